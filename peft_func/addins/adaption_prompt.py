"""Gated adaption prompts: an attention also attends to learned tokens, apart, and a gate that starts at zero adds that.

    y = O(softmax(Q K^T / sqrt(d)) V + g softmax(Q K_p^T / sqrt(d)) V_p),  K_p, V_p = the projections of the prompts

Zhang et al., "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention", 2023, arXiv
2303.16199. O is the projection behind the attention. The prompts have no positions. The second softmax is the
attention's own, run on the same queries with the prompts in the place of a cache, so that its rotations, scale and
groups of heads are what they are; what it gives is added to what O gets.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_func.addins.arguments import by_name
from peft_func.addins.around import nothing
from peft_func.addins.bottleneck import check_size
from peft_func.addins.place import Place, place_at
from peft_func.addins.prefix import CACHE, before_states, takes_cache
from peft_func.addins.structure import linear_widths, projections_of
from peft_func.addins.values import main, with_main
from peft_func.errors import AddinError, OptionError
from peft_func.functional.model import FunctionalModel
from peft_func.functional.surround import Inner
from peft_func.transforms.options import check_flag
from peft_func.transforms.transform import Part, Transform, check_name
from peft_func.trees.keys import normal, split
from peft_func.trees.paths import Tree
from peft_func.trees.select import Where
from peft_func.weights.around import Site, at
from peft_func.weights.mapping import Weights


def adaption_prompt(where: Where, *, tokens: int = 10, tanh: bool = False, name: str = "adaption_prompt") -> Part:
    """Let attentions attend to learned tokens as well, through a gate that is zero at the start.

    Leaves of `trainable[name][path]`: `prompt` [tokens, width], from N(0, 1); `gate` [], zero: nothing changes at
    first, and it is the only leaf with a gradient then. The prompts go through the attention's own projections of keys
    and values, with whatever else the chain does to them.

    Args:
        where: self-attentions whose forward takes `past_key_values`, as `pf.attentions()` of Llama or GPT-2; the paper
            takes the last layers: `pf.attentions(range(2, 32))`.
        tokens: the number of prompts in each.
        tanh: whether the gate goes through tanh, as in the original code; the paper's equations and HF PEFT's have
            none.
        name: the sub-tree.

    Raises:
        OptionError: an option is out of range; at `bind`, if an attention takes no cache, or its projections are
            unknown.
        AddinError: in a call, if the attention is across, or runs flash attention, which takes no mask.

    Example:
        >>> import torch, transformers, peft_func as pf
        >>> config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16)
        >>> model = pf.functionalize(transformers.GPT2LMHeadModel(config).eval())
        >>> adapter = pf.bind(pf.adaption_prompt(pf.attentions(-1), tokens=4), model)
        >>> frozen, trainable = adapter.init(0)
        >>> {leaf: list(t.shape) for leaf, t in trainable["adaption_prompt"]["transformer.h.1.attn"].items()}
        {'prompt': [4, 16], 'gate': []}
        >>> ids = torch.tensor([[3, 1, 4]])
        >>> same = model(adapter.apply(frozen, trainable), ids).logits
        >>> torch.allclose(same, model(model.params, ids).logits, atol=1e-6)
        True
    """
    check_name(name)
    check_size(name, "tokens", tokens, optional=False)
    check_flag(name, "tanh", tanh)

    def make(paths: tuple[str, ...], model: FunctionalModel) -> Transform:
        places = [place_at(model, path) for path in paths]
        sizes = {place.path: _width(place, name) for place in places}
        names = {place.path: takes_cache(place, name) for place in places}
        projections = {place.path: projections_of(place.module) for place in places}
        behind = {place.path: _behind(place) for place in places}

        def first_values(weights: Weights, key: int) -> Tree:
            tree: Tree = {}
            for place in places:
                own = split(split(key, place.path), "prompt")
                prompt = normal((tokens, sizes[place.path]), 1.0, own, place.like)
                tree[place.path] = {"prompt": prompt, "gate": prompt.new_zeros(())}
            return tree

        sites = []
        for path in paths:
            if (last := behind[path]) is not None:
                sites.append(Site(last, functools.partial(joined, path), name, at()))
            function = functools.partial(gated, name, tanh, names[path], projections[path], last is None)
            sites.append(Site(path, function, name, at(path)))
        return Transform(first_values, nothing, sites=tuple(sites))

    return Part(where, make, name, "adaption_prompt", {"tokens": tokens, "tanh": tanh}, modules=True)


def _width(place: Place, name: str) -> int:
    children = [place.module.get_submodule(child) for child in projections_of(place.module)]
    found = [linear_widths(child) for child in children]
    if len(found) == 3 and found[0] is not None:
        return found[0][0]
    if len(found) == 1 and found[0] is not None and found[0][1] == 3 * found[0][0]:
        if type(children[0]).__name__ == "Conv1D":
            return found[0][0]
        raise OptionError(
            f"{name}: {place.path!r} ({type(place.module).__name__}) has one projection for queries, keys and values, "
            "and models order its rows by head or by kind; GPT-2's is known, for others use pf.prefix_tuning"
        )
    raise OptionError(
        f"{name}: {place.path!r} ({type(place.module).__name__}) has no projections of queries, keys and values, as "
        "pf.attentions() in Llama and GPT-2 have"
    )


def _behind(place: Place) -> str | None:
    """Return the path of the linear map that an attention ends with, beside its projections; None if it has none."""
    names = projections_of(place.module)
    found = [child for child, module in place.module.named_children() if linear_widths(module) and child not in names]
    return f"{place.path}.{found[-1]}".lstrip(".") if found else None


class _Instead:
    """Stands for a cache: an attention that adds its keys and values to it gets those of the prompts."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.used = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.used = True
        return before_states(self.keys, key_states[:, :, :0]), before_states(self.values, value_states[:, :, :0])


_GETTING = "what O gets"


def gated(
    name: str, tanh: bool, names: Sequence[str], projections: Sequence[str], bare: bool,
    tree: Tree, inner: Inner, *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """Run an attention on the prompts, and then on the tokens with what came of that; `bare` if O is not within."""
    given = by_name(names, args, kwargs)
    if any(given.get(other) is not None for other in ("encoder_hidden_states", "key_value_states")):
        raise AddinError(f"{name}: {inner.path!r} attends to another sequence; choose self-attentions only")
    if isinstance(given.get(CACHE), _Instead):
        raise AddinError(f"{name}: {inner.path!r} has another adaption prompt; take one with more tokens")
    implementation = str(getattr(getattr(inner.module, "config", None), "_attn_implementation", ""))
    if "flash" in implementation or "flex" in implementation:
        raise AddinError(f"{name}: {inner.path!r} runs {implementation}, which takes no mask here; use sdpa or eager")
    h, prompt, gate = given[names[0]], tree["prompt"], tree["gate"]
    keys, values = projected(inner.module, projections, prompt.to(h.dtype))
    cache = _Instead(keys, values * (torch.tanh(gate) if tanh else gate).to(h.dtype))
    everything = h.new_zeros(1, 1, h.shape[1], prompt.shape[0])
    key = (_GETTING, inner.path)
    inner.notes[key] = None
    added = main(inner(**{**given, "attention_mask": everything, CACHE: cache}))
    if not cache.used or (not bare and inner.notes[key] is None):
        raise AddinError(f"{name}: {inner.path!r} did not add its keys and values to {CACHE}")
    output = inner(**given)
    del inner.notes[key]
    return with_main(output, main(output) + added) if bare else output


def joined(path: str, tree: Tree, inner: Inner, x: Tensor) -> Any:
    """Run the projection behind an attention; of a run on prompts, only note what it gets."""
    key = (_GETTING, path)
    if key not in inner.notes:
        return inner(x)
    if inner.notes[key] is None:
        inner.notes[key] = x
        return x
    return inner(x + inner.notes[key])


def projected(attention: nn.Module, names: Sequence[str], prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keys and the values `[tokens, width]` that an attention makes of tokens `[tokens, width]`.

    Args:
        attention: with its weights of this call.
        names: of its projections of queries, keys and values, or of the one for all three.
        prompt: the tokens.
    """
    if len(names) == 1:
        _, keys, values = attention.get_submodule(names[0])(prompt[None])[0].chunk(3, -1)
        return keys, values
    return attention.get_submodule(names[1])(prompt[None])[0], attention.get_submodule(names[2])(prompt[None])[0]

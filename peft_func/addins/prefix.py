"""Prefix tuning: every attention sees learned keys and values before those of the tokens.

    Attention(Q, [P_k; K], [P_v; V])

Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", 2021, arXiv 2101.00190: with
`reparameterize="mlp"`, all P are linear in tanh(W z + c) of one small table z. P-tuning v2, Liu et al., 2022,
arXiv 2110.07602: the P themselves train, in every layer.

The prefix joins where a module adds its keys and values to a cache: Hugging Face's attentions do so under the argument
`past_key_values`. The cache itself never holds it, so generation works, and so does activation checkpointing.
"""

import functools
from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_func.addins.arguments import by_name, holders, parameters_of, tokens_before
from peft_func.addins.around import SHARED, nothing
from peft_func.addins.bottleneck import check_size
from peft_func.addins.once import once
from peft_func.addins.place import Place, place_at
from peft_func.addins.structure import linear_widths, projections_of
from peft_func.errors import AddinError, OptionError
from peft_func.functional.model import FunctionalModel
from peft_func.functional.surround import Inner
from peft_func.transforms.options import check_choice, check_flag
from peft_func.transforms.transform import Part, Transform, check_name
from peft_func.trees.keys import normal, split, uniform
from peft_func.trees.paths import Tree
from peft_func.trees.select import Where
from peft_func.weights.around import Site, at
from peft_func.weights.mapping import Weights

CACHE = "past_key_values"


def prefix_tuning(
    where: Where,
    *,
    tokens: int = 20,
    reparameterize: str | None = None,
    hidden: int | None = None,
    shift: bool = True,
    width: int | None = None,
    name: str = "prefix_tuning",
) -> Part:
    """Put learned keys and values before those of the tokens, in every chosen attention.

    Leaves of `trainable[name][path]`: `keys` and `values` [tokens, width], width being all heads of keys together
    (fewer than those of queries in grouped attention). With an MLP they are what it makes: `shared` holds `prompt`
    [tokens, width], `down` [hidden, width] and `down_bias`, and a place `keys` and `values` [width, hidden], with
    `keys_bias` and `values_bias` [width]. Prefixes and `prompt` are drawn from N(0, 1), as both papers' code does, the
    MLP as `nn.Linear` is.

    A call stays as it is. Every token attends to the whole prefix, padded or causal as it may be. An `eager` attention
    shows the prefix in the attention weights that it returns.

    Args:
        where: attentions, such as `pf.attentions()`, whose forward takes `past_key_values`: Llama, GPT-2, BERT and most
            others of Hugging Face; self-attention without relative position biases (T5).
        tokens: the length of the prefix.
        reparameterize: `"mlp"` for that of Li and Liang, or None.
        hidden: its width; that of the keys by default.
        shift: whether positions of tokens begin behind the prefix, as with a cache that holds it (the papers, HF PEFT):
            a net with a table of positions then takes `tokens` fewer.
        width: of keys and values, where the attention's projections cannot tell it.
        name: the sub-tree.

    Raises:
        OptionError: an option is out of range; at `bind`, if an attention takes no cache or its width is unknown.
        AddinError: in a call, if the attention is across, or its mask cannot be extended.

    Example:
        >>> import torch, transformers, peft_func as pf
        >>> config = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
        >>> model = pf.functionalize(transformers.BertModel(config).eval())
        >>> adapter = pf.bind(pf.prefix_tuning(pf.attentions(), tokens=4), model)
        >>> frozen, trainable = adapter.init(0)
        >>> [(path, list(tree["keys"].shape)) for path, tree in trainable["prefix_tuning"].items()]
        [('encoder.layer.0.attention.self', [4, 16])]
        >>> model(adapter.apply(frozen, trainable), torch.tensor([[3, 1, 4]])).last_hidden_state.shape
        torch.Size([1, 3, 16])
    """
    check_name(name)
    check_size(name, "tokens", tokens, optional=False)
    check_size(name, "hidden", hidden)
    check_size(name, "width", width)
    check_flag(name, "shift", shift)
    if reparameterize is not None:
        check_choice(name, "reparameterize", reparameterize, ("mlp",))
    options = {
        "tokens": tokens, "reparameterize": reparameterize, "hidden": hidden, "shift": shift, "width": width,
    }  # fmt: skip

    def make(paths: tuple[str, ...], model: FunctionalModel) -> Transform:
        root = model._skeleton.root
        places = [place_at(model, path) for path in paths]
        sizes = {place.path: width or _key_width(place, name) for place in places}
        table = sizes[places[0].path]
        names = {place.path: takes_cache(place, name) for place in places}
        takers = _position_takers(model, paths) if shift else []
        moving = {taker: parameters_of(root.get_submodule(taker)) for taker in takers}
        if reparameterize is not None and SHARED in paths:
            raise OptionError(f"{name}: a module named {SHARED!r} cannot be a place: the tree has shared leaves there")

        def first_values(weights: Weights, key: int) -> Tree:
            if reparameterize is None:
                return {
                    place.path: {
                        leaf: normal((tokens, sizes[place.path]), 1.0, split(key, f"{place.path}.{leaf}"), place.like)
                        for leaf in ("keys", "values")
                    }
                    for place in places
                }
            own = split(key, SHARED)
            inner = hidden or table
            like = places[0].like
            tree: Tree = {SHARED: {"prompt": normal((tokens, table), 1.0, split(own, "prompt"), like)}}
            tree[SHARED] |= _affine("down", inner, table, own, like)
            for place in places:
                own = split(key, place.path)
                tree[place.path] = {
                    **_affine("keys", sizes[place.path], inner, own, place.like),
                    **_affine("values", sizes[place.path], inner, own, place.like),
                }
            return tree

        common = () if reparameterize is None else (SHARED,)
        sites = [Site(path, functools.partial(prefixed, name, names[path]), name, at(*common, path)) for path in paths]
        sites += [Site(taker, functools.partial(moved, own, tokens), name, at()) for taker, own in moving.items()]
        return Transform(first_values, nothing, sites=tuple(sites))

    return Part(where, make, name, "prefix_tuning", options, modules=True)


def _affine(leaf: str, out: int, inputs: int, key: int, like: Tensor) -> dict[str, Tensor]:
    bound = 1 / sqrt(inputs)
    weight = uniform((out, inputs), bound, split(key, leaf), like)
    return {leaf: weight, f"{leaf}_bias": uniform((out,), bound, split(key, f"{leaf}_bias"), like)}


def takes_cache(place: Place, name: str) -> tuple[str, ...]:
    """Return what an attention's forward takes.

    Raises:
        OptionError: it takes no cache, where keys and values could be joined.
    """
    names = parameters_of(place.module)
    if CACHE not in names or "position_bias" in names:
        why = f"takes no {CACHE}" if CACHE not in names else "adds relative position biases of the tokens only"
        raise OptionError(
            f"{name}: {place.path!r} ({type(place.module).__name__}) {why}; choose modules that project "
            "queries, keys and values, and take a cache: pf.attentions() in Llama, GPT-2, BERT; for others there are "
            "prompts (pf.vpt, pf.prompt_tuning)"
        )
    return names


def _key_width(place: Place, name: str) -> int:
    names = projections_of(place.module)
    found = [linear_widths(place.module.get_submodule(child)) for child in names]
    if len(found) == 3 and found[1] is not None:
        return found[1][1]
    if len(found) == 1 and found[0] is not None and found[0][1] == 3 * found[0][0]:
        return found[0][0]
    raise OptionError(
        f"{name}: the projections of {place.path!r} ({type(place.module).__name__}) do not tell how wide keys and "
        "values are; give width=..."
    )


def _position_takers(model: FunctionalModel, paths: Sequence[str]) -> list[str]:
    """Return the nearest modules around attentions that take tokens, and their positions if there are any."""
    found: dict[str, None] = {}
    for path in paths:
        for holder in holders(path):
            names = parameters_of(model._skeleton.root.get_submodule(holder))
            if "inputs_embeds" in names and "attention_mask" in names:
                if "position_ids" in names:
                    found[holder] = None
                break
    return list(found)


class _Joining:
    """Stands for a cache, and puts a prefix before the keys and values that an attention adds to it."""

    def __init__(self, keys: Tensor, values: Tensor, cache: Any) -> None:
        self.keys, self.values, self.cache = keys, values, cache
        self.used = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.cache is not None:
            key_states, value_states = self.cache.update(key_states, value_states, *args, **kwargs)
        self.used = True
        return before_states(self.keys, key_states), before_states(self.values, value_states)

    def get_seq_length(self, *args: Any) -> Any:
        return 0 if self.cache is None else self.cache.get_seq_length(*args)


def before_states(prefix: Tensor, states: Tensor) -> Tensor:
    """Put `[tokens, heads * size]` before `[batch, heads, tokens, size]`."""
    batch, heads, _, size = states.shape
    own = prefix.to(states.dtype).reshape(-1, heads, size).transpose(0, 1)
    return torch.cat([own.expand(batch, -1, -1, -1), states], 2)


def keys_and_values(tree: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the keys and the values `[tokens, width]` of a place."""
    if "prompt" not in tree:
        return tree["keys"], tree["values"]
    h = torch.tanh(F.linear(tree["prompt"], tree["down"], tree["down_bias"]))
    return F.linear(h, tree["keys"], tree["keys_bias"]), F.linear(h, tree["values"], tree["values_bias"])


def prefixed(name: str, names: Sequence[str], tree: Tree, inner: Inner, *args: Any, **kwargs: Any) -> Any:
    """Run an attention with a prefix."""
    given = by_name(names, args, kwargs)
    if any(given.get(other) is not None for other in ("encoder_hidden_states", "key_value_states")):
        raise AddinError(f"{name}: {inner.path!r} attends to another sequence; choose self-attentions only")
    keys, values = keys_and_values(tree)
    cache = given.get(CACHE)
    cache = getattr(cache, "self_attention_cache", cache)  # of an encoder and a decoder
    h = given[names[0]]
    given["attention_mask"] = _extended(given.get("attention_mask"), keys.shape[0], h, cache, inner, name)
    joining = _Joining(keys, values, cache)
    output = inner(**{**given, CACHE: joining})
    if not joining.used:
        raise AddinError(f"{name}: {inner.path!r} did not add its keys and values to {CACHE}, where the prefix joins")
    return output


def _extended(mask: Any, tokens: int, h: Tensor, cache: Any, inner: Inner, name: str) -> Tensor | None:
    """Return the mask of an attention, with the prefix open to all queries."""
    flash = "flash" in str(getattr(getattr(inner.module, "config", None), "_attn_implementation", ""))
    if mask is None:
        if flash or not getattr(inner.module, "is_causal", False):
            return None
        # Told nothing, a causal attention takes the first keys for those of the first queries.
        before = 0 if cache is None else cache.get_seq_length(getattr(inner.module, "layer_idx", 0))
        shape = (h.shape[1], before)
        return once(inner, ("causal", tokens, h.device), shape, lambda: _opened(_causal(*shape, h.device), tokens))
    if not isinstance(mask, Tensor) or not (mask.dim() == 4 or (flash and mask.dim() == 2)):
        found = f"{mask.dim()} dimensions" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
        raise AddinError(f"{name}: the mask at {inner.path!r} has {found} and cannot be extended; use sdpa or eager")
    return once(inner, ("opened", tokens), (mask,), lambda: _opened(mask, tokens))


def _causal(queries: int, before: Any, device: torch.device) -> Tensor:
    return torch.ones(queries, before + queries, dtype=torch.bool, device=device).tril(before)[None, None]


def _opened(mask: Tensor, tokens: int) -> Tensor:
    shape = (*mask.shape[:-1], tokens)
    ones = mask.dtype is torch.bool or not mask.is_floating_point()
    return torch.cat([mask.new_ones(shape) if ones else mask.new_zeros(shape), mask], -1)


def moved(names: Sequence[str], tokens: int, tree: Tree, inner: Inner, *args: Any, **kwargs: Any) -> Any:
    """Run a net with the positions of all tokens behind the prefix."""
    given = by_name(names, args, kwargs)
    positions = given.get("position_ids")
    if positions is None:
        ids: Tensor | None = given.get("input_ids")
        seen: Tensor = given["inputs_embeds"] if ids is None else ids
        positions = torch.arange(seen.shape[1], device=seen.device)[None] + tokens_before(given)
    return inner(**{**given, "position_ids": positions + tokens})

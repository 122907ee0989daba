"""Prompt tuning: learned vectors stand among the embedded tokens, and the rest of the net treats them as tokens.

    x = [p_1, ..., p_m, e(t_1), ..., e(t_n)]

Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", 2021, arXiv 2104.08691. With
`reparameterize="mlp"`, p = MLP(z): P-tuning, Liu et al., "GPT Understands, Too", 2021, arXiv 2103.10385.

The prompts come in where a module takes token ids or their embeddings (Hugging Face's backbones: `BertModel`,
`LlamaModel`, `T5Stack`), and leave its output again, so that heads, labels and poolers above see the user's tokens.
"""

import functools
from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_func.addins.arguments import by_name, holders, parameters_of, token_mask, tokens_before
from peft_func.addins.around import nothing
from peft_func.addins.bottleneck import check_size
from peft_func.addins.place import Place, place_at
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

INITS = ("sample", "normal")
IGNORED = -100
"""The label of a token without one, in PyTorch and in Hugging Face's losses."""


def prompt_tuning(
    where: Where,
    *,
    tokens: int = 20,
    init: str | Sequence[int] = "sample",
    reparameterize: str | None = None,
    hidden: int | None = None,
    after: int = 0,
    keep: bool = False,
    name: str = "prompt_tuning",
) -> Part:
    """Put learned vectors before the embedded tokens.

    Leaves of `trainable[name][path]`, path being the embedding's: `prompt` [tokens, width]; with an MLP also `down`
    [hidden, width], `mid` [hidden, hidden], `up` [width, hidden] and their biases `down_bias`, `mid_bias`, `up_bias`.

    A call stays as it is: `model(weights, input_ids=..., attention_mask=..., labels=...)`. The mask over tokens,
    `position_ids` and `token_type_ids` are extended: prompts are attended to, they have the first positions (tokens
    that are given positions get these plus `tokens`) and type 0. `inputs_embeds` may be given in place of `input_ids`.
    `model.method("generate")` works with a growing cache: prompts are in it from the first step on. In a net with an
    encoder and a decoder the prompts are in the encoder, the decoder attends to them, and `keep` has no meaning.

    Args:
        where: the embedding of the tokens, such as `["word_embeddings"]`, `["wte"]`, `["embed_tokens"]`.
        tokens: the number of prompts.
        init: `"sample"`, rows of the embedding drawn by the key; `"normal"`, N(0, 1); or the ids of a text, repeated or
            cut to the number of prompts.
        reparameterize: `"mlp"` for P-tuning's two hidden layers with ReLU, or None.
        hidden: their width; that of the embedding by default.
        after: how many tokens stand before the prompts. With 1, a BERT that pools its first token still pools [CLS].
        keep: whether outputs keep the prompts, as HF PEFT's do. Then `logits` are `tokens` longer, integer `labels`
            [batch, tokens] are extended by -100, and `start_positions` and `end_positions` are moved. Otherwise
            outputs are as long as the input; a causal loss then does not ask the last prompt for the first token.
        name: the sub-tree.

    Raises:
        OptionError: an option is out of range; at `bind`, if no module takes the embeddings of these tokens.
        AddinError: in a call, if the mask is not [batch, tokens], or neither ids nor embeddings are given.

    Example:
        >>> import torch, transformers, peft_func as pf
        >>> config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16)
        >>> model = pf.functionalize(transformers.GPT2LMHeadModel(config).eval())
        >>> adapter = pf.bind(pf.prompt_tuning(["wte"], tokens=4), model)
        >>> frozen, trainable = adapter.init(0)
        >>> ids = torch.tensor([[3, 1, 4, 1, 5]])
        >>> model(adapter.apply(frozen, trainable), input_ids=ids, labels=ids).logits.shape
        torch.Size([1, 5, 32])
    """
    check_name(name)
    check_size(name, "tokens", tokens, optional=False)
    if isinstance(after, bool) or not isinstance(after, int) or after < 0:
        raise OptionError(f"{name}: after={after!r} is no number of tokens")
    check_flag(name, "keep", keep)
    if reparameterize is not None:
        check_choice(name, "reparameterize", reparameterize, ("mlp",))
    check_size(name, "hidden", hidden)
    if isinstance(init, str):
        check_choice(name, "init", init, INITS)
    else:
        init = _ids(name, init)
    options = {
        "tokens": tokens, "init": init, "reparameterize": reparameterize, "hidden": hidden, "after": after,
        "keep": keep,
    }  # fmt: skip

    def make(paths: tuple[str, ...], model: FunctionalModel) -> Transform:
        if len(paths) != 1:
            raise OptionError(f"{name}: {', '.join(paths[:4])}: prompts stand before one embedding; choose one")
        place = place_at(model, paths[0])
        table = _table(place, model, name)
        entrance, root = _entrance(place, model, name)
        names = parameters_of(model._skeleton.root.get_submodule(entrance))
        # An encoder keeps the prompts: its decoder attends to them, and its mask has to say so.
        keeps = keep or root is not None
        lookup = _inside(place.path, entrance, model, name)
        entering = functools.partial(prompted, name, lookup, names, tokens, after, keeps)
        outer = [] if root is None else [functools.partial(longer_mask, name, root, tokens, after)]
        own = parameters_of(model._skeleton.root)
        if root is None and keep:
            outer = [functools.partial(longer_labels, own, tokens, after)]

        def first_values(weights: Weights, key: int) -> Tree:
            return {place.path: _first_values(options, table, split(key, place.path))}

        sites = (Site(entrance, entering, name, at(place.path)), *(Site("", each, name, at()) for each in outer))
        return Transform(first_values, nothing, sites=sites)

    return Part(where, make, name, "prompt_tuning", options, modules=True)


def _ids(name: str, init: object) -> list[int]:
    if isinstance(init, Tensor):
        init = init.tolist()
    if not isinstance(init, Sequence) or not init or not all(type(token) is int and token >= 0 for token in init):
        raise OptionError(f"{name}: init={init!r} is none of {', '.join(map(repr, INITS))}, nor a list of token ids")
    return list(init)


def _table(place: Place, model: FunctionalModel, name: str) -> Tensor:
    path = f"{place.path}.weight".lstrip(".")
    table = model.params.get(model.ties.get(path, path))
    if not isinstance(place.module, nn.Embedding) or table is None:
        kind = type(place.module).__name__
        raise OptionError(f"{name}: {place.path!r} is a {kind}; choose the nn.Embedding of the tokens, by its name")
    return table


def _entrance(place: Place, model: FunctionalModel, name: str) -> tuple[str, tuple[str, ...] | None]:
    """Return the module that takes embeddings, and if it is an encoder, what the whole net takes."""
    root = model._skeleton.root
    for holder in holders(place.path):
        names = parameters_of(root.get_submodule(holder))
        if "inputs_embeds" in names and "attention_mask" in names:
            if "decoder_input_ids" not in names:
                whole = parameters_of(root)
                return holder, whole if "decoder_input_ids" in whole else None
            encoder = f"{holder}.encoder".lstrip(".")
            if "inputs_embeds" in parameters_of(root.get_submodule(encoder)):
                return encoder, parameters_of(root)
    raise OptionError(
        f"{name}: no module around {place.path!r} takes `inputs_embeds` and `attention_mask`, as Hugging Face's do, so "
        "it is unknown what has to learn of the longer sequence; write it with pf.around"
    )


def _inside(path: str, at: str, model: FunctionalModel, name: str) -> str:
    """Return the path, within the module `at`, of the embedding or of one that is tied to it."""
    own = f"{path}.weight".lstrip(".")
    own = model.ties.get(own, own)
    for weight in (own, *model.infos[own].aliases):
        if weight.startswith(f"{at}." if at else ""):
            return weight[len(at) + 1 if at else 0 :].removesuffix(".weight").removesuffix("weight")
    raise OptionError(f"{name}: {at!r} takes the embeddings of {path!r}, but does not hold it")


def _first_values(options: Mapping[str, Any], table: Tensor, key: int) -> dict[str, Tensor]:
    tokens, init, width = options["tokens"], options["init"], table.shape[1]
    if init == "normal":
        prompt = normal((tokens, width), 1.0, split(key, "prompt"), table)
    else:
        if init == "sample":
            generator = torch.Generator().manual_seed(split(key, "prompt"))
            rows = torch.randint(table.shape[0], (tokens,), generator=generator)
        else:
            if max(init) >= table.shape[0]:
                raise OptionError(f"init holds the token {max(init)}, and the vocabulary has {table.shape[0]}")
            rows = torch.tensor(init).repeat(-(-tokens // len(init)))[:tokens]
        prompt = table.detach()[rows.to(table.device)]
        prompt = prompt.float() if prompt.dtype.itemsize < 4 else prompt
    tree = {"prompt": prompt}
    if options["reparameterize"] is not None:
        hidden = options["hidden"] or width
        for leaf, (out, inputs) in {"down": (hidden, width), "mid": (hidden, hidden), "up": (width, hidden)}.items():
            bound = 1 / sqrt(inputs)
            tree[leaf] = uniform((out, inputs), bound, split(key, leaf), table)
            tree[f"{leaf}_bias"] = uniform((out,), bound, split(key, f"{leaf}_bias"), table)
    return tree


def soft_prompt(tree: Mapping[str, Tensor]) -> Tensor:
    """Return the prompts `[tokens, width]` of a tree: the leaf itself, or what the MLP makes of it."""
    h = tree["prompt"]
    if "down" not in tree:
        return h
    for leaf in ("down", "mid"):
        h = F.relu(F.linear(h, tree[leaf], tree[f"{leaf}_bias"]))
    return F.linear(h, tree["up"], tree["up_bias"])


def prompted(
    name: str, embedding: str, names: Sequence[str], tokens: int, after: int, keep: bool,
    tree: Tree, inner: Inner, *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """Run a backbone on a sequence with prompts in it."""
    given = by_name(names, args, kwargs)
    ids: Any = given.get("input_ids")
    embeds: Any = given.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        found = "both" if ids is not None else "neither"
        raise AddinError(f"{name}: {inner.path!r} gets {found} of input_ids and inputs_embeds; give one of them")
    seen: Tensor = embeds if ids is None else ids
    batch, count = seen.shape[:2]
    before = tokens_before(given)
    if not isinstance(before, int):
        raise AddinError(f"{name}: a cache of fixed length is given, which does not tell whether the prompts are in it")
    mask = token_mask(given, "attention_mask", name)
    if mask is not None and (before or mask.shape[1] == count):  # the whole net may have seen to it
        given["attention_mask"] = _with(mask, tokens, after, 1)
    positions = given.get("position_ids")
    if before:
        if positions is not None:
            given["position_ids"] = positions + tokens
        return inner(**given)
    if count < after:
        raise AddinError(f"{name}: after={after} tokens come the prompts, and the sequence has {count}")
    if positions is not None:
        moved = torch.cat([positions[..., :after], positions[..., after:] + tokens], -1)
        between = torch.arange(tokens, device=positions.device) + after
        given["position_ids"] = _joined(moved, between.expand(*positions.shape[:-1], tokens), after, -1)
    if given.get("token_type_ids") is not None:
        given["token_type_ids"] = _with(given["token_type_ids"], tokens, after, 0)
    if embeds is None:
        embeds = inner.module.get_submodule(embedding)(ids)
    prompt = soft_prompt(tree).to(embeds.dtype).expand(batch, -1, -1)
    output = inner(**{**given, "input_ids": None, "inputs_embeds": _joined(embeds, prompt, after, 1)})
    return output if keep else _without(output, count + tokens, tokens, after)


def longer_mask(
    name: str, names: Sequence[str], tokens: int, after: int, tree: Tree, inner: Inner, *args: Any, **kwargs: Any
) -> Any:
    """Run a net whose decoder attends to prompts in its encoder."""
    given = by_name(names, args, kwargs)
    mask = token_mask(given, "attention_mask", name)
    if mask is not None:
        given["attention_mask"] = _with(mask, tokens, after, 1)
    return inner(**given)


def longer_labels(
    names: Sequence[str], tokens: int, after: int, tree: Tree, inner: Inner, *args: Any, **kwargs: Any
) -> Any:
    """Run a net whose outputs hold the prompts, with labels for them."""
    given = by_name(names, args, kwargs)
    seen = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    labels = given.get("labels")
    if labels is not None and seen is not None and not labels.is_floating_point() and labels.shape == seen.shape[:2]:
        given["labels"] = _with(labels, tokens, after, IGNORED)
    for key in ("start_positions", "end_positions"):
        if given.get(key) is not None:
            given[key] = given[key] + tokens * (given[key] >= after)
    return inner(**given)


def _with(values: Tensor, tokens: int, after: int, fill: int) -> Tensor:
    return _joined(values, values.new_full((values.shape[0], tokens), fill), after, 1)


def _joined(values: Tensor, new: Tensor, after: int, dim: int) -> Tensor:
    rest = values.shape[dim] - after
    return torch.cat([values.narrow(dim, 0, after), new, values.narrow(dim, after, rest)], dim)


def _without(output: Any, length: int, tokens: int, after: int) -> Any:
    """Return an output without the prompts: of every tensor `[batch, length, features]`, alone or in tuples."""
    if isinstance(output, Tensor):
        if output.dim() != 3 or output.shape[1] != length:
            return output
        return torch.cat([output[:, :after], output[:, after + tokens :]], 1) if after else output[:, tokens:]
    if isinstance(output, Mapping):
        return type(output)(**{key: _without(item, length, tokens, after) for key, item in output.items()})
    if isinstance(output, tuple | list) and not hasattr(output, "_fields"):
        return type(output)(_without(item, length, tokens, after) for item in output)
    return output

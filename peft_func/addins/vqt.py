"""Visual query tuning: learned tokens that ask frozen blocks, and are asked by nobody.

    Z_i = L_i(P_i; K_i, V_i),  logits = head(c) + W [Z_1, ..., Z_m]

Tu et al., "Visual Query Tuning: Towards Effective Usage of Intermediate Representations for Parameter and Memory
Efficient Transfer Learning", 2023, arXiv 2212.03220. In block L_i the queries of the tokens P_i attend over the keys
and values of the tokens of the image, which see nothing of them, and go through the rest of the block. What comes out
of all blocks goes to the head, which has a part W of its own for it, zero at the start: nothing changes at first.
"""

import functools
import re
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_func.addins.across import Key, note_keys, noted
from peft_func.addins.around import nothing
from peft_func.addins.bottleneck import check_size
from peft_func.addins.parts import blocks
from peft_func.addins.place import place_at
from peft_func.addins.prefix_tokens import ASKING
from peft_func.addins.structure import Block, blocks_at, linear_widths, projections_of, structure_of
from peft_func.addins.values import main, main_argument, with_main, with_main_argument
from peft_func.addins.vpt import check_alone
from peft_func.errors import AddinError, OptionError
from peft_func.functional.model import FunctionalModel
from peft_func.functional.surround import Inner
from peft_func.transforms.options import check_choice
from peft_func.transforms.transform import Part, Transform, check_name
from peft_func.trees.keys import split, uniform
from peft_func.trees.paths import Tree
from peft_func.trees.select import Where
from peft_func.weights.around import Site, at
from peft_func.weights.mapping import Weights

_HEADS = re.compile(r"(num|n)_(attention_)?heads?|heads")


def vqt(
    where: Where | None = None,
    *,
    tokens: int = 1,
    pool: str = "none",
    head: str | None = None,
    heads: int | None = None,
    bound: float = 0.1,
    name: str = "vqt",
) -> Part:
    """Let learned tokens ask the blocks of a vision transformer, and give their answers to the head.

    Leaves of `trainable[name]`: each block has `query` [tokens, width]; the path of the head has `weight` [classes,
    features], with blocks * tokens * width features, or blocks * width if pooled.

    Args:
        where: a selector of blocks, by default all.
        tokens: how many tokens ask each block.
        pool: `"mean"` averages the answers of a block, `"none"` gives all of them to the head.
        head: the path of the head; by default the last linear map behind the blocks.
        heads: of the attentions; by default what these say.
        bound: the tokens are drawn from U(-bound, bound).
        name: the sub-tree.

    Raises:
        OptionError: an option is out of range; at `bind`, something chosen is no block, there is no head, or an
            attention is not the plain one: softmax(q k^T / sqrt(d)) v between linear maps.
        AddinError: in a call, if a block gets masks or positions, or the head acts on more than one vector a sample.

    Example:
        >>> import torch, peft_func as pf
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        >>> class Classifier(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.encoder, self.head = torch.nn.TransformerEncoder(layer, 2), torch.nn.Linear(8, 3)
        ...     def forward(self, x):
        ...         return self.head(self.encoder(x)[:, 0])
        >>> adapter = pf.bind(pf.vqt(tokens=2), pf.functionalize(Classifier()))
        >>> _, trainable = adapter.init(0)
        >>> {path: [list(leaf.shape) for leaf in leaves.values()] for path, leaves in trainable["vqt"].items()}
        {'encoder.layers.0': [[2, 8]], 'encoder.layers.1': [[2, 8]], 'head': [[3, 32]]}
    """
    check_size(name, "tokens", tokens, optional=False)
    check_size(name, "heads", heads)
    check_choice(name, "pool", pool, ("none", "mean"))
    options: dict[str, Any] = {"tokens": tokens, "pool": pool, "head": head, "heads": heads, "bound": bound}

    def make(paths: tuple[str, ...], model: FunctionalModel) -> Transform:
        known = blocks_at(model, paths)
        for path in paths:
            if path not in known:
                raise OptionError(f"{name}: {path!r} is no block of a transformer; select among pf.blocks()")
        plain = {path: _plain(model, block, heads, name) for path, block in known.items()}
        top = structure_of(model).head if head is None else head
        if top is None:
            raise OptionError(f"{name}: {model!r} has no linear map behind its blocks; give head=..., its path")
        classes = _classes(model, top, name)
        features = sum(block.width * (1 if pool == "mean" else tokens) for block in known.values())

        def draw(weights: Weights, key: int) -> Tree:
            tree: Tree = {}
            for path, block in known.items():
                like = place_at(model, path).like
                tree[path] = {"query": uniform((tokens, block.width), bound, split(split(key, path), "query"), like)}
            zero = uniform((classes, features), 0.0, 0, place_at(model, top).like)
            return tree | {top: {"weight": torch.zeros_like(zero)}}

        key, sites = note_keys(name), []
        for path, block in known.items():
            asks, sees, answers = (key(path, what) for what in ("asks", "sees", "answers"))
            sites.append(Site(block.attention, functools.partial(answer, asks, sees, plain[path]), name, at()))
            sites.append(Site(path, functools.partial(ask, asks, answers, pool), name, at(path)))
        every = tuple(key(path, "answers") for path in known)
        sites.append(Site(top, functools.partial(tell, name, every), name, at(top)))
        return Transform(draw, nothing, options=options | {"head": top}, sites=tuple(sites))

    return Part(blocks() if where is None else where, make, check_name(name), "vqt", options, modules=True)


def ask(asks: Key, answers: Key, pool: str, tree: Tree, inner: Inner, *args: Any, **kwargs: Any) -> Any:
    """Run a block as it is, and once more on the tokens that ask; keep what they are told."""
    x = main_argument(args, kwargs)
    check_alone(x, inner, args, kwargs)
    output = inner(*args, **kwargs)
    asking = tree["query"].to(x.dtype).expand(*x.shape[:-2], -1, -1)
    args, kwargs = with_main_argument(args, kwargs, asking)
    inner.notes[asks] = inner.notes[ASKING] = True
    try:  # the recomputation of a checkpoint ends by an exception, as soon as it has what it wants
        found = main(inner(*args, **kwargs))
    finally:
        inner.notes[asks] = inner.notes[ASKING] = False
    told = found.mean(-2) if pool == "mean" else found.flatten(-2)
    inner.notes[answers] = told, torch.is_grad_enabled()
    return output


def answer(asks: Key, sees: Key, plain: "Plain | None", tree: Tree, inner: Inner, *args: Any, **kwargs: Any) -> Any:
    """Run an attention; when tokens ask, over the keys and values of the tokens that were there before."""
    x = main_argument(args, kwargs)
    if not inner.notes.get(asks):
        output = inner(*args, **kwargs)
        inner.notes[sees] = x, output
        return output
    seen, output = inner.notes[sees]
    if plain is None:  # torch's own takes queries, keys and values
        return inner(x, seen, seen, need_weights=False)
    return with_main(output, _attend(inner.module, plain, x, seen))


def tell(name: str, answers: tuple[Key, ...], tree: Tree, inner: Inner, *args: Any, **kwargs: Any) -> Any:
    """Run the head, and add what its own part makes of the answers."""
    output = inner(*args, **kwargs)
    logits = main(output)
    told = torch.cat([noted(key, inner) for key in answers], -1)
    if logits.shape[:-1] != told.shape[:-1]:
        raise AddinError(
            f"{name}: the head {inner.path!r} gives {tuple(logits.shape)}, and the answers are {tuple(told.shape)}; it "
            "must act on one vector for each sample"
        )
    return with_main(output, logits + F.linear(told, tree["weight"].to(told.dtype)))


@dataclass(frozen=True)
class Plain:
    """A plain attention: softmax(q k^T / sqrt(d)) v between linear maps.

    Attributes:
        heads: how many it has.
        projections: the names of its projections, three or one.
        outputs: that of the linear map behind it, if it has one.
    """

    heads: int
    projections: tuple[str, ...]
    outputs: tuple[str, ...]


def _attend(module: nn.Module, plain: Plain, asking: Tensor, seen: Tensor) -> Tensor:
    maps = [module.get_submodule(name) for name in plain.projections]
    if len(maps) == 1:
        query = maps[0](asking).chunk(3, -1)[0]
        _, key, value = maps[0](seen).chunk(3, -1)
    else:
        query, key, value = maps[0](asking), maps[1](seen), maps[2](seen)
    size = query.shape[-1] // plain.heads
    query, key, value = (tensor.unflatten(-1, (-1, size)).transpose(-2, -3) for tensor in (query, key, value))
    if key.shape[-3] != plain.heads:
        key, value = (tensor.repeat_interleave(plain.heads // key.shape[-3], -3) for tensor in (key, value))
    attended = F.scaled_dot_product_attention(query, key, value)
    output = attended.transpose(-2, -3).flatten(-2)
    for last in plain.outputs:
        output = module.get_submodule(last)(output)
    return output


def _plain(model: FunctionalModel, block: Block, heads: int | None, name: str) -> Plain | None:
    """Return what is known of a plain attention; None for torch's own, which is asked directly.

    Raises:
        OptionError: it is another attention, or the number of its heads is unknown.
    """
    if len(block.attentions) != 1 or not block.batch_first:
        raise OptionError(f"{name}: {block.path!r} has several attentions, or the batch on its second axis")
    module = model._skeleton.root.get_submodule(block.attention)
    if isinstance(module, nn.MultiheadAttention):
        return None
    projections = projections_of(module)
    others = {child: part for child, part in module.named_children() if child not in projections}
    outputs = tuple(child for child, part in others.items() if linear_widths(part))
    odd = [child for child, part in others.items() if child not in outputs and list(part.parameters())]
    odd += [key for key, _ in module.named_parameters(recurse=False)] + list(outputs[1:])
    widths = linear_widths(module.get_submodule(projections[0]))
    if len(projections) == 1 and widths is not None and widths[1] != 3 * widths[0]:
        odd.append(projections[0])
    if odd:
        raise OptionError(
            f"{name}: the attention {block.attention!r} has more than projections and an output ({', '.join(odd)}), "
            f"and {name} knows the plain one only"
        )
    known, width = vars(module), _query_width(module, projections)
    found = [value for key, value in known.items() if _HEADS.fullmatch(key) and isinstance(value, int)]
    if isinstance(known.get("head_dim"), int):
        found.append(width // known["head_dim"])
    count = heads or next(iter(found), None)
    if count is None:
        raise OptionError(f"{name}: {block.attention!r} does not say how many heads it has; give heads=...")
    for key in ("scale", "scaling"):
        factor = known.get(key)
        if isinstance(factor, float) and abs(factor * sqrt(width // count) - 1) > 1e-4:
            raise OptionError(f"{name}: {block.attention!r} has {key}={factor}, not 1 / sqrt(features of a head)")
    return Plain(count, projections, outputs)


def _query_width(module: nn.Module, projections: tuple[str, ...]) -> int:
    widths = linear_widths(module.get_submodule(projections[0]))
    assert widths is not None  # a projection is a linear map
    return widths[1] if len(projections) == 3 else widths[1] // 3


def _classes(model: FunctionalModel, path: str, name: str) -> int:
    known = dict(model._skeleton.root.named_modules())
    found = linear_widths(known[path]) if path in known else None
    if found is None:
        raise OptionError(f"{name}: head={path!r} is not the path of a linear map")
    return found[1]

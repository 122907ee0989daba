"""Visual prompt tuning: learned tokens among those of the image.

    shallow:  [c, P, E]_1 = L_1([c, P, E_0]),  [c, Z, E]_i = L_i([c, Z, E]_(i-1))
    deep:     [c, _, E]_i = L_i([c, P_(i-1), E_(i-1)])                               for every block L_i

Jia et al., "Visual Prompt Tuning", 2022, arXiv 2203.12119: c the class token (all prefix tokens here), E the patches, P
the prompts, drawn from U(-v, v) with v^2 = 6 / (values of a patch + width). Behind the last block they are taken out
again, so heads that pool over all tokens see those of the image only. This is no identity at the start.
"""

import functools
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from peft_func.addins.around import nothing
from peft_func.addins.bottleneck import check_size
from peft_func.addins.parts import blocks
from peft_func.addins.place import place_at
from peft_func.addins.prefix_tokens import PROMPTS, prefix_of
from peft_func.addins.structure import blocks_at, parts_of
from peft_func.addins.values import main, main_argument, with_main, with_main_argument
from peft_func.addins.width import widths
from peft_func.errors import AddinError, OptionError
from peft_func.functional.model import FunctionalModel
from peft_func.functional.surround import Inner
from peft_func.transforms.options import check_flag, check_number, check_probability
from peft_func.transforms.transform import Part, Transform, check_name
from peft_func.trees.keys import split, uniform
from peft_func.trees.paths import Tree
from peft_func.trees.select import Where
from peft_func.weights.around import Site, at
from peft_func.weights.mapping import Weights


def vpt(
    where: Where | None = None,
    *,
    tokens: int = 10,
    deep: bool = True,
    prefix: int | None = None,
    bound: float | None = None,
    dropout: float = 0.0,
    keep: bool = False,
    width: int | None = None,
    name: str = "vpt",
) -> Part:
    """Put learned tokens behind the prefix tokens of a vision transformer.

    Leaves of `trainable[name][path]`: `prompt` [tokens, width]: for every chosen block if deep, else for the first.

    Args:
        where: a selector over modules, by default all blocks. The tokens go in before the first of them and come out
            behind the last.
        tokens: how many.
        deep: give each of these blocks tokens of its own, in place of what came out of those of the block before.
        prefix: how many tokens come before those of the patches; by default what the model has.
        bound: v; by default by the equation of this file.
        dropout: the probability of dropping a value of the tokens, in train mode.
        keep: leave the tokens in the output of the last block.
        width: the number of features, where the weights cannot tell it.
        name: the sub-tree.

    Raises:
        OptionError: an option is out of range; at `bind`, the prefix, the bound or the width is unknown, or the tokens
            are not the second to last axis.
        AddinError: in a call, if a block also gets something that speaks of each token, such as a mask.

    Example:
        >>> import torch, peft_func as pf
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        >>> model = pf.functionalize(torch.nn.TransformerEncoder(layer, 2))
        >>> adapter = pf.bind(pf.vpt(tokens=3, prefix=0, bound=0.1), model)
        >>> frozen, trainable = adapter.init(0)
        >>> {path: list(leaf["prompt"].shape) for path, leaf in trainable["vpt"].items()}
        {'layers.0': [3, 8], 'layers.1': [3, 8]}
        >>> model(adapter.apply(frozen, trainable), torch.ones(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """
    check_size(name, "tokens", tokens, optional=False)
    check_flag(name, "deep", deep)
    check_flag(name, "keep", keep)
    if bound is not None and check_number(name, "bound", bound) < 0:
        raise OptionError(f"{name}: bound={bound!r} is below 0")
    check_probability(name, "dropout", dropout)
    options: dict[str, Any] = {
        "tokens": tokens,
        "deep": deep,
        "prefix": prefix,
        "bound": bound,
        "dropout": dropout,
        "keep": keep,
        "width": width,
    }

    def make(paths: tuple[str, ...], model: FunctionalModel) -> Transform:
        before = prefix_of(model, prefix, name)
        owners = paths if deep else paths[:1]
        known = blocks_at(model, paths)
        for block in known.values():
            if not block.batch_first:
                raise OptionError(
                    f"{name}: {block.attention!r} has batch_first=False, so tokens are the first axis of "
                    f"{block.path!r}; make the model with batch_first=True"
                )
        sizes = {
            path: known[path].width if path in known else widths(place_at(model, path), name, width)[0]
            for path in owners
        }
        bounds = _bounds(model, sizes, bound, name)

        def draw(weights: Weights, key: int) -> Tree:
            tree: Tree = {}
            for path, size in sizes.items():
                like = place_at(model, path).like
                own = split(split(key, path), "prompt")
                tree[path] = {"prompt": uniform((tokens, size), bounds[path], own, like)}
            return tree

        def site(path: str) -> Site:
            how = ("insert" if path == paths[0] else "replace") if path in owners else None
            leaves = path == paths[-1] and not keep
            return Site(path, functools.partial(prompted, how, leaves, before, tokens, dropout), name, at(path))

        return Transform(draw, nothing, sites=tuple(map(site, _span(model, paths))))

    return Part(blocks() if where is None else where, make, check_name(name), "vpt", options, modules=True)


def prompted(
    how: str | None,
    leaves: bool,
    prefix: int,
    count: int,
    dropout: float,
    tree: Tree,
    inner: Inner,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run a block with prompts put in, or put in place of those that are there, and taken out again if they leave."""
    if how is not None:
        x = main_argument(args, kwargs)
        if how == "insert":
            check_alone(x, inner, args, kwargs)
        prompt = tree["prompt"].to(x.dtype).expand(*x.shape[:-2], -1, -1)
        if dropout:
            prompt = F.dropout(prompt, dropout, inner.training)
        behind = prefix if how == "insert" else prefix + count
        x = torch.cat([x[..., :prefix, :], prompt, x[..., behind:, :]], -2)
        args, kwargs = with_main_argument(args, kwargs, x)
    before = inner.notes.get(PROMPTS, 0)
    inner.notes[PROMPTS] = before + count  # for what acts on the grid of patches inside of the block
    try:  # the recomputation of a checkpoint ends by an exception, as soon as it has what it wants
        output = inner(*args, **kwargs)
    finally:
        inner.notes[PROMPTS] = before
    if not leaves:
        return output
    y = main(output)
    return with_main(output, torch.cat([y[..., :prefix, :], y[..., prefix + count :, :]], -2))


def _span(model: FunctionalModel, paths: tuple[str, ...]) -> tuple[str, ...]:
    """Return these paths and those of the blocks between them, through which prompts go as well."""
    every = tuple(block.path for block in parts_of(model).blocks)
    if not {*paths} <= {*every}:
        return paths
    return every[every.index(paths[0]) : every.index(paths[-1]) + 1]


def _bounds(model: FunctionalModel, sizes: dict[str, int], bound: float | None, name: str) -> dict[str, float]:
    """Return v for each place: what the user says, or by the equation of this file."""
    if bound is not None:
        return dict.fromkeys(sizes, bound)
    patch = parts_of(model).patch
    if patch is None:
        raise OptionError(
            f"{name}: {model!r} has no patches of images, whose size the bound is made of; give bound=..."
        )
    return {path: sqrt(6 / (patch + width)) for path, width in sizes.items()}


def check_alone(x: Tensor, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a block that gets masks or positions of tokens: prompts have none."""
    if x.dim() < 3:
        raise AddinError(f"at {inner.path!r} an activation is {tuple(x.shape)}, not [batch, tokens, features]")
    for other in pytree.tree_leaves((args, kwargs)):
        if isinstance(other, Tensor) and other is not x and x.shape[-2] in other.shape[-2:]:
            raise AddinError(
                f"{inner.path!r} also gets a tensor of shape {tuple(other.shape)}, one entry for each of the "
                f"{x.shape[-2]} tokens (a mask, positions); prompts have no entry in it. Call the model without a mask"
            )

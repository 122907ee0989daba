"""Convpass: a convolution over the grid of patches, beside attentions and feed-forward parts M.

    y = M(x) + s Up(act(Conv3x3(act(Down(x)))))

Jie & Deng, "Convolutional Bypasses Are Better Vision Transformer Adapters", 2022, arXiv 2207.07039. Tokens before those
of the patches (class token, registers) are maps of one pixel each, for the same convolution. `act` is x sigmoid(1.702
x). Up is zero at the start, so nothing changes at first. A layer scale behind M scales the bypass, too. Tokens that
`pf.vpt` and `pf.vqt` bring into the same call are maps of one pixel, too.
"""

import functools
from collections.abc import Mapping
from math import isqrt, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_func.addins.added import adding, check_features
from peft_func.addins.bottleneck import check_size
from peft_func.addins.parts import attentions, mlps
from peft_func.addins.place import Place
from peft_func.addins.prefix_tokens import ASKING, PROMPTS, prefix_of
from peft_func.addins.width import widths
from peft_func.errors import AddinError, OptionError
from peft_func.functional.model import FunctionalModel
from peft_func.functional.surround import Inner
from peft_func.transforms.options import check_choice, check_number, check_probability
from peft_func.transforms.transform import Part, Transform, check_name
from peft_func.trees.keys import split, uniform
from peft_func.trees.paths import Tree
from peft_func.trees.select import Where


def convpass(
    where: Where | None = None,
    *,
    rank: int = 8,
    scale: float = 0.01,
    grid: tuple[int, int] | None = None,
    prefix: int | None = None,
    init: str = "identity",
    dropout: float = 0.1,
    width: int | None = None,
    name: str = "convpass",
) -> Part:
    """Add a convolutional bypass to modules of a vision transformer.

    Leaves of `trainable[name][path]`: `down` [rank, in], `down_bias` [rank], `conv` [rank, rank, 3, 3], `conv_bias`
    [rank], `up` [out, rank], `up_bias` [out].

    Args:
        where: a selector over modules that take and give tokens `[batch, tokens, features]`; by default all
            attentions and feed-forward parts (the first variant of the paper). `pf.attentions()` alone is its second.
        rank: the width of the bypass.
        scale: s; the paper chooses it among 0.01, 0.1, 1, 10.
        grid: rows and columns of patches; by default the patches are a square, whatever its size.
        prefix: how many tokens come before those of the patches; by default what the model has.
        init: of the convolution: `"identity"` or `"xavier"`.
        dropout: the probability of dropping a feature before Up, in train mode.
        width: the number of features, where the weights cannot tell it.
        name: the sub-tree.

    Raises:
        OptionError: an option is out of range; at `bind`, the number of prefix tokens or of features is unknown.
        AddinError: in a call, if the patches are no such grid.

    Example:
        >>> import torch, peft_func as pf
        >>> model = pf.functionalize(torch.nn.Linear(8, 8))
        >>> adapter = pf.bind(pf.convpass("", rank=2, prefix=1), model)
        >>> frozen, trainable = adapter.init(0)
        >>> model(adapter.apply(frozen, trainable), torch.ones(2, 1 + 5 * 5, 8)).shape
        torch.Size([2, 26, 8])
    """
    check_size(name, "rank", rank, optional=False)
    check_size(name, "width", width)
    check_number(name, "scale", scale)
    check_choice(name, "init", init, ("identity", "xavier"))
    check_probability(name, "dropout", dropout)
    if grid is not None:
        if not isinstance(grid, tuple | list) or len(grid) != 2:
            raise OptionError(f"{name}: grid={grid!r} is no pair of rows and columns, such as grid=(14, 14)")
        for size in grid:
            check_size(name, "grid", size, optional=False)
    options: dict[str, Any] = {
        "rank": rank,
        "scale": scale,
        "grid": None if grid is None else list(grid),
        "prefix": prefix,
        "init": init,
        "dropout": dropout,
        "width": width,
    }

    def draw(place: Place, key: int) -> Tree:
        inputs, outputs = widths(place, name, width)
        down = uniform((rank, inputs), sqrt(6 / (inputs + rank)), split(key, "down"), place.like)
        conv = uniform((rank, rank, 3, 3), sqrt(6 / (18 * rank)), split(key, "conv"), place.like)
        if init == "identity":
            eye = torch.eye(rank, dtype=conv.dtype, device=conv.device)
            conv = F.pad(eye[:, :, None, None], (1, 1, 1, 1))
        zeros = functools.partial(torch.zeros, dtype=down.dtype, device=down.device)
        first = {"down": down, "down_bias": zeros(rank), "conv": conv, "conv_bias": zeros(rank)}
        return first | {"up": zeros(outputs, rank), "up_bias": zeros(outputs)}

    def make(paths: tuple[str, ...], model: FunctionalModel) -> Transform:
        before = prefix_of(model, prefix, name)
        change = functools.partial(bypass, before, options["grid"], scale, dropout)
        part = adding(chosen, change, draw, "parallel", name=name, kind="convpass", options=options)
        return part.make(paths, model)

    chosen = attentions() | mlps() if where is None else where
    return Part(chosen, make, check_name(name), "convpass", options, modules=True)


def bypass(
    prefix: int,
    grid: list[int] | None,
    scale: float,
    dropout: float,
    tree: Mapping[str, Any],
    x: Tensor,
    inner: Inner,
) -> Tensor:
    """Return s Up(act(Conv(act(Down(x)))))."""
    check_features(x, tree["down"].shape[-1], inner)
    own = {leaf: tensor.to(x.dtype) for leaf, tensor in tree.items()}
    h = _act(F.linear(x, own["down"], own["down_bias"]))
    if inner.notes.get(ASKING):  # none of these tokens has a place in the image
        h = F.linear(h, own["conv"][:, :, 1, 1], own["conv_bias"])
        return F.linear(F.dropout(_act(h), dropout, inner.training), own["up"], own["up_bias"]) * scale
    prefix += inner.notes.get(PROMPTS, 0)
    single, patches = h[..., :prefix, :], h[..., prefix:, :]
    rows, columns = _grid(patches, grid, prefix, inner)
    maps = F.pad(patches.reshape(*patches.shape[:-2], rows, columns, -1), (0, 0, 1, 1, 1, 1))
    # One product over the nine taps, because the kernels of convolutions lack some of torch.func's rules.
    seen = [maps[..., i : i + rows, j : j + columns, :] for i in range(3) for j in range(3)]
    taps = own["conv"].permute(0, 2, 3, 1).flatten(1)
    patches = F.linear(torch.cat(seen, -1), taps, own["conv_bias"]).flatten(-3, -2)
    single = F.linear(single, own["conv"][:, :, 1, 1], own["conv_bias"])  # all other taps see padding
    h = F.dropout(_act(torch.cat([single, patches], -2)), dropout, inner.training)
    return F.linear(h, own["up"], own["up_bias"]) * scale


def _act(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _grid(patches: Tensor, grid: list[int] | None, prefix: int, inner: Inner) -> tuple[int, int]:
    if patches.dim() < 3:
        raise AddinError(f"at {inner.path!r} an activation is {tuple(patches.shape)}, not [batch, tokens, features]")
    count = patches.shape[-2]
    rows, columns = grid or (isqrt(count), isqrt(count))
    if rows * columns != count:
        raise AddinError(
            f"at {inner.path!r} there are {count} tokens behind the {prefix} of the prefix, which are no grid of "
            f"{rows} x {columns}; give grid=(rows, columns) and prefix=..."
        )
    return rows, columns

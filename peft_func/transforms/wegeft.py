"""WeGeFT: W' = W + s (W phi^T) psi on the input side, W + s phi psi W on the output side, with s = alpha / rank.

Savadikar, Song and Wu, "WeGeFT: Weight-Generative Fine-Tuning for Multi-Faceted Efficient Adaptation of Large Models",
ICML 2025, arXiv 2312.00700 (version 5); the successor of GIFT (versions 1 to 4), without a block between phi and psi.
It has a scale, may drop entries of the weight that it generates from, and starts from phi = 0, GIFT from psi = 0.

On the output side the whole output is edited, y' = (I + s phi psi) y, and so is the bias. (In the authors' code phi is
a layer from `out` to `rank` there, which fits only rank = out.)
"""

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_func.errors import OptionError
from peft_func.functional.model import FunctionalModel
from peft_func.transforms.gift_groups import Share, base_groups, check_share
from peft_func.transforms.options import (
    SEPARATE_PROJECTIONS,
    biases,
    check_choice,
    check_number,
    check_probability,
    check_rank,
    per_place,
)
from peft_func.transforms.transform import Changes, Part, Transform, check_name
from peft_func.trees.keys import split, uniform
from peft_func.trees.paths import Tree
from peft_func.trees.select import Where
from peft_func.weights.absorb import absorb
from peft_func.weights.layout import Layout
from peft_func.weights.mapping import Weights
from peft_func.weights.matrix import Dense, IdentityPlus, LowRank, Matrix, Product, Sum
from peft_func.weights.operator import full_precision
from peft_func.weights.sampled import Sampled

# Of a group: the first place that uses it, the extent of phi and psi on the side that is edited, and their rank.
_Size: TypeAlias = tuple[str, int, int]


def wegeft(
    where: Where,
    *,
    rank: int = 8,
    alpha: float | None = None,
    side: str = "input",
    share: Share = "target",
    dropout: float = 0.0,
    init: str = "default",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    name: str = "wegeft",
) -> Part:
    """Generate a low-rank update of every selected weight from the weight itself, with a scale.

    Leaves of `trainable[name][group]`: `phi` and `psi`. Input side: both [rank, in], where `in` counts a convolution's
    kernel. Output side: `phi` [out, rank] and `psi` [rank, out]. They have the weight's dtype, float32 for a
    half-precision one. `phi` is zero at init and `psi` drawn from U(-1/sqrt(n), 1/sqrt(n)), n its columns.

    Weights are matrices `[out, in]`: an embedding's outputs are its rows, one for each token.

    Args:
        where: a selector; only parameters of two dimensions or more are looked at.
        rank: the rank, from 1 to that of the matrices.
        alpha: the update is scaled by alpha / rank; None means alpha = rank.
        side: `"input"` or `"output"`. For some targets one and for others the other, chain two parts:
            `pf.chain(pf.wegeft(["q_proj"]), pf.wegeft(["down_proj"], side="output", name="wegeft_output"))`.
        share: which places share one pair: `"target"`, those whose modules have the same last name, over depth;
            `"all"`; `"none"`, one pair for each place, under its path; or `{group: selector}`, the authors'
            `tied_modules`.
        dropout: the probability of dropping an entry of the weight that the update is generated from, in training;
            neither the base product nor the bias is dropped. A weight that an earlier part of a chain changed is
            formed for that.
        init: `"default"`, or `"random"`, in which phi is drawn as psi is, so that the update is not zero at first.
        rank_pattern: `{regex of the end of a module path: rank}`; places that share have one rank.
        alpha_pattern: likewise for alpha, which each place may have for itself.
        name: the sub-tree.

    Raises:
        OptionError: an option is out of range; at `bind`, a rank above that of a matrix, a pattern without a match,
            places of different width or rank in one group, or a place in no group or in two.

    Example:
        >>> import torch, peft_func as pf
        >>> net = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 8))] * 2)
        >>> method = pf.chain(
        ...     pf.wegeft(["0"], rank=2, alpha=4), pf.wegeft(["1"], rank=2, side="output", name="outputs")
        ... )
        >>> frozen, trainable = pf.bind(method, pf.functionalize(net)).init(0)
        >>> {leaf: list(tensor.shape) for leaf, tensor in trainable["wegeft"]["0"].items()}
        {'phi': [2, 8], 'psi': [2, 8]}
        >>> {leaf: list(tensor.shape) for leaf, tensor in trainable["outputs"]["1"].items()}
        {'phi': [8, 2], 'psi': [2, 8]}
    """
    check_choice(name, "side", side, ("input", "output"))
    check_choice(name, "init", init, ("default", "random"))
    check_share("wegeft", share)
    alpha = None if alpha is None else check_number(name, "alpha", alpha)
    check_probability(name, "dropout", dropout)
    options: dict[str, Any] = {
        "rank": rank, "alpha": alpha, "side": side, "share": share, "dropout": dropout, "init": init,
    }  # fmt: skip

    def make(paths: tuple[str, ...], model: FunctionalModel) -> Transform:
        layouts = {path: model.layouts[path] for path in paths}
        groups = base_groups("wegeft", paths, share, model)
        ranks = dict.fromkeys(paths, rank) | per_place(name, "rank_pattern", rank_pattern or {}, paths, model)
        alphas = per_place(name, "alpha_pattern", alpha_pattern or {}, paths, model)
        scales: dict[str, float] = {}
        shapes: dict[str, _Size] = {}
        for path, layout in layouts.items():
            r = check_rank(name, path, ranks[path], layout.matrix_shape)
            scales[path] = check_number(name, "alpha", alphas.get(path, r if alpha is None else alpha)) / r
            width = layout.matrix_shape[-1 if side == "input" else -2]
            _check_shared(name, path, groups[path], (width, r), shapes.setdefault(groups[path], (path, width, r)), side)
        bias_of = {path: biases((path,), model) for path in paths} if side == "output" else {}

        def draw(weights: Weights, key: int) -> Tree:
            tree: Tree = {}
            for group, (path, width, r) in shapes.items():
                own, like = split(key, group), weights.base[path]
                psi = uniform((r, width), 1 / sqrt(width), own, like)
                phi = torch.zeros_like(psi)
                if init == "random":
                    phi = uniform((r, width), 1 / sqrt(width), split(own, "phi"), like)
                tree[group] = {"phi": phi if side == "input" else phi.mT, "psi": psi}
            return tree

        def apply(tree: Tree, weights: Weights) -> Changes:
            changes: dict[str, Tensor | Matrix] = {}
            for path, layout in layouts.items():
                leaf = tree[groups[path]]
                phi = leaf["phi"].mT if side == "input" else leaf["phi"]
                low = LowRank(phi, leaf["psi"], scales[path])
                base = weights.matrix(path)
                changes[path] = (
                    _dropping(base, low, layout, side, dropout) if dropout else _changed(base, low, layout, side)
                )
                for bias in bias_of.get(path, ()):
                    changes[bias] = _edited(path, bias, changes.get(bias, weights[bias]), low)  # type: ignore[arg-type]
            return changes

        resolved: dict[str, Any] = {
            "rank_pattern": {path: r for path, r in ranks.items() if r != rank},
            "alpha_pattern": alphas,
        }
        if isinstance(share, Mapping):
            resolved["share"] = {group: [path for path in paths if groups[path] == group] for group in shapes}
        return Transform(draw, apply, options=options | resolved)

    return Part(where, make, check_name(name), "wegeft", options, also=biases if side == "output" else None)


def _check_shared(name: str, path: str, group: str, size: tuple[int, int], first: _Size, side: str) -> None:
    for what, own, other in zip((f"{side}s", "as its rank"), size, first[1:], strict=True):
        if own != other:
            raise OptionError(
                f"{name}: {first[0]} has {other} {what} and {path} has {own}, but both share phi and psi in the group "
                f"{group!r}; give each its own with share='none', or share={{group: selector}}"
            )


def _changed(base: Matrix, low: LowRank, layout: Layout, side: str) -> Matrix:
    if side == "input":
        return Product(base, IdentityPlus(low))
    if not layout.is_conv:
        return Product(IdentityPlus(low), base)
    # What follows a convolution cannot mix the rows of its matrix where groups divide them; `rank` rows more can.
    return Sum(base, _generated(base, low, side))


def _dropping(base: Matrix, low: LowRank, layout: Layout, side: str, dropout: float) -> Matrix:
    """Return the weight with entries dropped before they meet `low`, anew whenever it acts.

    Autograd keeps one dropped copy of the weight until backward: the gradient of the factor beside it is made of that.
    """

    def draw(base: Matrix, parts: Sequence[Tensor], drop: bool) -> Matrix:
        own = LowRank(parts[0], parts[1], low.scale)
        if not drop:
            return _changed(base.deterministic(), own, layout, side)
        dense = base.deterministic().dense(own.compute_dtype)
        # Many adapters at once have an axis more than the weight that they share; each drops its own entries.
        batch = max(own.shape[:-2], dense.shape[:-2], key=len)
        return Sum(base, _generated(Dense(F.dropout(dense.expand(*batch, *dense.shape[-2:]), dropout)), own, side))

    return Sampled(draw, base, (low.B, low.A))


def _generated(base: Matrix, low: LowRank, side: str) -> LowRank:
    """Return `base low`, or `low base`, as one low-rank matrix: `rank` columns, or rows, go through the base."""
    with full_precision(low.A.device):
        if side == "input":
            return absorb(base, low)
        mirrored = absorb(base.T, LowRank(low.A.mT, low.B.mT, low.scale))
        return LowRank(mirrored.A.mT, mirrored.B.mT, low.scale)


def _edited(path: str, bias: str, value: Tensor, low: LowRank) -> Tensor:
    """Return `(I + s phi psi) b`, for the part of a bias that belongs to a weight."""
    weight = path.rpartition(".")[2]
    wide = torch.promote_types(low.compute_dtype, value.dtype)
    edit = IdentityPlus(low.map(lambda tensor, _: tensor.to(wide)))
    if weight in SEPARATE_PROJECTIONS and bias.endswith("in_proj_bias"):
        parts = list(value.to(wide).chunk(len(SEPARATE_PROJECTIONS)))
        own = SEPARATE_PROJECTIONS.index(weight)
        with full_precision(value.device):
            parts[own] = edit.linear(parts[own])
        return torch.cat(parts)
    # A grouped transposed convolution has one row of its matrix for the same output of every group.
    with full_precision(value.device):
        return edit.linear(value.to(wide).view(-1, low.shape[-1])).flatten()

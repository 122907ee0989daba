"""LoRA: W' = W + s B A, with s = alpha / rank.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
Rank-stabilised, s = alpha / sqrt(rank): Kalajdzievski, arXiv 2312.03732. The matrix of a convolution's weight may be
seen in three ways: W' = W + s reshape(B A, W.shape), see `conv_views`.
"""

from collections.abc import Mapping
from math import prod, sqrt

import torch

from peft_func.functional.model import FunctionalModel
from peft_func.transforms.conv_views import VIEWS, change_of, view_shape
from peft_func.transforms.options import (
    biases,
    check_choice,
    check_flag,
    check_number,
    check_probability,
    check_rank,
    per_place,
)
from peft_func.transforms.transform import Changes, Part, Transform, check_name
from peft_func.trees.keys import normal, split, uniform
from peft_func.trees.paths import Tree
from peft_func.trees.select import Where
from peft_func.weights.mapping import Weights
from peft_func.weights.matrix import LowRank


def lora(
    where: Where,
    *,
    rank: int = 8,
    alpha: float | None = None,
    rank_stabilized: bool = False,
    dropout: float = 0.0,
    init: str = "default",
    conv: str = "factored",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    bias: bool = False,
    name: str = "lora",
) -> Part:
    """Add a low-rank matrix to every selected weight.

    Leaves of `trainable[name][path]`: `A` [rank, in], `B` [out, rank]; for a convolution `A` [rank, in / groups,
    *kernel], `B` [out, rank, 1, ...], or in another view (`conv`) `A` [rank, w], `B` [h, rank]; for experts `A`
    [experts, rank, in], `B` [experts, out, rank]. They have the weight's dtype and device, float32 for a half-precision
    weight. `B` is zero at init, so nothing changes at first.

    Args:
        where: a selector; only parameters of two dimensions or more are looked at.
        rank: the rank, from 1 to that of the matrix.
        alpha: the scale is `alpha / rank`; None means `alpha = rank`, a scale of 1.
        rank_stabilized: make the scale `alpha / sqrt(rank)`.
        dropout: the probability of dropping an input of the low-rank branch (not of the base) in train mode; lookups
            in an embedding have no such input.
        init: `"default"` draws A from U(-1/sqrt(in), 1/sqrt(in)), `"gaussian"` from N(0, 1/rank^2); `in` is the width
            of the matrix.
        conv: how a convolution's weight is seen as a matrix [h, w]. `"factored"`: h = out, w = in / groups * taps,
            which acts as a convolution to `rank` channels and a pointwise one behind it. `"out_as_h"`: the same, with
            the leaves as plain matrices. `"balanced"`: h = out * k0, w = in / groups * k1 * ...: fewer values for one
            rank, unless inputs are few; the update is formed and added to the weight in each call, for one convolution
            (with dropout, in train mode, for one of its own). A transposed one has `out / groups` and `in` there.
        rank_pattern: `{regex of the end of a module path: rank}`; the first that matches wins.
        alpha_pattern: likewise for alpha.
        bias: train the biases of the adapted modules too: leaves `trainable[name][bias path]["bias"]`.
        name: the sub-tree.

    Raises:
        OptionError: an option is out of range; at `bind`, a rank above that of a matrix, or a pattern without a match.

    Example:
        >>> import torch, peft_func as pf
        >>> model = pf.functionalize(torch.nn.Linear(16, 32))
        >>> frozen, trainable = pf.bind(pf.lora("weight", rank=4, alpha=8), model).init(0)
        >>> {leaf: list(tensor.shape) for leaf, tensor in trainable["lora"]["weight"].items()}
        {'A': [4, 16], 'B': [32, 4]}
    """
    check_choice(name, "init", init, ("default", "gaussian"))
    check_choice(name, "conv", conv, ("factored", *VIEWS))
    check_flag(name, "rank_stabilized", rank_stabilized)
    check_flag(name, "bias", bias)
    alpha = None if alpha is None else check_number(name, "alpha", alpha)
    check_probability(name, "dropout", dropout)
    options = {
        "rank": rank,
        "alpha": alpha,
        "rank_stabilized": rank_stabilized,
        "dropout": dropout,
        "init": init,
        "conv": conv,
        "bias": bias,
    }

    def make(paths: tuple[str, ...], model: FunctionalModel) -> Transform:
        layouts = {path: model.layouts[path] for path in paths}
        views = {path: view_shape(layout, conv) for path, layout in layouts.items()}
        ranks = dict.fromkeys(paths, rank) | per_place(name, "rank_pattern", rank_pattern or {}, paths, model)
        alphas = per_place(name, "alpha_pattern", alpha_pattern or {}, paths, model)
        resolved = {
            "rank_pattern": {path: r for path, r in ranks.items() if r != rank},
            "alpha_pattern": alphas,
        }
        scales: dict[str, float] = {}
        for path, view in views.items():
            r = check_rank(name, path, ranks[path], view)
            a = check_number(name, "alpha", alphas.get(path, r if alpha is None else alpha))
            scales[path] = a / sqrt(r) if rank_stabilized else a / r

        def draw(weights: Weights, key: int) -> Tree:
            tree: Tree = {}
            for path, layout in layouts.items():
                like, r = weights.base[path], ranks[path]
                *_, rows, columns = views[path]
                kernel = layout.kernel if conv == "factored" else ()
                inputs = (columns // prod(kernel), *kernel)
                sample = uniform if init == "default" else normal
                spread = 1 / sqrt(columns) if init == "default" else 1 / r
                A = sample((*layout.batch, r, *inputs), spread, split(key, path), like)
                B = torch.zeros(*layout.batch, rows, r, *[1] * len(kernel), dtype=A.dtype, device=A.device)
                tree[path] = {"A": A, "B": B}
            return tree | {path: {"bias": weights.base[path]} for path in weights if path not in layouts}

        def apply(tree: Tree, weights: Weights) -> Changes:
            changes = {}
            for path, layout in layouts.items():
                A, B = (layout.factor(tree[path][leaf]) for leaf in "AB")
                changes[path] = weights.matrix(path) + change_of(layout, LowRank(B, A, scales[path], dropout))
            return changes

        def holds(tree: Tree) -> Tree:
            return {path: leaf["bias"] for path, leaf in tree.items() if path not in layouts}

        return Transform(draw, apply, holds, options=options | resolved)

    return Part(where, make, check_name(name), "lora", options, also=biases if bias else None)

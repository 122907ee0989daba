"""FacT: the changes of all weights of a transformer as one tensor, decomposed.

Every weight is cut into blocks of width x width, a query projection into one, the first map of a feed-forward part into
four below each other. With U [rank, width] and V [width, rank] that all blocks of all layers share, block j changes by

    TT:  s V sigma_j U                        sigma_j [rank, rank] its own
    TK:  s V (sum_k p_kj C_k) U               C [rank, rank, rank] shared, p_j [rank] its own

Jie & Deng, "FacT: Factor-Tuning for Lightweight Adaptation on Vision Transformer", 2023, arXiv 2212.03145. It is a
change of weights of low rank: it merges, and no dropout stands inside of it. V is zero at the start.
"""

from collections.abc import Mapping
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from peft_func.errors import OptionError
from peft_func.functional.model import FunctionalModel
from peft_func.transforms.options import check_choice, check_number
from peft_func.transforms.transform import Changes, Part, Transform, check_name
from peft_func.trees.keys import split, uniform
from peft_func.trees.paths import Tree
from peft_func.trees.select import Where
from peft_func.weights.mapping import Weights
from peft_func.weights.matrix import LowRank

SHARED = "shared"


def fact(
    where: Where,
    *,
    rank: int = 8,
    scale: float = 1.0,
    how: str = "tt",
    width: int | None = None,
    name: str = "fact",
) -> Part:
    """Change weights by factors that all of them share.

    Leaves of `trainable[name]`: `shared` has `U` [rank, width] and `V` [width, rank], for `"tk"` also `C` [rank, rank,
    rank]; each path has `sigma` [rows * rank, columns * rank] for `"tt"`, `p` [rank, rows, columns] for `"tk"`, of a
    weight of rows x columns blocks.

    Args:
        where: a selector; only parameters of two dimensions or more are looked at.
        rank: the rank of the factors.
        scale: s.
        how: `"tt"` (tensor train) or `"tk"` (Tucker).
        width: of the blocks; by default the smallest extent among the weights. All extents must be multiples of it.
        name: the sub-tree.

    Raises:
        OptionError: an option is out of range; at `bind`, the extents of a weight are no multiples of the width.

    Example:
        >>> import torch, peft_func as pf
        >>> net = torch.nn.TransformerEncoderLayer(8, 2, 32, batch_first=True)
        >>> adapter = pf.bind(pf.fact(["linear1", "linear2"], rank=2), pf.functionalize(net))
        >>> _, trainable = adapter.init(0)
        >>> list(trainable["fact"]["shared"]["U"].shape), list(trainable["fact"]["linear1.weight"]["sigma"].shape)
        ([2, 8], [8, 2])
    """
    check_choice(name, "how", how, ("tt", "tk"))
    scale = check_number(name, "scale", scale)
    for option, value in (("rank", rank), ("width", width)):
        if not (option == "width" and value is None) and (isinstance(value, bool) or not isinstance(value, int)):
            raise OptionError(f"{name}: {option}={value!r} is no whole number")
    options: dict[str, Any] = {"rank": rank, "scale": scale, "how": how, "width": width}

    def make(paths: tuple[str, ...], model: FunctionalModel) -> Transform:
        size, cut = _cut(paths, model, width, name)
        if not 1 <= rank <= size:
            raise OptionError(f"{name}: rank={rank!r} for blocks of {size} x {size}, whose ranks are 1 to {size}")
        if SHARED in paths:
            raise OptionError(
                f"{name}: a parameter named {SHARED!r} cannot be a place: the tree has shared leaves there"
            )

        def init(weights: Weights, key: int) -> Tree:
            like = next(iter(weights.base.values()))
            common = split(key, SHARED)
            U = uniform((rank, size), 1 / sqrt(size), split(common, "U"), like)
            shared = {"U": U, "V": torch.zeros(size, rank, dtype=U.dtype, device=U.device)}
            if how == "tk":
                shared["C"] = uniform((rank,) * 3, sqrt(3 / rank**2), split(common, "C"), like)
            tree: Tree = {SHARED: shared}
            for path, (rows, columns) in cut.items():
                own = split(key, path)
                if how == "tt":
                    shape = (rows * rank, columns * rank)
                    tree[path] = {"sigma": uniform(shape, 1 / sqrt(columns * rank), split(own, "sigma"), like)}
                else:
                    tree[path] = {"p": uniform((rank, rows, columns), sqrt(3 / rank), split(own, "p"), like)}
            return tree

        def apply(tree: Tree, weights: Weights) -> Changes:
            shared = _wide(tree[SHARED])
            return {
                path: weights.matrix(path)
                + low_rank(shared, _sigma(shared, _wide(tree[path]), extents), extents, scale)
                for path, extents in cut.items()
            }

        return Transform(init, apply)

    return Part(where, make, check_name(name), "fact", options)


def low_rank(shared: Mapping[str, Tensor], sigma: Tensor, extents: tuple[int, int], scale: float) -> LowRank:
    """Return s (I x V) sigma (I x U), for a sigma of rows x columns blocks, at the smaller of its two sides."""
    U, V = shared["U"], shared["V"]
    (rows, columns), rank = extents, U.shape[0]
    if rows >= columns:
        left = torch.matmul(V, sigma.reshape(rows, rank, columns * rank)).reshape(rows * V.shape[0], columns * rank)
        return LowRank(left, _along_diagonal(U, columns), scale)
    right = torch.matmul(sigma.reshape(rows * rank, columns, rank), U).reshape(rows * rank, columns * U.shape[1])
    return LowRank(_along_diagonal(V, rows), right, scale)


def _wide(tree: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return leaves in float32 at least: their products are formed, and rounded once."""
    return {leaf: tensor.float() if tensor.dtype.itemsize < 4 else tensor for leaf, tensor in tree.items()}


def _along_diagonal(matrix: Tensor, count: int) -> Tensor:
    if count == 1:
        return matrix
    eye = torch.eye(count, dtype=matrix.dtype, device=matrix.device)
    return torch.kron(eye, matrix)


def _sigma(shared: Mapping[str, Tensor], own: Mapping[str, Tensor], extents: tuple[int, int]) -> Tensor:
    if "p" not in own:
        return own["sigma"]
    rows, columns = extents
    rank = shared["C"].shape[0]
    blocks: Tensor = torch.tensordot(shared["C"], own["p"], 1)  # [rank, rank, rows, columns]
    return blocks.permute(2, 0, 3, 1).reshape(rows * rank, columns * rank)


def _cut(
    paths: tuple[str, ...], model: FunctionalModel, width: int | None, name: str
) -> tuple[int, dict[str, tuple[int, int]]]:
    """Return the width of the blocks, and how many rows and columns of them each weight has."""
    shapes = {path: model.layouts[path].matrix_shape for path in paths}
    for path, shape in shapes.items():
        if len(shape) != 2:
            raise OptionError(f"{name}: {path!r} holds {shape[0]} matrices, and {name} knows single ones; leave it out")
    narrow = min(shapes, key=lambda path: min(shapes[path]))
    size = width or min(shapes[narrow])
    for path, (out, inputs) in shapes.items():
        if size < 1 or out % size or inputs % size:
            whose = f"the width {size}" if width else f"{size}, the smallest extent ({narrow!r})"
            raise OptionError(
                f"{name}: {path!r} is {out} x {inputs}, no whole number of blocks of {whose}; leave it out, or give "
                "a width that divides all"
            )
    return size, {path: (out // size, inputs // size) for path, (out, inputs) in shapes.items()}

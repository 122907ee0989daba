"""DoRA: W' = diag(m / |V|) V with V = W + s B A.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353. The norms of the rows of V come from
|w + s b A|^2 = |w|^2 + 2 s (A w).b + s^2 b A A^T b^T, without forming V.
"""

from dataclasses import replace
from typing import Any

from peft_func.functional.model import FunctionalModel
from peft_func.transforms.lora import lora
from peft_func.transforms.magnitude import magnitude_of
from peft_func.transforms.transform import Changes, Part, Transform
from peft_func.trees.paths import Tree
from peft_func.trees.select import Where
from peft_func.weights.mapping import Weights


def dora(where: Where, *, rank: int = 8, name: str = "dora", **options: Any) -> Part:
    """Train the direction of every selected weight by a low-rank matrix, and the norms of its rows.

    Leaves of `trainable[name][path]`: `A` and `B` as in `pf.lora`, and `magnitude` [out].

    Args:
        where: a selector; only parameters of two dimensions or more are looked at.
        rank: the rank of the direction's update.
        name: the sub-tree.
        **options: those of `pf.lora`.

    Raises:
        OptionError: as `pf.lora`.

    Example:
        >>> import torch, peft_func as pf
        >>> frozen, trainable = pf.bind(pf.dora("weight", rank=2), pf.functionalize(torch.nn.Linear(4, 3))).init(0)
        >>> list(trainable["dora"]["weight"])
        ['A', 'B', 'magnitude']
    """
    low_rank = lora(where, rank=rank, name=name, **options)

    def make(paths: tuple[str, ...], model: FunctionalModel) -> Transform:
        return _together(low_rank.make(paths, model), magnitude_of(paths))

    return replace(low_rank, make=make, kind="dora")


def _together(first: Transform, second: Transform) -> Transform:
    """Apply two transforms one after the other, their leaves side by side under each path."""

    def init(weights: Weights, key: int) -> Tree:
        tree = first.init(weights, key)
        more = second.init(weights.updated(first.apply(tree, weights)), key)
        return {path: {**leaf, **more.get(path, {})} for path, leaf in tree.items()}

    def apply(tree: Tree, weights: Weights) -> Changes:
        changes = first.apply(tree, weights)
        return {**changes, **second.apply(tree, weights.updated(changes))}

    return Transform(init, apply, first.holds, first.options)

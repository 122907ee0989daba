"""The effective weights of many adapters at once: `apply`, mapped over the leading axis of a stacked tree.

Whatever a method computes is computed for each adapter; what does not depend on the adapter (the base weight) is
found out by `torch.func.vmap` itself, and stays one tensor for all.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_func.errors import TreeError
from peft_func.functional.model import FunctionalModel
from peft_func.transforms.bind import Adapter, check_tree
from peft_func.trees.paths import from_leaves, leaves
from peft_func.trees.stack import count_stacked
from peft_func.weights.groups import Grouped, Groups, column
from peft_func.weights.layout import Layout, Storage
from peft_func.weights.mapping import Weights
from peft_func.weights.matrix import Dense, Matrix
from peft_func.weights.operator import Operator


def count_members(adapter: Adapter, stacked: Mapping[str, Any]) -> int:
    """Return the number of trees in a stacked one, after checking that it is one.

    Raises:
        TreeError: it is no stack of this adapter's trees.
    """
    count = count_stacked(stacked)
    if count == 0:
        raise TreeError("the stacked tree holds no adapter: its leading axis is empty")
    check_tree(stacked, {keys: (count, *shape) for keys, shape in adapter.spec.items()})
    return count


def groups_in(model: FunctionalModel, count: int, size: int) -> Groups:
    """Return groups of a batch of this model."""
    return Groups(count, size, model.weight_shapes, model.table_shapes)


def grouped_weights(
    adapter: Adapter,
    frozen: Mapping[str, Tensor],
    stacked: Mapping[str, Any],
    groups: Groups,
    take: Callable[[str, torch.dtype], Callable[[Matrix], Matrix]] | None = None,
) -> Weights:
    """Return the effective weights of a stacked tree with one member for each group of the batch.

    Args:
        adapter: the bound adapter.
        frozen: the base weights.
        stacked: the stacked tree.
        groups: of the batch.
        take: gives, for a path and its dtype, what makes the groups' matrix out of the members'; None where
            they are the same.
    """
    found: dict[str, tuple[Matrix, torch.dtype]] = {}
    flags: list[bool] = []  # for every tensor of every expression: whether it differs between members
    bases: list[Mapping[str, Tensor]] = []
    flat = dict(leaves(stacked))

    def trace(tensors: Sequence[Tensor]) -> list[Tensor]:
        weights = adapter.apply(frozen, from_leaves(zip(flat, tensors, strict=True)))
        bases.append(weights.base)
        mapped = []
        for path, value in weights.items():
            if value is not frozen.get(path):
                matrix = _matrix(value, adapter.model.layouts[path])
                found[path] = matrix, value.dtype
                for tensor in matrix.tensors():
                    flags.append(torch._C._functorch.is_batchedtensor(tensor))
                    mapped += [tensor] if flags[-1] else []
        return mapped

    own, differs = iter(torch.func.vmap(trace)(list(flat.values()))), iter(flags)
    items: dict[str, Tensor | Operator] = {**frozen}
    for name, (matrix, dtype) in found.items():
        whole = matrix.map(lambda tensor, _: next(own) if next(differs) else tensor)
        taker = None if take is None else take(name, dtype)
        items[name] = Grouped(whole, groups, adapter.model.layouts[name], dtype, name, taker)
    return Weights({name: items[name] for name in adapter.model.params}, bases[0], adapter.model.layouts)


def _matrix(value: Tensor | Operator, layout: Layout) -> Matrix:
    if isinstance(value, Operator):
        matrix = value.matrix
        if layout.batch:  # every tensor gets the axis of experts, so that one more axis means a group's own
            matrix = matrix.map(lambda t, ndim: t.expand(*layout.batch, *t.shape) if t.dim() == ndim else t)
        return matrix
    return Dense(column(value) if layout.storage is Storage.VECTOR else layout.to_matrix(value))

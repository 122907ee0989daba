"""The effective weights of many adapters at once: `apply`, mapped over the leading axis of a stacked tree.

Whatever a method computes is computed for each adapter; what does not depend on the adapter (the base weight) is
found out by `torch.func.vmap` itself, and stays one tensor for all.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_func.errors import TreeError
from peft_func.functional.model import FunctionalModel
from peft_func.transforms.bind import Adapter, check_tree
from peft_func.trees.paths import join, leaves
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
    counts = {join(keys): tensor.shape[0] if tensor.dim() else 0 for keys, tensor in leaves(stacked)}
    if not counts:
        raise TreeError("the stacked tree has no leaves; make it with pf.stack([tree, ...])")
    (path, count), *rest = counts.items()
    odd = next(((other, length) for other, length in rest if length != count), None)
    if odd is not None:
        raise TreeError(
            f"a stacked tree has one leading length; {path!r} has {count} and {odd[0]!r} has {odd[1]}. "
            "Make it with pf.stack([tree, ...])"
        )
    if count == 0:
        raise TreeError("the stacked tree holds no adapter: its leading axis is empty")
    check_tree(stacked, {keys: (count, *shape) for keys, shape in adapter.spec.items()})
    return count


def groups_in(model: FunctionalModel, count: int, size: int) -> Groups:
    """Return groups of a batch of this model."""
    # Modules of torch use their own matrices as matrices, but for an embedding's, which a model may read as it is.
    loose = [
        tensor
        for name, tensor in model.params.items()
        if any(
            kind is nn.Embedding or not kind.__module__.startswith("torch.nn.") for kind in model.infos[name].modules
        )
    ]
    shapes = [
        frozenset(tuple(tensor.shape) for tensor in tensors if tensor.dim())
        for tensors in (model.params.values(), (*loose, *model.state.values()))
    ]
    return Groups(count, size, *shapes)


def grouped_weights(
    adapter: Adapter, frozen: Mapping[str, Tensor], stacked: Mapping[str, Any], groups: Groups
) -> Weights:
    """Return the effective weights of a stacked tree with one member for each group of the batch."""
    found: dict[str, tuple[Matrix, list[bool]]] = {}
    dtypes: dict[str, torch.dtype] = {}
    shared: dict[str, list[Tensor]] = {}
    kept: list[Weights] = []

    def trace(tree: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        weights = adapter.apply(frozen, tree)
        kept.append(weights)
        for path, value in weights.items():
            if value is not frozen.get(path):
                matrix, dtypes[path] = _matrix(value, adapter.model.layouts[path]), value.dtype
                found[path] = matrix, [torch._C._functorch.is_batchedtensor(t) for t in matrix.tensors()]
        for path, (matrix, mapped) in found.items():
            shared[path] = [t for t, own in zip(matrix.tensors(), mapped, strict=True) if not own]
        return {
            path: [t for t, own in zip(matrix.tensors(), mapped, strict=True) if own]
            for path, (matrix, mapped) in found.items()
        }

    mapped = torch.func.vmap(trace)(stacked)
    base = kept[0].base
    items: dict[str, Tensor | Operator] = {}
    for name in adapter.model.params:
        if name not in found:
            items[name] = frozen[name]
            continue
        matrix, is_mapped = found[name]
        rest, common, flags = iter(mapped[name]), iter(shared[name]), iter(is_mapped)
        whole = matrix.map(lambda *_, r=rest, c=common, f=flags: next(r) if next(f) else next(c))
        items[name] = Grouped(whole, groups, adapter.model.layouts[name], dtypes[name], name)
    return Weights(items, base, adapter.model.layouts)


def _matrix(value: Tensor | Operator, layout: Layout) -> Matrix:
    if isinstance(value, Operator):
        matrix = value.matrix
        if layout.batch:  # every tensor gets the axis of experts, so that one more axis means a group's own
            matrix = matrix.map(lambda t, ndim: t.expand(*layout.batch, *t.shape) if t.dim() == ndim else t)
        return matrix
    return Dense(column(value) if layout.storage is Storage.VECTOR else layout.to_matrix(value))

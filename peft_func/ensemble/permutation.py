"""Permuting the units of a network, which changes its weights and nothing that it computes.

A specification is data: for every permutation, the places in the tree that it reorders. For `h = f(W1 x)`, `y = W2 h`:

    {"hidden": [("1.weight", 0), ("1.bias", 0), ("2.weight", 1)]}

Ainsworth et al., "Git Re-Basin: Merging Models modulo Permutation Symmetries", arXiv 2209.04836.
"""

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from peft_func.errors import TreeError

Place: TypeAlias = tuple[str, int] | tuple[str, int, int]
"""A parameter's name and the axis that is reordered; with a third number, each unit has that many consecutive entries
there (what `Flatten` makes of a channel's pixels)."""

Specification: TypeAlias = Mapping[str, Iterable[Place]]
"""The places that each permutation reorders."""


def permute(tree: Mapping[str, Tensor], spec: Specification, permutations: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reorder the units of a flat tree.

    Args:
        tree: `{name: tensor}`, such as `model.params`; or the buffers, with a specification for them.
        spec: the places of each permutation; see `pf.permutation_spec`.
        permutations: for each name in `spec`, int64 `[units]`: new unit `i` is old unit `permutation[i]`. Further ones
            are ignored.

    Returns:
        A new dict; what is not reordered is the same tensor object. Differentiable in the tree.

    Raises:
        TreeError: a place is not in the tree, has another length, or what is given is no permutation.

    Example:
        >>> import torch, peft_func as pf
        >>> tree = {"1.weight": torch.tensor([[1.0], [2.0]]), "2.weight": torch.tensor([[10.0, 20.0]])}
        >>> spec = {"hidden": [("1.weight", 0), ("2.weight", 1)]}
        >>> pf.permute(tree, spec, {"hidden": torch.tensor([1, 0])})
        {'1.weight': tensor([[2.],
                [1.]]), '2.weight': tensor([[20., 10.]])}
    """
    units = check_spec(tree, spec)
    result = dict(tree)
    for name, count in units.items():
        order = permutations.get(name)
        if order is None:
            raise TreeError(f"there is no permutation {name!r}; given are {', '.join(permutations) or 'none'}")
        if order.dtype != torch.int64 or order.shape != (count,) or not _is_permutation(order):
            raise TreeError(
                f"the permutation {name!r} is no reordering of {count} units: {tuple(order.shape)} {order.dtype}"
            )
        for place in spec[name]:
            result[place[0]] = reorder(result[place[0]], place, order)
    return result


def reorder(tensor: Tensor, place: Place, order: Tensor) -> Tensor:
    """Reorder one axis of a tensor, unit by unit."""
    _, axis, *block = place
    size = block[0] if block else 1
    order = order.to(tensor.device)
    if size > 1:
        order = (order[:, None] * size + torch.arange(size, device=order.device)).flatten()
    return tensor.index_select(axis, order)


def check_spec(tree: Mapping[str, Tensor], spec: Specification) -> dict[str, int]:
    """Return how many units each permutation has in this tree.

    Raises:
        TreeError: a place is not in the tree, or its length does not fit those of the same permutation.
    """
    units: dict[str, int] = {}
    for name, places in spec.items():
        for parameter, axis, *block in places:
            tensor = tree.get(parameter)
            if tensor is None:
                raise TreeError(f"the permutation {name!r} is for {parameter!r}, which the tree does not hold")
            if not isinstance(tensor, Tensor):
                raise TreeError(
                    f"{parameter!r} is a {type(tensor).__name__}; plain tensors come from pf.merge(weights)"
                )
            size = block[0] if block else 1
            if not -tensor.ndim <= axis < tensor.ndim or size < 1 or tensor.shape[axis] % size:
                raise TreeError(
                    f"the permutation {name!r} is for axis {axis} of {parameter!r}, in blocks of {size}; "
                    f"it is {tuple(tensor.shape)}"
                )
            count = tensor.shape[axis] // size
            if units.setdefault(name, count) != count:
                raise TreeError(
                    f"the permutation {name!r} reorders {units[name]} units elsewhere, but axis {axis} of "
                    f"{parameter!r} has {count}: it is {tuple(tensor.shape)}"
                )
        if name not in units:
            raise TreeError(f"the permutation {name!r} has no places; leave it out")
    return units


def _is_permutation(order: Tensor) -> bool:
    return torch.equal(order.sort().values, torch.arange(len(order), device=order.device))

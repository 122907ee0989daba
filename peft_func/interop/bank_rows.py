"""A whole tree as one row of numbers for each dtype and device, and several rows as one stacked tree of views."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from peft_func.errors import TreeError
from peft_func.transforms.bind import check_tree
from peft_func.trees.paths import Keys, Tree, from_leaves, join, leaves, map_leaves

Row: TypeAlias = tuple[Tensor, ...]
"""The numbers of one tree: a vector for each kind of leaf. Rows are never written to."""

Kind: TypeAlias = tuple[torch.dtype, torch.device]


class RowLayout:
    """Where in a row each leaf is.

    Attributes:
        bytes: of a row.
    """

    def __init__(self, kinds: Mapping[Keys, Kind], shapes: Mapping[Keys, tuple[int, ...]], *, rounds: bool) -> None:
        """Lay the leaves out, one after another.

        Args:
            kinds: the dtype and device in which each leaf is kept.
            shapes: of the leaves, in the order that stacked trees have.
            rounds: whether leaves of a wider dtype are rounded, rather than refused.
        """
        self._shapes = dict(shapes)
        self._rounds = rounds
        self._columns: dict[Kind, list[Keys]] = {}
        for keys in shapes:
            self._columns.setdefault(kinds[keys], []).append(keys)
        self._sizes = {keys: torch.Size(shape).numel() for keys, shape in shapes.items()}
        self.bytes = sum(self._sizes[keys] * kinds[keys][0].itemsize for keys in shapes)

    def flatten(self, tree: Mapping[str, Any]) -> Row:
        """Copy a tree into a new row.

        Raises:
            TreeError: it has other leaves or shapes; a leaf has no values, or more precision than is kept.
        """
        check_tree(tree, self._shapes)
        found = dict(leaves(tree))
        return tuple(
            torch.cat([self._cast(keys, found[keys], *kind) for keys in column])
            for kind, column in self._columns.items()
        )

    def stack(self, rows: Sequence[Row]) -> Tree:
        """Copy rows into a new stacked tree: leaves `[len(rows), *shape]`, those of a kind views of one tensor."""
        # Plain rows, rather than blocks with free places: one copy either way, and a row that somebody still reads
        # stays as it is for as long as he does.
        return self._views([torch.stack(column) for column in zip(*rows, strict=True)])

    def tree(self, row: Row) -> Tree:
        """Copy a row into a tree of separate tensors."""
        return map_leaves(lambda leaf: leaf[0].clone(), self._views([column.unsqueeze(0) for column in row]))

    def _views(self, joined: Sequence[Tensor]) -> Tree:
        found: dict[Keys, Tensor] = {}
        for numbers, column in zip(joined, self._columns.values(), strict=True):
            parts = numbers.split_with_sizes([self._sizes[keys] for keys in column], 1)
            for keys, part in zip(column, parts, strict=True):
                found[keys] = part.view(part.shape[0], *self._shapes[keys])
        return from_leaves((keys, found[keys]) for keys in self._shapes)

    def _cast(self, keys: Keys, leaf: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        if leaf.is_meta and device.type != "meta":
            raise TreeError(f"the leaf {join(keys)!r} is on meta and has no values")
        if not self._rounds and torch.promote_types(leaf.dtype, dtype) != dtype:
            raise TreeError(
                f"the leaf {join(keys)!r} is {leaf.dtype}, and the bank keeps it in {dtype}, which would round it; "
                f"cast it, pf.map_leaves(lambda t: t.to({dtype}), tree), or pf.AdapterBank(..., dtype={dtype})"
            )
        return leaf.detach().reshape(-1).to(device, dtype)

"""Many trees of one structure as one tree with a leading axis, and back."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from peft_func.errors import TreeError
from peft_func.trees.paths import Tree, from_leaves, join, leaves, map_leaves


def stack(trees: Sequence[Mapping[str, Any]]) -> Tree:
    """Stack trees of the same keys, shapes, dtypes and devices: every leaf gets a leading axis of length `len(trees)`.

    Raises:
        TreeError: there is no tree, or a leaf is missing, is too many or of another kind somewhere.

    Example:
        >>> import torch, peft_func as pf
        >>> pf.stack([{"a": torch.zeros(3)}, {"a": torch.ones(3)}])["a"].shape
        torch.Size([2, 3])
    """
    if isinstance(trees, Mapping) or not trees:
        raise TreeError("stack takes a list of at least one tree")
    columns = [dict(leaves(tree)) for tree in trees]
    for number, column in enumerate(columns[1:], 1):
        for keys in sorted(columns[0].keys() ^ column.keys()):
            raise TreeError(f"the leaf {join(keys)!r} is not in both tree 0 and tree {number}; they must be alike")
        for keys, tensor in column.items():
            if _kind(tensor) != _kind(columns[0][keys]):
                raise TreeError(
                    f"the leaf {join(keys)!r} is {_kind(tensor)} in tree {number} "
                    f"but {_kind(columns[0][keys])} in tree 0; trees of one bound adapter are alike"
                )
    return from_leaves((keys, torch.stack([column[keys] for column in columns])) for keys in columns[0])


def unstack(stacked: Mapping[str, Any]) -> list[Tree]:
    """Undo `stack`: one tree for each place on the leading axis; the leaves are views.

    Raises:
        TreeError: the tree is empty, or its leaves have no common leading length.

    Example:
        >>> import torch, peft_func as pf
        >>> [tree["a"].tolist() for tree in pf.unstack({"a": torch.tensor([[1.0], [2.0]])})]
        [[1.0], [2.0]]
    """
    return [map_leaves(lambda tensor, i=i: tensor[i], stacked) for i in range(count_stacked(stacked))]


def count_stacked(stacked: Mapping[str, Any]) -> int:
    """Return how many trees a stacked one holds.

    Raises:
        TreeError: it has no leaves, or they have no common leading length.
    """
    lengths = {join(keys): (tensor.shape[0] if tensor.ndim else None) for keys, tensor in leaves(stacked)}
    if not lengths:
        raise TreeError(
            "the leaves of a stacked tree have one common leading length; this tree has no leaves. Make it with "
            "pf.stack([tree, ...])"
        )
    (count, _), *_ = Counter(lengths.values()).most_common()
    odd = {path: length for path, length in lengths.items() if length is None or length != count}
    if count is None or odd:
        first = ", ".join(f"{path!r} has {length}" for path, length in list(odd.items())[:3])
        raise TreeError(
            f"the leaves of a stacked tree have one common leading length; most leaves have {count}, but {first}. Make "
            "it with pf.stack([tree, ...])"
        )
    return count


def _kind(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"

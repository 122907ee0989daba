"""Trees are nested plain dicts whose leaves are tensors; a path is the keys to a leaf, joined with dots."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch

from peft_func.errors import TreeError

Tree: TypeAlias = dict[str, Any]
"""A nested dict of tensors. (The type cannot say more: Python's recursive aliases defeat `mypy`.)"""

Keys: TypeAlias = tuple[str, ...]


def join(keys: Keys) -> str:
    """Return the path of a leaf: its keys, joined with dots."""
    return ".".join(keys)


def leaves(tree: Mapping[str, Any], prefix: Keys = ()) -> Iterator[tuple[Keys, torch.Tensor]]:
    """Yield `(keys, tensor)` for every leaf, in the order of the dicts.

    Raises:
        TreeError: it is no dict, a leaf is not a tensor, or a key is not a string.
    """
    if not isinstance(tree, Mapping):
        raise TreeError(f"a {type(tree).__name__} is no tree; trees are (nested) dicts of tensors by name")
    for key, value in tree.items():
        if not isinstance(key, str):
            raise TreeError(f"the key {key!r} below {join(prefix)!r} is not a string; trees are dicts by name")
        if isinstance(value, torch.Tensor):
            yield (*prefix, key), value
        elif isinstance(value, Mapping):
            yield from leaves(value, (*prefix, key))
        else:
            raise TreeError(
                f"the leaf {join((*prefix, key))!r} is a {type(value).__name__}; the leaves of a tree are tensors only"
            )


def insert(tree: Tree, keys: Keys, value: object) -> None:
    """Put `value` at `keys`, making the dicts on the way; only for trees that the caller has just made.

    Raises:
        TreeError: something is there already.
    """
    for depth, key in enumerate(keys[:-1], 1):
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise TreeError(f"{join(keys)!r} lies below the leaf {join(keys[:depth])!r} of another tree")
    there = tree.get(keys[-1])
    if isinstance(there, dict):
        raise TreeError(f"{join((*keys, next(iter(there))))!r} lies below the leaf {join(keys)!r} of another tree")
    if there is not None:
        raise TreeError(f"both trees hold {join(keys)!r}; combine takes trees that share no leaf")
    tree[keys[-1]] = value


def from_leaves(items: Iterator[tuple[Keys, torch.Tensor]]) -> Tree:
    """Build the nested dict that has these leaves."""
    tree: Tree = {}
    for keys, tensor in items:
        insert(tree, keys, tensor)
    return tree


def map_leaves(function: Callable[..., torch.Tensor], tree: Mapping[str, Any], *others: Mapping[str, Any]) -> Tree:
    """Apply a function to every leaf of a tree, and to the leaves at the same paths of others.

    Args:
        function: takes one tensor from each tree.
        tree: the tree whose keys, and whose order of keys, the result has.
        *others: trees with the same paths.

    Raises:
        TreeError: another tree has other paths.

    Example:
        >>> import torch, peft_func as pf
        >>> pf.map_leaves(lambda p, g: p - 0.5 * g, {"a": torch.ones(2)}, {"a": torch.ones(2)})
        {'a': tensor([0.5000, 0.5000])}
    """
    columns = [dict(leaves(other)) for other in others]
    first = dict(leaves(tree))
    for column in columns:
        for keys in sorted(first.keys() ^ column.keys()):
            raise TreeError(f"the leaf {join(keys)!r} is in one tree only; map_leaves takes trees of the same paths")
    return from_leaves((keys, function(leaf, *(column[keys] for column in columns))) for keys, leaf in first.items())

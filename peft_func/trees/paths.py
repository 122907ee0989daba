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
        if isinstance(value, Mapping):
            yield from leaves(value, (*prefix, key))
        elif isinstance(value, torch.Tensor):
            yield (*prefix, key), value
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


def map_leaves(function: Callable[[torch.Tensor], torch.Tensor], tree: Mapping[str, Any]) -> Tree:
    """Apply a function to every leaf; the result has the same keys in the same order."""
    return from_leaves((keys, function(tensor)) for keys, tensor in leaves(tree))

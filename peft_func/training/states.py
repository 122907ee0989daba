"""The states of functional optimizers, leaf by leaf.

A state is made of dicts, tuples (named ones, too) and lists. What it has for the leaves of the tree that it steps is in
sub-trees of the same paths, as with `pf.optimizer`, or in lists in the order of the sorted paths, as with torchopt. The
rest is shared by all leaves: numbers, and tensors without dimensions such as a count.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeAlias

from torch import Tensor

from peft_func.errors import TreeError
from peft_func.trees.paths import Keys, Tree, insert, join

ByLeaf: TypeAlias = Callable[[Keys, "Tensor | None", "Tensor | None"], Tensor]


class Zip:
    """Makes one state of two, which may be for different leaves.

    Args:
        by_leaf: from the path of a leaf of the first tree, and its values in the two states, to the new one. A value is
            None where a state has none; one of them is a tensor.
        shared: from the two values of what is no leaf's own to the new one.
        first: the paths of the leaves that the first state is for, and the result.
        second: those of the second.

    Attributes:
        found: how many trees or lists with values for the leaves were met.
    """

    def __init__(
        self, by_leaf: ByLeaf, shared: Callable[[Any, Any], Any], first: Collection[Keys], second: Collection[Keys]
    ) -> None:
        self._by_leaf, self._shared = by_leaf, shared
        # Python's order of tuples of keys is that of a tree whose keys are sorted at every level.
        self._first, self._second = sorted(first), sorted(second)
        self.found = 0

    def __call__(self, one: Any, other: Any, at: str = "the state") -> Any:
        """Return the new state.

        Raises:
            TreeError: the two are of different structure, or a tensor is no leaf's.
        """
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            return self._dicts(one, other, at)
        if type(one) is not type(other) and not (isinstance(one, Tensor) and isinstance(other, Tensor)):
            raise TreeError(f"{at} is a {type(one).__name__} in one place and a {type(other).__name__} in the other")
        if isinstance(one, list) and self._are_leaves(one, other):
            made = self._leafwise(dict(zip(self._first, one, strict=True)), dict(zip(self._second, other, strict=True)))
            return list(made.values())
        if isinstance(one, tuple | list):
            return self._entries(one, other, at)
        if isinstance(one, Tensor) and (one.dim() or other.dim()):
            raise TreeError(
                f"{at} is a tensor {tuple(one.shape)} of no known leaf; what is held for each leaf is a tree of the "
                "paths of what trains, or a list in their order"
            )
        if not isinstance(one, Tensor | int | float | str | None):
            raise TreeError(f"{at} is a {type(one).__name__}; a state is made of dicts, tuples, lists and tensors")
        return self._shared(one, other)

    def _dicts(self, one: Mapping[str, Any], other: Mapping[str, Any], at: str) -> Tree:
        flat, others = dict(_flat(one)), dict(_flat(other))
        made: Tree = {}
        if flat.keys() <= {*self._first} and others.keys() <= {*self._second}:
            for keys, value in self._leafwise(flat, others).items():
                insert(made, keys, value)
            return made
        for key in dict.fromkeys((*one, *other)):
            # An optimizer may make a part of its state in its first step only.
            value = self(one.get(key, {}), other.get(key, {}), f"{at}.{key}")
            if key in one or value:
                made[key] = value
        return made

    def _entries(self, one: Any, other: Any, at: str) -> Any:
        if len(one) != len(other):
            raise TreeError(f"{at} has {len(one)} entries in one place and {len(other)} in the other")
        named = hasattr(one, "_fields")
        names = one._fields if named else range(len(one))
        made = [self(a, b, f"{at}.{name}") for name, a, b in zip(names, one, other, strict=True)]
        return type(one)(*made) if named else type(one)(made)

    def _leafwise(self, one: Mapping[Keys, Any], other: Mapping[Keys, Any]) -> dict[Keys, Tensor]:
        self.found += bool(one or other)
        made, known = {}, {*self._first}
        for keys in dict.fromkeys((*one, *other)):
            mine, theirs = one.get(keys), other.get(keys)
            if keys not in known:
                continue
            for value in (mine, theirs):
                if value is not None and not isinstance(value, Tensor):
                    raise TreeError(f"the leaf {join(keys)!r} is a {type(value).__name__}, not a tensor")
            if mine is not None and theirs is not None and theirs.shape != mine.shape:
                shapes = f"{tuple(mine.shape)} in one place and {tuple(theirs.shape)} in the other"
                raise TreeError(f"the leaf {join(keys)!r} is {shapes}")
            made[keys] = self._by_leaf(keys, mine, theirs)
        return made

    def _are_leaves(self, one: list[Any], other: list[Any]) -> bool:
        return (
            len(one) == len(self._first)
            and len(other) == len(self._second)
            and all(isinstance(entry, Tensor) for entry in (*one, *other))
        )


def _flat(tree: Mapping[str, Any], prefix: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, (*prefix, key))
        else:
            yield (*prefix, key), value

"""What no weight can express: a pure function around the call of a module."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peft_func.weights.groups import Groups


@dataclass(frozen=True)
class Around:
    """A function that is called in place of a module's forward, which it is given.

    Attributes:
        path: the module's path in the model.
        function: `(tree, inner, *args, **kwargs) -> output`; `inner` is the forward, or what earlier arounds made of
            it (see `functional.surround.Inner`).
        tree: the tensors of this place, a nested dict.
        part: the name of the part of the chain that it comes from.
        groups: of the batch, where the tensors have a leading axis over them; None otherwise.
        changes: whether it may change what the module returns; False for one that only leaves notes for others.
    """

    path: str
    function: Callable[..., Any]
    tree: Mapping[str, Any]
    part: str
    groups: Groups | None = None
    changes: bool = True


@dataclass(frozen=True)
class Site:
    """Where an add-in acts and how: what is known of an `Around` once its part is bound, before there are tensors.

    Attributes:
        path: the module's path in the model.
        function: as in `Around`.
        part: the name of the part of the chain.
        pick: from the part's tree to the tensors of this place. It computes nothing: they may have further leading
            axes.
        changes: as in `Around`.
    """

    path: str
    function: Callable[..., Any]
    part: str
    pick: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    changes: bool = True

    def around(self, tree: Mapping[str, Any]) -> Around:
        """Return the around with the tensors of a tree."""
        return Around(self.path, self.function, self.pick(tree), self.part, changes=self.changes)


def at(*keys: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Return what picks the sub-trees of these keys, joined; nothing where there is none."""
    return functools.partial(_at, keys)


def _at(keys: tuple[str, ...], tree: Mapping[str, Any]) -> dict[str, Any]:
    return {leaf: value for key in keys for leaf, value in tree.get(key, {}).items()}

"""What no weight can express: a pure function around the call of a module."""

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

"""The positions of a sequence at which an add-in acts, such as its first and its last tokens.

Positions count the tokens that are there: padding, at whichever side, is passed over. As in pyreft, of "f3+l5" no more
than half of a short sequence is first, and no more than half is last.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from peft_func.addins.arguments import by_name, parameters_of, token_mask, tokens_before
from peft_func.errors import AddinError, OptionError
from peft_func.functional.model import FunctionalModel
from peft_func.functional.surround import Inner
from peft_func.trees.paths import Tree

Positions: TypeAlias = str | slice | Sequence[int] | Callable[[Tensor, Tensor], Tensor]
"""`"all"`, `"f3"`, `"l2"`, `"f3+l2"`, a slice or its text `"2:8"`, a list of numbers, or `(rank, count) -> bool`."""

_ENDS = re.compile(r"(?:f(\d+))?\+?(?:l(\d+))?")
_SLICE = re.compile(r"(-?\d+)?:(-?\d+)?(?::(\d+))?")
_KEY = "tokens that are there"


def read_positions(name: str, positions: Any) -> Any:
    """Return positions as JSON has them: a text or a list; or the function, if it is one.

    Raises:
        OptionError: they cannot be read.
    """
    if isinstance(positions, slice):
        positions = ":".join("" if part is None else str(part) for part in (positions.start, positions.stop))
        positions += "" if slice_step(positions) is None else ""
    if callable(positions):
        return positions
    if isinstance(positions, str):
        ends = _ENDS.fullmatch(positions)
        if positions == "all" or _SLICE.fullmatch(positions) or (ends and any(map(int, filter(None, ends.groups())))):
            return positions
    elif isinstance(positions, Sequence) and positions and all(type(number) is int for number in positions):
        return list(positions)
    raise OptionError(
        f"{name}: positions={positions!r}; say 'all', 'f3+l2' (the first three and the last two tokens), 'f1', 'l1', "
        "a slice '2:8', a list of numbers, or give a function (rank, count) -> bool tensor"
    )

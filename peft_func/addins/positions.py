"""The positions of a sequence at which an add-in acts, such as its first and its last tokens.

Positions count the tokens that are there: padding, at whichever side, is passed over. As in pyreft, of "f3+l5" no more
than half of a short sequence is first, and no more than half is last.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from peft_func.addins.arguments import by_name, holders, parameters_of, token_mask, tokens_before
from peft_func.addins.once import once
from peft_func.errors import AddinError, OptionError
from peft_func.functional.surround import Inner
from peft_func.trees.paths import Tree
from peft_func.weights.around import Site, at

Positions: TypeAlias = str | slice | Sequence[int] | Callable[[Tensor, Tensor], Tensor]
"""`"all"`, `"f3"`, `"l2"`, `"f3+l2"`, a slice or its text `"2:8"`, a list of numbers, or `(rank, count) -> bool`."""

MASK = "attention_mask"

_ENDS = re.compile(r"f([1-9]\d*)(?:\+l([1-9]\d*))?|l([1-9]\d*)")
_SLICE = re.compile(r"(-?\d+)?:(-?\d+)?")


def read_positions(name: str, positions: Any) -> Any:
    """Return positions as JSON has them, a text or a list; or the function, if it is one.

    Raises:
        OptionError: they cannot be read.
    """
    if isinstance(positions, slice) and positions.step in (None, 1):
        positions = ":".join("" if end is None else str(end) for end in (positions.start, positions.stop))
    if isinstance(positions, str):
        if positions == "all" or _SLICE.fullmatch(positions) or _ENDS.fullmatch(positions):
            return positions
    elif callable(positions):
        return positions
    elif isinstance(positions, Sequence) and positions and all(type(number) is int for number in positions):
        return list(positions)
    raise OptionError(
        f"{name}: positions={positions!r}; say 'all', 'f3+l2' (the first three and the last two tokens), 'f1', 'l1', "
        "a slice '2:8', a list of numbers, or give a function (rank, count) -> bool tensor"
    )


def has_two_ends(positions: Any) -> bool:
    """Whether positions are both first and last ones."""
    return isinstance(positions, str) and "+" in positions


def chosen(positions: Any, rank: Tensor, count: Tensor) -> tuple[Tensor, ...]:
    """Return where positions are: one bool tensor, or one for the first and one for the last ones.

    Args:
        positions: what `read_positions` returned.
        rank: int `[batch or 1, tokens]`: the number of each token among those that are there.
        count: int `[batch or 1, 1]`: how many are there.
    """
    if positions == "all":
        return (torch.ones_like(rank, dtype=torch.bool),)
    if isinstance(positions, list):
        return (torch.stack([rank == (number if number >= 0 else count + number) for number in positions]).any(0),)
    if not isinstance(positions, str):
        return (positions(rank, count),)
    if ends := _SLICE.fullmatch(positions):
        start, stop = (None if end is None else int(end) for end in ends.groups())
        after = rank >= (0 if start is None else start if start >= 0 else count + start)
        return (after & (rank < (count if stop is None else stop if stop >= 0 else count + stop)),)
    ends = _ENDS.fullmatch(positions)
    assert ends is not None
    first, last = (None if n is None else torch.clamp(count // 2, max=int(n)) for n in (ends[1], ends[2] or ends[3]))
    groups = (None if first is None else rank < first, None if last is None else rank >= count - last)
    return tuple(group for group in groups if group is not None)


class Tokens:
    """Tells the positions at places of a model, from what the modules around them were called with.

    Attributes:
        noting: sites that see these calls; they belong behind (outside) those of the places.
    """

    def __init__(self, positions: Any, mask: str, name: str, root: nn.Module, paths: Sequence[str]) -> None:
        self._positions, self._mask, self._name = positions, mask, name
        self._at: dict[str, str] = {}
        if positions != "all":
            self._at = {path: _taker(root, path) for path in paths}
            _check_batch_first(root, paths, name)
        noted = [(taker, MASK) for taker in dict.fromkeys(self._at.values())]
        noted += [("", mask)] if self._at and mask != MASK else []
        self.noting = [
            Site(
                taker,
                functools.partial(note_tokens, parameters_of(root.get_submodule(taker)), which, name),
                name,
                at(),
                changes=False,
            )
            for taker, which in noted
        ]

    def at(self, path: str) -> Callable[[Tensor, Inner], tuple[Tensor, ...]]:
        """Return a function `(h, inner) -> masks` for a place; a mask is bool, and broadcasts with h."""
        return functools.partial(masks_of, self._positions, self._mask, self._at.get(path, ""), self._name)


def _taker(root: nn.Module, path: str) -> str:
    """Return the nearest module around a place that takes tokens and their mask; the whole net if there is none."""
    for holder in holders(path):
        names = parameters_of(root.get_submodule(holder))
        if MASK in names and {"input_ids", "inputs_embeds", "pixel_values"}.intersection(names):
            return holder
    return ""


def _check_batch_first(root: nn.Module, paths: Sequence[str], name: str) -> None:
    for path in paths:
        for module in root.get_submodule(path).modules():
            if getattr(module, "batch_first", True) is False:
                raise OptionError(
                    f"{name}: {path!r} has the batch on its second axis, and positions are those of the second; "
                    "build it with batch_first=True, or say positions='all'"
                )


def note_tokens(names: tuple[str, ...], mask: str, name: str, tree: Tree, inner: Inner, *args: Any, **kw: Any) -> Any:
    """Leave the mask of this call for the places inside."""
    given = by_name(names, args, kw)
    inner.notes[_key(inner.path, mask)] = token_mask(given, mask, name), tokens_before(given)
    if mask not in names:
        kw.pop(mask, None)
    return inner(*args, **kw)


def _key(at: str, mask: str) -> tuple[str, str, str]:
    return "tokens", at, mask


def masks_of(positions: Any, mask: str, at: str, name: str, h: Tensor, inner: Inner) -> tuple[Tensor, ...]:
    """Return where the positions are in an activation `[batch, tokens, features]`."""
    if positions == "all":
        return (torch.ones((), dtype=torch.bool, device=h.device),)
    if h.dim() != 3:
        raise AddinError(
            f"{name}: at {inner.path!r} an activation is {tuple(h.shape)}, not [batch, tokens, features], so it has no "
            "positions; say positions='all'"
        )
    there, before = inner.notes.get(_key(at, MASK), (None, 0))
    own = inner.notes.get(_key("", mask), (None, 0))[0]
    there, mask = (there, MASK) if own is None else (own, mask)
    if isinstance(before, int) and before > 0:
        return (torch.zeros((), dtype=torch.bool, device=h.device),) * (2 if has_two_ends(positions) else 1)
    if there is not None and there.shape[1] != h.shape[1]:
        raise AddinError(
            f"{name}: at {inner.path!r} there are {h.shape[1]} tokens, and {mask} is for {there.shape[1]}; if another "
            "part of the chain adds tokens, put it behind this one"
        )
    given, count, device = (positions, there, before), h.shape[1], h.device
    return once(inner, ("positions", count, device), given, lambda: _masks(*given, count, device))


def _masks(positions: Any, there: Tensor | None, before: Any, tokens: int, device: torch.device) -> tuple[Tensor, ...]:
    if there is None:
        rank, count = torch.arange(tokens, device=device)[None], torch.full((1, 1), tokens, device=device)
        found = chosen(positions, rank, count)
    else:
        there = (there if there.dtype is torch.bool else there != 0).to(device)
        rank, count = there.long().cumsum(1) - 1, there.long().sum(1, keepdim=True)
        found = tuple(group & there for group in chosen(positions, rank, count))
    first = before == 0  # of a cache with a fixed length, a tensor
    return tuple((group if first is True else group & first)[..., None] for group in found)

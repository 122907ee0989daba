"""What many places of one call would compute alike, such as masks, is computed at the first of them and noted."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from peft_func.functional.surround import Inner
from peft_func.weights.eager import in_transform

Made = TypeVar("Made")

_KEPT = 4
"""A net has few kinds of masks; a call that generates has new ones for each token, of which the latest are kept."""


def once(inner: Inner, key: tuple[Hashable, ...], given: Sequence[Any], make: Callable[[], Made]) -> Made:
    """Return what was made in this call of the same key and the same values, or make it.

    Args:
        inner: of the call, whose notes keep what is made.
        key: names what is made, and all else that it depends on.
        given: what it is made of. Numbers and texts must be equal; tensors and all else must be the same objects, and
            not written to since.
        make: makes it, without any other input.
    """
    if in_transform():
        return make()  # a compiler sees by itself what is computed twice; what a transform maps is gone with it
    if any(isinstance(value, Tensor) and value.is_inference() for value in given):
        return make()  # these count no writes
    # What the first run of a reentrant checkpoint makes has no gradient, and is not for where there should be one.
    slot = ("once", *key, torch.is_grad_enabled())
    kept = inner.notes.get(slot, ())
    marks = [value._version if isinstance(value, Tensor) else 0 for value in given]
    for values, versions, made in kept:
        if versions == marks and all(map(_same, values, given)):
            found: Made = made
            return found
    new = make()
    inner.notes[slot] = (*kept, (tuple(given), marks, new))[-_KEPT:]
    return new


def _same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, int | str) and type(one) is type(other) and one == other)

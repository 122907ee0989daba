"""Randomness is an argument: a key is an integer, and it splits by path.

A leaf that is drawn from `split(key, path)` depends on the key and on its own path, and on nothing else: adding a
target, or another transform, changes no other leaf's first value, and the global generators are never touched.
"""

import contextlib
import contextvars
import hashlib
from collections.abc import Iterator
from typing import TypeAlias

import torch

from peft_func.errors import OptionError

Key: TypeAlias = int | torch.Generator

_SHAPES_ONLY = contextvars.ContextVar("shapes only", default=False)


def as_key(key: Key) -> int:
    """Return the integer of a key; one number is drawn from a generator, which moves on as generators do.

    Raises:
        OptionError: the key is neither an integer nor a `torch.Generator`.
    """
    if isinstance(key, torch.Generator):
        return int(torch.randint(2**62, (), generator=key, device=key.device))
    if isinstance(key, bool) or not isinstance(key, int):
        raise OptionError(f"a key is an int or a torch.Generator, not {key!r}; write adapter.init(0)")
    return key


def split(key: Key, path: str) -> int:
    """Return the key for one path: a 63-bit integer, the same on every machine.

    Example:
        >>> import peft_func as pf
        >>> pf.split(0, "q.weight") == pf.split(0, "q.weight") != pf.split(0, "v.weight")
        True
    """
    digest = hashlib.sha256(f"{as_key(key)}/{path}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Draw nothing within this context: `uniform` and `normal` give tensors on meta, whatever the size."""
    token = _SHAPES_ONLY.set(True)
    try:
        yield
    finally:
        _SHAPES_ONLY.reset(token)


def _draw(fill: str, shape: tuple[int, ...], scale: float, key: int, like: torch.Tensor) -> torch.Tensor:
    # Drawn on the CPU in float32 whatever `like` is, so that a seed means the same adapter on every device and in
    # every dtype; half-precision bases get float32 factors, because updates of an adapter are lost in bfloat16.
    dtype = torch.float32 if like.dtype.itemsize < 4 else like.dtype
    if like.is_meta or _SHAPES_ONLY.get():
        return torch.empty(shape, dtype=dtype, device="meta")
    values = torch.empty(shape, dtype=torch.float32, device="cpu")  # whatever the default device is
    generator = torch.Generator("cpu").manual_seed(key)
    if fill == "uniform":
        values.uniform_(-scale, scale, generator=generator)
    else:
        values.normal_(0.0, scale, generator=generator)
    return values.to(like.device, dtype)


def uniform(shape: tuple[int, ...], bound: float, key: int, like: torch.Tensor) -> torch.Tensor:
    """Draw from U(-bound, bound), on the device and in the dtype of `like` (float32 for a half-precision one)."""
    return _draw("uniform", shape, bound, key, like)


def normal(shape: tuple[int, ...], std: float, key: int, like: torch.Tensor) -> torch.Tensor:
    """Draw from N(0, std^2), on the device and in the dtype of `like` (float32 for a half-precision one)."""
    return _draw("normal", shape, std, key, like)

"""What happens when a structured weight has to be formed inside a call: allowed, hinted at, or an error."""

import contextlib
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Literal

import torch

from peft_func.errors import DensifyError, OptionError

Policy = Literal["allow", "warn", "error"]

_policy: ContextVar[Policy] = ContextVar("densify", default="warn")


class DensifyWarning(UserWarning):
    """A structured weight was formed; the result is right, but it cost the memory and time of a dense weight."""


@contextlib.contextmanager
def densify(policy: Policy) -> Iterator[None]:
    """Choose what happens in this block (and thread) when a structured weight is formed inside a call of a model.

    Args:
        policy: `"allow"` it silently, `"warn"` once for each place (the default), or make it an `"error"`.

    Raises:
        OptionError: an unknown policy.

    Example:
        >>> import peft_func as pf
        >>> with pf.densify("error"):
        ...     pass  # a training step here raises pf.DensifyError rather than form W + BA
    """
    if policy not in ("allow", "warn", "error"):
        raise OptionError(f"densify takes 'allow', 'warn' or 'error', not {policy!r}")
    token = _policy.set(policy)
    try:
        yield
    finally:
        _policy.reset(token)


def forming_is_an_error() -> bool:
    """Whether the policy forbids to form a weight."""
    return _policy.get() == "error"


def note_densified(path: str, reason: str) -> None:
    """Apply the policy to one weight that is about to be formed.

    Raises:
        DensifyError: the policy is `"error"`.
    """
    if torch.compiler.is_compiling():
        return  # no warnings inside a graph; run the call once without compile to see them
    policy = _policy.get()
    message = f"the effective weight {path!r} is formed, because {reason} has no rule for structured weights"
    if policy == "error":
        raise DensifyError(message)
    if policy == "warn":
        warnings.warn(f"{message}; the result is right", DensifyWarning, stacklevel=2)

"""A subclass for each class of nets, whose forward says what the net's takes: Trainer asks the class."""

import functools
import inspect
from collections.abc import Callable
from typing import Any


def class_for(cls: Any, net: Any, forward: Callable[..., Any]) -> Any:
    """Return the subclass; one that has a forward of its own, other than the one given, keeps its signature."""
    return _subclass(written_class(cls), net, forward)


def written_class(cls: Any) -> Any:
    """Return the class that was written, of one that `class_for` made."""
    return getattr(cls, "_written", cls)


@functools.cache
def _subclass(cls: Any, net: Any, general: Callable[..., Any]) -> Any:
    contents: dict[str, Any] = {"__module__": cls.__module__, "__doc__": cls.__doc__, "_written": cls}
    if cls.forward is general:

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return general(self, *args, **kwargs)

        forward.__signature__ = inspect.signature(net.forward)  # type: ignore[attr-defined]
        forward.__doc__ = general.__doc__
        contents["forward"] = forward
    return type(f"{cls.__name__}{net.__name__}", (cls,), contents)

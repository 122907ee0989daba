"""The main tensor among what a module receives or returns: alone, the first of a tuple, or the first of a dict."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peft_func.errors import AddinError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def main(value: Any) -> Tensor:
    """Return the main tensor of an output: itself, or the first tensor in a tuple, a list or a dict.

    Raises:
        AddinError: there is none.
    """
    if isinstance(value, Tensor):
        return value
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    for item in items:
        if isinstance(item, Tensor):
            return item
    raise AddinError(f"an add-in needs a tensor here; the module gives a {type(value).__name__} without one")


def with_main(value: Any, new: Tensor) -> Any:
    """Return an output with another main tensor; its type stays (tuples, named tuples, Hugging Face's outputs)."""
    if isinstance(value, Tensor):
        return new
    old = main(value)
    if isinstance(value, Mapping):
        return type(value)(**{key: new if item is old else item for key, item in value.items()})
    items = [new if item is old else item for item in value]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def main_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the first tensor among positional and then keyword arguments.

    Raises:
        AddinError: there is none.
    """
    return main([*args, *kwargs.values()])


def with_main_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], new: Any) -> Arguments:
    """Return the arguments with another first tensor."""
    old = main_argument(args, kwargs)
    place = next((i for i, item in enumerate(args) if item is old), None)
    if place is not None:
        return (*args[:place], new, *args[place + 1 :]), dict(kwargs)
    return args, {key: new if item is old else item for key, item in kwargs.items()}

"""The arguments of a module's forward by their names: token masks and positions are found by what they are called."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from peft_func.errors import AddinError


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """Return the names of what a module's forward takes, in order, without `*args` and `**kwargs`."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(type(module).forward).parameters.values()
    return tuple(parameter.name for parameter in found if parameter.kind in kinds)[1:]


def holders(path: str) -> Iterator[str]:
    """Yield the paths of the modules around a module, from the nearest to the whole net."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def by_name(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def tokens_before(arguments: Mapping[str, Any]) -> Any:
    """Return how many tokens the cache of keys and values holds, of a call whose arguments are given by name."""
    cache = arguments.get("past_key_values")
    return 0 if cache is None else cache.get_seq_length()


def token_mask(arguments: Mapping[str, Any], name: str, who: str) -> Tensor | None:
    """Return the mask over tokens `[batch, tokens]` of a call; None if it has none.

    Raises:
        AddinError: the argument is no mask over tokens, such as one over pairs of them.
    """
    mask = arguments.get(name)
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
        return mask
    found = f"{mask.dim()} dimensions" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
    raise AddinError(f"{who}: {name} has {found}; it must be [batch, tokens], which says where the padding is")

"""An add-in given as an `nn.Module`: it becomes a pure function itself, with a copy of its parameters at each place."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_func.addins.place import Place
from peft_func.errors import OptionError
from peft_func.functional.model import FunctionalModel, functionalize


@dataclass(frozen=True)
class Built:
    """Makes the module of an add-in for each place: `pf.built(lambda place: Bottleneck(place.module.out_features))`.

    Attributes:
        build: takes a `Place`, returns a new `nn.Module`.
    """

    build: Callable[[Place], nn.Module]


def built(build: Callable[[Place], nn.Module]) -> Built:
    """Say that a function makes the module of an add-in, for `pf.around`, `pf.before`, `pf.after` and `pf.across`.

    Example:
        >>> import torch, peft_func as pf
        >>> after_each = pf.built(lambda place: torch.nn.Linear(place.module.out_features, place.module.out_features))
        >>> model = pf.functionalize(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)))
        >>> adapter = pf.bind(pf.after(["0", "1"], after_each, name="mix"), model)
        >>> [list(leaf.shape) for leaf in adapter.init(0)[1]["mix"]["1"].values()]
        [[2, 2], [2]]
    """
    return Built(build)


def builder_of(thing: Any) -> Callable[[Place], nn.Module] | None:
    """Return what makes the module of an add-in, if it is one: a class, an instance, or `pf.built(...)`."""
    if isinstance(thing, Built):
        return thing.build
    if isinstance(thing, nn.Module):
        return lambda place: thing
    if isinstance(thing, type) and issubclass(thing, nn.Module):
        return lambda place: thing()
    return None


class Functional:
    """A module as `(tree, *args, **kwargs) -> output`, in the mode of the module that it is added to."""

    def __init__(self, module: nn.Module, place: Place) -> None:
        model = functionalize(module).to(place.like.device, place.like.dtype)
        self._models = {mode: model.train(mode) for mode in (True, False)}

    @property
    def params(self) -> dict[str, Tensor]:
        """The parameters by name, in the dtype and on the device of the place."""
        return self._models[True].params

    def in_mode(self, training: bool) -> FunctionalModel:
        """Return the functional model in train or eval mode."""
        return self._models[training]


def drawn(build: Callable[[Place], nn.Module], place: Place, key: int) -> Functional:
    """Build a module whose first values depend on the key only; the global generator is left as it was.

    Raises:
        OptionError: what it makes is no module.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key)
        module = build(place)
    if not isinstance(module, nn.Module):
        raise OptionError(f"an add-in at {place.path!r} is a {type(module).__name__}; it must be an nn.Module")
    return Functional(module, place)


def leaves_of(functional: Functional) -> Mapping[str, Tensor]:
    """Return the first values of the tree of a place."""
    return {name: tensor.clone() for name, tensor in functional.params.items()}

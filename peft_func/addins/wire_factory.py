"""What makes the add-in of a wire: a class, an instance, or a function of the place and the wire's keywords."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from peft_func.addins.modules import Built
from peft_func.addins.place import Place
from peft_func.addins.wire_class import Protocol, method_of, methods_of
from peft_func.addins.wiring import Wire, path_text
from peft_func.errors import OptionError
from peft_func.trees.select import nearest


def maker(wire: Wire, factories: Mapping[str, Any]) -> Callable[[Place], nn.Module]:
    """Return what makes the add-in of a wire at a place."""
    if wire.name not in factories:
        near = f"the nearest given: {', '.join(nearest(wire.name, factories, 3))}" if factories else "none is given"
        raise wire.spot.error(f"no add-in {wire.name!r}; {near}. Give it as pf.wire(..., {wire.name}=its class)")
    factory = factories[wire.name]
    if isinstance(factory, nn.Module) and wire.kwargs:
        raise wire.spot.error(f"{wire.name} is a module, which takes no keywords; give its class")
    if not isinstance(factory, Built | nn.Module) and not callable(factory):
        raise OptionError(f"wire: {wire.name} is a {type(factory).__name__}; give an nn.Module class, or a function")
    if isinstance(factory, type):
        if not issubclass(factory, nn.Module):
            raise OptionError(f"wire: the class {factory.__name__} is no nn.Module")
        _check_methods(wire, factory)
    takes_place = not isinstance(factory, nn.Module) and _takes_place(wire, factory)

    def make(place: Place) -> nn.Module:
        build = factory.build if isinstance(factory, Built) else factory
        addin = build if isinstance(build, nn.Module) else build(*[place] * takes_place, **wire.kwargs)
        if not isinstance(addin, nn.Module):
            raise OptionError(
                f"wire: {wire.name} made a {type(addin).__name__} at {place.path!r}; expected an nn.Module"
            )
        _check_methods(wire, type(addin))
        return Protocol(addin)

    return make


def _takes_place(wire: Wire, factory: Any) -> bool:
    """Say whether a factory requires the place, too; its signature must take the keywords of the wire."""
    always = isinstance(factory, Built)
    factory = factory.build if always else factory
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        return True
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    known = signature.parameters.values()
    needed = [p.name for p in known if p.kind in positional and p.default is p.empty and p.name not in wire.kwargs]
    if len(needed) > 1:
        raise wire.spot.error(
            f"{wire.name} needs {', '.join(needed)}, and a factory gets one argument, the place: give "
            f"{wire.name}=lambda place: {wire.name}({', '.join(needed)})"
        )
    takes = always or bool(needed)
    try:
        signature.bind(*[None] * takes, **wire.kwargs)
    except TypeError as error:
        names = ", ".join(p.name for p in known if p.name not in needed) or "none"
        raise wire.spot.error(f"{wire.name}: {error}; its keywords: {names}") from None
    return takes


def _check_methods(wire: Wire, kind: type) -> None:
    for end in wire.ends:
        method = method_of(kind, end.hook)
        if method is None:
            close = ", ".join(nearest(end.hook, methods_of(kind), 3))
            raise end.spot.error(f"{wire.name} has no method {end.hook!r}; the nearest: {close}")
        takes = ("module", "inputs", "outputs")[: 2 if end.side == "pre" else 3]
        try:
            inspect.signature(method).bind("self", *takes)
        except TypeError:
            where = "into" if end.side == "pre" else "out of"
            raise end.spot.error(
                f"{end.hook} is put on the way {where} ({path_text(end.path)}), where it is called with "
                f"({', '.join(takes)}); it takes {inspect.signature(method)}"
            ) from None

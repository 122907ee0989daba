"""Add-ins wired into a model by a line of text: `(A.f): ...->{in1}(fc1)->...->{out1}(fc3)->...`."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from peft_func.addins.across import note_keys
from peft_func.addins.around import nothing
from peft_func.addins.modules import drawn, leaves_of
from peft_func.addins.place import Place, place_at
from peft_func.addins.wire_class import Hook, run_hooks
from peft_func.addins.wire_drawing import is_drawing, parse_drawing
from peft_func.addins.wire_factory import maker
from peft_func.addins.wire_parser import parse
from peft_func.addins.wire_records import from_records, to_records
from peft_func.addins.wiring import Keys, Spot, Wire, draw, path_text
from peft_func.errors import OptionError, SelectorError
from peft_func.functional.model import FunctionalModel
from peft_func.functional.walk import walk
from peft_func.transforms.transform import Part, Transform, check_name
from peft_func.trees.keys import split
from peft_func.trees.paths import Tree, insert
from peft_func.trees.select import exact, nearest
from peft_func.weights.around import Site
from peft_func.weights.mapping import Weights


@dataclass(frozen=True, repr=False)
class Wiring(Part):
    """Add-ins and where they meet the base model; made by `pf.wire`. `print` draws it in the one-line grammar.

    Attributes:
        wires: one for each add-in.
    """

    wires: tuple[Wire, ...] = ()

    def resolve(self, model: FunctionalModel) -> tuple[str, ...]:
        """Return the paths of all modules that have a hook, in the order of a walk.

        Raises:
            SelectorError: the text names a module that the model has not; shows the column and the nearest names.
        """
        for wire in self.wires:
            for path, spot in wire.passed:
                locate(path, model, spot)
        found = {locate(end.path, model, end.spot) for wire in self.wires for end in wire.ends}
        return tuple(path for path in walk(model._skeleton.root) if path in found)

    @property
    def records(self) -> list[dict[str, Any]]:
        """The wires as dicts of `name`, `location`, `hook` and `kwargs`, which `pf.wire` reads as well."""
        return to_records(self.wires)

    def __str__(self) -> str:
        return draw(self.wires)

    def __repr__(self) -> str:
        return f"Wiring({str(self)!r}, name={self.name!r})"


def wire(
    wiring: str | Mapping[str, Any] | Sequence[Mapping[str, Any]], *, name: str = "wire", **factories: Any
) -> Wiring:
    r"""Put add-ins into a model by ZhiJian's one-line grammar, its records, or a drawing.

    `(A.f): ...->{inout1}(fc2)->...` replaces what enters `fc2` by what `A`'s method `f` makes of it. A marker belongs
    to the module on its left ("post": on the way out), or else to that on its right ("pre": on the way in). `{in1}`
    notes what is there, and at `{out1}` the method finds it in `self.inputs_cache`; without any out, `{in1}...{in2}`
    are in and out, by pairs. `blocks[0:12]` makes a copy of the expression for each index, with an add-in of its own;
    several ranges advance together. `...` and `->` carry no meaning, expressions are separated by commas, and white
    space is free. Beyond ZhiJian's: `(A(dim=8).f)` gives the factory keywords, and `{out1.g}` a marker its own method.

    The add-in's class is written as `pf.AddinBase` says, and never keeps anything between calls. Hooks at one module
    run in the order of the text: those before the module, then those after it.

    Args:
        wiring: the text; or records `{"name", "location", "hook", "kwargs"}`, where a record with several locations is
            one add-in that they share; or several lines that draw rows of `(modules)`, `(A.f)`, `->` and `|`.
        name: the sub-tree: `trainable[name][add-in][module path][leaf]`, where the path is that of its first method.
        **factories: for each name of an add-in, what makes it: an `nn.Module` class, or a function, called with the
            keywords of the record, and with the `Place` of its first method if it requires one argument more; or
            `pf.built(...)`, or an instance.

    Returns:
        A method for `pf.chain` and `pf.bind`, whose `str` is its grammar and whose `.records` are its records.

    Raises:
        OptionError: the text, a record or a factory is wrong; shows where in the text.
        SelectorError: at `bind`, if there is no such module.
        AddinError: in a call, if an add-in gives before it takes.

    Example:
        >>> import torch, peft_func as pf
        >>> class Scale(pf.AddinBase):
        ...     def __init__(self, width):
        ...         super().__init__()
        ...         self.scale = torch.nn.Parameter(torch.ones(width))
        ...     def adapt_input(self, module, inputs):
        ...         return inputs[0] * self.scale
        >>> method = pf.wire("(Scale.adapt_input): ...->{inout1}([0:2])->...", Scale=lambda place: Scale(4))
        >>> print(method)
        (Scale.adapt_input): ...->{inout1}([0])->...,
        (Scale.adapt_input): ...->{inout1}([1])->...
        >>> model = pf.functionalize(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)))
        >>> adapter = pf.bind(method, model)
        >>> model(adapter.apply(*adapter.init(0)), torch.ones(3, 4)).shape
        torch.Size([3, 2])
    """
    check_name(name)
    if not isinstance(wiring, str):
        wires = from_records(wiring)
    elif is_drawing(wiring, factories):
        wires = parse_drawing(wiring, factories)
    else:
        wires = parse(wiring)
    makers = [maker(wire, factories) for wire in wires]
    unused = sorted(factories.keys() - {wire.name for wire in wires})
    if unused:
        raise OptionError(
            f"wire: {unused[0]} is wired nowhere; the wiring names {', '.join({w.name: 0 for w in wires})}"
        )
    where = exact(path_text(end.path) for wire in wires for end in wire.ends)
    make = functools.partial(_make, wires, makers, name)
    return Wiring(where, make, name, modules=True, wires=wires)


def locate(path: Keys, model: FunctionalModel, spot: Spot) -> str:
    """Return the path by which a walk knows the module that a wire names.

    Raises:
        SelectorError: there is none; names the nearest.
    """
    root = model._skeleton.root
    module: nn.Module = root
    names: list[str] = []
    for key in path:
        children = {name: child for name, child in module._modules.items() if child is not None}
        count = sum(name.isdigit() for name in children)
        name = str(key + count) if isinstance(key, int) and key < 0 else str(key)
        if name not in children:
            inside = f"({'.'.join(names)})" if names else "the model"
            if isinstance(key, int) and count:
                message = f"{inside} has {count} numbered modules; expected an index from {-count} to {count - 1}"
            else:
                wanted = ".".join(map(str, path))
                message = f"{inside} has no module {key!r}. The nearest names: {', '.join(nearest(wanted, walk(root)))}"
            raise SelectorError(f"wire: {spot.explain(f'no module ({path_text(path)}): {message}')}")
        module = children[name]
        names.append(name)
    first: str = next(name for name, part in root.named_modules() if part is module)
    return first


def _make(
    wires: tuple[Wire, ...],
    makers: list[Callable[[Place], nn.Module]],
    name: str,
    paths: tuple[str, ...],
    model: FunctionalModel,
) -> Transform:
    keys: list[tuple[str, str]] = []
    builds: list[tuple[Callable[[Place], nn.Module], Place]] = []
    hooks: dict[str, list[Hook]] = {path: [] for path in paths}
    key = note_keys(name)
    for number, (wire, make) in enumerate(zip(wires, makers, strict=True)):
        first = locate(next(end.path for end in wire.ends if end.kind != "in"), model, wire.spot)
        place = place_at(model, first)
        functional = drawn(make, place, 0)
        builds.append((make, place))
        keys.append((wire.name, _unused(first, [key for other, key in keys if other == wire.name])))
        sources = {end.number: locate(end.path, model, end.spot) for end in wire.ends if end.kind == "in"}
        for end in wire.ends:
            alone = end.kind == "inout"
            note = key(first if alone else sources[end.number], f"{number}.{0 if alone else end.number}")
            hook = Hook(end.kind, end.side, end.hook, str(number), functional, note)
            hooks[locate(end.path, model, end.spot)].append(hook)

    def init(weights: Weights, key: int) -> Tree:
        tree: Tree = {}
        for own, (make, place) in zip(keys, builds, strict=True):
            leaves = leaves_of(drawn(make, place, split(split(key, own[0]), own[1])))
            if leaves:
                insert(tree, own, {leaf.removeprefix("addin."): tensor for leaf, tensor in leaves.items()})
        return tree

    def site(path: str, own: list[Hook]) -> Site:
        places = {hook.key: keys[int(hook.key)] for hook in own}
        return Site(path, functools.partial(run_hooks, tuple(own)), name, functools.partial(_picked, places))

    return Transform(init, nothing, sites=tuple(site(path, own) for path, own in hooks.items()))


def _picked(places: Mapping[str, tuple[str, str]], tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tree.get(name, {}).get(place, {}) for key, (name, place) in places.items()}


def _unused(path: str, used: list[str]) -> str:
    """Return the key of an add-in: where its first method is, numbered if another is there already."""
    return next(key for n in itertools.count(1) if (key := path if n == 1 else f"{path}#{n}") not in used)

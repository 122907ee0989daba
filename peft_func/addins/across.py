"""What is at one place of a model, used at another, in the same call."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from peft_func.addins.around import Init, bodies_at, called, nothing
from peft_func.addins.modules import builder_of
from peft_func.addins.place import place_at
from peft_func.addins.values import main, main_argument, with_main, with_main_argument
from peft_func.errors import AddinError, LeakError, OptionError
from peft_func.functional.model import FunctionalModel
from peft_func.functional.surround import Inner
from peft_func.functional.walk import resolve_modules
from peft_func.transforms.options import check_choice
from peft_func.transforms.transform import Part, Transform, check_name
from peft_func.trees.paths import Tree
from peft_func.trees.select import Where
from peft_func.weights.around import Site, at

SIDES = ("input", "output")

Key: TypeAlias = tuple[str, str, str]
"""Where a call keeps what a part notes: the part's name, the path of the place, and what it is."""

_SERIAL = itertools.count()


def across(
    source: Where,
    sink: Where,
    function: Any,
    init: Init | None = None,
    *,
    taken: str = "output",
    given: str = "input",
    name: str = "across",
    share: bool = False,
) -> Part:
    """Use the activation at one module to change that at another, later in the same call.

    Nothing survives the call: the activation goes from place to place with it, so threads, `vmap`, compiled calls and
    checkpointing (with `use_reentrant=False`) work.

    Args:
        source: a selector over modules: where the activation is taken.
        sink: a selector over modules: what is changed. Several sources and sinks are paired in order; one source may
            serve all sinks.
        function: `(tree, taken, here) -> here`: the main tensors of both places. Or an `nn.Module`, as for
            `pf.around`, whose forward takes `(taken, here)`.
        init: as for `pf.around`; the places are the sinks.
        taken: `"output"` or `"input"` of the source: its first tensor.
        given: `"input"` or `"output"` of the sink.
        name: as for `pf.around`.
        share: as for `pf.around`.

    Raises:
        SelectorError: at `bind`, if a selector matches no module.
        OptionError: at `bind`, if sources and sinks cannot be paired.
        AddinError: in a call, if a sink is run before its source.
        LeakError: in a call, if reentrant checkpointing has cut the way between the two.

    Example:
        >>> import torch, peft_func as pf
        >>> model = pf.functionalize(torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)]))
        >>> def gate(place, key):
        ...     return {"gate": torch.zeros(())}
        >>> adapter = pf.bind(pf.across("0", "2", lambda tree, a, x: x + tree["gate"] * a, gate), model)
        >>> model(adapter.apply(*adapter.init(0)), torch.ones(1, 4)).shape
        torch.Size([1, 4])
    """
    check_name(name)
    check_choice(name, "taken", taken, SIDES)
    check_choice(name, "given", given, SIDES)
    if builder_of(function) is None and not callable(function):
        raise OptionError(f"{name}: a {type(function).__name__} is no add-in; give a function or an nn.Module")

    ends = (source, taken, given)
    return Part(sink, functools.partial(_transform, ends, function, init, name, share), name, modules=True)


def _transform(
    ends: tuple[Where, str, str],
    function: Any,
    init: Init | None,
    name: str,
    share: bool,
    paths: tuple[str, ...],
    model: FunctionalModel,
) -> Transform:
    source, taken, given = ends
    pairs = _paired(resolve_modules(source, model, name), paths, name)
    sources = list(dict.fromkeys(pairs))
    places = [place_at(model, path) for path in paths]
    for path, place in zip(pairs, places, strict=True):
        if path == place.path and (taken, given) == ("output", "input"):
            raise OptionError(f"{name}: the output of {path!r} cannot change its own input")
    bodies = bodies_at(function, init, places, share=share)
    key = note_keys(name)
    noting = [
        Site(path, functools.partial(note, key(path, taken), taken), name, at(), changes=False) for path in sources
    ]
    using = [
        Site(
            place.path,
            functools.partial(use, key(path, taken), given, bodies.function(place)),
            name,
            at(bodies.key(place)),
        )
        for place, path in zip(places, pairs, strict=True)
    ]
    # At one module, what is taken on the way in is taken outside, and what is taken on the way out inside.
    sites = [*using, *noting] if taken == "input" else [*noting, *using]
    return Transform(bodies.init, nothing, sites=tuple(sites))


def _paired(sources: Sequence[str], sinks: Sequence[str], name: str) -> Sequence[str]:
    """Return the source of every sink."""
    if len(sources) == 1:
        return [sources[0]] * len(sinks)
    if len(sources) != len(sinks):
        raise OptionError(
            f"{name}: {len(sources)} sources ({', '.join(sources[:3])}) and {len(sinks)} sinks "
            f"({', '.join(sinks[:3])}) cannot be paired; select as many of both, or one source"
        )
    return sources


def note_keys(name: str) -> Callable[[str, str], Key]:
    """Return what makes the keys of a part's notes; it is made anew whenever a part is bound.

    Two parts of one name may be in one chain, below named chains: they must not find each other's notes.
    """
    serial = next(_SERIAL)
    return lambda path, what: (name, path, f"{what} {serial}")


def note(key: Key, side: str, tree: Tree, inner: Inner, *args: Any, **kwargs: Any) -> Any:
    """Leave what is at a module for other places of this call."""
    if side == "input":
        inner.notes[key] = main_argument(args, kwargs), torch.is_grad_enabled()
    output = inner(*args, **kwargs)
    if side == "output":
        inner.notes[key] = main(output), torch.is_grad_enabled()
    return output


def use(key: Key, side: str, function: Callable[..., Any], tree: Tree, inner: Inner, *args: Any, **kwargs: Any) -> Any:
    """Change what is at a module by what was left at another."""
    if side == "input":
        here = called(function, inner, tree, noted(key, inner), main_argument(args, kwargs))
        args, kwargs = with_main_argument(args, kwargs, here)
        return inner(*args, **kwargs)
    output = inner(*args, **kwargs)
    return with_main(output, called(function, inner, tree, noted(key, inner), main(output)))


def noted(key: Key, inner: Inner) -> torch.Tensor:
    """Return what was left at another place of this call.

    Raises:
        AddinError: nothing was, so far.
        LeakError: it was computed without gradients, which are wanted now.
    """
    name, path, _ = key
    if key not in inner.notes:
        raise AddinError(f"{name}: {inner.path!r} runs before {path!r}, from which it takes; put the source first")
    value, graded = inner.notes[key]
    if torch.is_grad_enabled() and not graded and value.is_floating_point():
        raise LeakError(
            f"{name}: what {inner.path!r} takes from {path!r} was computed without gradients (reentrant checkpointing "
            "does so), and its gradient would be lost; use use_reentrant=False"
        )
    tensor: torch.Tensor = value
    return tensor

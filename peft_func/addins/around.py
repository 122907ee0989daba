"""The four ways to act on activations: around a module, before it, after it, and across from one to another.

With `f` the add-in, `M` the module and `theta` the tensors of the place:

    around:  y = f(theta, M, x)        before:  y = M(f(theta, x))
    after:   y = f(theta, M(x))        across:  y = M(f(theta, a, x)),  a what was at another place of the same call
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

from peft_func.addins.modules import Functional, builder_of, drawn, leaves_of
from peft_func.addins.place import Place, place_at
from peft_func.addins.values import with_main_argument
from peft_func.errors import OptionError
from peft_func.functional.model import FunctionalModel
from peft_func.functional.surround import Inner
from peft_func.transforms.transform import Changes, Part, Transform, check_name
from peft_func.trees.keys import split
from peft_func.trees.paths import Tree
from peft_func.trees.select import Where
from peft_func.weights.around import Site, at
from peft_func.weights.mapping import Weights

Init: TypeAlias = Callable[[Place, int], Mapping[str, Any]]
"""First values of what trains at a place: `(place, key) -> tree`."""

Function: TypeAlias = Callable[..., Any]
"""What an around does: `(tree, inner, *args, **kwargs) -> output`."""

SHARED = "shared"
"""The key of the tree that all places share."""


def around(
    where: Where,
    function: Any,
    init: Init | None = None,
    *,
    name: str = "around",
    share: bool = False,
) -> Part:
    """Put a function around the calls of modules.

    Args:
        where: a selector over modules.
        function: `(tree, inner, *args, **kwargs) -> output`, where `inner(*args, **kwargs)` runs the module and what
            earlier parts of the chain put around it; `inner.training` is its mode. It must be pure. Or an `nn.Module`
            (a class without arguments, an instance, `pf.built(...)`) whose forward takes `(inner, *args, **kwargs)`.
        init: `(place, key) -> tree`: the first values of what trains, for each place; None if nothing does, or for a
            module, whose parameters they are (under their names, in the dtype of the place).
        name: the sub-tree: `trainable[name][module path][leaf]`.
        share: one tree, under `"shared"`, for all places.

    Raises:
        SelectorError: at `bind`, if no module is selected.
        OptionError: an option cannot work.

    Example:
        >>> import torch, peft_func as pf
        >>> model = pf.functionalize(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)))
        >>> def scaled(tree, inner, x):
        ...     return inner(x) * tree["scale"]
        >>> method = pf.around("0", scaled, lambda place, key: {"scale": torch.ones(4)}, name="ssf")
        >>> adapter = pf.bind(pf.chain(method, pf.lora("1", rank=1)), model)
        >>> frozen, trainable = adapter.init(0)
        >>> list(trainable["ssf"]["0"])
        ['scale']
        >>> model(adapter.apply(frozen, trainable), torch.ones(3, 4)).shape
        torch.Size([3, 2])
    """
    return surrounding(where, function, init, as_it_is, name=name, share=share)


def before(where: Where, function: Any, init: Init | None = None, *, name: str = "before", share: bool = False) -> Part:
    """Change what modules receive.

    Args:
        where: a selector over modules.
        function: `(tree, *args, **kwargs)`, with what the module is called with; it returns a new first tensor, or all
            arguments as a pair `(args, kwargs)` of a tuple and a dict. Or an `nn.Module`, as for `pf.around`.
        init: as for `pf.around`.
        name: as for `pf.around`.
        share: as for `pf.around`.

    Example:
        >>> import torch, peft_func as pf
        >>> model = pf.functionalize(torch.nn.Linear(4, 2))
        >>> shift = pf.before("", lambda tree, x: x + tree["shift"], lambda place, key: {"shift": torch.zeros(4)})
        >>> adapter = pf.bind(shift, model)
        >>> model(adapter.apply(*adapter.init(0)), torch.ones(3, 4)).shape
        torch.Size([3, 2])
    """
    return surrounding(where, function, init, _before, name=name, share=share)


def after(where: Where, function: Any, init: Init | None = None, *, name: str = "after", share: bool = False) -> Part:
    """Change what modules return.

    Args:
        where: a selector over modules.
        function: `(tree, output) -> output`; an output that is a tuple comes and goes as one. Or an `nn.Module`, as for
            `pf.around`.
        init: as for `pf.around`.
        name: as for `pf.around`.
        share: as for `pf.around`.

    Example:
        >>> import torch, peft_func as pf
        >>> model = pf.functionalize(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()))
        >>> adapter = pf.bind(pf.after("0", pf.built(lambda place: torch.nn.Linear(4, 4)), name="more"), model)
        >>> list(adapter.init(0)[1]["more"]["0"])
        ['weight', 'bias']
    """
    return surrounding(where, function, init, _after, name=name, share=share)


def surrounding(
    where: Where,
    function: Any,
    init: Init | None,
    how: Callable[[Function], Function],
    *,
    name: str,
    share: bool = False,
    kind: str | None = None,
    options: dict[str, Any] | None = None,
) -> Part:
    """Make the part of a chain that puts `how(function)` around modules; `kind` and `options` are for files."""
    check_name(name)
    if builder_of(function) is None and not callable(function):
        raise OptionError(f"{name}: a {type(function).__name__} is no add-in; give a function or an nn.Module")

    make = functools.partial(_transform, function, init, how, name, share)
    return Part(where, make, name, kind=kind, options=options, modules=True)


def _transform(
    function: Any,
    init: Init | None,
    how: Callable[[Function], Function],
    name: str,
    share: bool,
    paths: tuple[str, ...],
    model: FunctionalModel,
) -> Transform:
    places = [place_at(model, path) for path in paths]
    bodies = bodies_at(function, init, places, share=share)

    sites = (Site(place.path, how(bodies.function(place)), name, at(bodies.key(place))) for place in places)
    return Transform(bodies.init, nothing, sites=tuple(sites))


class Bodies:
    """The functions of an add-in at its places, and their trees."""

    def __init__(self, places: list[Place], init: Init, functions: Mapping[str, Function], share: bool) -> None:
        self._places = places[:1] if share else places
        self._init = init
        self._functions = functions
        self._share = share

    def key(self, place: Place) -> str:
        """Return the key of a place's own tree."""
        return SHARED if self._share else place.path

    def function(self, place: Place) -> Function:
        """Return the function at a place."""
        return self._functions[self.key(place)]

    def init(self, weights: Weights, key: int) -> Tree:
        """Return the first values for all places."""
        trees = {self.key(place): self._init(place, split(key, self.key(place))) for place in self._places}
        return {path: dict(tree) for path, tree in trees.items() if tree}


def bodies_at(function: Any, init: Init | None, places: list[Place], *, share: bool) -> Bodies:
    """Return an add-in's functions and first values, whether it is a function or a module."""
    build = builder_of(function)
    if build is None:
        key = (SHARED,) if share else [place.path for place in places]
        return Bodies(places, init or _empty, dict.fromkeys(key, function), share)
    if init is not None:
        raise OptionError("an add-in that is an nn.Module has its own parameters: leave out init")
    own = [(SHARED, places[0])] if share else [(place.path, place) for place in places]
    functions = {key: functools.partial(_run, drawn(build, place, 0)) for key, place in own}
    return Bodies(places, lambda place, key: leaves_of(drawn(build, place, key)), functions, share)


def nothing(tree: Tree, weights: Weights) -> Changes:
    """Change no weight."""
    return {}


def _empty(place: Place, key: int) -> dict[str, Tensor]:
    return {}


def _run(functional: Functional, tree: Mapping[str, Tensor], *args: Any, training: bool, **kwargs: Any) -> Any:
    return functional.in_mode(training)(tree, *args, **kwargs)


def called(function: Function, inner: Inner, *args: Any, **kwargs: Any) -> Any:
    """Call an add-in's function; one that is a module learns the mode of the module that it is added to."""
    if isinstance(function, functools.partial) and function.func is _run:
        return function(*args, training=inner.training, **kwargs)
    return function(*args, **kwargs)


def as_it_is(function: Function) -> Function:
    """Take a function as one around modules: `how` of `surrounding`."""
    return functools.partial(_call_around, function)


def _call_around(function: Function, tree: Tree, inner: Inner, *args: Any, **kwargs: Any) -> Any:
    return called(function, inner, tree, inner, *args, **kwargs)


def _before(function: Function) -> Function:
    return functools.partial(_call_before, function)


def _call_before(function: Function, tree: Tree, inner: Inner, *args: Any, **kwargs: Any) -> Any:
    new = called(function, inner, tree, *args, **kwargs)
    if isinstance(new, tuple) and len(new) == 2 and isinstance(new[0], tuple) and isinstance(new[1], dict):
        args, kwargs = new
    else:
        args, kwargs = with_main_argument(args, kwargs, new)
    return inner(*args, **kwargs)


def _after(function: Function) -> Function:
    return functools.partial(_call_after, function)


def _call_after(function: Function, tree: Tree, inner: Inner, *args: Any, **kwargs: Any) -> Any:
    return called(function, inner, tree, inner(*args, **kwargs))

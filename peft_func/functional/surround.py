"""Functions around the calls of modules, installed on the private copy for one call.

Eagerly they are put on the clone of that call. A compiled call runs on `Entry`, where every place that ever had an
around asks, while it is traced, which ones there are now: nothing of that is left in the graph.
"""

import functools
import inspect
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import nn

from peft_func.errors import AddinError, UnusedAddinWarning
from peft_func.functional.skeleton import structural_copy
from peft_func.weights.around import Around

Notes = dict[Any, Any]
"""What arounds of one call leave for each other."""


class Inner:
    """The call that an around is around.

    Attributes:
        module: the module of this call, with its weights of this call.
        call: what it runs.
        path: its path in the model.
        notes: a dict of this call of the model, for arounds at other places; it is gone when the call is.
    """

    def __init__(self, call: Callable[..., Any], module: nn.Module, path: str, notes: Notes) -> None:
        self.call = call
        self.module = module
        self.path = path
        self.notes = notes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, with the arounds that were there before."""
        return self.call(*args, **kwargs)

    @property
    def training(self) -> bool:
        """Whether the module is in train mode."""
        return bool(self.module.training)


class Forward:
    """What stands in place of a forward, and says what it takes: `generate`, Trainer and `torch.export` ask."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call: Callable[..., Any] | None = call

    @property
    def call(self) -> Callable[..., Any]:
        """What it stands for."""
        assert self._call is not None
        return self._call

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.call)

    @property
    def __code__(self) -> Any:
        return getattr(self.call, "__code__", None)


class Surrounded(Forward):
    """The forward of a module with one around.

    It is an attribute of the module, and holds it weakly: a cycle would keep the weights and the notes of a call until
    the garbage is collected.
    """

    def __init__(self, around: Around, module: nn.Module, notes: Notes) -> None:
        self.around = around
        self.notes = notes
        self.called = False
        self._module = weakref.ref(module)
        self._call = vars(module).get("forward")  # that of the class would be bound, and hold the module
        self._kept: nn.Module | None = None

    @property
    def module(self) -> nn.Module:
        """The module of this call, with its weights of this call."""
        module = self._module()
        if module is None:
            raise AddinError(
                f"the forward of {self.around.path!r} is called after the call of the model, whose weights are gone"
            )
        return module

    @property
    def call(self) -> Callable[..., Any]:
        """What it is around."""
        module = self.module
        return types.MethodType(type(module).forward, module) if self._call is None else self._call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.called = True
        module = self.module
        if sys._getframe(1).f_code not in _OF_MODULES:
            self._kept = module  # `checkpoint(module.forward, x)` holds nothing else until it runs this again
        inner = Inner(self.call, module, self.around.path, self.notes)
        return self.around.function(self.around.tree, inner, *args, **kwargs)


# What calls the forward of a module, or of a `Surrounded` that is around another: all of these have the module.
_OF_MODULES = {
    code
    for caller in (nn.Module._call_impl.__code__, Inner.__call__.__code__)
    for code in (caller, *caller.co_consts)
    if isinstance(code, types.CodeType)
}


def surround(root: nn.Module, arounds: Iterable[Around], fused: "Fused") -> list[Surrounded]:
    """Put functions around the calls of modules of a clone that belongs to one call, and return them."""
    notes: Notes = {}
    installed = []
    for around in arounds:
        module = called_module(root, around.path, fused)
        vars(module)["forward"] = call = Surrounded(around, module, notes)
        installed.append(call)
    return installed


def warn_of_unused(installed: "Iterable[Surrounded]") -> None:
    """Warn of arounds whose module was not called: what they should do is missing from the output."""
    unused = dict.fromkeys(call.around.path for call in installed if not call.called)
    if unused:
        parts = dict.fromkeys(call.around.part for call in installed if not call.called)
        warnings.warn(
            f"the add-in {', '.join(map(repr, parts))} did nothing at {', '.join(unused)}: this call never ran the "
            "forward of that module (its parent reads its weights, or skips it)",
            UnusedAddinWarning,
            stacklevel=4,
        )


Fused: TypeAlias = Mapping[str, Sequence[str]]
"""For modules inside of torch's encoders and their layers, by each of their paths: the paths of all of those."""


def fused_layers(root: nn.Module) -> Fused:
    """Return which modules of a model a fused kernel may pass by; nothing for most models."""
    kinds = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
    layers = {path: {*part.modules()} - {part} for path, part in root.named_modules() if isinstance(part, kinds)}
    if not layers:
        return {}
    # A module in two layers is called by both, and each has to leave its kernel.
    every = root.named_modules(remove_duplicate=False)
    around = {name: [path for path, inside in layers.items() if module in inside] for name, module in every}
    return {name: paths for name, paths in around.items() if paths}


def called_module(root: nn.Module, path: str, fused: Fused) -> nn.Module:
    """Return a module, and make those around it call it."""
    # In eval mode torch's encoder layers hand their weights to one fused kernel, which calls no module.
    for holder in fused.get(path, ()):
        layer = _module_at(root, holder)
        if isinstance(layer, nn.TransformerEncoderLayer):
            vars(layer)["activation_relu_or_gelu"] = 0
        else:
            vars(layer)["use_nested_tensor"] = False
    return _module_at(root, path)


def _module_at(root: nn.Module, path: str) -> nn.Module:
    module = root
    for name in path.split(".") if path else ():  # the registries themselves: get_submodule asks for attributes
        module = module._modules[name]  # type: ignore[assignment]
    return module


class Hosts:
    """The places where add-ins may be, for all callables of one module: in train mode, in eval mode, its methods."""

    def __init__(self) -> None:
        self.paths: set[str] = set()
        self._entries: weakref.WeakSet[Entry] = weakref.WeakSet()

    def __reduce__(self) -> Any:
        return _hosts_of, (self.paths,)  # a copy of a model makes entries of its own

    def add(self, paths: Iterable[str]) -> None:
        """Let compiled calls ask for arounds at these places, too."""
        self.paths.update(paths)
        for entry in self._entries:
            entry.host(self.paths)

    def entry(self, root: nn.Module, method: str) -> "Entry":
        """Return what runs compiled calls of a method of a module."""
        entry = Entry(root, method)
        entry.host(self.paths)
        self._entries.add(entry)
        return entry


def _hosts_of(paths: set[str]) -> Hosts:
    hosts = Hosts()
    hosts.add(paths)
    return hosts


class Entry(nn.Module):
    """A module whose forward is a method of another, with arounds."""

    def __init__(self, root: nn.Module, method: str) -> None:
        super().__init__()
        self.root = root
        self.method = method
        self._now = _Now()

    def host(self, paths: Iterable[str]) -> None:
        """Let modules ask for their arounds; the module tree is copied first, for it belongs to others."""
        missing = set(paths) - self._now.places
        if missing and not self._now.places:
            self.root = structural_copy(self.root)
        fused = fused_layers(self.root) if missing else {}
        for path in missing:
            module = called_module(self.root, path, fused)
            vars(module)["forward"] = _Asking(module.forward, module, path, self._now)
        self._now.places |= missing

    def forward(self, arounds: tuple[Around, ...], *args: Any, **kwargs: Any) -> Any:
        """Call the method, with these arounds."""
        for around in arounds:
            if around.path not in self._now.places:
                raise AddinError(
                    f"{around.path!r} was no place of an add-in when this model was made; call pf.bind with it before "
                    "torch.compile meets the model"
                )
        self._now.arounds, self._now.notes = arounds, {}
        try:
            call = self.root if self.method == "forward" else getattr(self.root, self.method)
            return call(*args, **kwargs)
        finally:
            self._now.arounds, self._now.notes = (), {}


class _Now:
    """The arounds of the call that is being traced."""

    def __init__(self) -> None:
        self.places: set[str] = set()
        self.arounds: tuple[Around, ...] = ()
        self.notes: Notes = {}


class _Asking(Forward):
    """A forward that looks up what is around it."""

    def __init__(self, call: Callable[..., Any], module: nn.Module, path: str, now: _Now) -> None:
        super().__init__(call)
        self.module, self.path, self.now = module, path, now

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.call
        for around in self.now.arounds:
            if around.path == self.path:
                inner = Inner(call, self.module, self.path, self.now.notes)
                call = functools.partial(around.function, around.tree, inner)
        return call(*args, **kwargs)

"""A plain `nn.Module` that carries add-ins: a copy of the net with merged weights, and functions on its modules."""

import contextvars
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_func.functional.containers import Container, Place, hold_parameter
from peft_func.functional.skeleton import Skeleton
from peft_func.functional.surround import Forward, Inner, Notes, called_module, fused_layers
from peft_func.transforms.bind import Adapter
from peft_func.trees.paths import join, leaves
from peft_func.weights.around import Around
from peft_func.weights.mapping import Weights
from peft_func.weights.merge import merge

_NOTES: contextvars.ContextVar[Notes | None] = contextvars.ContextVar("notes of the call", default=None)


def export_module(adapter: Adapter, frozen: Mapping[str, Tensor], trainable: Mapping[str, Any]) -> nn.Module:
    """Return a plain module of the net's class, with the adapter in it: weights merged, add-ins on their modules.

    It is a copy: it shares nothing with the net or with the trees, and needs no call of this library. Its `state_dict`
    has the names of the net's, and the leaves of add-ins under `addins.`; it pickles if the functions of its add-ins
    do (functions of a module, not lambdas), deep-copies, and goes through `torch.export` (with `pf.across` in it, with
    `strict=False`, the default of recent versions).

    Args:
        adapter: the bound adapter, with or without add-ins.
        frozen: its first tree.
        trainable: its second tree.

    Example:
        >>> import torch, peft_func as pf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> model = pf.functionalize(net)
        >>> method = pf.chain(pf.lora("1", rank=1), pf.after("0", pf.built(lambda place: torch.nn.Linear(4, 4))))
        >>> adapter = pf.bind(method, model)
        >>> module = pf.export_module(adapter, *adapter.init(0))
        >>> list(module.state_dict())[-2:]
        ['addins.after.0.weight', 'addins.after.0.bias']
        >>> module(torch.ones(3, 4)).shape
        torch.Size([3, 2])
    """
    model = adapter.model
    with torch.no_grad():
        weights = adapter.apply(frozen, trainable)
        merged = merge(Weights(weights, weights.base, weights.layouts))
    params = {name: nn.Parameter(tensor.detach().clone()) for name, tensor in merged.items()}
    state = {name: tensor.clone() for name, tensor in model.state.items()}
    root = Skeleton(model._skeleton.copy()).clone(params, state)
    if not weights.arounds:
        return root
    used = {id(tensor) for around in weights.arounds for _, tensor in leaves(around.tree)}
    held, places = _Held(), {}
    for keys, tensor in leaves(trainable):
        if id(tensor) in used:
            places[id(tensor)] = hold_parameter(held, join(keys), tensor.detach().clone())
    if places:
        root._modules["addins"] = held
    calls, fused = _Calls(), fused_layers(root)
    for around in weights.arounds:
        module = called_module(root, around.path, fused)
        vars(module)["forward"] = _Surrounded(module.forward, module, around, _placed(around.tree, places), calls)
    vars(root)["forward"] = _Root(root.forward, calls)
    return root


class _Held(Container):
    """The leaves of add-ins. A net that runs all its children in turn, as `Sequential` does, passes through."""

    def forward(self, value: Any) -> Any:
        return value


class _Calls:
    """Where arounds of a call find each other's notes: those of the running call, or of the last one in backward."""

    def __init__(self) -> None:
        self.last: Notes = {}

    def notes(self) -> Notes:
        """Return the notes of this call."""
        now = None if torch.compiler.is_compiling() else _NOTES.get()
        return self.last if now is None else now

    def __reduce__(self) -> Any:
        return _Calls, ()


class _Root(Forward):
    """The forward of the whole module: it begins a call."""

    def __init__(self, call: Callable[..., Any], calls: _Calls) -> None:
        super().__init__(call)
        self.calls = calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # Dynamo knows no context variables
            output = self.call(*args, **kwargs)
            if self.calls.last:
                self.calls.last = {}
            return output
        notes: Notes = {}
        token = _NOTES.set(notes)
        try:
            return self.call(*args, **kwargs)
        finally:
            _NOTES.reset(token)
            # Activation checkpointing runs parts of this call again when gradients are computed.
            self.calls.last = notes if torch.is_grad_enabled() else {}


class _Surrounded(Forward):
    """The forward of a module with a function around it."""

    def __init__(self, call: Callable[..., Any], module: nn.Module, around: Around, tree: Any, calls: _Calls) -> None:
        super().__init__(call)
        self.module, self.calls = module, calls
        self.path, self.function, self.tree = around.path, around.function, tree

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inner = Inner(self.call, self.module, self.path, self.calls.notes())
        return self.function(_tensors(self.tree), inner, *args, **kwargs)


def _placed(tree: Mapping[str, Any], places: Mapping[int, Place]) -> dict[str, Any]:
    return {key: places[id(v)] if isinstance(v, Tensor) else _placed(v, places) for key, v in tree.items()}


def _tensors(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.get() if isinstance(value, Place) else _tensors(value) for key, value in tree.items()}

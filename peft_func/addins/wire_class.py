"""Classes whose methods are hooks, as pure functions: what they keep between hooks goes with the call of the model.

With `c` what the add-in noted (`inputs_cache`), `M` the module, and the methods those of its class:

    pre:   x' = method(M, (x, ...))      post:  y' = method(M, (x, ...), y)      both read and write c

Each call of a method runs on a private copy of the add-in: `c` is put on the copy before, taken from it after, and left
for the next hook of the same call.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_func.addins.across import Key, noted
from peft_func.addins.modules import Functional
from peft_func.addins.values import main, main_argument, with_main, with_main_argument
from peft_func.errors import AddinError
from peft_func.functional.surround import Inner


class AddinBase(nn.Module):
    """A base for add-ins whose methods are hooks, for `pf.wire`.

    A method `(module, inputs)` runs on the way into a module: `inputs` is the tuple of its positional arguments (its
    first tensor, if it is called with keywords only); what it returns replaces the first, a tuple replaces all, and
    None leaves them. A method `(module, inputs, outputs)` runs on the way out: `outputs` is the main tensor of what the
    module returns, and what it returns replaces that; a tuple replaces the whole output. `inputs_cache` holds what was
    noted earlier in the same call of the model; nothing is kept after it. A class need not inherit this one: the names
    of its methods count.

    Example:
        >>> import torch, peft_func as pf
        >>> class Skip(pf.AddinBase):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.scale = torch.nn.Parameter(torch.zeros(()))
        ...     def adapt_output(self, module, inputs, outputs):
        ...         return outputs + self.scale * self.inputs_cache
        >>> method = pf.wire("(Skip.adapt_output): ...->{in1}(0){out1}->...", Skip=Skip)
        >>> model = pf.functionalize(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()))
        >>> pf.bind(method, model).init(0)[1]
        {'wire': {'Skip': {'0': {'scale': tensor(0.)}}}}
    """

    inputs_cache: Any

    def __init__(self) -> None:
        super().__init__()
        self.inputs_cache = None

    def get_pre(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Note what enters the module."""
        self.inputs_cache = inputs[0]

    def get_post(self, module: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> None:
        """Note what leaves the module."""
        self.inputs_cache = outputs

    def add_pre(self, module: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
        """Add what was noted to what enters the module."""
        added: Tensor = inputs[0] + _cache_of(self)
        return added

    def add_post(self, module: nn.Module, inputs: tuple[Any, ...], outputs: Tensor) -> Tensor:
        """Add what was noted to what leaves the module."""
        return outputs + _cache_of(self)


def _cache_of(addin: nn.Module) -> Tensor:
    cache = getattr(addin, "inputs_cache", None)
    if cache is None:
        raise AddinError(
            f"{type(addin).__name__} adds what it has noted, and has noted nothing; wire it with get_pre or get_post "
            "first"
        )
    tensor: Tensor = cache
    return tensor


def method_of(kind: type, name: str) -> Callable[..., Any] | None:
    """Return a method of an add-in's class, or the base's where the class does not inherit it."""
    method = getattr(kind, name, None) or (getattr(AddinBase, name) if name in vars(AddinBase) else None)
    return method if callable(method) else None


def methods_of(kind: type) -> list[str]:
    """Return the names of the methods that may be hooks: those of the class and of its bases, without `nn.Module`'s."""
    bases = [base for base in kind.__mro__ if not issubclass(nn.Module, base)]
    names = {name for base in (*bases, AddinBase) for name in vars(base)}
    return sorted(name for name in names if not name.startswith("_") and method_of(kind, name) is not None)


class Protocol(nn.Module):
    """An add-in whose forward is any of its hooks, and gives back what it has noted."""

    def __init__(self, addin: nn.Module) -> None:
        super().__init__()
        self.addin = addin

    def forward(self, method: str, side: str, cache: Any, module: nn.Module, *values: Any) -> tuple[Any, Any]:
        """Run a hook.

        Args:
            method: of the add-in.
            side: `"pre"` or `"post"`.
            cache: what was noted; None if nothing was.
            module: the module of the base model.
            *values: what entered it, and, after it, its output.

        Returns:
            What the hook returns, and what is noted now.
        """
        addin: Any = self.addin
        before = getattr(addin, "inputs_cache", None)
        if cache is not None:
            addin.inputs_cache = cache
        try:
            arguments = (values,) if side == "pre" else (values[:-1], values[-1])
            hook = method_of(type(addin), method)
            result = hook(addin, module, *arguments)  # type: ignore[misc]
            return result, getattr(addin, "inputs_cache", None)
        finally:
            addin.inputs_cache = before  # a compiled call has no copy of its own


@dataclass(frozen=True)
class Hook:
    """A method of an add-in at one side of a module.

    Attributes:
        kind: `"inout"`, `"in"` or `"out"`, as of an `End`.
        side: `"pre"` or `"post"`.
        method: of the add-in.
        key: of the add-in's tensors in the tree of the place.
        functional: the add-in's `Protocol` as a pure function.
        note: where this call keeps what the add-in noted.
    """

    kind: str
    side: str
    method: str
    key: str
    functional: Functional
    note: Key

    def __call__(self, tree: Mapping[str, Any], inner: Inner, *values: Any) -> Any:
        """Return what the method returns."""
        weights = {f"addin.{name}": tensor for name, tensor in tree[self.key].items()}
        cache = noted(self.note, inner) if self.kind == "out" or self.note in inner.notes else None
        run = self.functional.in_mode(inner.training)
        result, now = run(weights, self.method, self.side, cache, inner.module, *values)
        if now is not None and (now is not cache or self.kind == "in"):
            inner.notes[self.note] = now, torch.is_grad_enabled()
        return result


def run_hooks(hooks: tuple[Hook, ...], tree: Mapping[str, Any], inner: Inner, *args: Any, **kwargs: Any) -> Any:
    """Run a module with hooks before and after it, each kind in its order, as torch runs a module's own hooks."""
    inputs = args or tuple(value for value in kwargs.values() if isinstance(value, Tensor))[:1]
    for hook in hooks:
        if hook.side == "pre":
            _check_inputs(hook, inputs, inner)
            new = hook(tree, inner, *inputs)
            if new is not None:
                inputs = new if isinstance(new, tuple) else (new, *inputs[1:])
    if args:
        args = inputs
    elif inputs and inputs[0] is not main_argument((), kwargs):
        if len(inputs) > 1:
            raise AddinError(f"{inner.path!r} is called with keywords only; an add-in can replace its first tensor")
        args, kwargs = with_main_argument((), kwargs, inputs[0])
    output = inner(*args, **kwargs)
    for hook in hooks:
        if hook.side == "post":
            new = hook(tree, inner, *inputs, main(output))
            if new is not None:
                output = with_main(output, new) if isinstance(new, Tensor) else new
    return output


def _check_inputs(hook: Hook, inputs: tuple[Any, ...], inner: Inner) -> None:
    if not inputs:
        raise AddinError(f"{hook.method}: {inner.path!r} is called without a tensor; put the add-in after it (post)")

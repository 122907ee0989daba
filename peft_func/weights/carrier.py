"""The carrier takes an operator through a module's own code, which expects a tensor.

It is an empty tensor on the meta device with the operator as an attribute: it holds no storage, so a use that slips
past the rules meets the meta device instead of base values. Every torch function on it comes to `__torch_function__`,
which answers questions about shape, dtype and device, uses the rule for the function where there is one, and
otherwise forms the weight.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

from peft_func.errors import LeakError, RouteError
from peft_func.weights.densify import note_densified
from peft_func.weights.eager import in_transform
from peft_func.weights.groups import Grouped
from peft_func.weights.operator import Operator

Rule: TypeAlias = Callable[..., Any]
"""A function of the arguments of the torch function; it may return `NotImplemented` to have the weight formed."""

RULES: dict[Any, Rule] = {}
"""How each torch function acts with carriers among its arguments."""

GROUP_RULES: dict[Any, Rule] = {}
"""How it acts where one of them carries a weight that differs along the batch."""


def implements(*functions: Any, rules: dict[Any, Rule] = RULES) -> Callable[[Rule], Rule]:
    """Register a rule for torch functions."""

    def register(rule: Rule) -> Rule:
        rules.update(dict.fromkeys(functions, rule))
        return rule

    return register


class Carrier(Tensor):
    """An operator in the clothes of a tensor; it lives for one call of a model."""

    op: Operator

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = RULES.get(func)
        if rule is not None:
            result = rule(*args, **kwargs)
            if result is not NotImplemented:
                return result
        elif func in _OF_THE_SHELL:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if (name.endswith("_") and not name.endswith("__")) or "out" in kwargs or name in _WRITES:
            path = next(carrier.op.path for carrier in (*args, *kwargs.values()) if isinstance(carrier, Carrier))
            raise LeakError(
                f"{name} writes to the effective weight {path!r}, which is computed for this call only; "
                "a model that updates its own weights in place is no pure function of them"
            )
        return func(*_plain(args, name), **_plain(kwargs, name))


class GroupedCarrier(Carrier):
    """The carrier of a weight that differs along the batch: what has no rule cannot be done with it."""

    op: Grouped

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = GROUP_RULES.get(func)
        if rule is not None:
            result = rule(*args, **kwargs)
            if result is not NotImplemented:
                return result
        elif func in _OF_THE_SHELL:
            return super().__torch_function__(func, types, args, kwargs)
        name = getattr(func, "__name__", str(func))
        given = [
            value for arg in (*args, *kwargs.values()) for value in (arg if isinstance(arg, list | tuple) else [arg])
        ]
        paths = [value.op.path for value in given if isinstance(value, GroupedCarrier)]
        raise RouteError(f"{name} has no rule for weights that differ along the batch: {', '.join(paths) or 'unknown'}")


def shells_need_grad() -> bool:
    """Whether the shell of an operator that requires a gradient has to require one."""
    # An autograd.Function takes the shell without asking `__torch_function__`, and whatever gradient it returned would
    # be lost. The shell therefore requires a gradient, which autograd then refuses to accept on the meta device. Under
    # functorch and compile such a function does ask, and the weight is formed for it.
    return not in_transform() and torch.is_grad_enabled()


def carry(op: Operator, need_grad: bool | None = None) -> Carrier:
    """Dress an operator as a tensor; `need_grad` is what `shells_need_grad` said, where many are dressed at once."""
    requires_grad = (shells_need_grad() if need_grad is None else need_grad) and op.requires_grad
    kind = GroupedCarrier if isinstance(op, Grouped) else Carrier
    if torch.compiler.is_dynamo_compiling():
        carrier = torch.empty(op.layout.shape, dtype=op.dtype, device="meta").as_subclass(kind)
    else:
        carrier = Tensor._make_subclass(kind, _shell(op.layout.size, op.dtype), requires_grad)
    carrier.op = op
    return carrier


@functools.lru_cache(maxsize=1024)
def _shell(size: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return an empty tensor to alias, which costs half of making one; it outlives what is around this call."""
    with temporarily_clear_interpreter_stack(), _disable_current_modes(), torch.inference_mode(mode=False):
        return torch.empty(size, dtype=dtype, device="meta")


def form(carrier: Carrier, reason: str) -> Tensor:
    """Form the weight of a carrier, as the densify policy allows.

    Raises:
        LeakError: its transform drops activations.
        DensifyError: the policy forbids it.
    """
    if carrier.op.matrix.has_dropout:
        raise LeakError(
            f"{reason} needs the effective weight {carrier.op.path!r} itself, but its transform drops activations, "
            "which no weight can express; use dropout=0, model.eval(), or adapt another place"
        )
    note_densified(carrier.op.path, reason)
    return carrier.op.materialise()


def _plain(value: Any, reason: str) -> Any:
    """Replace the carriers in (nested) arguments by the weights they stand for."""
    if isinstance(value, Carrier):
        return form(value, reason)
    if isinstance(value, tuple | list):
        return type(value)(_plain(item, reason) for item in value)
    if isinstance(value, dict):
        return {key: _plain(item, reason) for key, item in value.items()}
    return value


def getter(name: str) -> Any:
    """Return the function that torch passes to `__torch_function__` when an attribute is read."""
    return getattr(Tensor, name).__get__


# What the empty tensor itself answers rightly.
_OF_THE_SHELL = {
    *map(getter, ["shape", "dtype", "ndim", "layout", "is_sparse", "is_quantized", "is_nested", "is_mkldnn"]),
    *map(getter, ["itemsize", "nbytes", "_version"]),
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.nelement,
    Tensor.ndimension,
    Tensor.stride,
    Tensor.is_contiguous,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.element_size,
    Tensor.__len__,
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}

_WRITES = {"__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "data_ptr", "untyped_storage"}

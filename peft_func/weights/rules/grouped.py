"""Weights that differ along the batch: products with each group's own matrix, and everything else group by group.

A product runs the shared part (the base weight) once over the whole batch and the groups' own parts as batched
products; convolutions, lookups and norms go through `torch.func.vmap` over the groups, which does the same.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_func.errors import RouteError
from peft_func.weights.carrier import GROUP_RULES, RULES, Carrier, GroupedCarrier, Rule, carry, getter, implements
from peft_func.weights.groups import Grouped, Groups
from peft_func.weights.layout import Layout, Storage
from peft_func.weights.matrix import Dense
from peft_func.weights.operator import Operator
from peft_func.weights.rules.matmul import stored


def groups_of(*values: Any) -> Groups:
    """Return the groups that the carriers among some arguments are for."""
    found = {value.op.groups for value in values if isinstance(value, GroupedCarrier)}
    if len(found) != 1:
        raise RouteError(f"weights for different batches meet in one function: {found}")
    return found.pop()


def product(x: Tensor, weight: Any, bias: Any, groups: Groups, what: str, *, flattened: bool = False) -> Tensor:
    """Return `x M^T + bias`: `[total, *, in]` to `[total, *, out]`; both may be those of each group, or of all."""
    shared = None if isinstance(bias, GroupedCarrier) else bias
    if isinstance(weight, GroupedCarrier):
        parts = groups.split(x, what, flattened=flattened)
        if x.dim() < 2:
            raise RouteError(f"{what} meets a single vector of {tuple(x.shape)} in a batch of {groups.total}")
        y = stored(weight).linear(parts.flatten(1, -2), shared)
        y = y.reshape(-1, *parts.shape[2:-1], y.shape[-1])
    else:
        y = F.linear(x, weight, shared)
    if bias is shared:
        return y
    return pointwise(torch.add, y, bias, flattened=flattened).to(y.dtype)  # autocast casts a bias to its product


def pointwise(function: Callable[..., Tensor], x: Tensor, weight: GroupedCarrier, *, flattened: bool = False) -> Tensor:
    """Apply a pointwise function to an activation and the groups' own values of a parameter, which broadcasts."""
    name, groups, shape = getattr(function, "__name__", "this"), weight.op.groups, weight.op.layout.shape
    parts = groups.split(x, name, flattened=flattened)
    missing = x.dim() - len(shape)
    if missing < 0 or (missing == 0 and shape[0] != 1):  # its first dimension would have to be the batch
        raise RouteError(f"{name} broadcasts {tuple(x.shape)} with {weight.op.path!r} {shape}, which differs along it")
    own = weight.op.each().reshape(groups.count, *[1] * missing, *shape)
    return function(parts, own).flatten(0, 1)


@implements(F.linear, rules=GROUP_RULES)
def linear(input: Tensor, weight: Any, bias: Any = None) -> Any:
    if isinstance(input, Carrier) or weight.dim() != 2:
        return NotImplemented
    groups = groups_of(weight, bias)
    if isinstance(weight, GroupedCarrier) and weight.op.layout.storage is Storage.TRANSPOSED:
        return NotImplemented
    return product(input, weight, bias, groups, "linear")


@implements(torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__, rules=GROUP_RULES)
def matmul(input: Any, other: Any) -> Any:
    if isinstance(input, Carrier) or other.dim() != 2:
        return NotImplemented
    return product(input, transpose(other), None, groups_of(other), "matmul")


@implements(torch.addmm, Tensor.addmm, rules=GROUP_RULES)
def addmm(input: Any, left: Any, right: Any, *, beta: float = 1, alpha: float = 1, out: Any = None) -> Any:
    if isinstance(left, Carrier) or out is not None or beta != 1 or alpha != 1:
        return NotImplemented
    # HF Conv1D joins the positions of each sample to the batch before this.
    groups = groups_of(input, right)
    transposed = transpose(right) if isinstance(right, Carrier) else right.mT
    return product(left, transposed, input, groups, "addmm", flattened=True)


@implements(torch.t, Tensor.t, getter("T"), getter("mT"), rules=GROUP_RULES)
def transpose(input: Carrier) -> Any:
    if not isinstance(input, GroupedCarrier):
        return input.mT
    if input.dim() != 2 or input.op.layout.is_conv:
        return NotImplemented
    matrix = stored(input).T
    layout = Layout(Storage.MATRIX, matrix.shape[-2:])
    return carry(Grouped(matrix, input.op.groups, layout, input.op.dtype, input.op.path))


@implements(torch.transpose, Tensor.transpose, rules=GROUP_RULES)
def swap(input: GroupedCarrier, dim0: int, dim1: int) -> Any:
    return transpose(input) if input.dim() == 2 and {dim0 % 2, dim1 % 2} == {0, 1} else NotImplemented


@implements(torch.detach, Tensor.detach, rules=GROUP_RULES)
def detach(input: GroupedCarrier) -> Carrier:
    return carry(input.op.replace(input.op.matrix.map(lambda tensor, _: tensor.detach())))


@implements(Tensor.contiguous, rules=GROUP_RULES)
def contiguous(input: GroupedCarrier, **kwargs: Any) -> Carrier:
    return input


def _pointwise_rule(function: Callable[..., Tensor]) -> Rule:
    def rule(input: Any, other: Any, **kwargs: Any) -> Any:
        carriers = [value for value in (input, other) if isinstance(value, Carrier)]
        tensors = [value for value in (input, other) if isinstance(value, Tensor)]
        if kwargs or len(carriers) > 1:
            return NotImplemented
        if len(tensors) == 1:  # with a number: a parameter of another value
            return _each(function)(input, other)
        carrier, x = (other, input) if isinstance(other, GroupedCarrier) else (input, other)
        groups = carrier.op.groups
        if groups.count > 1 and tuple(x.shape) in groups.weights:
            raise RouteError(f"{carrier.op.path!r} meets {tuple(x.shape)}, which may be a weight and no activation")
        if carrier is other:
            return pointwise(function, x, carrier)
        return pointwise(lambda x, own: function(own, x), x, carrier)

    return rule


def _each(function: Callable[..., Tensor]) -> Rule:
    """Make the rule that applies a pointwise function to the groups' own values of a vector."""

    def rule(*args: Any, **kwargs: Any) -> Any:
        (carrier,) = (value for value in args if isinstance(value, GroupedCarrier))
        if not carrier.op.is_vector:
            return NotImplemented
        values = function(*(value.op.each() if value is carrier else value for value in args), **kwargs)
        op = carrier.op
        matrix = Dense(values.reshape(op.groups.count, -1, 1))
        return carry(Grouped(matrix, op.groups, op.layout, values.dtype, op.path))

    return rule


for _name in ("add", "sub", "mul", "div"):
    _function = getattr(torch, _name)
    _signs = {"div": "truediv"}.get(_name, _name)
    implements(
        _function, getattr(Tensor, _name), getattr(Tensor, f"__{_signs}__"), rules=GROUP_RULES
    )(_pointwise_rule(_function))  # fmt: skip
for _name in ("__radd__", "__rmul__", "__rsub__", "__rtruediv__"):
    _swapped = {"a": torch.add, "m": torch.mul, "s": torch.sub, "t": torch.div}[_name[3]]
    implements(getattr(Tensor, _name), rules=GROUP_RULES)(_pointwise_rule(lambda x, y, swapped=_swapped: swapped(y, x)))
implements(Tensor.float, rules=GROUP_RULES)(_each(Tensor.float))


@implements(Tensor.to, rules=GROUP_RULES)
def to(input: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(input, GroupedCarrier):
        return NotImplemented
    own = (input.op.dtype, input.op.device, None, False)
    return (
        input if all(value in own for value in (*args, *kwargs.values())) else _each(Tensor.to)(input, *args, **kwargs)
    )


@implements(Tensor.expand, rules=GROUP_RULES)
def expand(input: GroupedCarrier, *sizes: Any) -> Any:
    """A parameter made as long as the batch (a class token) becomes the activation that it is meant to be."""
    own = input.op.layout.shape
    return _lengthen(input, sizes, [{-1, size} for size in own[1:]])


@implements(Tensor.repeat, rules=GROUP_RULES)
def repeat(input: GroupedCarrier, *sizes: Any) -> Any:
    return _lengthen(input, sizes, [{1}] * (input.dim() - 1))


def _lengthen(input: GroupedCarrier, sizes: Any, inner: list[set[int]]) -> Any:
    """Give the batch every group's own value, if the first axis gets as long as the batch and no other changes."""
    wanted = list(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else list(sizes)
    groups, own = input.op.groups, input.op.layout.shape
    if len(wanted) != len(own) or own[:1] != (1,) or wanted[0] != groups.total:
        return NotImplemented
    if not all(size in allowed for size, allowed in zip(wanted[1:], inner, strict=True)):
        return NotImplemented
    return input.op.each().expand(groups.count, groups.size, *own[1:]).flatten(0, 1)


def _with_rule(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function whose arguments may be carriers of single weights."""
    # torch.compile, which is inside a `__torch_function__` here, would not dispatch on them once more.
    rule = RULES.get(function)
    result = NotImplemented if rule is None else rule(*args, **kwargs)
    return function(*args, **kwargs) if result is NotImplemented else result


def by_group(function: Callable[..., Tensor]) -> Rule:
    """Make the rule that maps a function over the groups; its first argument is the activation."""
    name = getattr(function, "__name__", "this")

    def rule(input: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(input, Carrier):
            return NotImplemented
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        apart = {key: value.op.take_apart() for key, value in given.items() if isinstance(value, GroupedCarrier)}
        groups = groups_of(*given.values())

        def one(x: Tensor, *tensors: Tensor) -> Tensor:
            rest, own = list(tensors), dict(given)
            for key, (mine, _, build) in apart.items():
                value = build(rest[: len(mine)])
                if function is F.embedding and isinstance(value, Tensor):
                    # Under vmap, torch's own lookup gives the row of the padding a gradient; our rule does not.
                    op = given[key].op
                    value = Operator(Dense(value), op.layout, op.dtype, op.path)
                own[key] = carry(value) if isinstance(value, Operator) else value
                del rest[: len(mine)]
            y: Tensor = _with_rule(function, x, *(own[i] for i in range(len(args))), **{n: own[n] for n in kwargs})
            return y

        axes = [axis for _, some, _ in apart.values() for axis in some]
        every = [tensor for some, _, _ in apart.values() for tensor in some]
        if function is F.embedding and input.dim() < 2 and groups.count > 1:
            raise RouteError("embedding looks up one axis of numbers, which may be positions; give ids a second axis")
        inner = input.shape[1:] if function is F.embedding else None if function in _NORMS else ()
        parts = groups.split(input, name, inner=inner)
        return torch.func.vmap(one, in_dims=(0, *axes), randomness="different")(parts, *every).flatten(0, 1)

    return rule


# Their activations may lie anyhow; convolutions, group_norm and batch_norm know the batch as their leading axis.
_NORMS = (F.layer_norm, F.rms_norm)

for _function in (
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
    F.embedding, F.layer_norm, F.rms_norm, F.group_norm, F.batch_norm,
):  # fmt: skip
    implements(_function, rules=GROUP_RULES)(by_group(_function))

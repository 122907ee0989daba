"""`nn.MultiheadAttention` hands its packed weights to one function, which takes them apart itself."""

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from peft_func.errors import RouteError
from peft_func.weights.carrier import GROUP_RULES, Carrier, GroupedCarrier, form, implements
from peft_func.weights.groups import Groups
from peft_func.weights.matrix import Matrix
from peft_func.weights.rules.matmul import stored


class _Projection:
    """As much of a weight as attention asks for: its shape, its rows in parts, and its product with activations.

    Carriers would do in eager mode; torch.compile, which is inside a `__torch_function__` here, would not dispatch on
    them once more.
    """

    def __init__(self, matrix: Matrix, groups: Groups | None = None, ndim: int = 2) -> None:
        self.matrix = matrix
        self.groups = groups
        self.shape = matrix.shape[-2:][:ndim]  # a bias that differs along the batch is a matrix of one column

    def split(self, sizes: Sequence[int]) -> list["_Projection"]:
        """Return consecutive rows."""
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        rows = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        return [_Projection(self.matrix.take(part), self.groups, len(self.shape)) for part in rows]

    def chunk(self, count: int) -> list["_Projection"]:
        """Return equal parts."""
        return self.split([self.shape[0] // count] * count)


def _linear(x: Tensor, weight: Any, bias: Any = None) -> Tensor:
    given = [value for value in (weight, bias) if isinstance(value, _Projection)]
    groups = next((value.groups for value in given if value.groups is not None), None)
    if groups is None:
        return weight.matrix.linear(x, bias) if given else F.linear(x, weight, bias)
    # The batch is the second axis here, or joined to the first.
    if x.numel() % (groups.total * x.shape[-1]):
        raise RouteError(f"attention projects {tuple(x.shape)} in a batch of {groups.total}")
    by_group = x.reshape(-1, groups.count, groups.size, x.shape[-1]).transpose(0, 1).flatten(1, 2)
    y = weight.matrix.linear(by_group) if isinstance(weight, _Projection) else F.linear(by_group, weight)
    if isinstance(bias, _Projection):
        y = y + bias.matrix.dense(y.dtype).mT  # a column for each group
    elif bias is not None:
        y = y + bias
    # The code around takes views of it.
    y = y.reshape(groups.count, -1, groups.size, y.shape[-1])
    return y.transpose(0, 1).contiguous().view(*x.shape[:-1], y.shape[-1])


def _rebuilt(function: Any, **names: Any) -> Callable[..., Any]:
    """Return torch's own function, in which some global names mean something else."""
    return FunctionType(function.__code__, {**vars(F), **names}, argdefs=function.__defaults__)


# torch's code for the attention itself, but for how it projects, and for the question whether an argument overrides
# torch functions, which here none does.
_attend = _rebuilt(
    F.multi_head_attention_forward,
    has_torch_function=lambda _: False,
    linear=_linear,
    _in_projection=_rebuilt(F._in_projection, linear=_linear),  # type: ignore[attr-defined]
    _in_projection_packed=_rebuilt(F._in_projection_packed, linear=_linear),  # type: ignore[attr-defined]
)


@implements(F.multi_head_attention_forward)
@implements(F.multi_head_attention_forward, rules=GROUP_RULES)
def multi_head_attention_forward(*args: Any, **kwargs: Any) -> Any:
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, GroupedCarrier)]
    if given and given[0].op.groups.count > 1:
        query, total = args[0] if args else kwargs["query"], given[0].op.groups.total
        if query.dim() != 3 or query.shape[1] != total:  # windows, or axes of an image, were joined to the batch
            raise RouteError(
                f"attention meets {tuple(query.shape)} in a batch of {total}, which is not its second axis"
            )
    return _attend(*map(_project, args), **{name: _project(value) for name, value in kwargs.items()})


def _project(value: Any) -> Any:
    if isinstance(value, GroupedCarrier):
        # Biases on keys and values (three dimensions) are repeated along the batch, and say themselves that they can't.
        return value if value.dim() > 2 else _Projection(stored(value), value.op.groups, value.dim())
    if not isinstance(value, Carrier):
        return value
    return _Projection(stored(value)) if value.dim() == 2 else form(value, "multi_head_attention_forward")

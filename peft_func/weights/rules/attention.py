"""`nn.MultiheadAttention` hands its packed weights to one function, which takes them apart itself."""

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from peft_func.weights.carrier import Carrier, form, implements
from peft_func.weights.matrix import Matrix
from peft_func.weights.rules.matmul import stored


class _Projection:
    """As much of a weight as attention asks for: its shape, its rows in parts, and its product with activations.

    Carriers would do in eager mode; torch.compile, which is inside a `__torch_function__` here, would not dispatch on
    them once more.
    """

    def __init__(self, matrix: Matrix) -> None:
        self.matrix = matrix
        self.shape = matrix.shape

    def split(self, sizes: Sequence[int]) -> list["_Projection"]:
        """Return consecutive rows."""
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return [_Projection(self.matrix.take(slice(end - size, end))) for end, size in zip(ends, sizes, strict=True)]

    def chunk(self, count: int) -> list["_Projection"]:
        """Return equal parts."""
        return self.split([self.shape[0] // count] * count)


def _linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    return weight.matrix.linear(x, bias) if isinstance(weight, _Projection) else F.linear(x, weight, bias)


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
def multi_head_attention_forward(*args: Any, **kwargs: Any) -> Any:
    return _attend(*map(_project, args), **{name: _project(value) for name, value in kwargs.items()})


def _project(value: Any) -> Any:
    if not isinstance(value, Carrier):
        return value
    return _Projection(stored(value)) if value.dim() == 2 else form(value, "multi_head_attention_forward")

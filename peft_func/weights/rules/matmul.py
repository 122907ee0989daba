"""Products of activations with a structured weight: `F.linear`, and the products behind HF Conv1D and experts."""

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_func.weights.carrier import Carrier, implements
from peft_func.weights.layout import Storage
from peft_func.weights.matrix import Matrix


def stored(carrier: Carrier) -> Matrix:
    """Return the matrix as it is stored, so that `x @ stored` is what the module writes as `x @ weight`."""
    op = carrier.op
    return op.matrix.T if op.layout.storage is Storage.TRANSPOSED else op.matrix


def _is_matrix(value: Any) -> TypeGuard[Carrier]:
    return isinstance(value, Carrier) and not value.op.layout.is_conv


def _times(x: Tensor, y: Tensor, bias: Tensor | None = None) -> Any:
    """Return `x @ y + bias` where one side is structured."""
    if isinstance(x, Carrier) == isinstance(y, Carrier):
        return NotImplemented  # both are: form them
    if _is_matrix(y) and x.dim() >= 1:
        return stored(y).T.linear(x, bias)
    if _is_matrix(x) and y.dim() >= 2:
        return _add(stored(x).linear(y.mT).mT, bias)
    if _is_matrix(x) and x.dim() == 2:
        return _add(stored(x).linear(y), bias)
    return NotImplemented


def _add(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias


@implements(F.linear)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if isinstance(input, Carrier) or isinstance(bias, Carrier) or not _is_matrix(weight):
        return NotImplemented
    return stored(weight).linear(input, bias)


@implements(
    torch.matmul, torch.mm, torch.bmm, torch.mv,
    Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.mv, Tensor.__matmul__,
)  # fmt: skip
def matmul(input: Tensor, other: Tensor | None = None, **kwargs: Any) -> Any:
    other = kwargs.pop("mat2", kwargs.pop("tensor2", kwargs.pop("vec", other)))
    return NotImplemented if kwargs or other is None else _times(input, other)


@implements(Tensor.__rmatmul__)
def rmatmul(input: Tensor, other: Tensor) -> Any:
    return _times(other, input)


@implements(torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm)
def addmm(input: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1, out: Any = None) -> Any:
    if isinstance(input, Carrier) or out is not None or beta != 1 or alpha != 1:
        return NotImplemented
    return _times(left, right, input)


def _grouped_mm(x: Tensor, weight: Tensor, offs: Tensor | None = None, **kwargs: Any) -> Any:
    """Multiply the rows of each expert, which end at `offs`, with the weight of that expert."""
    if not _is_matrix(weight) or weight.dim() != 3 or x.dim() != 2 or offs is None:
        return NotImplemented
    if any(value is not None for value in kwargs.values()):
        return NotImplemented
    experts = stored(weight).T
    ends = offs.tolist()
    starts = [0, *ends[:-1]]
    parts = [experts.select(e).linear(x[a:b]) for e, (a, b) in enumerate(zip(starts, ends, strict=True))]
    rest = x.new_zeros(x.shape[0] - ends[-1], experts.shape[-2])
    return torch.cat([*parts, rest.to(parts[0].dtype)])


for _owner, _name in [(torch, "_grouped_mm"), (F, "grouped_mm")]:
    if hasattr(_owner, _name):
        implements(getattr(_owner, _name))(_grouped_mm)

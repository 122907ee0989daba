"""Views of a structured weight that stay structured: transposes, slices of rows, one expert of many."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_func.weights.carrier import Carrier, carry, getter, implements
from peft_func.weights.layout import Layout, Storage
from peft_func.weights.matrix import Matrix
from peft_func.weights.operator import Operator
from peft_func.weights.rules.embedding import rows
from peft_func.weights.rules.matmul import stored


def _view(carrier: Carrier, matrix: Matrix) -> Carrier:
    return carry(Operator(matrix, Layout(Storage.MATRIX, matrix.shape), carrier.op.dtype, carrier.op.path))


@implements(torch.t, Tensor.t, getter("T"))
def transpose(input: Carrier) -> Any:
    return swap(input, 0, 1) if input.dim() == 2 else NotImplemented


@implements(getter("mT"))
def transpose_each(input: Carrier) -> Any:
    return swap(input, -2, -1)


@implements(torch.transpose, Tensor.transpose, torch.swapaxes, Tensor.swapaxes)
def swap(input: Carrier, dim0: int, dim1: int) -> Any:
    last = {input.dim() - 1, input.dim() - 2}
    if input.op.layout.is_conv or {dim0 % input.dim(), dim1 % input.dim()} != last:
        return NotImplemented
    return _view(input, stored(input).T)


@implements(Tensor.__getitem__)
def getitem(input: Carrier, index: Any) -> Any:
    if not isinstance(input, Carrier) or isinstance(index, Carrier) or input.op.layout.is_conv:
        return NotImplemented
    matrix = stored(input)
    match index:
        case Tensor(dtype=torch.int64) | int() if input.dim() == 3 and not isinstance(index, bool):
            return _view(input, matrix.select(index)) if isinstance(index, int) or index.dim() < 2 else NotImplemented
        case Tensor(dtype=torch.int64) if input.dim() == 2:
            return rows(matrix, index, input.op.dtype)
        case slice(step=None | 1) if input.dim() == 2:
            return _view(input, matrix.take(index))
        case _:
            return NotImplemented


@implements(torch.split, Tensor.split)
def split(
    tensor: Carrier, split_size_or_sections: int | Sequence[int] | None = None, dim: int = 0, **kwargs: Any
) -> Any:
    sizes = kwargs.get("split_size", split_size_or_sections)
    if sizes is None or tensor.dim() != 2 or dim % 2 != 0 or tensor.op.layout.is_conv:
        return NotImplemented
    n = tensor.shape[0]
    if isinstance(sizes, int):
        sizes = [min(sizes, n - start) for start in range(0, n, sizes)]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    matrix = stored(tensor)
    return tuple(_view(tensor, matrix.take(slice(end - size, end))) for end, size in zip(ends, sizes, strict=True))


@implements(torch.chunk, Tensor.chunk)
def chunk(input: Carrier, chunks: int, dim: int = 0) -> Any:
    return split(input, -(-input.shape[0] // chunks), dim) if input.dim() == 2 else NotImplemented


@implements(torch.detach, Tensor.detach, getter("data"))
def detach(input: Carrier) -> Carrier:
    return carry(input.op.replace(input.op.matrix.map(lambda tensor, _: tensor.detach())))


@implements(Tensor.contiguous)
def contiguous(input: Carrier, **kwargs: Any) -> Carrier:
    return input


@implements(Tensor.to)
def to(input: Carrier, *args: Any, **kwargs: Any) -> Any:
    own = (input.op.dtype, input.op.device, None, False)
    return input if all(value in own for value in (*args, *kwargs.values())) else NotImplemented

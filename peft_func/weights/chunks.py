"""Forming an effective weight in one pass: some of its rows at a time, each rounded once into its place.

    out[i:j] = W[i:j];  out[i:j] += s B[i:j] A            W + s B A

A chunk of rows stays in the cache from the first term to the rounding, so the weight is read and the result written
once, and nothing as large as a weight exists beside the result.

It writes in place, so it is for plain tensors outside of autograd and of every transform; there, `Operator.materialise`
is the same in whole tensors.
"""

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from peft_func.weights.eager import in_transform
from peft_func.weights.layout import Layout, Storage
from peft_func.weights.matrix import Matrix
from peft_func.weights.operator import Operator, full_precision
from peft_func.weights.rows import spans, writer

# Temporary memory by dtype and device, used again from weight to weight: fresh pages cost as much as the arithmetic.
Scratch: TypeAlias = dict[tuple[torch.dtype, torch.device], Tensor]


def form(operator: Operator, scratch: Scratch | None = None) -> Tensor:
    """Form an effective weight, as `Operator.materialise` does, in chunks where no graph is needed.

    Args:
        operator: a weight.
        scratch: a dict that keeps the temporary memory from call to call.

    Returns:
        A new tensor of the parameter's shape and dtype, contiguous if it was formed in chunks.
    """
    if not is_plain(operator) or (torch.is_grad_enabled() and operator.requires_grad):
        return operator.materialise()
    out = torch.empty(operator.shape, dtype=operator.dtype, device=operator.device)
    if type(out) is not Tensor:
        return operator.materialise()  # a mode makes fake tensors
    form_into(operator, out, {} if scratch is None else scratch)
    return out


def form_into(operator: Operator, out: Tensor, scratch: Scratch) -> None:
    """Write a weight that `is_plain` into a tensor of its shape, dtype and device, in chunks and without a graph."""
    with torch.no_grad(), full_precision(operator.device):
        dtype = operator.matrix.compute_dtype
        turned = operator.layout.storage is Storage.TRANSPOSED
        for matrix, slots in _singles(operator.matrix, _slots(operator.layout, out)):
            _form_single(matrix, slots, dtype, turned, scratch)


def is_plain(operator: Operator) -> bool:
    """Whether a weight may be written in place: one weight, of plain tensors, outside of all transforms."""
    return (
        outside_transforms()
        and type(operator) is Operator
        and len(operator.matrix.shape) <= 3
        and all(is_plain_tensor(tensor) for tensor in operator.tensors())
    )


def outside_transforms() -> bool:
    """Whether neither torch.func, nor forward-mode derivatives, nor compile or a trace follow what is computed."""
    return not in_transform() and torch._C._get_tracing_state() is None and forward_ad._current_level < 0


def is_plain_tensor(tensor: Any) -> bool:
    """Whether it is a strided tensor or parameter with memory of its own, of no further class."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided and tensor.device.type != "meta"
    )


def _slots(layout: Layout, stored: Tensor) -> Tensor:
    # The stored weight with the rows of the matrix in front; the inputs and taps of a kernel are joined chunk by chunk,
    # as they may be no view of all.
    match layout.storage:
        case Storage.TRANSPOSED:
            return stored.mT
        case Storage.CONV_TRANSPOSED:
            return stored.transpose(0, 1)
        case _:
            return stored


def _singles(matrix: Matrix, slots: Tensor) -> Iterator[tuple[Matrix, Tensor]]:
    batch = matrix.shape[:-2]
    if not batch:
        yield matrix, slots
        return
    for expert in range(batch[0]):
        yield _expert(matrix, expert), slots[expert]


def _expert(matrix: Matrix, index: int) -> Matrix:
    def pick(tensor: Tensor, ndim: int) -> Tensor:
        # An axis over experts of length one is the same for all of them.
        return tensor[min(index, len(tensor) - 1)] if tensor.dim() > ndim else tensor

    return matrix.map(pick)


def _form_single(matrix: Matrix, slots: Tensor, dtype: torch.dtype, turned: bool, scratch: Scratch) -> None:
    width, put = matrix.shape[1], writer(matrix, dtype)
    # Wherever it is computed, it lies alike: the same product in another order could differ in its last digit.
    lies = slots.is_contiguous() if slots.dim() > 2 else slots.stride(0 if turned else 1) == 1
    direct = slots.dtype == dtype and lies
    for start, stop in spans(matrix.shape[0], width, dtype, slots.device):
        slot, rows = slots[start:stop], stop - start
        if direct:
            put(start, slot.view(rows, width), False)
            continue
        work = _borrow(scratch, rows * width, dtype, slots.device)
        chunk = work.view(width, rows).mT if turned else work.view(rows, width)
        put(start, chunk, False)
        slot.copy_(chunk if slot.dim() == 2 else chunk.view(slot.shape))


def _borrow(scratch: Scratch, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    memory = scratch.get((dtype, device))
    if memory is None or len(memory) < size:
        memory = scratch[dtype, device] = torch.empty(size, dtype=dtype, device=device)
    return memory[:size]

"""Rows of a structured weight, looked up by index."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_func.weights.carrier import Carrier, implements
from peft_func.weights.matrix import Matrix
from peft_func.weights.rules.matmul import stored


def rows(matrix: Matrix, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows at an int64 index of any shape: `[*index.shape, in]`."""
    return matrix.take(index.flatten()).dense(matrix.compute_dtype).to(dtype).view(*index.shape, matrix.shape[-1])


@implements(F.embedding)
def embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Any:  # fmt: skip
    if not isinstance(weight, Carrier) or max_norm is not None or scale_grad_by_freq or weight.op.layout.batch:
        return NotImplemented
    found = rows(stored(weight), input, weight.op.dtype)
    if padding_idx is None:
        return found
    # The row of the padding gets no gradient: neither its own entries nor, through them, what all rows share.
    is_padding = (input == padding_idx % weight.op.layout.shape[0]).unsqueeze(-1)
    return torch.where(is_padding, found.detach(), found)

"""Looking at tensors' values, where that can be done, and the precision to compute in."""

from functools import reduce

import torch
from torch import Tensor

from peft_func.weights.eager import in_transform


def readable() -> bool:
    """Say whether values can be looked at: not inside `torch.func` transforms, nor while compiling."""
    return not in_transform()


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype to compute in: that of all the tensors together, float32 at least."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def wide(tensor: Tensor) -> Tensor:
    """Return a floating-point tensor in float32 at least."""
    return tensor.to(wide_dtype(tensor))

"""Looking at tensors' values, where that can be done, and the precision to compute in."""

import torch
from torch import Tensor


def readable() -> bool:
    """Say whether values can be looked at: not inside `torch.func` transforms, nor while compiling."""
    return torch._C._functorch.peek_interpreter_stack() is None and not torch.compiler.is_compiling()


def wide(tensor: Tensor) -> Tensor:
    """Return a floating-point tensor in float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

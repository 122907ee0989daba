"""`x W^T + b + s (x A^T) B^T` with the second product accumulated into the first.

Adding the branch separately reads and writes the wide activation once more, and scales it; here the scale is folded
into the product. It is an in-place product on a tensor that nobody else has, of plain autograd operators, so it can be
differentiated twice and checkpointed. It is only for plain eager mode: `vmap` refuses to write what it maps into what
it does not, autocast leaves in-place products alone, and compile fuses by itself.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def can_accumulate(x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether the branch may be accumulated: one base matrix, one dtype, outside of transforms and autocast.

    The factors may be single matrices, or one for each slice of `x` `[count, n, in]`.
    """
    return (
        W.dim() == 2
        and (A.dim() == B.dim() == 2 or (x.dim() == 3 and A.dim() == B.dim() == 3 and len(A) == len(B) == len(x)))
        and x.dtype == W.dtype == A.dtype == B.dtype
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not under_autocast(x.device)
    )


def under_autocast(device: torch.device) -> bool:
    """Whether autocast is on for a device; on meta, where torch refuses the question, it is not."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def accumulate(
    x: Tensor, dropped: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
) -> Tensor:
    """Return `x W^T + bias + scale (dropped A^T) B^T`: `[*, in]` to `[*, out]`.

    Args:
        x: what the base acts on, `[*, in]`.
        dropped: what the branch acts on, `[*, in]`: `x`, or `x` after dropout.
        W: `[out, in]`.
        bias: `[out]`, or None.
        A: `[rank, in]`, or `[count, rank, in]`.
        B: `[out, rank]`, or `[count, out, rank]`.
        scale: `s`.
    """
    if A.dim() == 3:
        inner = torch.bmm(A, dropped.mT).mT  # a third faster on the CPU than dropped A^T
        return F.linear(x, W, bias).baddbmm_(inner, B.mT, alpha=scale)
    # Two dimensions from the start: an in-place product on a view would make autograd copy slices.
    y = F.linear(x.reshape(-1, x.shape[-1]), W, bias)
    inner = F.linear(dropped.reshape(-1, x.shape[-1]), A)
    return y.addmm_(inner, B.t(), alpha=scale).view(*x.shape[:-1], W.shape[0])

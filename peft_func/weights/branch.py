"""A low-rank branch beside a product with a matrix, or inside of it, by plain operators.

    beside      g (x W^T + s (x A^T) B^T) + b
    inside      g (x + s (x A^T) B^T) W^T + b

Small products, and those of frozen factors, are computed like this; `peft_func.weights.fused` chooses, and has the same
as one function.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Branch(NamedTuple):
    """The low-rank part of a product.

    Attributes:
        A: `[rank, in]`, or `[count, rank, in]`: one for each slice of an activation `[count, n, in]`.
        B: `[out, rank]`, or `[count, out, rank]`; inside, it is `[in, rank]`.
        scale: s.
        dropped: what it acts on, if that is not the activation itself.
        inside: whether it is added to the activation, before the matrix: `(x + branch) W^T`.
    """

    A: Tensor
    B: Tensor
    scale: float
    dropped: Tensor | None = None
    inside: bool = False


def composed(
    x: Tensor, W: Tensor | None, bias: Tensor | None, branch: Branch, *, formed: bool = False, in_place: bool = True
) -> Tensor:
    """Return the product and its branch in two dimensions, which an in-place product has to have from the start.

    Args:
        x: `[*, in]`.
        W: `[out, in]`; without it, that is x + branch.
        bias: `[out]`, or None.
        branch: the low-rank part.
        formed: whether to form the sum first, for a branch beside the product.
        in_place: whether to add the branch into the product, which a map over one of them does not allow.
    """
    if branch.inside and W is not None:
        return F.linear(composed(x, None, None, branch), W, bias)
    A, B, scale, dropped, _ = branch
    x = x if x.dim() == 2 else x.reshape(-1, A.shape[1])
    if formed and W is not None:
        return F.linear(x, torch.addmm(W, B, A, alpha=scale), bias)
    z = x if dropped is None else dropped.reshape(x.shape)
    u = narrow(z, A)
    if x.dtype != A.dtype:
        y = x if W is None else F.linear(x, W, bias)
        return y + (F.linear(u, B) * scale).to(y.dtype)
    if W is None or not in_place:
        return torch.addmm(x if W is None else F.linear(x, W, bias), u, B.t(), alpha=scale)
    return F.linear(x, W, bias).addmm_(u, B.t(), alpha=scale)


def narrow(x: Tensor, A: Tensor) -> Tensor:
    """Return u = x A^T in the dtype of the factors."""
    return F.linear(x if x.dtype == A.dtype else x.to(A.dtype), A)


def accumulated_slices(x: Tensor, W: Tensor | None, bias: Tensor | None, branch: Branch) -> Tensor:
    """Return `x W^T + bias + branch`, `[count, n, out]`, for factors that each slice has of its own."""
    A, B, scale, dropped, _ = branch
    z = (x if dropped is None else dropped).to(A.dtype)
    u = torch.bmm(A, z.mT).mT  # a third faster on the CPU than x A^T
    y = x if W is None else F.linear(x, W, bias)
    if y.dtype != u.dtype:
        return y + (torch.bmm(u, B.mT) * scale).to(y.dtype)
    return torch.baddbmm(y, u, B.mT, alpha=scale) if W is None else y.baddbmm_(u, B.mT, alpha=scale)


def gained(y: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return `gain y + bias`, or y itself without a gain, when the bias is in it already."""
    if gain is None:
        return y
    y = (y * gain).to(y.dtype)
    return y if bias is None else y + bias

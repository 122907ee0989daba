"""What goes through a base weight: the rows' norms, and a low-rank matrix behind it, without forming either.

    |w + u|^2 = |w|^2 + 2 w.u + |u|^2 for each row, with u = s b A        (the norms of DoRA)
    W (s B A) = s (W B) A                                                 (rank columns go through W)

A weight in half precision takes part in float32, an eighth of it at a time.
"""

from typing import Any

import torch
from torch import Tensor

from peft_func.weights.eager import in_transform
from peft_func.weights.matrix import Dense, Diagonal, IdentityPlus, LowRank, Matrix, Product, Sum, cast

PIECES = 8


def square_norms(matrix: Matrix) -> Tensor:
    """Return the squared norm of every row: `[*, out]`."""
    dtype = matrix.compute_dtype
    match matrix:
        case Dense(tensor=tensor):
            return torch.square(torch.linalg.vector_norm(tensor, dim=-1, dtype=dtype))
        case Sum(left=left, right=LowRank(A=A, B=B, scale=scale)):
            A, B = A.to(dtype), B.to(dtype) * scale
            cross = (through(left, A.mT) * B).sum(-1)
            return square_norms(left) + 2 * cross + ((B @ (A @ A.mT)) * B).sum(-1)
        case Product(left=Diagonal() as left, right=right):
            return left.entries.square() * square_norms(right)
        case Product(left=left, right=IdentityPlus(inner=LowRank() as low)):
            return square_norms(Sum(left, absorb(left, low)))
        case _:
            return torch.square(torch.linalg.vector_norm(matrix.dense(dtype), dim=-1))


def absorb(left: Matrix, low: LowRank) -> LowRank:
    """Return `left @ low` as one low-rank matrix: `rank` columns go through `left`."""
    # What is dropped is an input of the left side, never an entry of a factor.
    return LowRank(through(left.deterministic(), low.B), low.A, low.scale, low.dropout)


def through(matrix: Matrix, columns: Tensor) -> Tensor:
    """Return `matrix @ columns` in the dtype of the columns: `[*, out, n]`."""
    match matrix:
        case Dense(tensor=W) if W.dtype != columns.dtype and _is_plain(W):
            product: Tensor = Widened.apply(W, columns)  # type: ignore[no-untyped-call]
            return product
        case Dense(tensor=W):
            return torch.matmul(W.to(columns.dtype), columns)
        case _:
            return cast(matrix, columns.dtype).linear(columns.mT).mT


def _is_plain(W: Tensor) -> bool:
    return not in_transform() and not (W.requires_grad and torch.is_grad_enabled())


class Widened(torch.autograd.Function):
    """`W X` for a frozen W in a narrower dtype than X, of which autograd would keep a wide copy."""

    @staticmethod
    def forward(W: Tensor, X: Tensor) -> Tensor:
        """Compute it piece by piece."""
        return torch.cat([piece.to(X.dtype) @ X for piece in W.chunk(PIECES, -2)], -2)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, _: Any) -> None:
        """Keep W as it is."""
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        """Return the gradient of X: the transpose of W, piece by piece."""
        (W,) = ctx.saved_tensors
        pieces = zip(W.chunk(PIECES, -2), dy.chunk(PIECES, -2), strict=True)
        return None, sum(piece.to(dy.dtype).mT @ part for piece, part in pieces)

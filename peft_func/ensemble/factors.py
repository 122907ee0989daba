"""Arithmetic of low-rank matrices on their factors: sums, truncation and norms, without ever forming a product.

A sum of K matrices w_k B_k A_k is one product of concatenated factors, [w_1 B_1 ... w_K B_K] [A_1; ...; A_K], of
rank R = r_1 + ... + r_K. With thin QR factorisations B = Q_B T_B and A^T = Q_A T_A, its singular values are those of
the small core T_B T_A^T, so that a truncated SVD costs O((out + in) R^2); it is the best approximation of its rank
(Eckart and Young, 1936).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_func.ensemble.values import wide_dtype
from peft_func.weights.matrix import LowRank


def concatenate(terms: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Return the weighted sum, exactly: factors side by side, weights and scales in A, scale 1.

    Args:
        terms: matrices `[*batch, out, in]`, of any ranks; the ranks add.
        weights: one number for each.
    """
    dtype = wide_dtype(*(tensor for term in terms for tensor in term.tensors()))
    A = [term.A.to(dtype) * (weight * term.scale) for term, weight in zip(terms, weights, strict=True)]
    return LowRank(torch.cat([term.B.to(dtype) for term in terms], -1), torch.cat(A, -2))


def decompose(low: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular value decomposition `(U, S, Vh)`, by QR of the factors.

    Returns:
        `U` [*batch, out, n], `S` [*batch, n] descending and `Vh` [*batch, n, in], with n = min(out, in, rank).
    """
    dtype = wide_dtype(*low.tensors())
    Q_B, T_B = torch.linalg.qr(low.B.to(dtype))
    Q_A, T_A = torch.linalg.qr(low.A.to(dtype).mT)
    U, S, Vh = torch.linalg.svd(T_B @ T_A.mT * low.scale, full_matrices=False)
    return Q_B @ U, S, Vh @ Q_A.mT


def truncate(low: LowRank, rank: int | None = None) -> LowRank:
    """Return the best approximation of a rank, or the same matrix with as few columns as rounding allows.

    Args:
        low: the matrix.
        rank: the highest rank of the result; None keeps every singular value that is not lost in the rounding of the
            largest one.
    """
    return rejoin(*decompose(low), rank)


def rejoin(U: Tensor, S: Tensor, Vh: Tensor, rank: int | None) -> LowRank:
    """Return `U diag(S) Vh` cut to a rank, its singular values shared evenly by both factors."""
    rank = effective_rank(S, max(U.shape[-2], Vh.shape[-1])) if rank is None else rank
    root = S[..., :rank].sqrt()
    return LowRank(U[..., :rank] * root.unsqueeze(-2), root.unsqueeze(-1) * Vh[..., :rank, :])


def effective_rank(S: Tensor, extent: int) -> int:
    """Return how many singular values are above the rounding of the largest, at least one; of a batch, the most."""
    noise = extent * torch.finfo(S.dtype).eps * S.amax(-1, keepdim=True)
    return max(1, int((noise < S).sum(-1).max()))


def fit(low: LowRank) -> LowRank:
    """Return the same matrix in a form that can be bound: of a rank that its shape can have."""
    return truncate(low) if low.A.shape[-2] > min(low.shape[-2:]) else low


def norm(low: LowRank) -> float:
    """Return the Frobenius norm, from the triangular factors: accurate where a difference of squares is not."""
    T_B = torch.linalg.qr(low.B.double()).R
    T_A = torch.linalg.qr(low.A.double().mT).R
    return abs(low.scale) * float(torch.linalg.vector_norm(T_B @ T_A.mT))


def inner(left: LowRank, right: LowRank) -> float:
    """Return the Frobenius inner product: the Gram matrices of the factors, entry by entry."""
    grams = (left.B.double().mT @ right.B.double()) * (left.A.double() @ right.A.double().mT)
    return left.scale * right.scale * float(grams.sum())

"""A matrix in its singular bases: `U diag(d) V^T`, where the bases are shared and only `d` differs or trains."""

import torch
from torch import Tensor

from peft_func.weights.matrix import Dense, Leafwise, LowRank, Matrix, Rows


class Spectral(LowRank):
    """`U diag(d) V^T`, of `U` `[*, out, n]`, `d` `[*, n]` and `Vt` `[*, n, in]`: a LowRank whose `B` is `U diag(d)`.

    The bases are as large as the weight, so they act in the dtype of what they act on, and stay shared where only `d`
    has an axis over adapters.
    """

    def __init__(self, U: Tensor, d: Tensor, Vt: Tensor) -> None:
        self.U, self.d, self.A = U, d, Vt
        self.scale, self.dropout = 1.0, 0.0
        batch = max(U.shape[:-2], d.shape[:-1], Vt.shape[:-2], key=len)
        self.shape = (*batch, U.shape[-2], Vt.shape[-1])

    @property
    def B(self) -> Tensor:  # type: ignore[override]
        """`U diag(d)`: `[*, out, n]`."""
        return self.U * self.d.unsqueeze(-2)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.U, self.d, self.A)

    def map(self, function: Leafwise) -> Matrix:
        return Spectral(function(self.U, 2), function(self.d, 1), function(self.A, 2))

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        inner = Dense(self.A.to(x.dtype)).linear(x)
        inner = (inner * (self.d if self.d.dim() == 1 else self.d.unsqueeze(-2))).to(x.dtype)
        return Dense(self.U.to(x.dtype)).linear(inner, bias)

    @property
    def T(self) -> Matrix:
        return Spectral(self.A.mT, self.d, self.U.mT)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return (self.U.to(dtype) * self.d.to(dtype).unsqueeze(-2)) @ self.A.to(dtype)

    def take(self, rows: Rows) -> Matrix:
        return Spectral(Dense(self.U).take(rows).dense(self.U.dtype), self.d, self.A)

    def deterministic(self) -> Matrix:
        return self

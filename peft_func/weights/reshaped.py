"""A change of a weight that is a low-rank matrix under another view: `reshape(B A, [out, in])`, row by row.

The matrix that a method sees need not be `[out, in / groups * taps]`: the balanced view of a convolution's weight is
`[out * k0, in / groups * k1 * ...]`. What has low rank there has none as the weight's own matrix, and is no cheap
convolution either, so the change itself is formed, once in each call, and added to the weight that it changes: one
convolution in all. That is by design: such a change is as large as the weight, which is small beside the activations
of a convolution, so `pf.densify("error")` does not speak of it.
"""

import torch
from torch import Tensor

from peft_func.weights.matrix import Composite, Dense, LowRank, Matrix
from peft_func.weights.operator import full_precision


class Reshaped(Composite):
    """The entries of `inner` `[*, h, w]`, in their order, as a matrix `[*, out, in]`."""

    def __init__(self, inner: Matrix, shape: tuple[int, ...]) -> None:
        self.inner = inner
        self.children = (inner,)
        self.shape = (*inner.shape[:-2], *shape[-2:])

    def _rebuilt(self, *children: Matrix) -> Matrix:
        (inner,) = children
        return Reshaped(inner, self.shape)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return Dense(self.formed(x.dtype)).linear(self.drop(x), bias)

    @property
    def T(self) -> Matrix:
        return Dense(self.formed(self.compute_dtype).mT)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.inner.dense(dtype).reshape(self.shape)

    def formed(self, dtype: torch.dtype) -> Tensor:
        """Return it formed, rounded once to a dtype."""
        with full_precision(self.tensors()[0].device):
            return self.dense(self.compute_dtype).to(dtype)

    def added_to(self, matrix: Tensor) -> Tensor:
        """Return `matrix + self`, rounded once to the dtype of the matrix."""
        dtype = torch.promote_types(self.compute_dtype, matrix.dtype)
        return (matrix.to(dtype) + self.formed(dtype)).to(matrix.dtype)

    def drop(self, x: Tensor) -> Tensor:
        """Drop some of what it acts on, if it has dropout."""
        return self.inner.drop(x) if isinstance(self.inner, LowRank) else x

"""A matrix for the groups that have chosen an adapter, and the base weight for all others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_func.weights.matrix import Dense, Diagonal, IdentityPlus, LowRank, Matrix, Product, Sum
from peft_func.weights.sampled import Sampled


@dataclass(frozen=True)
class Choice:
    """Which groups have chosen an adapter, and what the others get.

    Attributes:
        base: the base weight as a matrix, `[*experts, out, in]`.
        chosen: a bool for each group.
        experts: the number of axes over experts.
        only_base: whether a matrix that all groups share can only be the base, not a constant of a method.
    """

    base: Tensor
    chosen: Tensor
    experts: int
    only_base: bool = True

    def effective(self, matrix: Matrix) -> Matrix:
        """Return the matrix where chosen and the base elsewhere, with as much structure as there was."""
        match matrix:
            case Dense(tensor=tensor) if tensor is self.base or (self.only_base and tensor.dim() == 2 + self.experts):
                return matrix  # the base weight itself, which all groups share
            case Sum(left=left, right=Sampled() as right):
                return Sum(self.effective(left), self._drawn(right, Choice._zero))
            case Sum(left=left, right=right) if right.is_structured and not left.is_structured:
                return Sum(self.effective(left), self._zero(right))
            case Product(left=left, right=right) if left.is_structured and not right.is_structured:
                return Product(self._identity(left), self.effective(right))
            case Product(left=left, right=right) if right.is_structured and not left.is_structured:
                return Product(self.effective(left), self._identity(right))
            case Sampled():
                return self._drawn(matrix, Choice.effective)
            case _:
                return self._formed(matrix, self.base)

    def _zero(self, matrix: Matrix) -> Matrix:
        """Return it where chosen and zero elsewhere."""
        match matrix:
            # All factors: an adapter that a group has not chosen must not spoil its result, even if it is not finite.
            case LowRank(B=B, A=A, scale=scale, dropout=dropout):
                return LowRank(self._pick(B, 0.0, 2), self._pick(A, 0.0, 2), scale, dropout)
            case Diagonal(vector=vector, repeat=repeat):
                return Diagonal(self._pick(vector, 0.0, 1), repeat)
            case Sum(left=left, right=right):
                return Sum(self._zero(left), self._zero(right))
            case Product(left=left, right=right):
                return Product(self._zero(left), self._zero(right))
            case _:
                return self._formed(matrix, torch.zeros((), dtype=matrix.compute_dtype))

    def _identity(self, matrix: Matrix) -> Matrix:
        """Return it where chosen and the identity elsewhere."""
        match matrix:
            case Diagonal(vector=vector, repeat=repeat):
                return Diagonal(self._pick(vector, 1.0, 1), repeat)
            case IdentityPlus(inner=inner):
                return IdentityPlus(self._zero(inner))
            case Product(left=left, right=right):
                return Product(self._identity(left), self._identity(right))
            case _:
                return self._formed(matrix, torch.eye(matrix.shape[-1], dtype=matrix.compute_dtype))

    def _drawn(self, matrix: Sampled, choose: Callable[["Choice", Matrix], Matrix]) -> Matrix:
        """Choose each time that it is drawn; which groups have chosen goes with its tensors, to be taken apart too."""

        def draw(base: Matrix, parts: Sequence[Tensor], random: bool) -> Matrix:
            *rest, chosen = parts
            own = chosen.bool().reshape(chosen.shape[: chosen.dim() - self.experts])
            return choose(Choice(self.base, own, self.experts), matrix.draw(base, rest, random))

        chosen = self.chosen.reshape(*self.chosen.shape, *[1] * self.experts)  # every tensor has the axes of experts
        return Sampled(draw, matrix.base, (*matrix.parts, chosen), (*matrix.ndims, 0))

    def _formed(self, matrix: Matrix, other: Tensor) -> Matrix:
        dense = matrix.dense(matrix.compute_dtype)
        return Dense(self._pick(dense, other.to(dense), 2).to(self.base.dtype))

    def _pick(self, tensor: Tensor, other: Tensor | float, ndim: int) -> Tensor:
        return torch.where(self.chosen.view(*self.chosen.shape, *[1] * (ndim + self.experts)), tensor, other)

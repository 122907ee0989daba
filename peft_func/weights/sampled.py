"""A matrix that is drawn anew each time it acts, as stochastic depth in what generates it asks for."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from peft_func.weights.matrix import Leafwise, Matrix, Rows

Draw: TypeAlias = Callable[[Matrix, Sequence[Tensor], bool], Matrix]
"""Makes a matrix from a base and some tensors; at random if the last argument is true."""


class Sampled(Matrix):
    """A random matrix: a model in train mode draws it wherever it acts; formed, or in eval mode, it is not random.

    `parts` are the tensors that it is made of beside those of `base`, and `ndims` their numbers of dimensions in a
    single matrix.
    """

    is_structured = False  # it holds the base

    def __init__(self, draw: Draw, base: Matrix, parts: Sequence[Tensor], ndims: Sequence[int] | None = None) -> None:
        self.draw, self.base, self.parts = draw, base, tuple(parts)
        self.ndims = tuple(ndims) if ndims else tuple(part.dim() for part in parts)
        leading = (part.shape[: part.dim() - n] for part, n in zip(self.parts, self.ndims, strict=True))
        self.shape = (*max((base.shape[:-2], *leading), key=len), *base.shape[-2:])

    def sample(self) -> Matrix:
        """Draw it, from torch's own generator."""
        return self.draw(self.base, self.parts, True)

    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.base.tensors(), *self.parts)

    def map(self, function: Leafwise) -> Matrix:
        base = self.base.map(function)
        parts = [function(part, n) for part, n in zip(self.parts, self.ndims, strict=True)]
        return Sampled(self.draw, base, parts, self.ndims)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.sample().linear(x, bias)

    @property
    def T(self) -> Matrix:
        return self.sample().T

    def take(self, rows: Rows) -> Matrix:
        return self.sample().take(rows)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.deterministic().dense(dtype)

    def deterministic(self) -> Matrix:
        return self.draw(self.base, self.parts, False)

    @property
    def has_dropout(self) -> bool:
        return True

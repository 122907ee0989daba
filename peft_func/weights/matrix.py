"""A small algebra of matrices that act without being formed.

    W + s B A          Sum(Dense(W), LowRank(B, A, s))                         LoRA
    W (I + phi psi)    Product(Dense(W), IdentityPlus(LowRank(phi, psi)))      GIFT
    diag(l) W          Product(Diagonal(l), Dense(W))                          IA3
    diag(m / |V|) V    Product(Diagonal(m / square_norms(V).sqrt()), V)        DoRA

`+` and `@` make a Sum and a Product too; torch.compile follows `+`, but not `@`, on objects that are no tensors.
A matrix is `[out, in]`, or `[experts, out, in]`: a batch of matrices, one of which acts on each slice of its input.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_func.errors import TreeError
from peft_func.weights import fused
from peft_func.weights.branch import Branch

# Rows of a matrix: a slice of them, or an int64 tensor [n].
Rows: TypeAlias = slice | Tensor
# A function of a tensor of an expression and of its number of dimensions in a single matrix (without experts).
Leafwise: TypeAlias = Callable[[Tensor, int], Tensor]


class Matrix(ABC):
    """A linear map from `in` to `out`, or a batch of them; closed under `+`, `@` and `.T`."""

    shape: tuple[int, ...]
    is_structured = True  # holds no Dense: it is the small part of an expression

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors it is made of."""

    @abstractmethod
    def map(self, function: Leafwise) -> "Matrix":
        """Return the same expression over other tensors."""

    @abstractmethod
    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return `x M^T + bias`: `[*, in]` to `[*, out]`."""

    @property
    @abstractmethod
    def T(self) -> "Matrix":
        """The transpose."""

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return it formed, computed in `dtype`."""

    def take(self, rows: Rows) -> "Matrix":
        """Return some rows of a single matrix, as a matrix."""
        return Dense(_pick(self.dense(self.compute_dtype), rows))

    def select(self, experts: int | Tensor) -> "Matrix":
        """Return one matrix of a batch (an integer), or a batch of some of them (an int64 tensor `[n]`)."""
        return self.map(lambda tensor, ndim: tensor[experts] if tensor.dim() > ndim else tensor)

    def deterministic(self) -> "Matrix":
        """Return it without dropout."""
        return self

    @property
    def has_dropout(self) -> bool:
        """Whether it drops units when it acts."""
        return False

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype to form it in before rounding once: that of all its tensors together, float32 at least."""
        dtype = torch.float32
        for tensor in self.tensors():
            dtype = torch.promote_types(dtype, tensor.dtype)
        return dtype

    def __add__(self, other: "Matrix") -> "Matrix":
        return Sum(self, other)

    def __matmul__(self, other: "Matrix") -> "Matrix":
        return Product(self, other)


def _pick(tensor: Tensor, rows: Rows) -> Tensor:
    # F.embedding is the same as indexing for a matrix, with a cheaper backward.
    return F.embedding(rows, tensor) if isinstance(rows, Tensor) and tensor.dim() == 2 else tensor[..., rows, :]


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    return F.linear(x, matrix) if matrix.dim() == 2 else torch.matmul(x, matrix.mT)


def _add(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias.to(x.dtype)  # x is narrower under autocast


class Dense(Matrix):
    """A matrix that is there, as a tensor."""

    is_structured = False

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.shape = tuple(tensor.shape)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.tensor,)

    def map(self, function: Leafwise) -> Matrix:
        return Dense(function(self.tensor, 2))

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if len(self.shape) == 2:
            return F.linear(x, self.tensor, bias)
        return _add(_times(x, self.tensor), bias)

    @property
    def T(self) -> Matrix:
        return Dense(self.tensor.mT)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.tensor.to(dtype)

    def take(self, rows: Rows) -> Matrix:
        return Dense(_pick(self.tensor, rows))


class Diagonal(Matrix):
    """`diag(v)`, each entry of `v` standing `repeat` times in a row (a channel scale, over the kernel's taps)."""

    def __init__(self, vector: Tensor, repeat: int = 1) -> None:
        self.vector = vector
        self.repeat = repeat
        n = vector.shape[-1] * repeat
        self.shape = (*vector.shape[:-1], n, n)

    @property
    def entries(self) -> Tensor:
        """The diagonal: `[*, n]`."""
        return self.vector if self.repeat == 1 else self.vector.repeat_interleave(self.repeat, -1)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.vector,)

    def map(self, function: Leafwise) -> Matrix:
        return Diagonal(function(self.vector, 1), self.repeat)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        entries = self.entries if self.vector.dim() == 1 else self.entries.unsqueeze(-2)
        return _add((x * entries).to(x.dtype), bias)

    @property
    def T(self) -> Matrix:
        return self

    def dense(self, dtype: torch.dtype) -> Tensor:
        return torch.diag_embed(self.entries.to(dtype))


class LowRank(Matrix):
    """`s B A`, of `B` `[*, out, rank]` and `A` `[*, rank, in]`.

    `dropout` is the probability of dropping an input when it acts on activations; the formed matrix has none.
    """

    def __init__(self, B: Tensor, A: Tensor, scale: float = 1.0, dropout: float = 0.0) -> None:
        *outer, rows, rank = B.shape
        *batch, inner, columns = A.shape
        if rank != inner:
            raise TreeError(f"LowRank: B {list(B.shape)} has rank {rank}, A {list(A.shape)} has {inner}")
        self.B, self.A, self.scale, self.dropout = B, A, scale, dropout
        self.shape = (*(outer or batch), rows, columns)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.B, self.A)

    def map(self, function: Leafwise) -> Matrix:
        return LowRank(function(self.B, 2), function(self.A, 2), self.scale, self.dropout)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        inner = _times(self.drop(x).to(self.A.dtype), self.A)
        # Scaling the narrow activation costs rank / out of scaling the wide one.
        return _add(_times(inner if self.scale == 1.0 else inner * self.scale, self.B).to(x.dtype), bias)

    @property
    def T(self) -> Matrix:
        return LowRank(self.A.mT, self.B.mT, self.scale, self.dropout)

    def dense(self, dtype: torch.dtype) -> Tensor:
        product = self.B.to(dtype) @ self.A.to(dtype)
        return product if self.scale == 1.0 else product * self.scale

    def take(self, rows: Rows) -> Matrix:
        return LowRank(_pick(self.B, rows), self.A, self.scale, self.dropout)

    def deterministic(self) -> Matrix:
        return LowRank(self.B, self.A, self.scale)

    @property
    def has_dropout(self) -> bool:
        return self.dropout > 0.0

    def drop(self, x: Tensor) -> Tensor:
        """Drop some of what it acts on, if it has dropout."""
        return F.dropout(x, self.dropout) if self.dropout > 0.0 else x

    def branch(self, x: Tensor) -> Branch:
        """Return it as the low-rank part of a fused product."""
        return Branch(self.A, self.B, self.scale, F.dropout(x, self.dropout) if self.dropout > 0.0 else None)


class Composite(Matrix):
    """A matrix made of matrices, which its constructor takes in order."""

    children: tuple[Matrix, ...]

    def _rebuilt(self, *children: Matrix) -> Matrix:
        return type(self)(*children)

    def tensors(self) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = ()
        for child in self.children:
            found += child.tensors()
        return found

    def map(self, function: Leafwise) -> Matrix:
        return self._rebuilt(*(child.map(function) for child in self.children))

    def deterministic(self) -> Matrix:
        return self._rebuilt(*(child.deterministic() for child in self.children))

    @property
    def has_dropout(self) -> bool:
        return any(child.has_dropout for child in self.children)

    @property
    def is_structured(self) -> bool:  # type: ignore[override]
        return all(child.is_structured for child in self.children)


class IdentityPlus(Composite):
    """`I + inner`, for a square `inner`."""

    def __init__(self, inner: Matrix) -> None:
        self.inner = inner
        self.children = (inner,)
        self.shape = inner.shape

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        low = self.inner
        if isinstance(low, LowRank) and _fits(x, None, low):
            return _add(fused.input_side(x, None, None, low.branch(x)), bias)
        return _add(x + self.inner.linear(x).to(x.dtype), bias)

    @property
    def T(self) -> Matrix:
        return IdentityPlus(self.inner.T)

    def dense(self, dtype: torch.dtype) -> Tensor:
        inner = self.inner.dense(dtype)
        return inner + torch.eye(inner.shape[-1], dtype=dtype, device=inner.device)


class Sum(Composite):
    """`left + right`."""

    def __init__(self, left: Matrix, right: Matrix) -> None:
        if left.shape[-2:] != right.shape[-2:]:
            raise TreeError(f"a sum of matrices of different shapes: {left.shape} and {right.shape}")
        self.left, self.right = self.children = (left, right)
        self.shape = left.shape if len(left.shape) >= len(right.shape) else right.shape

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        left, right = self.left, self.right
        if isinstance(left, Dense) and isinstance(right, LowRank) and _fits(x, left.tensor, right):
            return fused.linear(x, left.tensor, bias, right.branch(x))
        y = left.linear(x, bias)
        return y + right.linear(x).to(y.dtype)  # autocast gives the two sides different dtypes

    @property
    def T(self) -> Matrix:
        return Sum(self.left.T, self.right.T)

    def dense(self, dtype: torch.dtype) -> Tensor:
        left, right = self.left.dense(dtype), self.right
        if type(right) is LowRank and left.dim() == right.A.dim() == right.B.dim() == 2:
            return torch.addmm(left, right.B.to(dtype), right.A.to(dtype), alpha=right.scale)
        return left + right.dense(dtype)

    def take(self, rows: Rows) -> Matrix:
        return Sum(self.left.take(rows), self.right.take(rows))


class Product(Composite):
    """`left @ right`."""

    def __init__(self, left: Matrix, right: Matrix) -> None:
        if left.shape[-1] != right.shape[-2]:
            raise TreeError(f"a product of matrices that do not chain: {left.shape} and {right.shape}")
        self.left, self.right = self.children = (left, right)
        batch = left.shape[:-2] if len(left.shape) >= len(right.shape) else right.shape[:-2]
        self.shape = (*batch, left.shape[-2], right.shape[-1])

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        match self.left, self.right:
            case Dense(tensor=W), IdentityPlus(inner=LowRank() as low) if _fits(x, W, low):
                return fused.input_side(x, W, bias, low.branch(x))
            case Diagonal(repeat=1, vector=gain), Sum(left=Dense(tensor=W), right=LowRank() as low) if _fits(x, W, low):
                if gain.dim() == low.A.dim() - 1 == 1:
                    return fused.linear(x, W, bias, low.branch(x), gain)
        return self.left.linear(self.right.linear(x), bias)

    @property
    def T(self) -> Matrix:
        return Product(self.right.T, self.left.T)

    def dense(self, dtype: torch.dtype) -> Tensor:
        # Form the side that holds the base weight, and let the structured side act on it.
        if self.left.is_structured:
            return cast(self.left.deterministic(), dtype).linear(self.right.dense(dtype).mT).mT
        return cast(self.right.deterministic(), dtype).T.linear(self.left.dense(dtype))

    def take(self, rows: Rows) -> Matrix:
        match self.left:
            case Diagonal() as left:
                return Product(Diagonal(left.entries[..., rows]), self.right.take(rows))
            case IdentityPlus() as left:
                return Sum(self.right.take(rows), Product(left.inner, self.right).take(rows))
            case Sum() as left:
                return Sum(Product(left.left, self.right).take(rows), Product(left.right, self.right).take(rows))
            case left:
                return Product(left.take(rows), self.right)


def _fits(x: Tensor, W: Tensor | None, low: LowRank) -> bool:
    return type(low) is LowRank and fused.can_fuse(x, W, low.A, low.B)


def cast(matrix: Matrix, dtype: torch.dtype) -> Matrix:
    """Return the same expression over tensors of another dtype."""
    return matrix.map(lambda tensor, _: tensor.to(dtype))

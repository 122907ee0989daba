"""What an adapter adds to one weight: low-rank terms where it is exactly that, or the difference, formed."""

import torch
from torch import Tensor

from peft_func.ensemble.values import wide_dtype
from peft_func.errors import OptionError
from peft_func.weights.mapping import Weights
from peft_func.weights.matrix import Dense, LowRank, Matrix, Sum
from peft_func.weights.operator import Operator


def low_rank_terms(matrix: Matrix, base: Tensor) -> list[LowRank] | None:
    """Return the terms of `base + B A + B A + ...`; None if the expression is another.

    Args:
        matrix: an effective weight.
        base: the base weight, seen as a matrix.
    """
    match matrix:
        case Sum(left=left, right=LowRank() as low):
            terms = low_rank_terms(left, base)
            return None if terms is None else [*terms, LowRank(low.B, low.A, low.scale)]
        case Dense(tensor=tensor) if _same(tensor, base):
            return []
        case _:
            return None


def _same(left: Tensor, right: Tensor) -> bool:
    # Mostly views of one tensor; the matrix of a transposed convolution is a copy.
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    shared = (left.data_ptr(), left.stride()) == (right.data_ptr(), right.stride())
    return shared or bool(torch.equal(left, right))


def delta_at(weights: Weights, path: str) -> list[LowRank] | Tensor:
    """Return what was added to a weight: low-rank terms, or a tensor in its shape, float32 at least.

    Raises:
        OptionError: the adapter does something there that is no change of a weight.
    """
    value, base = weights[path], weights.base[path]
    if isinstance(value, Operator):
        terms = low_rank_terms(value.matrix, value.layout.to_matrix(base))
        if terms is not None:
            return terms
        value = value.exact()
    elif not isinstance(value, Tensor):
        raise OptionError(f"{path}: a {type(value).__name__} acts on activations; it adds nothing to a weight")
    elif value is base:
        return []
    dtype = wide_dtype(value, base)
    return value.to(dtype) - base.to(dtype)


def formed(delta: list[LowRank] | Tensor, weights: Weights, path: str) -> Tensor:
    """Return a delta as a tensor in the weight's shape, float32 at least."""
    if isinstance(delta, Tensor):
        return delta
    base = weights.base[path]
    total = base.new_zeros(base.shape, dtype=wide_dtype(base))
    for term in delta:
        total = total + weights.layouts[path].to_stored(term.dense(term.compute_dtype))
    return total

"""Rows of an expression, written or added in place: what forming a weight in chunks asks of each kind of matrix.

What an expression needs as a whole (a factor in the dtype of the computation, `A W` of a low-rank matrix that acts on
the outputs) is made once, before the first rows.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from peft_func.weights.matrix import Dense, Diagonal, IdentityPlus, LowRank, Matrix, Product, Sum
from peft_func.weights.reshaped import Reshaped
from peft_func.weights.sampled import Sampled
from peft_func.weights.spectral import Spectral

# Bytes of a chunk, in the dtype of the computation. Smaller ones cost more calls and more waiting of threads for each
# other, larger ones leave the cache and take more memory. A compromise: over six runs (float32, rank 16, one or two
# threads, a machine under load) the time relative to 4 MiB was 0.9 to 1.8 with 2 MiB, 0.9 to 4.7 with 1, 1.0 to 3.3
# with 0.5, and 0.7 to 1.2 with 16, which is no chunks at all for these weights.
CHUNK_BYTES = 4 * 2**20
# A GPU has memory fast enough to make the calls the dearer part; the bound is there for the size of the temporary.
CHUNK_BYTES_ON_DEVICE = 64 * 2**20
# A chunk of a very wide matrix has some rows nevertheless, or `A` would be read more often than `W`.
LEAST_ROWS = 64

# Writes the rows from `start` on into `out` `[rows, in]`, or adds them to what is there (`add`).
Put: TypeAlias = Callable[[int, Tensor, bool], None]


def spans(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[int, int]]:
    """Cut the rows of a matrix into chunks of nearly the same size, whatever dtype the result has."""
    most = CHUNK_BYTES if device.type == "cpu" else CHUNK_BYTES_ON_DEVICE
    rows = max(LEAST_ROWS, most // max(1, width * dtype.itemsize))
    count = max(1, -(-height // rows))
    rows = -(-height // count)
    for start in range(0, height, max(1, rows)):
        yield start, min(start + rows, height)


def writer(matrix: Matrix, dtype: torch.dtype) -> Put:
    """Return what writes rows of a matrix, computed in `dtype`."""
    # By the very class: a class of a user's own, though it inherits from one of these, may have another dense form.
    rule = _RULES.get(type(matrix))
    if rule is not None:
        return rule(matrix, dtype)
    return _dense(Dense(matrix.dense(dtype)), dtype)


def _whole(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    height, width = matrix.shape
    whole = torch.empty(height, width, dtype=dtype, device=matrix.tensors()[0].device)
    writer(matrix, dtype)(0, whole, False)
    return whole


def _dense(matrix: Dense, dtype: torch.dtype) -> Put:
    def put(start: int, out: Tensor, add: bool) -> None:
        rows = matrix.tensor[start : start + len(out)]
        if add:
            out.add_(rows)
        else:
            out.copy_(rows)

    return put


def _product_of(B: Tensor, A: Tensor, scale: float) -> Put:
    def put(start: int, out: Tensor, add: bool) -> None:
        out.addmm_(B[start : start + len(out)], A, beta=1 if add else 0, alpha=scale)

    return put


def _low_rank(matrix: LowRank, dtype: torch.dtype) -> Put:
    return _product_of(matrix.B.to(dtype), matrix.A.to(dtype), matrix.scale)


def _spectral(matrix: Spectral, dtype: torch.dtype) -> Put:
    return _product_of(matrix.U.to(dtype) * matrix.d.to(dtype), matrix.A.to(dtype), 1.0)


def _diagonal(matrix: Diagonal, dtype: torch.dtype) -> Put:
    entries = matrix.entries

    def put(start: int, out: Tensor, add: bool) -> None:
        if not add:
            out.zero_()
        out.diagonal(start).add_(entries[start : start + len(out)])

    return put


def _sampled(matrix: Sampled, dtype: torch.dtype) -> Put:
    return writer(matrix.deterministic(), dtype)


def _identity_plus(matrix: IdentityPlus, dtype: torch.dtype) -> Put:
    inner = writer(matrix.inner, dtype)

    def put(start: int, out: Tensor, add: bool) -> None:
        inner(start, out, add)
        out.diagonal(start).add_(1)

    return put


def _sum(matrix: Sum, dtype: torch.dtype) -> Put:
    left, right = writer(matrix.left, dtype), writer(matrix.right, dtype)

    def put(start: int, out: Tensor, add: bool) -> None:
        left(start, out, add)
        right(start, out, True)

    return put


def _changed(inner: Put, change: Callable[[int, Tensor], Tensor]) -> Put:
    # What changes rows in place may not change those that are there already.
    def put(start: int, out: Tensor, add: bool) -> None:
        rows = torch.empty_like(out) if add else out
        inner(start, rows, False)
        change(start, rows)
        if add:
            out.add_(rows)

    return put


def _product(matrix: Product, dtype: torch.dtype) -> Put:
    left, right = matrix.left, matrix.right
    match left, right:
        case _ if type(left) not in _RULES or type(right) not in _RULES:
            return _dense(Dense(matrix.dense(dtype)), dtype)
        case Diagonal(), _:
            entries = left.entries.to(dtype)
            return _changed(
                writer(right, dtype), lambda start, rows: rows.mul_(entries[start : start + len(rows)].unsqueeze(1))
            )
        case _, Diagonal():
            entries = right.entries.to(dtype)
            return _changed(writer(left, dtype), lambda _, rows: rows.mul_(entries))
        case _, IdentityPlus(inner=LowRank() as low) if type(low) is LowRank:
            B, A = low.B.to(dtype), low.A.to(dtype)
            return _changed(writer(left, dtype), lambda _, rows: rows.addmm_(rows @ B, A, alpha=low.scale))
        case IdentityPlus(inner=inner), _:
            return writer(Sum(right, Product(inner, right)), dtype)
        case LowRank(), _ if type(left) is LowRank:
            return _product_of(left.B.to(dtype), _times(left.A.to(dtype), right), left.scale)
        case _:
            whole, rows = _whole(right, dtype), writer(left, dtype)

            def put(start: int, out: Tensor, add: bool) -> None:
                acting = out.new_empty(len(out), left.shape[1])
                rows(start, acting, False)
                out.addmm_(acting, whole, beta=1 if add else 0)

            return put


def _times(A: Tensor, matrix: Matrix) -> Tensor:
    """Return `A M` `[rank, in]`, of `A` `[rank, out]`, chunk by chunk of the rows of `M`."""
    height, width = matrix.shape
    result, put = A.new_zeros(len(A), width), writer(matrix, A.dtype)
    for start, stop in spans(height, width, A.dtype, A.device):
        rows = A.new_empty(stop - start, width)
        put(start, rows, False)
        result.addmm_(A[:, start:stop], rows)
    return result


def _reshaped(matrix: Reshaped, dtype: torch.dtype) -> Put:
    inner, width = writer(matrix.inner, dtype), matrix.inner.shape[1]

    def put(start: int, out: Tensor, add: bool) -> None:
        first, last = start * out.shape[1], (start + len(out)) * out.shape[1]  # entries, in their order
        top, bottom = first // width, -(-last // width)  # the rows of the inner matrix that hold them
        rows = out.new_empty(bottom - top, width)
        inner(top, rows, False)
        entries = rows.view(-1)[first - top * width : last - top * width].view(out.shape)
        if add:
            out.add_(entries)
        else:
            out.copy_(entries)

    return put


_RULES: dict[type[Matrix], Callable[[Any, torch.dtype], Put]] = {
    Dense: _dense,
    LowRank: _low_rank,
    Spectral: _spectral,
    Diagonal: _diagonal,
    IdentityPlus: _identity_plus,
    Sum: _sum,
    Product: _product,
    Reshaped: _reshaped,
    Sampled: _sampled,
}

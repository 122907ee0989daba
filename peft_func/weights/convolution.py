"""How a convolution acts with the matrix of a weight, `[out, in / groups * taps]`, instead of the weight itself.

For a transposed convolution, whose weight is stored as `[in, out / groups, *kernel]`, the matrix is
`[out / groups, in * taps]`: in both cases a low-rank update is a convolution to `rank` channels (in every group) and
a pointwise one behind it, and `A` has the layer's inputs and kernel, `B` its outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from peft_func.weights.absorb import absorb
from peft_func.weights.fused import can_fuse
from peft_func.weights.matrix import Dense, Diagonal, IdentityPlus, LowRank, Matrix, Product, Sum
from peft_func.weights.reshaped import Reshaped
from peft_func.weights.sampled import Sampled
from peft_func.weights.spectral import Spectral


@dataclass(frozen=True)
class Convolution:
    """One call of a convolution.

    Attributes:
        dims: 1, 2 or 3.
        transposed: whether it is a `conv_transpose`.
        kernel: the extent of the kernel in each dimension.
        groups: the number of groups.
        options: stride, padding, dilation (and output_padding), as the function takes them.
        formed: gives the dense form of a matrix that has no convolution of its own, and says so to the user.
    """

    dims: int
    transposed: bool
    kernel: tuple[int, ...]
    groups: int
    options: dict[str, Any]
    formed: Callable[[Matrix], Tensor]

    @property
    def taps(self) -> int:
        """The number of weights between one input channel and one output channel."""
        return prod(self.kernel)

    def full(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """Convolve with the weight whose matrix this is: `[n, in / groups * taps]`, or `[n, in * taps]` transposed."""
        weight = matrix.reshape(*matrix.shape[:-1], -1, *self.kernel)
        if self.transposed:
            return _TRANSPOSED[self.dims](x, weight.transpose(0, 1), bias, groups=self.groups, **self.options)
        return _PLAIN[self.dims](x, weight, bias, groups=self.groups, **self.options)

    def share_over_groups(self, A: Tensor) -> Tensor:
        """Return the first factor as the matrix of a convolution that gives `groups * rank` channels."""
        return A if self.transposed or self.groups == 1 else A.repeat(self.groups, 1)

    def pointwise(self, x: Tensor, B: Tensor) -> Tensor:
        """Mix `groups * rank` channels to the outputs, each group on its own."""
        rows = B.repeat(self.groups, 1) if self.transposed and self.groups > 1 else B
        return _PLAIN[self.dims](x, rows.reshape(*rows.shape, *[1] * self.dims), groups=self.groups)

    def channels(self, vector: Tensor) -> Tensor:
        """Return a vector over channels in a shape that broadcasts with activations, batched or not."""
        return vector.reshape(-1, *[1] * self.dims)

    def scale_out(self, y: Tensor, vector: Tensor) -> Tensor:
        """Scale the outputs, by the diagonal over the rows of the matrix."""
        vector = vector.repeat(self.groups) if self.transposed else vector
        return (y * self.channels(vector)).to(y.dtype)

    def scale_in(self, x: Tensor, vector: Tensor) -> Tensor:
        """Scale the inputs, by the diagonal over the input channels of the matrix."""
        vector = vector if self.transposed else vector.repeat(self.groups)
        return (x * self.channels(vector)).to(x.dtype)


def convolve(matrix: Matrix, x: Tensor, how: Convolution, bias: Tensor | None = None) -> Tensor:
    """Convolve `x` with the weight whose matrix this is, and add the bias."""
    match matrix:
        case Dense(tensor=tensor):
            return how.full(x, tensor, bias)
        case Sum(left=Dense(tensor=tensor), right=Reshaped() as change) if not change.has_dropout:
            return how.full(x, change.added_to(tensor), bias)
        case Sampled():
            return convolve(matrix.sample(), x, how, bias)
        case Reshaped():
            return how.full(matrix.drop(x), matrix.formed(x.dtype), bias)
        case Sum(left=Dense(tensor=tensor), right=LowRank(A=A, B=B) as low) if _may_accumulate(x, tensor, low):
            y = how.full(x, tensor, bias)
            return y.add_(how.pointwise(how.full(low.drop(x), how.share_over_groups(A)), B), alpha=low.scale)
        case Sum(left=left, right=right):
            y = convolve(left, x, how, bias)
            return y + convolve(right, x, how).to(y.dtype)
        case Spectral(U=U, d=d, A=A):
            inner = how.full(x, how.share_over_groups(A.to(x.dtype)))
            y = how.pointwise((inner * how.channels(d.repeat(how.groups))).to(x.dtype), U.to(x.dtype))
        case LowRank(A=A, B=B, scale=scale):
            inner = how.full(matrix.drop(x).to(A.dtype), how.share_over_groups(A))
            y = how.pointwise(inner if scale == 1.0 else inner * scale, B).to(x.dtype)
        case Product(left=Diagonal(repeat=1, vector=vector), right=right):
            y = how.scale_out(convolve(right, x, how), vector)
        case Product(left=left, right=Diagonal(repeat=how.taps, vector=vector)):
            return convolve(left, how.scale_in(x, vector), how, bias)
        case Product(left=left, right=IdentityPlus(inner=LowRank() as low)):
            return convolve(Sum(left, absorb(left, low)), x, how, bias)
        case _:
            return how.full(x, how.formed(matrix), bias)
    return y if bias is None else y + how.channels(bias).to(y.dtype)


def _may_accumulate(x: Tensor, W: Tensor, low: LowRank) -> bool:
    """Whether the branch may be added in place: a tensor that nobody else has, outside of transforms and autocast."""
    return type(low) is LowRank and can_fuse(x, W, low.A, low.B) and x.dtype == low.A.dtype


_PLAIN: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}

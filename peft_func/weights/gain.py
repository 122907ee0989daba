"""The gradient of a gain on the outputs of a product, `y = gain z + bias`, without keeping z, which is as wide as y.

    d gain = sum of dy z = (sum of dy y - bias sum of dy) / gain          sums over rows

The next operator of a model mostly keeps y in any case. An alias of it costs nothing then, but it would hold its memory
where hooks handle saved tensors (checkpoints among them), and it is of no use once the model has written to y.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Below it, dividing would magnify what rounding left of the difference.
SMALLEST = 1 / 64
# Entries that stay in the cache of a core, and are enough for some threads to share.
BLOCK = 2**18


class Alias:
    """The output of a function, which notices whether it has been written to since."""

    def __init__(self, y: Tensor) -> None:
        self.y = y.detach()
        self.version = self.y._version

    @property
    def is_untouched(self) -> bool:
        """Whether it still has the values that the function returned."""
        return self.y._version == self.version


def may_alias(x: Tensor, bias: Tensor | None) -> bool:
    """Whether z may come from y in backward: there are values to look at, and precision to spare."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    modes = torch._C._len_torch_dispatch_stack()  # one of them may make fake tensors
    captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return hooks is None and not (modes or captured or x.is_meta) and (bias is None or x.dtype.itemsize >= 4)


def gain_gradient(
    dy: Tensor,
    gain: Tensor,
    bias: Tensor | None,
    kept: Tensor | None,
    output: Alias | None,
    again: Callable[[], Tensor],
) -> Tensor:
    """Return the gradient of the gain, `[out]`.

    Args:
        dy: of the output, `[tokens, out]`.
        gain: `[out]`.
        bias: `[out]`, or None.
        kept: z `[tokens, out]`, if it was kept.
        output: an alias of y, if it was not.
        again: computes z. A graph of this backward needs it, of which y is no function.
    """
    differentiable = torch.is_grad_enabled()
    if output is not None and output.is_untouched and not differentiable and bool(gain.abs().amin() >= SMALLEST):
        total = _column_products(dy, output.y, gain.dtype)
        return total / gain if bias is None else (total - bias * dy.sum(0)) / gain
    z = again() if kept is None or differentiable else kept
    return torch.sum(dy * z, 0).to(gain.dtype)


def _column_products(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sums over rows of `a * b`, some rows at a time: what they are summed into stays in the cache."""
    rows = max(1, BLOCK // max(1, a.shape[1]))
    first, *others = zip(a.split(rows), b.split(rows), strict=True)  # type: ignore[no-untyped-call]
    total: Tensor = first[0].to(dtype) * first[1]
    for p, q in others:
        total[: len(p)].addcmul_(p.to(dtype), q.to(dtype))
    return total.sum(0)

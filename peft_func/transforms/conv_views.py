"""The matrix that a method sees in a convolution's weight `[out, in / groups, k0, k1, ...]`, read row by row.

    out_as_h    [out, in / groups * k0 * k1 * ...]
    balanced    [out * k0, in / groups * k1 * ...]        in one dimension, where there is no k1, the same as out_as_h

The two views of Qiu's GIFt (https://github.com/qiauil/GIFt, `ConvWeightHWType`). Rank r costs r (h + w) values: fewer
in the balanced view where there are about as many inputs as outputs, more where there are few inputs (a first layer).
A transposed convolution's weight is read as its matrix is, with `out / groups` and `in` for `out` and `in / groups`.
Other weights have one view only.
"""

from peft_func.weights.layout import Layout
from peft_func.weights.matrix import LowRank, Matrix
from peft_func.weights.reshaped import Reshaped

VIEWS = ("balanced", "out_as_h")
"""The names of the views."""


def view_shape(layout: Layout, conv: str) -> tuple[int, ...]:
    """Return the shape of the matrix that a method sees: `[*batch, h, w]`."""
    rows, columns = layout.matrix_shape[-2:]
    if conv != "balanced" or len(layout.kernel) < 2:
        return layout.matrix_shape
    k0 = layout.kernel[0]
    return (rows * k0, columns // k0)


def change_of(layout: Layout, seen: LowRank, *, whole: bool = False) -> Matrix:
    """Return a change of the matrix that a method sees as a change of the weight's own matrix.

    Args:
        layout: how the weight is stored.
        seen: the change, in the method's view.
        whole: form it for every convolution, also where the views agree: its rank is no small one.
    """
    if layout.is_conv and (whole or seen.shape != layout.matrix_shape):
        return Reshaped(seen, layout.matrix_shape)
    return seen

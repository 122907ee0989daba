"""Spherical interpolation: two tensors combined along the arc between them, not along the chord.

    slerp(a, b; t) = sin((1 - t) W) / sin W * a + sin(t W) / sin W * b,    cos W = <a, b> / (|a| |b|)

Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985. The coefficients need three inner products and
nothing else, so that for low-rank matrices they come from the factors, and the result is an exact sum.
"""

from math import atan2, sin, sqrt

from peft_func.errors import OptionError


def slerp_weights(path: str, t: float, aa: float, bb: float, ab: float) -> tuple[float, float]:
    """Return the two coefficients, from the inner products `<a, a>`, `<b, b>` and `<a, b>`.

    Parallel tensors, and tensors of which one is zero, have no arc: they are interpolated linearly.

    Raises:
        OptionError: they point in opposite directions, between which no arc is the shortest.
    """
    if aa == 0.0 or bb == 0.0:
        return 1.0 - t, t
    cosine = max(-1.0, min(1.0, ab / (sqrt(aa) * sqrt(bb))))
    square = 1.0 - cosine * cosine  # of the sine; below 1e-12 it is rounding, and the arc is its chord
    if square < 1e-12:
        if cosine < 0.0 and 0.0 < t < 1.0:
            raise OptionError(
                f"slerp: the two changes of {path} point in opposite directions, and no arc between them is the "
                "shortest; use how='svd', which adds them"
            )
        return 1.0 - t, t
    angle = atan2(sqrt(square), cosine)
    return sin((1.0 - t) * angle) / sqrt(square), sin(t * angle) / sqrt(square)

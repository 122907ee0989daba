"""How the tokens of a transformer lie in an image: extra ones first, then patches row by row."""

from collections.abc import Sequence
from math import isqrt, prod
from typing import Any

from peft_func.errors import OptionError


def check_grid(grid: Any, extra: Any) -> None:
    """Check that a grid is `(h, w)` or None, and a number of extra tokens a whole number or None.

    Raises:
        OptionError: it is not.
    """
    whole = isinstance(grid, Sequence) and all(isinstance(n, int) and not isinstance(n, bool) for n in grid)
    if grid is not None and not (whole and len(grid) == 2 and min(grid) >= 1):
        raise OptionError(f"grid is (h, w), the rows and columns of patches, not {grid!r}")
    if extra is not None and (not isinstance(extra, int) or isinstance(extra, bool) or extra < 0):
        raise OptionError(f"extra_tokens is how many tokens come before the patches, not {extra!r}")


def patch_grid(
    place: str,
    tokens: tuple[int, ...],
    size: tuple[int, ...] | None,
    grid: tuple[int, int] | None = None,
    extra: int | None = None,
) -> tuple[int, int, int]:
    """Return `(h, w, extra tokens)` for the tokens of a place: `tokens = extra tokens + h * w`.

    Args:
        place: for messages.
        tokens: `(count,)`, or `(h, w)` where the module's output is a grid already.
        size: `(height, width)` of the images, if they are known.
        grid: what the user says of the grid.
        extra: what the user says of the extra tokens.

    Raises:
        OptionError: what the user says does not fit, or nothing tells the grid.

    Example:
        >>> from peft_func.report.patches import patch_grid
        >>> patch_grid("a ViT", (197,), (224, 224))  # patches of 16 x 16, and a class token
        (14, 14, 1)
    """
    count = prod(tokens)
    if grid is not None:
        h, w = grid
        if count - h * w != (count - h * w if extra is None else extra) or count < h * w:
            raise OptionError(
                f"{place} has {count} tokens: they are no grid of {h} x {w} = {h * w}, after "
                f"{'some' if extra is None else extra} extra tokens"
            )
        return h, w, count - h * w
    if len(tokens) == 2:
        return *tokens, 0
    if size is None:
        raise OptionError(f"{place} has {count} tokens, and the input is no images; give grid=(h, w)")
    found = {
        (height, width, more)
        for more in ((0, 1) if extra is None else (extra,))
        for height, width in [_squares(count - more, size)]
        if height
    }
    if len(found) != 1:
        raise OptionError(
            f"{place} has {count} tokens for images of {size[0]} x {size[1]}: square patches and "
            f"{'one extra token or none do' if extra is None else f'{extra} extra tokens do'} not tell the grid; "
            "give grid=(h, w), and extra_tokens= for those before the patches"
        )
    return found.pop()


def _squares(count: int, size: tuple[int, ...]) -> tuple[int, int]:
    """Return into how many rows and columns `count` square patches divide an image; zeros where they do not."""
    height, width = size
    side = isqrt(height * width // count) if count > 0 else 0
    fits = side > 0 and height % side == 0 and width % side == 0 and (height // side) * (width // side) == count
    return (height // side, width // side) if fits else (0, 0)

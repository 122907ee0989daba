"""The grid of patches: what is inferred is right whenever the patches are squares, and never a guess."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import peft_func as pf
from peft_func.report.patches import check_grid, patch_grid


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 16), st.integers(0, 1))
def test_square_patches_and_up_to_one_extra_token_are_found(h, w, side, extra):
    assert patch_grid("p", (h * w + extra,), (h * side, w * side)) == (h, w, extra)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 16), st.integers(0, 9))
def test_given_numbers_of_extra_tokens(h, w, side, extra):
    count = (h * w + extra,)
    size = (h * side, w * side)
    assert patch_grid("p", count, size, None, extra) == (h, w, extra)
    assert patch_grid("p", count, size, (h, w)) == (h, w, extra)
    assert patch_grid("p", count, None, (h, w), extra) == (h, w, extra)


@given(st.integers(1, 200), st.integers(1, 64), st.integers(1, 64))
def test_what_is_inferred_is_the_only_way(count, height, width):
    ways = {
        (height // side, width // side, extra)
        for side in range(1, 65)
        for extra in (0, 1)
        if height % side == 0 and width % side == 0 and (height // side) * (width // side) + extra == count
    }
    if len(ways) == 1:
        assert patch_grid("p", (count,), (height, width)) == ways.pop()
    else:
        with pytest.raises(pf.OptionError, match="give grid="):
            patch_grid("p", (count,), (height, width))


def test_a_grid_that_the_output_has_needs_no_image():
    assert patch_grid("p", (3, 5), None) == (3, 5, 0)
    assert patch_grid("p", (3, 5), (64, 64)) == (3, 5, 0)


@pytest.mark.parametrize(
    ("tokens", "size", "grid", "extra"),
    [
        ((201,), (224, 224), None, None),  # registers
        ((197,), None, None, None),
        ((197,), (224, 224), None, 0),
        ((16,), None, (3, 5), 0),
        ((16,), None, (5, 5), None),
        ((16,), None, (4, 4), 1),
        ((3,), (8, 8), None, 5),
    ],
)
def test_what_does_not_fit_is_refused(tokens, size, grid, extra):
    with pytest.raises(pf.OptionError, match="a place has"):
        patch_grid("a place", tokens, size, grid, extra)


@pytest.mark.parametrize(
    ("grid", "extra"),
    [(4, None), ((4,), None), ("44", None), ((4, 0), None), ((2.0, 2), None), (None, -1), (None, "1")],
)
def test_what_is_no_grid_is_refused(grid, extra):
    with pytest.raises(pf.OptionError, match="grid is" if extra is None else "extra_tokens is"):
        check_grid(grid, extra)


def test_what_is_a_grid():
    check_grid(None, None)
    check_grid((3, 5), 0)
    check_grid([3, 5], 4)

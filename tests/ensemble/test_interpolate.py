"""The coefficients of the arc."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peft_func as pf
from peft_func.ensemble.interpolate import slerp_weights


def slerp(a, b, t):
    first, second = slerp_weights("x", t, float(a @ a), float(b @ b), float(a @ b))
    return first * a + second * b


@given(st.integers(0, 999), st.floats(0, 1))
def test_the_arc_between_equal_norms_has_that_norm_and_a_steady_angle(seed, t):
    a, b = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    a, b = 3 * a / a.norm(), 3 * b / b.norm()
    middle = slerp(a, b, t)
    assert float(middle.norm()) == pytest.approx(3, rel=1e-9)
    angle = lambda x, y: math.acos(max(-1.0, min(1.0, float(x @ y) / 9)))
    assert angle(a, middle) == pytest.approx(t * angle(a, b), abs=1e-6)


def test_the_ends():
    a, b = torch.randn(2, 6, dtype=torch.float64)
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)


@pytest.mark.parametrize("factor", [0.0, 1.0, 2.0, 1e-200])
def test_zero_and_parallel_tensors_are_interpolated_linearly(factor):
    a = torch.randn(6, dtype=torch.float64)
    torch.testing.assert_close(slerp(a, factor * a, 0.25), (0.75 + 0.25 * factor) * a)


def test_nearly_parallel_tensors_are_right_on_both_sides_of_the_switch():
    a = torch.tensor([1.0, 0.0], dtype=torch.float64)
    for angle in (1e-3, 1e-5, 1e-6, 9e-7, 1e-9):
        b = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
        expected = torch.tensor([math.cos(angle / 4), math.sin(angle / 4)], dtype=torch.float64)
        torch.testing.assert_close(slerp(a, b, 0.25), expected, atol=1e-12, rtol=0)


def test_opposite_tensors_have_no_arc():
    a = torch.randn(6, dtype=torch.float64)
    with pytest.raises(pf.OptionError, match="opposite"):
        slerp(a, -2 * a, 0.5)
    torch.testing.assert_close(slerp(a, -2 * a, 1.0), -2 * a)

"""Low-rank arithmetic on factors is that of the products."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_func.ensemble.factors import concatenate, decompose, effective_rank, fit, inner, norm, truncate
from peft_func.ensemble.values import wide_dtype
from peft_func.weights.matrix import LowRank


def draw(out, inputs, rank, seed, batch=(), scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(*batch, out, rank, dtype=torch.float64, generator=generator)
    return LowRank(B, torch.randn(*batch, rank, inputs, dtype=torch.float64, generator=generator), scale)


def dense(low):
    return low.scale * (low.B @ low.A)


sizes = st.integers(1, 7)


@given(sizes, sizes, sizes, sizes, st.sampled_from([(), (2,)]), st.integers(0, 99))
def test_a_concatenation_is_the_sum_and_fits(out, inputs, first, second, batch, seed):
    a, b = draw(out, inputs, first, seed, batch, 0.5), draw(out, inputs, second, seed + 1, batch, -3.0)
    total = concatenate([a, b], [2.0, 0.25])
    expected = 2 * dense(a) + 0.25 * dense(b)
    assert total.A.shape[-2] == first + second
    assert total.scale == 1.0
    torch.testing.assert_close(dense(total), expected, atol=1e-11, rtol=1e-11)
    fitted = fit(total)
    assert fitted.A.shape[-2] <= min(out, inputs)
    torch.testing.assert_close(dense(fitted), expected, atol=1e-11, rtol=1e-11)


@given(sizes, sizes, sizes, st.integers(1, 7), st.integers(0, 99))
def test_a_truncation_is_the_best_approximation(out, inputs, rank, cut, seed):
    low = draw(out, inputs, rank, seed, scale=-1.5)
    U, S, Vh = torch.linalg.svd(dense(low), full_matrices=False)
    best = U[:, :cut] * S[:cut] @ Vh[:cut]
    torch.testing.assert_close(dense(truncate(low, cut)), best, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(decompose(low)[1], S[: min(out, inputs, rank)], atol=1e-11, rtol=1e-11)


def test_none_keeps_the_rank_that_is_there():
    one = draw(6, 5, 1, 0)
    twice = concatenate([one, one, draw(6, 5, 2, 1)], [1.0, 2.0, 1.0])
    assert truncate(twice).A.shape[-2] == 3
    assert truncate(LowRank(one.B * 0, one.A)).A.shape[-2] == 1
    assert effective_rank(torch.tensor([[1.0, 0.5], [1.0, 1e-9]]), 4) == 2


def test_the_factors_share_the_singular_values_evenly():
    low = truncate(draw(6, 5, 3, 0))
    torch.testing.assert_close(low.B.mT @ low.B, low.A @ low.A.mT)


@given(sizes, sizes, sizes, st.integers(0, 99))
def test_norms_and_inner_products(out, inputs, rank, seed):
    a, b = draw(out, inputs, rank, seed, scale=-2.0), draw(out, inputs, rank + 1, seed + 1)
    assert norm(a) == pytest.approx(float(dense(a).norm()), rel=1e-12)
    assert inner(a, b) == pytest.approx(float((dense(a) * dense(b)).sum()), rel=1e-9, abs=1e-9)


def test_the_norm_of_a_small_difference_is_accurate():
    low = draw(40, 30, 3, 0)
    near = LowRank(low.B * (1 + 1e-12), low.A)
    assert norm(concatenate([near, low], [1.0, -1.0])) / norm(low) == pytest.approx(1e-12, rel=0.05)


def test_half_precision_is_computed_in_float32():
    half = LowRank(torch.ones(3, 1, dtype=torch.bfloat16), torch.ones(1, 3, dtype=torch.bfloat16))
    assert concatenate([half], [1 / 3]).A.dtype == torch.float32
    assert truncate(half).B.dtype == torch.float32
    assert wide_dtype(torch.ones(1, dtype=torch.float16), torch.ones(1, dtype=torch.float64)) == torch.float64


def test_nothing_of_the_size_of_the_matrix_is_formed():
    big = 1 << 20  # a product would be 8 TiB
    low = LowRank(torch.ones(big, 2), torch.ones(2, big))
    assert truncate(concatenate([low, low], [1.0, 1.0]), 1).A.shape == (1, big)
    assert norm(low) == pytest.approx(2 * big, rel=1e-5)

"""Norms and products that go through a base weight: equal to the dense ones, in half precision without a wide copy."""

import pytest
import torch

from peft_func.weights.absorb import PIECES, absorb, square_norms, through
from peft_func.weights.matrix import Dense, Diagonal, IdentityPlus, LowRank, Product, Sum
from peft_func.weights.sampled import Sampled
from tests.laws.test_nothing_dense import Watch
from tests.zoo import randn

W, B, A = randn(13, 7), randn(13, 2, seed=1), randn(2, 7, seed=2)
PHI, PSI, GAIN = randn(7, 2, seed=3), randn(2, 7, seed=4), randn(13, seed=5)
EXPRESSIONS = {
    "dense": Dense(W),
    "low rank": LowRank(B, A, 0.7),
    "lora": Sum(Dense(W), LowRank(B, A, 0.7)),
    "lora twice": Sum(Sum(Dense(W), LowRank(B, A, 0.7)), LowRank(B * 2, A)),
    "dora": Product(Diagonal(GAIN), Sum(Dense(W), LowRank(B, A))),
    "gift": Product(Dense(W), IdentityPlus(LowRank(PHI, PSI, 0.5))),
    "gift of lora": Product(Sum(Dense(W), LowRank(B, A)), IdentityPlus(LowRank(PHI, PSI))),
    "sum of two": Sum(Dense(W), Dense(W)),
    "experts": Sum(Dense(randn(3, 13, 7)), LowRank(randn(3, 13, 2, seed=6), randn(3, 2, 7, seed=7))),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_norms_are_those_of_the_dense_rows(name):
    matrix = EXPRESSIONS[name]
    expected = matrix.dense(torch.float64).square().sum(-1)
    assert torch.allclose(square_norms(matrix), expected, rtol=0, atol=1e-11 * expected.max())


@pytest.mark.parametrize("name", ["dense", "lora", "lora twice", "gift", "experts"])
def test_what_is_absorbed_is_the_product(name):
    matrix = EXPRESSIONS[name]
    low = LowRank(PHI, PSI, 0.3, dropout=0.5)
    found = absorb(matrix, low)
    assert (found.scale, found.dropout) == (0.3, 0.5)
    expected = matrix.dense(torch.float64) @ (0.3 * PHI @ PSI)
    assert torch.allclose(found.dense(torch.float64), expected, rtol=0, atol=1e-11)


def test_a_random_left_side_is_not_random_in_a_factor():
    left = Sampled(lambda base, _, drop: Product(Diagonal(GAIN), base) if drop else base, Dense(W), [])
    assert torch.allclose(absorb(left, LowRank(PHI, PSI)).B, W @ PHI, atol=1e-12)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(13, 7), (3, 13, 7), (5, 7), (8, 7)])
class TestHalfPrecision:
    def test_values_and_gradients_are_those_of_a_wide_copy(self, half, shape):
        base, X = randn(*shape).to(half), randn(7, 2, seed=8).requires_grad_()
        ours, theirs = through(Dense(base), X), base.double() @ X
        assert ours.dtype == X.dtype
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
        seed = randn(*ours.shape, seed=9).requires_grad_()
        for function in (lambda y: (y * seed).sum(), lambda y: y.square().mul(seed).sum()):
            first = [torch.autograd.grad(function(y), X, create_graph=True)[0] for y in (ours, theirs)]
            assert torch.allclose(*first, rtol=0, atol=1e-10)
            second = [torch.autograd.grad(g.square().sum(), seed, retain_graph=True)[0] for g in first]
            assert torch.allclose(*second, rtol=0, atol=1e-9)

    def test_under_vmap(self, half, shape):
        base, X = randn(*shape).to(half), randn(4, 7, 2, seed=8)
        mapped = torch.vmap(lambda x: through(Dense(base), x))(X)
        assert torch.allclose(mapped, torch.stack([base.double() @ x for x in X]), atol=1e-12)


def test_a_frozen_half_precision_weight_has_no_wide_copy():
    base = randn(101, 67).to(torch.bfloat16)
    low = LowRank(randn(67, 2, seed=1).float().requires_grad_(), randn(2, 67, seed=2).float())
    with Watch([base]) as watch:
        absorb(Dense(base), low).B.square().sum().backward()
        square_norms(Sum(Dense(base), LowRank(randn(101, 2).float(), randn(2, 67).float())))
    assert watch.made == []
    with Watch([base]) as watch:
        base.float()
    assert len(watch.made) == 1
    assert base.shape[0] > PIECES

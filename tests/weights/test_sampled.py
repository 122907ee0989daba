"""A random matrix acts anew each time, and is formed without its randomness."""

import torch
import torch.nn.functional as F

from peft_func.weights.convolution import Convolution, convolve
from peft_func.weights.matrix import Dense, LowRank, Sum
from peft_func.weights.sampled import Sampled
from tests.zoo import randn


def noisy(base, parts, drop):
    """A low-rank matrix, on (times 2) or off when it is drawn."""
    B, A = parts
    return LowRank(F.dropout(B.new_ones(*B.shape[:-2], 1, 1), 0.5 if drop else 0.0) * B, A)


B, A = randn(5, 2, seed=1), randn(2, 4, seed=2)
MATRIX = Sampled(noisy, Dense(randn(5, 4)), (B, A))
X = randn(3, 4, seed=3)


def outcomes(function, plain, count=40):
    """Check that each result is nothing, or twice the plain one, and that both occur."""
    seen = set()
    for seed in range(count):
        torch.manual_seed(seed)
        y = function()
        assert any(torch.allclose(y, k * plain) for k in (0, 2))
        seen.add(bool(y.any()))
    assert seen == {True, False}


def test_it_is_drawn_where_it_acts():
    outcomes(lambda: MATRIX.linear(X), X @ (B @ A).T)
    outcomes(lambda: MATRIX.T.linear(X @ A.T @ B.T), X @ A.T @ B.T @ B @ A)
    outcomes(lambda: MATRIX.take(slice(1, 3)).dense(torch.float64), (B @ A)[1:3])
    how = Convolution(1, False, (2,), 1, {}, lambda _: None)
    x = randn(1, 2, 6, seed=4)
    outcomes(lambda: convolve(MATRIX, x, how), F.conv1d(x, (B @ A).view(5, 2, 2)))


def test_formed_it_is_not_random():
    assert MATRIX.has_dropout
    assert not MATRIX.deterministic().has_dropout
    assert not MATRIX.is_structured
    for _ in range(5):
        assert torch.equal(MATRIX.dense(torch.float64), B @ A)
        whole = Sum(MATRIX.base, MATRIX)
        assert torch.equal(whole.deterministic().linear(X), whole.deterministic().linear(X))


def test_its_tensors_may_have_an_axis_in_front():
    assert MATRIX.shape == (5, 4)
    assert [t.data_ptr() for t in MATRIX.tensors()] == [t.data_ptr() for t in (MATRIX.base.tensor, B, A)]
    many = MATRIX.map(lambda t, ndim: torch.stack([t, 2 * t]) if t is not MATRIX.base.tensor and t.dim() == ndim else t)
    assert many.shape == (2, 5, 4)
    assert many.map(lambda t, ndim: t[1] if t.dim() > ndim else t).shape == (5, 4)
    assert torch.equal(many.dense(torch.float64), torch.stack([B @ A, 4 * (B @ A)]))

"""The accumulated product equals the composed one: values, first and second gradients; it keeps out of transforms."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import vmap

from peft_func.weights.fused import accumulate, can_accumulate
from peft_func.weights.matrix import Dense, LowRank, Sum
from tests.zoo import randn


def composed(x, W, bias, A, B, scale):
    return F.linear(x, W, bias) + scale * (x @ A.T) @ B.T


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_of_both_orders(shape, with_bias):
    W, A, B = randn(4, 5), randn(2, 5, seed=1), randn(4, 2, seed=2)
    bias = randn(4, seed=3) if with_bias else None
    inputs = [t.requires_grad_() for t in (randn(*shape, seed=4), A, B)]
    x = inputs[0]
    results = []
    for y in (accumulate(x, x, W, bias, A, B, 0.7), composed(x, W, bias, A, B, 0.7)):
        first = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        results.append([y, *first, *second])
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, atol=1e-11)


def test_it_keeps_out_of_transforms_autocast_experts_and_mixed_dtypes():
    W, A, B, x = randn(4, 5), randn(2, 5), randn(4, 2), randn(3, 5)
    assert can_accumulate(x, W, A, B)
    assert not can_accumulate(x, W, A.float(), B.float())
    assert not can_accumulate(x, W.expand(2, 4, 5), A, B)
    seen = []
    vmap(lambda a: seen.append(can_accumulate(x, W, a, B)) or a)(A.expand(2, 2, 5))
    torch.func.grad(lambda a: seen.append(can_accumulate(x, W, a, B)) or a.sum())(A)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen.append(can_accumulate(x.float(), W.float(), A.float(), B.float()))
    assert seen == [False] * 3


def test_the_frozen_weight_and_the_input_are_not_written():
    W, low, x = randn(4, 5), LowRank(randn(4, 2), randn(2, 5)), randn(3, 5)
    before = W.clone(), x.clone()
    Sum(Dense(W), low).linear(x)
    assert torch.equal(W, before[0])
    assert torch.equal(x, before[1])

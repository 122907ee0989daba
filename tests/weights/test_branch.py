"""A branch beside a product, or inside of it, is the product with the formed sum; its operands are not written to."""

import itertools

import pytest
import torch

from peft_func.weights.branch import Branch, accumulated_slices, composed, gained
from tests.zoo import randn


def operands(*lead, inside=False, weight=True, dtype=torch.float64):
    """x `[*lead, 3, 5]`, W `[4, 5]`, b, and the factors of a branch."""
    W, bias = (randn(4, 5, seed=1).to(dtype), randn(4, seed=2).to(dtype)) if weight else (None, None)
    A, B = randn(*lead[:1], 2, 5, seed=3), randn(*lead[:1], 4 if weight and not inside else 5, 2, seed=4)
    return randn(*lead, 3, 5).to(dtype), W, bias, A, B


def formed_sum(W, A, B, *, inside):
    return W @ (torch.eye(5).double() + 0.7 * B @ A) if inside else (torch.eye(5) if W is None else W) + 0.7 * B @ A


@pytest.mark.parametrize(("inside", "weight"), [(False, True), (True, True), (False, False)])
@pytest.mark.parametrize("in_place", [False, True])
def test_it_is_the_product_with_the_sum(inside, weight, in_place):
    x, W, bias, A, B = operands(inside=inside, weight=weight)
    given_tensors = [t for t in (x, W, bias, A, B) if t is not None]
    before = [t.clone() for t in given_tensors]
    expected = x @ formed_sum(W, A, B, inside=inside).T + (0 if bias is None else bias)
    for given, formed in itertools.product((x, x.view(1, 3, 5)), (False, not inside)):
        y = composed(given, W, bias, Branch(A, B, 0.7, inside=inside), formed=formed, in_place=in_place)
        assert torch.allclose(y, expected, rtol=0, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(before, given_tensors, strict=True))


@pytest.mark.parametrize("inside", [False, True])
def test_the_branch_may_act_on_something_else(inside):
    x, W, bias, A, B = operands(inside=inside)
    z = randn(3, 5, seed=9)
    branch = 0.7 * z @ A.T @ B.T
    expected = ((x + branch) @ W.T if inside else x @ W.T + branch) + bias
    assert torch.allclose(composed(x, W, bias, Branch(A, B, 0.7, z, inside)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("inside", [False, True])
def test_a_half_precision_base_rounds_its_own_products_only(inside):
    x, W, bias, A, B = operands(inside=inside, dtype=torch.bfloat16)
    y = composed(x, W, bias, Branch(A.float(), B.float(), 0.7, inside=inside))
    expected = x.double() @ formed_sum(W.double(), A, B, inside=inside).T + bias.double()
    assert y.dtype == torch.bfloat16
    assert (y - expected).abs().max() < 4 * torch.finfo(torch.bfloat16).eps * expected.abs().max()


@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_slices_with_factors_of_their_own(weight, dtype):
    x, W, bias, A, B = operands(2, weight=weight, dtype=dtype)
    y = accumulated_slices(x, W, bias, Branch(A, B, 0.7))
    wide = None if W is None else W.double()
    each = [z.double() @ formed_sum(wide, a, b, inside=False).T for z, a, b in zip(x, A, B, strict=True)]
    expected = torch.stack(each) + (0 if bias is None else bias)
    assert y.dtype == dtype
    assert (y - expected).abs().max() < 4 * torch.finfo(dtype).eps * expected.abs().max()


def test_a_gain_acts_before_the_bias():
    y, gain, bias = randn(3, 4), randn(4, seed=1), randn(4, seed=2)
    assert gained(y, None, None) is y
    assert torch.equal(gained(y, gain, None), y * gain)
    assert torch.equal(gained(y, gain, bias), y * gain + bias)

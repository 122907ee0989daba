"""Spectral is the matrix that it says: every way it acts is that of its dense form."""

import pytest
import torch

from peft_func.weights.absorb import square_norms
from peft_func.weights.matrix import Dense, IdentityPlus, LowRank, Product, Sum
from peft_func.weights.spectral import Spectral
from tests.transforms.plain import GRADS, same
from tests.zoo import randn

U, D, VT = randn(5, 3, seed=1), randn(3, seed=2), randn(3, 4, seed=3)
DENSE = U @ torch.diag(D) @ VT


def test_every_action_is_that_of_the_dense_form():
    matrix, x, bias = Spectral(U, D, VT), randn(2, 7, 4), randn(5)
    assert matrix.shape == (5, 4)
    assert matrix.is_structured
    assert matrix.tensors() == (U, D, VT)
    same(matrix.dense(torch.float64), DENSE)
    same(matrix.linear(x, bias), x @ DENSE.T + bias)
    same(matrix.linear(x[0, 0]), DENSE @ x[0, 0])
    same(matrix.T.linear(randn(7, 5)), randn(7, 5) @ DENSE)
    same(matrix.take(slice(1, 4)).dense(torch.float64), DENSE[1:4])
    same(matrix.take(torch.tensor([3, 0, 3])).dense(torch.float64), DENSE[[3, 0, 3]])
    same(square_norms(matrix), DENSE.square().sum(-1))
    same(LowRank(matrix.B, matrix.A).dense(torch.float64), DENSE)
    assert matrix.deterministic() is matrix


def test_in_sums_and_products_it_is_what_it_is_dense():
    W, phi, psi, x = randn(5, 4, seed=4), randn(4, 2), randn(2, 4), randn(7, 4)
    total = Sum(Dense(W), Spectral(U, D, VT))
    same(total.linear(x), x @ (W + DENSE).T)
    same(square_norms(total), (W + DENSE).square().sum(-1))
    generated = Product(total, IdentityPlus(LowRank(phi, psi)))
    same(generated.dense(torch.float64), (W + DENSE) @ (torch.eye(4, dtype=torch.float64) + phi @ psi))


def test_a_batch_of_values_shares_the_bases():
    d = torch.stack([D, 2 * D])
    matrix, x = Spectral(U, d, VT), randn(2, 7, 4)
    assert matrix.shape == (2, 5, 4)
    assert matrix.tensors()[0] is U
    same(matrix.dense(torch.float64), torch.stack([DENSE, 2 * DENSE]))
    same(matrix.linear(x), torch.stack([x[0] @ DENSE.T, 2 * x[1] @ DENSE.T]))
    same(Sum(Dense(U @ VT), matrix).linear(x), x @ (U @ VT).T + matrix.linear(x))


def test_experts_have_bases_and_values_of_their_own():
    every = Spectral(torch.stack([U, -U]), torch.stack([D, D + 1]), torch.stack([VT, VT]))
    other = -U @ torch.diag(D + 1) @ VT
    same(every.dense(torch.float64), torch.stack([DENSE, other]))
    same(every.linear(randn(2, 7, 4)), torch.stack([randn(2, 7, 4)[0] @ DENSE.T, randn(2, 7, 4)[1] @ other.T]))
    same(every.select(1).dense(torch.float64), other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_acts_in_the_dtype_of_what_it_acts_on(dtype):
    x = randn(7, 4).to(dtype)
    y = Spectral(U.float(), D.float(), VT.float()).linear(x)
    assert y.dtype is dtype
    same(y.double(), x.double() @ DENSE.T, 0.1)


def test_gradients_and_vmap():
    d, x = D.clone().requires_grad_(), randn(7, 4).requires_grad_()
    ours = torch.autograd.grad(Spectral(U, d, VT).linear(x).square().sum(), (d, x))
    theirs = torch.autograd.grad((x @ (U @ torch.diag(d) @ VT).T).square().sum(), (d, x))
    same(list(ours), list(theirs), GRADS)
    stacked = torch.stack([D, D.cos()])
    same(
        torch.vmap(lambda d: Spectral(U, d, VT).linear(x.detach()))(stacked),
        torch.stack([x.detach() @ (U @ torch.diag(d) @ VT).T for d in stacked]),
    )

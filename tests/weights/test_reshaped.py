"""Reshaped is the matrix that it says: every way it acts is that of its dense form."""

import pytest
import torch

import peft_func as pf
from peft_func.errors import PeftFuncError
from peft_func.weights.absorb import square_norms
from peft_func.weights.convolution import Convolution, convolve
from peft_func.weights.matrix import Dense, LowRank, Sum
from peft_func.weights.reshaped import Reshaped
from tests.transforms.plain import same
from tests.zoo import randn

B, A = randn(12, 2, seed=1), randn(2, 6, seed=2)
DENSE = (0.5 * B @ A).reshape(4, 18)


def reshaped(dropout=0.0):
    return Reshaped(LowRank(B, A, 0.5, dropout), (4, 18))


def test_every_action_is_that_of_the_dense_form():
    matrix, x, bias = reshaped(), randn(3, 5, 18), randn(4)
    assert matrix.shape == (4, 18)
    assert matrix.is_structured
    assert matrix.tensors() == (B, A)
    same(matrix.dense(torch.float64), DENSE)
    same(matrix.linear(x, bias), x @ DENSE.T + bias)
    same(matrix.T.dense(torch.float64), DENSE.T)
    same(matrix.take(slice(1, 3)).dense(torch.float64), DENSE[1:3])
    same(square_norms(matrix), DENSE.square().sum(-1))
    same(matrix.added_to(2 * DENSE), 3 * DENSE)


def test_a_batch_of_them_and_other_tensors():
    matrix = Reshaped(LowRank(torch.stack([B, 2 * B]), A, 0.5), (4, 18))
    assert matrix.shape == (2, 4, 18)
    same(matrix.dense(torch.float64), torch.stack([DENSE, 2 * DENSE]))
    same(matrix.select(1).dense(torch.float64), 2 * DENSE)
    same(reshaped().map(lambda tensor, ndim: ndim * tensor).dense(torch.float64), 4 * DENSE)


def test_entries_that_do_not_fill_the_shape_are_refused():
    with pytest.raises((PeftFuncError, RuntimeError)):
        Reshaped(LowRank(B, A), (4, 17)).dense(torch.float64)


def test_dropout_is_of_what_it_acts_on_and_never_of_the_formed_matrix():
    matrix, x = reshaped(0.5), randn(7, 18)
    assert matrix.has_dropout
    assert not matrix.deterministic().has_dropout
    same(matrix.dense(torch.float64), DENSE)
    torch.manual_seed(4)
    ours = matrix.linear(x)
    torch.manual_seed(4)
    same(ours, torch.nn.functional.dropout(x, 0.5) @ DENSE.T)


def test_the_sum_is_rounded_once_also_under_autocast():
    W = randn(4, 18, seed=5).bfloat16()
    low = Reshaped(LowRank(B.float(), A.float(), 0.5), (4, 18))
    expected = (W.float() + (0.5 * (B.float() @ A.float())).reshape(4, 18)).bfloat16()
    assert torch.equal(low.added_to(W), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(low.added_to(W), expected)
        assert low.formed(torch.float32).dtype is torch.float32


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_it_is_one_convolution_with_the_base_unless_it_drops(dropout):
    calls = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func) if "convolution" in str(func) else None
            return func(*args, **(kwargs or {}))

    how = Convolution(2, False, (3, 3), 1, {}, lambda matrix: pytest.fail("formed whole"))
    x, W, bias = randn(2, 2, 5, 5), randn(4, 18, seed=3), randn(4)
    torch.manual_seed(0)
    with Count():
        y = convolve(Sum(Dense(W), reshaped(dropout)), x, how, bias)
    assert len(calls) == (1 if dropout == 0.0 else 2)
    torch.manual_seed(0)
    dropped = torch.nn.functional.dropout(x, dropout)
    base = torch.nn.functional.conv2d(x, W.view(4, 2, 3, 3), bias)
    same(y, base + torch.nn.functional.conv2d(dropped, DENSE.view(4, 2, 3, 3)))


def test_forming_a_change_by_design_is_no_densified_weight():
    model = pf.functionalize(torch.nn.Conv2d(2, 4, 3))
    adapter = pf.bind(pf.lora("weight", rank=2, conv="balanced"), model)
    with pf.densify("error"):
        model(adapter.apply(*adapter.init(0)), torch.ones(1, 2, 5, 5))

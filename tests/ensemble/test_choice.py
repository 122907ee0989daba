"""A matrix where a group has chosen an adapter, and exactly the base where it has not."""

import pytest
import torch
from torch import nn

import peft_func as pf
from peft_func.ensemble.choice import Choice
from peft_func.weights.matrix import Dense, Diagonal, IdentityPlus, LowRank, Product, Sum
from tests.zoo import ZOO, randn

CHOSEN = torch.tensor([True, False, True])


def low(out, inp, seed=0):
    return LowRank(randn(3, out, 2, seed=seed), randn(3, 2, inp, seed=seed + 9), 0.5)


W = randn(4, 5)
EXPRESSIONS = {
    "lora": (lambda: Sum(Dense(W), low(4, 5)), True),
    "lora of a sum": (lambda: Sum(Sum(Dense(W), low(4, 5)), Sum(low(4, 5, 1), low(4, 5, 2))), True),
    "gift": (lambda: Product(Dense(W), IdentityPlus(low(5, 5))), True),
    "ia3": (lambda: Product(Diagonal(randn(3, 4)), Dense(W)), True),
    "ia3 in, over taps": (lambda: Product(Dense(randn(4, 6)), Diagonal(randn(3, 3), 2)), True),
    "dora": (lambda: Product(Diagonal(randn(3, 4)), Sum(Dense(W), low(4, 5))), True),
    "both sides": (lambda: Product(Diagonal(randn(3, 4)), Product(Dense(W), Diagonal(randn(3, 5)))), True),
    "two on one side": (lambda: Product(Product(Diagonal(randn(3, 4)), IdentityPlus(low(4, 4))), Dense(W)), True),
    "a product added": (lambda: Sum(Dense(W), Product(low(4, 4), low(4, 5))), True),
    "small first": (lambda: Sum(low(4, 5), Dense(W)), False),
    "its own": (lambda: Dense(randn(3, 4, 5)), False),
    "its own and lora": (lambda: Sum(Dense(randn(3, 4, 5)), low(4, 5)), True),
    "low rank on a side": (lambda: Product(low(4, 4), Dense(W)), None),
}


@pytest.mark.parametrize("name", list(EXPRESSIONS))
@pytest.mark.parametrize("bad", [None, torch.inf, torch.nan])
@pytest.mark.parametrize("only_base", [True, False])
def test_it_is_the_base_where_nothing_is_chosen(name, bad, only_base):
    make, structured = EXPRESSIONS[name]
    matrix = make()
    base = next((t for t in matrix.tensors() if t.dim() == 2 and len(t) == 4), W)
    if bad is not None:
        matrix = matrix.map(
            lambda t, ndim: t if t.dim() == 2 == ndim else t.clone().index_fill_(0, torch.tensor(1), bad)
        )
    found = Choice(base, CHOSEN, 0, only_base).effective(matrix)
    own, each = matrix.dense(torch.float64), found.dense(torch.float64).expand(3, *base.shape)
    assert torch.allclose(each[[0, 2]], own[[0, 2]], atol=1e-12)
    assert torch.allclose(each[1], base, atol=1e-12)
    if structured:
        assert any(tensor is base for tensor in found.tensors()) or "its own" in name


def test_a_constant_is_not_the_base():
    constant = Dense(randn(4, 5, seed=4))
    found = Choice(W, CHOSEN, 0, only_base=False).effective(constant).dense(torch.float64)
    assert torch.equal(found[0], constant.tensor)
    assert torch.equal(found[1], W)
    same = Dense(W)
    assert Choice(W, CHOSEN, 0, only_base=False).effective(same) is same


def test_experts_and_half_precision():
    base = randn(2, 4, 5).bfloat16()
    own = Dense(randn(3, 2, 4, 5).bfloat16())
    found = Choice(base, CHOSEN, 1).effective(own)
    assert found.tensor.dtype == torch.bfloat16
    assert torch.equal(found.tensor[1], base)
    assert torch.equal(found.tensor[2], own.tensor[2])


def test_a_drawn_matrix_stays_drawn_beside_the_base():
    net = nn.Sequential(nn.Linear(6, 6, bias=False)).double()
    model = pf.functionalize(net).train()
    adapter = pf.bind(pf.gift("0", rank=2, block="mlp", num_blocks=4, drop_path=0.9), model)
    frozen, start = adapter.init(0)
    stacked = pf.stack([pf.map_leaves(lambda leaf, s=s: leaf + 0.2 * (s + 1), start) for s in range(2)])
    x = torch.ones(3, 6, dtype=torch.float64)
    weights = pf.route(adapter, frozen, stacked, torch.tensor([0, -1, 1]))
    with pf.densify("error"), torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = torch.stack([model(weights, x) for _ in range(20)])
        calm = model.eval()(weights, x)
    assert torch.allclose(drawn[:, 1], net(x)[1].expand(20, 6))
    assert drawn[:, 0].std(0).min() > 0
    assert drawn[:, 2].std(0).min() > 0
    trees = pf.unstack(stacked)
    for i, k in ((0, 0), (2, 1)):
        assert torch.allclose(calm[i], model.eval()(adapter.apply(frozen, trees[k]), x)[i], atol=1e-10)


def test_a_drawn_matrix_of_experts_beside_the_base():
    model = pf.functionalize(ZOO["experts"].build())
    adapter = pf.bind(pf.wegeft(".*", rank=1, share="none", dropout=0.5), model)
    frozen, start = adapter.init(0)
    tree = pf.map_leaves(lambda leaf: leaf + 0.3, start)
    x = randn(2, 6)
    mixed = model(pf.route(adapter, frozen, pf.stack([tree]), torch.tensor([0, -1])), x)
    assert torch.allclose(mixed[:1], model(adapter.apply(frozen, tree), x[:1]), atol=1e-10)
    assert torch.allclose(mixed[1:], model(model.params, x[1:]), atol=1e-12)

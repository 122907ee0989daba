"""The diagonal of the Fisher information, against loops, closed forms, and the Hessian."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import peft_func as pf


def problem(dtype=torch.float64):
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    model = pf.functionalize(net)
    adapter = pf.bind(pf.chain(pf.lora("0", rank=2), pf.train("2")), model)
    frozen, trainable = adapter.init(0)
    trainable = pf.map_leaves(lambda t: t + 0.1, trainable)

    def loss(tree, x, y):
        return F.cross_entropy(model(adapter.apply(frozen, tree), x[None]), y[None])

    x, y = torch.randn(11, 5, dtype=dtype), torch.randint(3, (11,))
    return loss, trainable, x, y, model, adapter, frozen


def test_it_is_the_mean_of_squared_gradients():
    loss, tree, x, y, *_ = problem()
    found = pf.fisher(loss, tree, x, y)
    grads = [torch.func.grad(loss)(tree, *sample) for sample in zip(x, y, strict=True)]
    expected = pf.map_leaves(lambda *column: torch.stack(column).square().mean(0), *grads)
    pf.map_leaves(lambda a, b: torch.testing.assert_close(a, b) or a, found, expected)


@pytest.mark.parametrize("chunk_size", [1, 4, 11, 100])
def test_chunks_change_nothing(chunk_size):
    loss, tree, x, y, *_ = problem()
    found, whole = pf.fisher(loss, tree, x, y, chunk_size=chunk_size), pf.fisher(loss, tree, x, y)
    pf.map_leaves(lambda a, b: torch.testing.assert_close(a, b) or a, found, whole)


def test_with_labels_of_the_model_it_is_the_gauss_newton_diagonal():
    # For a softmax, E over its own labels of grad grad^T is J^T (diag p - p p^T) J; checked for the logits' bias.
    loss, tree, x, _, model, adapter, frozen = problem()
    probs = model(adapter.apply(frozen, tree), x).softmax(-1)
    expected = (probs - probs.square()).mean(0)
    by_label = [
        pf.fisher(lambda t, xi, wi, c=c: wi.sqrt() * loss(t, xi, torch.tensor(c)), tree, x, probs[:, c])["train"][
            "2.bias"
        ]
        for c in range(3)
    ]
    torch.testing.assert_close(sum(by_label), expected)


def test_samples_may_be_nested_and_half_precision_is_summed_in_float32():
    loss, tree, x, y, *_ = problem()
    nested = pf.fisher(
        lambda t, batch: loss(t, batch["x"], batch["more"][0]), tree, {"x": x, "more": [y]}, chunk_size=3
    )
    pf.map_leaves(lambda a, b: torch.testing.assert_close(a, b) or a, nested, pf.fisher(loss, tree, x, y))
    loss, tree, x, y, *_ = problem(torch.bfloat16)
    assert {leaf.dtype for _, leaf in pf.leaves(pf.fisher(loss, tree, x, y))} == {torch.float32}


def test_it_weighs_a_soup():
    # Two linear regressions that saw one input each: every weight should come from the one that saw its input.
    model = pf.functionalize(nn.Linear(2, 1, bias=False).double())
    loss = lambda tree, x, y: (model(tree, x[None])[0, 0] - y) ** 2 / 2
    trees = [{"weight": torch.tensor([[3.0, -1.0]]).double()}, {"weight": torch.tensor([[7.0, 5.0]]).double()}]
    inputs = torch.eye(2).double()
    fishers = [pf.fisher(loss, tree, inputs[i : i + 1], torch.zeros(1).double()) for i, tree in enumerate(trees)]
    torch.testing.assert_close(
        pf.fisher_soup(trees, fishers)["weight"], torch.tensor([[3.0, 5.0]]).double(), atol=1e-4, rtol=0
    )


def test_bad_samples():
    loss, tree, x, y, *_ = problem()
    with pytest.raises(pf.TreeError, match="takes samples"):
        pf.fisher(loss, tree)
    with pytest.raises(pf.TreeError, match=r"\[10, 11\]"):
        pf.fisher(loss, tree, x, y[:10])
    with pytest.raises(pf.TreeError, match="above 0"):
        pf.fisher(loss, tree, x[:0], y[:0])
    with pytest.raises(pf.TreeError, match="leading axis"):
        pf.fisher(loss, tree, x, 3)
    for chunk_size in (0, -1, 2.0, True):
        with pytest.raises(pf.OptionError, match="chunk_size"):
            pf.fisher(loss, tree, x, y, chunk_size=chunk_size)

"""The gradient of a function of a tree, eagerly and inside of transforms."""

import pytest
import torch

import peft_func as pf
from peft_func.functional.gradient import gradient_of
from peft_func.weights.eager import in_transform
from tests.zoo import randn

TREE = {"a": {"w": randn(3, 2)}, "b": randn(3, seed=1), "unused": randn(2, seed=2)}


def energy(tree):
    value = (tree["a"]["w"].T @ tree["b"]).square().sum()
    return value, [in_transform(), tree["b"].detach()]


def by_hand(tree):
    inner = tree["a"]["w"].T @ tree["b"]
    return {
        "a": {"w": 2 * torch.outer(tree["b"], inner)},
        "b": 2 * tree["a"]["w"] @ inner,
        "unused": torch.zeros(2, dtype=torch.float64),
    }


def same(one, other):
    assert [keys for keys, _ in pf.leaves(one)] == [keys for keys, _ in pf.leaves(other)]
    for (_, a), (_, b) in zip(pf.leaves(one), pf.leaves(other), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
def test_eagerly_it_is_autograd(context):
    before = pf.map_leaves(torch.clone, TREE)
    with context():
        grads, (seen, b) = gradient_of(energy, TREE)
    same(grads, by_hand(TREE))
    assert seen is False
    assert torch.equal(b, TREE["b"])
    assert not any(leaf.requires_grad for _, leaf in (*pf.leaves(grads), *pf.leaves(TREE)))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(pf.leaves(before), pf.leaves(TREE), strict=True))


def test_it_nests_in_transforms():
    stacked = pf.stack([TREE, pf.map_leaves(lambda leaf: 2 * leaf, TREE)])
    grads = torch.vmap(lambda tree: gradient_of(lambda own: (energy(own)[0], ()), tree)[0])(stacked)
    for found, tree in zip(pf.unstack(grads), pf.unstack(stacked), strict=True):
        same(found, by_hand(tree))
    # The gradient of a squared gradient: a graph through it is kept where a transform wants one.
    second = torch.func.grad(lambda b: gradient_of(lambda t: (t["b"].pow(3).sum(), ()), {"b": b})[0]["b"].sum())
    assert torch.allclose(second(TREE["b"]), 6 * TREE["b"])
    seen = []
    torch.vmap(lambda b: seen.append(in_transform()) or b)(TREE["b"])
    assert (seen, in_transform()) == ([True], False)


def test_a_function_without_a_graph_has_no_gradient():
    grads, rest = gradient_of(lambda tree: (tree["b"].detach().sum(), "rest"), TREE)
    assert (grads, rest) == (None, "rest")

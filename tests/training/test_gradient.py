"""Values and gradients over trees, by autograd and by torch.func alike."""

import optree
import pytest
import torch

import peft_func as pf
from peft_func.training.gradient import value_and_grad
from tests.zoo import randn

TREE = {"a": {"w": randn(3, 2)}, "b": randn(3, seed=1), "unused": randn(2, seed=2)}
X = randn(4, 3, seed=3)


def loss(tree, x):
    return ((x @ tree["a"]["w"]).tanh().sum(1) * (x @ tree["b"])).mean()


def close(a, b):
    optree.tree_map(lambda p, q: torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12), a, b)


def test_autograd_and_torch_func_agree():
    grads, value = value_and_grad(loss)(TREE, X)
    expected, wanted = torch.func.grad_and_value(loss)(TREE, X)
    close(grads, expected)
    torch.testing.assert_close(value, wanted)
    assert not value.requires_grad
    assert not grads["unused"].any()
    assert list(grads) == list(TREE)


def test_it_nests_in_the_transforms_of_torch_func():
    many = pf.stack([TREE, pf.map_leaves(torch.cos, TREE)])
    mapped, values = torch.vmap(value_and_grad(loss), in_dims=(0, None))(many, X)
    for k, tree in enumerate(pf.unstack(many)):
        grads, value = value_and_grad(loss)(tree, X)
        close(pf.unstack(mapped)[k], grads)
        torch.testing.assert_close(values[k], value)
    noted = lambda t, x: (loss(t, x), {"y": t["b"] * 2, "n": [3, "three", None]})
    _, (value, aux) = torch.func.vmap(value_and_grad(noted, has_aux=True), (0, None), (0, (0, {"y": 0, "n": None})))(
        many, X
    )
    assert aux["n"] == [3, "three", None]
    torch.testing.assert_close(aux["y"], 2 * many["b"])
    # The gradient of the gradient's norm, by finite differences.
    norm = lambda scale: sum((g**2).sum() for g in optree.tree_leaves(value_and_grad(loss)(TREE, X * scale)[0]))
    one = torch.tensor(1.0, dtype=torch.float64)
    slope = torch.func.grad(norm)(one)
    torch.testing.assert_close(slope, (norm(one + 1e-6) - norm(one - 1e-6)) / 2e-6, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_the_grad_mode_outside_does_not_matter(context):
    with context():
        grads, (value, aux) = value_and_grad(lambda t, x: (loss(t, x), {"y": t["b"] * 2, "n": 3}), has_aux=True)(
            TREE, X
        )
    close(grads, value_and_grad(loss)(TREE, X)[0])
    assert not aux["y"].requires_grad
    assert aux["n"] == 3
    torch.testing.assert_close(value, loss(TREE, X))


def test_leaves_are_not_touched():
    tree = pf.map_leaves(lambda leaf: leaf.clone().requires_grad_(), TREE)
    value_and_grad(loss)(tree, X)
    assert all(leaf.grad is None and leaf._version == 0 for leaf in optree.tree_leaves(tree))


def test_members():
    many = pf.stack([TREE, pf.map_leaves(torch.cos, TREE)])
    grads, values = value_and_grad(lambda t, x: torch.vmap(loss, (0, None))(t, x), members=True)(many, X)
    for k, tree in enumerate(pf.unstack(many)):
        close(pf.unstack(grads)[k], torch.func.grad(loss)(tree, X))
        torch.testing.assert_close(values[k], loss(tree, X))


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (lambda t: t["b"], {}, r"the loss is a scalar tensor; it gave a tensor \[3\]; sum or average it"),
        (lambda t: 1.0, {}, "it gave a float"),
        (lambda t: (t["b"].sum(), 1), {}, "it gave a tuple"),
        (
            lambda t: t["b"].sum(),
            {"has_aux": True},
            r"with has_aux=True the loss gives \(loss, aux\); it gave a tensor",
        ),
        (lambda t: t["b"].sum().long(), {}, "the loss is torch.int64"),
        (lambda t: t["b"].sum().detach(), {}, "does not depend on the tree"),
        (lambda t: t["b"].sum(), {"members": True}, r"for each of 3 members, \[3\]; it gave a tensor \[\]"),
        (lambda t: t["b"].repeat(2), {"members": True}, r"\[3\]; it gave a tensor \[6\]"),
    ],
)
def test_losses_that_have_no_gradient(function, options, message):
    tree = {"a": {"w": TREE["a"]["w"]}, "b": TREE["b"]}
    with pytest.raises(pf.TreeError, match=message):
        value_and_grad(function, **options)(tree)


def test_trees_that_have_none():
    with pytest.raises(pf.TreeError, match="no leaves"):
        value_and_grad(loss)({}, X)
    with pytest.raises(pf.TreeError, match="one common leading length; most leaves have 2, but 'b' has 3"):
        value_and_grad(loss, members=True)({"a": randn(2), "b": randn(3)}, X)
    with torch.inference_mode(), pytest.raises(pf.TreeError, match="inference_mode"):
        value_and_grad(loss)(TREE, X)

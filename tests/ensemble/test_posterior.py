"""The functions of the page on posteriors, against exact posteriors and numpy."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import peft_func as pf

PAGE = Path(__file__).parents[2] / "docs" / "posterior.md"
NOISE, PRIOR = 0.3, 2.0


@pytest.fixture(scope="module")
def page():
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(block, names)
    return names


def regression():
    """A linear regression in which only a low-rank pair's B trains, so that its posterior is known."""
    model = pf.functionalize(nn.Linear(4, 2, bias=False).double())
    adapter = pf.bind(pf.lora("weight", rank=2), model)
    frozen, trainable = adapter.init(0)
    down, up = pf.partition(trainable, r".*\.A")

    def predict(tree, x):
        return model(adapter.apply(frozen, pf.combine(down, tree)), x)

    x, y = torch.randn(9, 4).double(), torch.randn(9, 2).double()
    (_, A), *_ = pf.leaves(down)
    features = torch.einsum("ri,si->sr", A, x)  # what B [2, rank] multiplies
    return predict, up, x, y, features


def exact(features):
    """The posterior covariance of B, row by row: (Phi^T Phi / noise + prior)^-1 for each of the two outputs."""
    phi = np.kron(np.eye(2), features.numpy())
    return np.linalg.inv(phi.T @ phi / NOISE + PRIOR * np.eye(phi.shape[1]))


def test_laplace_of_a_linear_regression_is_its_posterior(page):
    predict, tree, x, y, features = regression()

    def negative_log_joint(tree):
        penalty = sum(leaf.square().sum() for _, leaf in pf.leaves(tree))
        return (predict(tree, x) - y).square().sum() / (2 * NOISE) + PRIOR / 2 * penalty

    precision = page["hessian"](negative_log_joint, tree)
    np.testing.assert_allclose(torch.linalg.inv(precision).numpy(), exact(features), atol=1e-10)
    curvature = torch.eye(2).double().expand(len(x), 2, 2) / NOISE
    by_gauss_newton = page["gauss_newton"](lambda t: predict(t, x), tree, curvature) + PRIOR * torch.eye(4).double()
    torch.testing.assert_close(by_gauss_newton, precision, atol=1e-10, rtol=0)


def test_its_predictions_are_those_of_the_gaussian_process(page):
    predict, tree, x, _, features = regression()
    curvature = torch.eye(2).double().expand(len(x), 2, 2) / NOISE
    precision = page["gauss_newton"](lambda t: predict(t, x), tree, curvature) + PRIOR * torch.eye(4).double()
    J = torch.func.jacrev(lambda v: predict(page["unravel"](v, tree), x)[:, 0])(page["ravel"](tree))
    covariance = J @ torch.linalg.inv(precision) @ J.mT
    kernel = features @ features.mT / PRIOR  # the function-space view of the same model
    expected = kernel - kernel @ torch.linalg.inv(kernel + NOISE * torch.eye(len(x)).double()) @ kernel
    torch.testing.assert_close(covariance, expected, atol=1e-10, rtol=0)


def test_gauss_newton_of_a_softmax_regression_is_its_hessian(page):
    model = pf.functionalize(nn.Linear(3, 4).double())
    x, y, tree = torch.randn(7, 3).double(), torch.randint(4, (7,)), model.params
    p = model(tree, x).softmax(-1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    found = page["gauss_newton"](lambda t: model(t, x), tree, curvature)
    expected = page["hessian"](lambda t: F.cross_entropy(model(t, x), y, reduction="sum"), tree)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def test_diagonal_laplace_is_exact_where_the_precision_is_diagonal(page):
    # One input at a time, and targets one deviation away: the squared gradients are the curvature.
    model = pf.functionalize(nn.Linear(3, 1, bias=False).double())
    x = torch.eye(3).double() * torch.tensor([1.0, 2.0, 3.0]).double()
    y = model(model.params, x)[:, 0] + NOISE**0.5
    fisher = pf.fisher(
        lambda tree, xi, yi: (model(tree, xi[None])[0, 0] - yi).square() / (2 * NOISE), model.params, x, y
    )
    found = page["diagonal_laplace"](fisher, len(x), PRIOR)["weight"][0]
    expected = np.linalg.inv(x.numpy().T @ x.numpy() / NOISE + PRIOR * np.eye(3))
    np.testing.assert_allclose(found.numpy(), expected.diagonal(), atol=1e-10)
    draws = [page["sample_diagonal"](model.params, {"weight": found[None]}, key)["weight"][0] for key in range(4000)]
    np.testing.assert_allclose(torch.stack(draws).var(0).numpy(), found.numpy(), rtol=0.1)


def test_ravel_goes_there_and_back(page):
    tree = {"a": {"b": torch.randn(2, 3), "c.d": torch.randn(())}, "e": torch.randn(4)}
    vector = page["ravel"](tree)
    assert vector.shape == (11,)
    back = page["unravel"](vector, tree)
    pf.map_leaves(lambda s, t: torch.testing.assert_close(s, t, rtol=0, atol=0) or s, back, tree)


def test_the_gaussian_has_the_precision_that_it_is_given(page):
    A = torch.randn(3, 3).double()
    precision = A @ A.mT + torch.eye(3)
    mean = torch.tensor([1.0, -2.0, 0.5]).double()
    draws = page["gaussian"](mean, precision, 200_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(draws.mean(0), mean, atol=0.01, rtol=0)
    torch.testing.assert_close(torch.cov(draws.mT), torch.linalg.inv(precision), atol=0.02, rtol=0)


def test_swag_moments_are_those_of_numpy(page):
    trees = [{"lora": {"A": torch.randn(2, 3).double(), "B": torch.randn(3, 2).double()}} for _ in range(12)]
    state = page["swag_start"](trees[0])
    for tree in trees:
        state = page["swag_update"](state, tree, rank=5)
    for leaf in ("A", "B"):
        path = np.stack([tree["lora"][leaf].numpy() for tree in trees])
        mean, square = state["mean"]["lora"][leaf].numpy(), state["square"]["lora"][leaf].numpy()
        np.testing.assert_allclose(mean, path.mean(0), atol=1e-12)
        np.testing.assert_allclose(square - mean**2, path.var(0), atol=1e-12)
        for number, deviation in zip(range(7, 12), state["deviations"], strict=True):
            expected = path[number] - path[: number + 1].mean(0)  # from the mean as it was then
            np.testing.assert_allclose(deviation["lora"][leaf].numpy(), expected, atol=1e-12)


def test_swag_samples_have_the_covariance_of_the_paper(page):
    trees = [{"a": torch.randn(3).double(), "b": torch.randn(1).double()} for _ in range(6)]
    state = page["swag_start"](trees[0])
    for tree in trees:
        state = page["swag_update"](state, tree, rank=4)
    generator = torch.Generator().manual_seed(0)
    draws = np.stack([page["ravel"](page["swag_sample"](state, generator)).numpy() for _ in range(20_000)])
    path = np.stack([np.concatenate([tree["a"].numpy(), tree["b"].numpy()]) for tree in trees])
    D = np.stack([path[i] - path[: i + 1].mean(0) for i in range(2, 6)])
    expected = np.diag(path.var(0)) / 2 + D.T @ D / (2 * 3)
    np.testing.assert_allclose(draws.mean(0), path.mean(0), atol=0.03)
    np.testing.assert_allclose(np.cov(draws.T), expected, atol=0.06)


def test_the_page_knows_less_far_from_its_data(page):
    near, far = pf.mutual_information(torch.vmap(page["linearised"])(page["draws"]))
    assert far > 2 * near

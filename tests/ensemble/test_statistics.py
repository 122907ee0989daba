"""Statistics over members, against plain numpy and scipy in float64, by hand, and under transforms."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

import peft_func as pf


def drawn(seed, members, n, classes, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(members, n, classes, generator=generator, dtype=torch.float64)


SIZES = {
    "seed": st.integers(0, 2**31),
    "members": st.integers(1, 5),
    "n": st.integers(1, 7),
    "classes": st.integers(2, 5),
}


@given(**SIZES)
def test_mixture_entropy_and_information_are_those_of_scipy(seed, members, n, classes):
    logits = drawn(seed, members, n, classes)
    probs = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(-1, keepdims=True)
    mixture = probs.mean(0)
    np.testing.assert_allclose(pf.mean_probabilities(logits).numpy(), mixture, rtol=1e-12)
    np.testing.assert_allclose(pf.mean_probabilities(logits, log=True).numpy(), np.log(mixture), atol=1e-12)
    np.testing.assert_allclose(pf.mean_logits(logits).numpy(), logits.numpy().mean(0), atol=1e-12)
    total = scipy.stats.entropy(mixture, axis=-1)
    np.testing.assert_allclose(pf.predictive_entropy(logits).numpy(), total, atol=1e-12)
    divergence = scipy.stats.entropy(probs, mixture[None], axis=-1).mean(0)  # the mean KL from the mixture: the same
    np.testing.assert_allclose(pf.mutual_information(logits).numpy(), divergence, atol=1e-12)
    assert (pf.mutual_information(logits) >= 0).all()
    assert (pf.mutual_information(logits) <= math.log(members) + 1e-12).all()


@given(**SIZES)
def test_disagreement_is_the_share_of_pairs(seed, members, n, classes):
    logits = drawn(seed, members + 1, n, classes)
    choice = logits.argmax(-1)
    pairs = [(i, j) for i in range(members + 1) for j in range(i)]
    expected = sum((choice[i] != choice[j]).double() for i, j in pairs) / len(pairs)
    torch.testing.assert_close(pf.disagreement(logits), expected)


@given(seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e3))
def test_entropies_do_not_depend_on_the_logits_offset(seed, scale):
    logits = drawn(seed, 3, 4, 5, scale)
    moved = logits + 7 * drawn(seed + 1, 3, 4, 1)
    torch.testing.assert_close(pf.mutual_information(moved), pf.mutual_information(logits), atol=1e-10, rtol=0)
    torch.testing.assert_close(pf.predictive_entropy(moved), pf.predictive_entropy(logits), atol=1e-10, rtol=0)


def test_members_that_agree_inform_of_nothing_and_never_of_less():
    same = drawn(9, 1, 2000, 5).float().expand(3, -1, -1)
    found = pf.mutual_information(same)
    assert found.min() == 0  # some are below by rounding
    assert found.max() < 1e-6


def test_large_and_impossible_logits():
    logits = torch.tensor([[[1e4, 0.0, -math.inf]], [[0.0, 1e4, -math.inf]]], requires_grad=True)
    torch.testing.assert_close(pf.predictive_entropy(logits), torch.tensor([math.log(2)]))
    torch.testing.assert_close(pf.mutual_information(logits), torch.tensor([math.log(2)]))
    assert pf.mean_probabilities(logits, log=True)[0, 2] == -math.inf
    for function in (pf.predictive_entropy, pf.mutual_information):
        (grad,) = torch.autograd.grad(function(logits).sum(), logits)
        assert grad.isfinite().all()
    tiny = pf.mean_probabilities(torch.tensor([[[0.0, -300.0]]]), log=True)
    assert tiny[0, 1] == pytest.approx(-300)  # its exponential is 0 in float32


def test_gradients_are_right():
    logits = drawn(0, 3, 2, 4).requires_grad_()
    for function in (pf.mean_probabilities, pf.mean_logits, pf.predictive_entropy, pf.mutual_information):
        assert torch.autograd.gradcheck(function, logits)


def test_vmap_equals_a_loop():
    many = torch.stack([drawn(i, 3, 4, 5) for i in range(6)])
    for function in (pf.mean_logits, pf.mean_probabilities, pf.predictive_entropy, pf.mutual_information):
        torch.testing.assert_close(torch.vmap(function)(many), torch.stack([function(logits) for logits in many]))
    torch.testing.assert_close(
        torch.vmap(pf.disagreement)(many), torch.stack([pf.disagreement(logits) for logits in many])
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    logits = drawn(1, 4, 3, 5).to(dtype)
    found = pf.mutual_information(logits)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), pf.mutual_information(logits.double()), atol=1e-5, rtol=1e-5)


def test_batches_of_any_shape():
    logits = drawn(2, 3, 8, 5)
    torch.testing.assert_close(
        pf.mutual_information(logits.reshape(3, 2, 4, 5)).flatten(), pf.mutual_information(logits)
    )
    assert pf.disagreement(logits[:, 0]).shape == ()


def test_the_variance_of_a_mixture_of_gaussians_is_that_of_its_samples():
    means, variances = torch.tensor([[0.0], [4.0]]).double(), torch.tensor([[1.0], [2.0]]).double()
    mean, variance = pf.mean_and_variance(means, variances)
    rng = np.random.default_rng(0)
    component = rng.integers(2, size=400_000)
    samples = means.numpy()[component, 0] + np.sqrt(variances.numpy()[component, 0]) * rng.standard_normal(400_000)
    assert mean.item() == pytest.approx(samples.mean(), abs=0.02)
    assert variance.item() == pytest.approx(samples.var(), rel=0.01)
    torch.testing.assert_close(pf.mean_and_variance(means)[1], torch.tensor([4.0]).double())


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (torch.zeros(4), r"\[None\]"),
        (torch.zeros(2, 3, dtype=torch.int64), "int64"),
        (torch.zeros(0, 3), r"\(0, 3\)"),
        (torch.zeros(2, 0), r"\(2, 0\)"),
        ([[0.0]], "list"),
    ],
)
def test_bad_logits(bad, said):
    for function in (
        pf.mean_logits,
        pf.mean_probabilities,
        pf.predictive_entropy,
        pf.mutual_information,
        pf.disagreement,
    ):
        with pytest.raises(pf.TreeError, match=said):
            function(bad)


def test_bad_members_and_variances():
    with pytest.raises(pf.TreeError, match="two members"):
        pf.disagreement(torch.zeros(1, 3, 2))
    with pytest.raises(pf.TreeError, match=r"\(2, 1\).*\(2, 3\)"):
        pf.mean_and_variance(torch.zeros(2, 3), torch.zeros(2, 1))

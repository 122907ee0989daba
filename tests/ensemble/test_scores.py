"""Scores of predicted probabilities, against scikit-learn, plain loops, and examples worked out by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, log_loss

import peft_func as pf

SIZES = {"seed": st.integers(0, 2**31), "n": st.integers(1, 60), "classes": st.integers(2, 6)}


def drawn(seed, n, classes):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (n,), generator=generator)


@given(**SIZES)
def test_likelihood_and_brier_are_those_of_sklearn(seed, n, classes):
    logits, labels = drawn(seed, n, classes)
    probs = logits.softmax(-1)
    expected = log_loss(labels.numpy(), probs.numpy(), labels=list(range(classes)))
    assert pf.negative_log_likelihood(logits, labels).item() == pytest.approx(expected, abs=1e-9)
    assert pf.negative_log_likelihood(probs.log(), labels).item() == pytest.approx(expected, abs=1e-9)
    if classes > 2:  # for two classes scikit-learn halves it
        expected = brier_score_loss(labels.numpy(), probs.numpy(), labels=list(range(classes)))
        assert pf.brier_score(probs, labels).item() == pytest.approx(expected, abs=1e-9)


@given(**SIZES, bins=st.integers(1, 20))
def test_calibration_equals_a_plain_loop(seed, n, classes, bins):
    logits, labels = drawn(seed, n, classes)
    probs = logits.softmax(-1)
    expected = 0.0
    for i in range(bins):
        inside = [
            (p.max().item(), bool(p.argmax() == y))
            for p, y in zip(probs, labels, strict=True)
            if i / bins < p.max().item() <= (i + 1) / bins
        ]
        if inside:
            confidence, right = (sum(column) / len(inside) for column in zip(*inside, strict=True))
            expected += len(inside) / n * abs(right - confidence)
    assert pf.calibration_error(probs, labels, bins).item() == pytest.approx(expected, abs=1e-12)
    found = pf.reliability(probs, labels, bins)
    gaps = torch.nan_to_num((found.accuracy - found.confidence).abs()) * found.count
    assert found.count.dtype == torch.int64
    assert found.count.sum() == n
    assert gaps.sum().item() / n == pytest.approx(expected, abs=1e-12)


def test_calibration_by_hand():
    confident = torch.tensor([0.95, 0.95, 0.65, 0.55], dtype=torch.float64)
    probs, labels = torch.stack([confident, 1 - confident], -1), torch.tensor([0, 1, 0, 1])
    expected = (2 * 0.45 + 0.35 + 0.55) / 4
    assert pf.calibration_error(probs, labels, bins=10).item() == pytest.approx(expected)
    edge = torch.tensor([[0.5, 0.5]])  # the upper end of a bin belongs to it
    assert pf.reliability(edge, torch.tensor([0]), bins=2).count.tolist() == [1, 0]
    sure = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert pf.reliability(sure, torch.tensor([0, 1]), 10).count.tolist() == [0] * 9 + [2]
    assert pf.calibration_error(sure, torch.tensor([1, 1])).item() == 0.5


def test_calibrated_predictions_have_little_error():
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(50_000, 3, generator=generator, dtype=torch.float64).softmax(-1)
    labels = torch.multinomial(probs, 1, generator=generator)[:, 0]
    assert pf.calibration_error(probs, labels) < 0.01
    sharpened = (3 * probs.log()).softmax(-1)
    assert pf.calibration_error(sharpened, labels) > 0.1
    assert pf.brier_score(sharpened, labels) > pf.brier_score(probs, labels)


def test_gradients_and_vmap():
    logits, labels = drawn(3, 12, 4)
    logits.requires_grad_()
    for score in (
        pf.negative_log_likelihood,
        lambda z, y: pf.brier_score(z.softmax(-1), y),
        lambda z, y: pf.calibration_error(z.softmax(-1), y),
    ):
        assert torch.autograd.gradcheck(lambda z, score=score: score(z, labels), logits)
        members = torch.stack([logits.detach(), 2 * logits.detach()])
        torch.testing.assert_close(
            torch.vmap(score, (0, None))(members, labels), torch.stack([score(member, labels) for member in members])
        )
    deep = torch.vmap(torch.func.grad(lambda z: pf.brier_score(z.softmax(-1), labels)))(members)
    assert deep.shape == members.shape


@pytest.mark.parametrize("score", [pf.brier_score, pf.calibration_error, pf.reliability])
def test_what_are_no_probabilities(score):
    logits, labels = drawn(4, 5, 3)
    signed = torch.tensor([[1.5, -0.5, 0.0]]).double().expand(5, 3)
    for bad in (logits, logits.log_softmax(-1), 2 * logits.softmax(-1), signed, torch.full_like(logits, math.nan)):
        with pytest.raises(pf.OptionError, match="softmax"):
            score(bad, labels)
    for dtype in (torch.float16, torch.bfloat16):
        score(logits.softmax(-1).to(dtype), labels)  # their rows sum to 1 as well as they can


@pytest.mark.parametrize("score", [pf.brier_score, pf.calibration_error, pf.negative_log_likelihood])
@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (torch.tensor([0, 1, 5]), "from 0 to 5"),
        (torch.tensor([0, -1, 1]), "from -1"),
        (torch.tensor([0, 1]), r"\(3, 2\).*\(2,\)"),
        (torch.tensor([0.0, 1.0, 1.0]), "int64"),
        ([0, 1, 1], "list"),
    ],
)
def test_bad_labels(score, labels, said):
    with pytest.raises(pf.TreeError, match=said):
        score(torch.full((3, 2), 0.5), labels)


def test_bad_predictions_and_bins():
    with pytest.raises(pf.TreeError, match="floating"):
        pf.brier_score(torch.ones(3, 2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(pf.TreeError, match="one sample"):
        pf.brier_score(torch.ones(0, 2), torch.zeros(0, dtype=torch.int64))
    for bins in (0, -1, 2.5, True):
        with pytest.raises(pf.OptionError, match="bins"):
            pf.calibration_error(torch.full((3, 2), 0.5), torch.zeros(3, dtype=torch.int64), bins)

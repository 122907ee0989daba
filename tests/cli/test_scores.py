"""The scores, against scikit-learn and against examples worked out by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, log_loss

from peft_func.cli.scores import (
    calibration_error,
    mean_of_probabilities,
    most_disputed,
    reliability,
    score,
    vote_counts,
)


@given(seed=st.integers(0, 2**31), n=st.integers(1, 60), classes=st.integers(2, 6))
def test_accuracy_and_nll_are_those_of_sklearn(seed, n, classes):
    generator = torch.Generator().manual_seed(seed)
    log_probs = torch.log_softmax(3 * torch.randn(n, classes, generator=generator, dtype=torch.float64), -1)
    labels = torch.randint(classes, (n,), generator=generator)
    found = score(log_probs, labels)
    assert found.accuracy == pytest.approx(accuracy_score(labels.numpy(), log_probs.argmax(-1).numpy()))
    expected = log_loss(labels.numpy(), log_probs.exp().numpy(), labels=list(range(classes)))
    assert found.nll == pytest.approx(expected, abs=1e-9)


def test_ece_by_hand():
    # Bins of width 0.1. Two predictions at 0.95 (one right), one at 0.65 (right), one at 0.55 (wrong):
    # (2 |1/2 - 0.95| + |1 - 0.65| + |0 - 0.55|) / 4
    confident = torch.tensor([0.95, 0.95, 0.65, 0.55], dtype=torch.float64)
    log_probs = torch.stack([confident, 1 - confident], -1).log()
    labels = torch.tensor([0, 1, 0, 1])
    assert calibration_error(log_probs, labels) == pytest.approx((2 * 0.45 + 0.35 + 0.55) / 4)


@given(seed=st.integers(0, 2**31), n=st.integers(1, 60), bins=st.integers(1, 20))
def test_ece_equals_a_plain_loop(seed, n, bins):
    generator = torch.Generator().manual_seed(seed)
    log_probs = torch.log_softmax(torch.randn(n, 3, generator=generator, dtype=torch.float64), -1)
    labels = torch.randint(3, (n,), generator=generator)
    expected = 0.0
    for i in range(bins):
        inside = [
            (p.max().item(), p.argmax() == y)
            for p, y in zip(log_probs.exp(), labels, strict=True)
            if i / bins < p.max().item() <= (i + 1) / bins
        ]
        expected += abs(sum(right for _, right in inside) - sum(p for p, _ in inside)) / n
    assert calibration_error(log_probs, labels, bins) == pytest.approx(expected)
    assert reliability(log_probs, labels, bins).count.sum() == n


def test_certain_predictions_are_in_the_last_bin():
    log_probs = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]])
    assert reliability(log_probs, torch.tensor([0, 1])).count.tolist() == [0] * 9 + [2]
    assert calibration_error(log_probs, torch.tensor([0, 1])) == 0.0


def test_mean_of_probabilities():
    probs = torch.tensor([[[0.9, 0.1]], [[0.3, 0.7]]], dtype=torch.float64)
    torch.testing.assert_close(mean_of_probabilities(probs.log()).exp(), torch.tensor([[0.6, 0.4]]).double())


def test_votes_and_disputes():
    sure, other, doubt = [0.9, 0.1], [0.1, 0.9], [0.6, 0.4]
    log_probs = torch.tensor([[sure, sure, doubt], [sure, other, doubt], [sure, sure, doubt]]).log()
    assert vote_counts(log_probs).tolist() == [[3, 0], [2, 1], [3, 0]]
    assert most_disputed(log_probs, 3).tolist() == [1, 2, 0]  # votes first, then the entropy of the mean
    assert most_disputed(log_probs[:1], 2).tolist() == [2, 0]
    assert most_disputed(log_probs, 9).shape == (3,)

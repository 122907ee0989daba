"""How good predictions are: accuracy, calibration, and where the members of an ensemble disagree."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import peft_func as pf
from peft_func.ensemble.scores import Reliability as Reliability

BINS = 10


@dataclass(frozen=True)
class Scores:
    """The scores of one predictor.

    Attributes:
        accuracy: the share of images whose most probable class is the right one, from 0 to 1.
        ece: the expected calibration error, from 0 to 1; see `calibration_error`.
        nll: the negative log-likelihood, the mean of `-log p(right class)`, in nats per image.
    """

    accuracy: float
    ece: float
    nll: float


def score(log_probs: Tensor, labels: Tensor) -> Scores:
    """Score log-probabilities `[n, classes]` against labels `[n]` (int64)."""
    return Scores(
        accuracy=(log_probs.argmax(-1) == labels).double().mean().item(),
        ece=calibration_error(log_probs, labels),
        nll=pf.negative_log_likelihood(log_probs.double(), labels).item(),
    )


def reliability(log_probs: Tensor, labels: Tensor, bins: int = BINS) -> Reliability:
    """Sort predictions into bins by confidence; see `pf.reliability`.

    Args:
        log_probs: `[n, classes]`.
        labels: `[n]`, int64.
        bins: how many of equal width.
    """
    return pf.reliability(log_probs.double().exp(), labels, bins)


def calibration_error(log_probs: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Return the expected calibration error; see `pf.calibration_error`.

    Args:
        log_probs: `[n, classes]`.
        labels: `[n]`, int64.
        bins: how many of equal width.
    """
    return pf.calibration_error(log_probs.double().exp(), labels, bins).item()


def mean_of_probabilities(log_probs: Tensor) -> Tensor:
    """Return the log of the members' mean probabilities: `[members, n, classes]` to `[n, classes]`."""
    return pf.mean_probabilities(log_probs, log=True)


def vote_counts(log_probs: Tensor) -> Tensor:
    """Count the members' votes: `[members, n, classes]` to int64 `[n, classes]`."""
    return F.one_hot(log_probs.argmax(-1), log_probs.shape[-1]).sum(0)


def most_disputed(log_probs: Tensor, count: int) -> Tensor:
    """Return the images on which the members disagree most, the most disputed first.

    They are ranked by the entropy of the votes; those with equal votes, by the entropy of the mean probabilities
    (which alone ranks them where there is one member).

    Args:
        log_probs: `[members, n, classes]`.
        count: how many; all of them if there are fewer.

    Returns:
        Their numbers, int64 `[min(count, n)]`.
    """
    by_entropy = torch.argsort(pf.predictive_entropy(log_probs), descending=True, stable=True)
    votes = vote_counts(log_probs).double() / len(log_probs)
    # Rounded, so that the order of the summands in the entropy does not decide between equal votes.
    by_votes = torch.argsort(_entropy(votes).round(decimals=9)[by_entropy], descending=True, stable=True)
    return by_entropy[by_votes][:count]


def _entropy(probs: Tensor) -> Tensor:
    """Return the entropy of distributions `[*, classes]`, in nats: `[*]`."""
    entropy: Tensor = torch.special.entr(probs).sum(-1)
    return entropy

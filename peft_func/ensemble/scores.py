"""How good predicted probabilities are: likelihood, Brier's score, and calibration.

Expected calibration error, over bins of equal width: Naeini et al., AAAI 2015; Guo et al., arXiv 1706.04599.
Brier's score: Brier, "Verification of forecasts expressed in terms of probability", 1950.

All take one predictor, `[*batch, classes]` and labels `[*batch]`; for each member of an ensemble,
`torch.vmap(pf.brier_score, (0, None))`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_func.ensemble.values import readable, wide
from peft_func.errors import OptionError, TreeError


@dataclass(frozen=True)
class Reliability:
    """Predictions in bins of equal width over the confidence, the probability of the most probable class.

    Attributes:
        count: `[bins]`, int64, how many predictions are in each.
        confidence: `[bins]`, their mean confidence; NaN in an empty bin.
        accuracy: `[bins]`, the share of them that is right; NaN in an empty bin.
    """

    count: Tensor
    confidence: Tensor
    accuracy: Tensor


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of `-log p(label)`, in nats.

    Args:
        logits: `[*batch, classes]`, or log-probabilities, such as `pf.mean_probabilities(logits, log=True)`.
        labels: int64 `[*batch]`.

    Raises:
        TreeError: shapes or dtypes do not fit, or a label is no class.

    Example:
        >>> import torch, peft_func as pf
        >>> pf.negative_log_likelihood(torch.zeros(3, 4), torch.tensor([0, 1, 3])).exp()
        tensor(4.)
    """
    logits = _check(logits, labels, "logits")
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def brier_score(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return the mean squared distance of the probabilities from the one-hot label, summed over the classes: 0 to 2.

    Args:
        probabilities: `[*batch, classes]`.
        labels: int64 `[*batch]`.

    Raises:
        TreeError: shapes or dtypes do not fit, or a label is no class.
        OptionError: these are no probabilities.

    Example:
        >>> import torch, peft_func as pf
        >>> pf.brier_score(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([0, 1]))
        tensor(0.2500)
    """
    probabilities = _check(probabilities, labels, "probabilities")
    truth = labels[..., None] == torch.arange(probabilities.shape[-1], device=labels.device)
    return (probabilities - truth.to(probabilities.dtype)).square().sum(-1).mean()


def reliability(probabilities: Tensor, labels: Tensor, bins: int = 15) -> Reliability:
    """Sort predictions into bins `(i / bins, (i + 1) / bins]` by confidence.

    Args:
        probabilities: `[*batch, classes]`.
        labels: int64 `[*batch]`.
        bins: how many.

    Raises:
        TreeError: shapes or dtypes do not fit, or a label is no class.
        OptionError: these are no probabilities, or `bins` is no positive int.

    Example:
        >>> import torch, peft_func as pf
        >>> found = pf.reliability(torch.tensor([[0.8, 0.2], [0.6, 0.4]]), torch.tensor([0, 1]), bins=2)
        >>> found.count.tolist(), found.accuracy.tolist()
        ([0, 2], [nan, 0.5])
    """
    member, confidence, right = _binned(probabilities, labels, bins)
    count = member.sum(0)
    return Reliability(count.long(), confidence @ member / count, right @ member / count)


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> Tensor:
    """Return the expected calibration error: the mean of `|accuracy - confidence|` over bins, weighted by their counts.

    It is piecewise differentiable in the confidences; the bins themselves have no gradient.

    Args:
        probabilities: `[*batch, classes]`.
        labels: int64 `[*batch]`.
        bins: how many bins of equal width.

    Raises:
        TreeError: shapes or dtypes do not fit, or a label is no class.
        OptionError: these are no probabilities, or `bins` is no positive int.

    Example:
        >>> import torch, peft_func as pf
        >>> pf.calibration_error(torch.tensor([[0.8, 0.2], [0.6, 0.4]]), torch.tensor([0, 1]), bins=1)
        tensor(0.2000)
    """
    member, confidence, right = _binned(probabilities, labels, bins)
    return ((right - confidence) @ member).abs().sum() / len(confidence)


def _binned(probabilities: Tensor, labels: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return each prediction's bin as a one-hot row `[n, bins]`, its confidence, and 1 where it is right."""
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise OptionError(f"bins={bins!r} is no number of bins; 15 is usual")
    probabilities = _check(probabilities, labels, "probabilities")
    confidence, prediction = probabilities.flatten(0, -2).max(-1)
    place = (confidence.detach() * bins).ceil().clamp(1, bins) - 1
    member = place[:, None] == torch.arange(bins, device=place.device)
    return member.to(confidence.dtype), confidence, (prediction == labels.flatten()).to(confidence.dtype)


def _check(values: Tensor, labels: Tensor, name: str) -> Tensor:
    """Return predictions in float32 at least, if they and the labels can be such."""
    if not isinstance(values, Tensor) or not values.is_floating_point():
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TreeError(f"the {name} are a floating-point tensor [*batch, classes], not {kind}")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TreeError(f"the labels are an int64 tensor [*batch], not {kind}; labels.long() makes one")
    if values.ndim < 2 or labels.shape != values.shape[:-1] or values.numel() == 0:
        raise TreeError(
            f"the {name} are {tuple(values.shape)} and the labels {tuple(labels.shape)}; they are [*batch, classes] "
            "and [*batch], with one sample or more. For each member of an ensemble, use torch.vmap(f, (0, None))"
        )
    if readable():
        _check_values(values.detach(), labels, name)  # inside transforms no value can be looked at
    return wide(values)


def _check_values(values: Tensor, labels: Tensor, name: str) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= values.shape[-1]:
        raise TreeError(f"the labels go from {low} to {high}, the classes from 0 to {values.shape[-1] - 1}")
    if name == "probabilities":
        off = (wide(values).sum(-1) - 1).abs().max()
        if not (values.min() >= 0 and off <= 0.01):
            raise OptionError(
                f"these are no probabilities: the least is {values.min():.3g} and a row's sum is off 1 by {off:.3g}; "
                "logits become such by logits.softmax(-1), log-probabilities by .exp()"
            )

"""What the members of an ensemble say together, and where they disagree.

`logits` is `[members, *batch, classes]`, as a `vmap` over stacked adapters gives it: unnormalised, or log-probabilities
(which are logits too). Results are in float32 at least; entropies are in nats.

Mixture of the members' predictions: Lakshminarayanan et al., arXiv 1612.01474. Mutual information (BALD): Houlsby et
al., arXiv 1112.5745. Disagreement: Fort et al., arXiv 1912.02757.
"""

import math

import torch
from torch import Tensor

from peft_func.ensemble.values import wide
from peft_func.errors import TreeError


def mean_logits(logits: Tensor) -> Tensor:
    """Average the members' logits: the product of their distributions, once normalised.

    Args:
        logits: `[members, *batch, classes]`.

    Returns:
        `[*batch, classes]`, float32 at least.

    Raises:
        TreeError: the logits are no floating-point tensor of two dimensions or more, or there is no member or class.

    Example:
        >>> import torch, peft_func as pf
        >>> pf.mean_logits(torch.tensor([[[0.0, 2.0]], [[0.0, 4.0]]]))
        tensor([[0., 3.]])
    """
    return _members(logits, "logits").mean(0)


def mean_probabilities(logits: Tensor, *, log: bool = False) -> Tensor:
    """Average the members' probabilities: the mixture, which is what an ensemble predicts.

    Args:
        logits: `[members, *batch, classes]`.
        log: return the logarithm, which keeps classes whose probability is too small for a float.

    Returns:
        `[*batch, classes]`, float32 at least.

    Raises:
        TreeError: see `mean_logits`.

    Example:
        >>> import torch, peft_func as pf
        >>> pf.mean_probabilities(torch.tensor([[[0.9, 0.1]], [[0.3, 0.7]]]).log())
        tensor([[0.6000, 0.4000]])
    """
    members = _members(logits, "logits").log_softmax(-1)
    impossible = (members == -math.inf).all(0)  # for all members: logsumexp has no gradient there
    mixture = torch.logsumexp(members.masked_fill(impossible, 0.0), 0) - math.log(len(members))
    mixture = mixture.masked_fill(impossible, -math.inf)
    return mixture if log else mixture.exp()


def predictive_entropy(logits: Tensor) -> Tensor:
    """Return the entropy of the mixture, the total uncertainty: `[members, *batch, classes]` to `[*batch]`, in nats.

    Raises:
        TreeError: see `mean_logits`.

    Example:
        >>> import torch, peft_func as pf
        >>> pf.predictive_entropy(torch.zeros(3, 1, 4)).exp()  # uniform over four classes
        tensor([4.])
    """
    return _entropy(mean_probabilities(logits, log=True))


def mutual_information(logits: Tensor) -> Tensor:
    """Return what the members know and the mixture does not: its entropy minus the mean of theirs.

    It is the mutual information of the prediction and the member (BALD), from 0, where all say the same, to
    `log(members)`.

    Args:
        logits: `[members, *batch, classes]`.

    Returns:
        `[*batch]`, in nats.

    Raises:
        TreeError: see `mean_logits`.

    Example:
        >>> import torch, peft_func as pf
        >>> sure = torch.tensor([[[50.0, 0.0]], [[0.0, 50.0]]])  # two members, sure of different classes
        >>> pf.mutual_information(sure).exp()
        tensor([2.])
    """
    members = _members(logits, "logits").log_softmax(-1)
    return (predictive_entropy(logits) - _entropy(members).mean(0)).clamp_min(0.0)  # below 0 by rounding only


def disagreement(logits: Tensor) -> Tensor:
    """Return the share of the pairs of members that choose different classes.

    Its mean over the batch is the share of samples on which two members, drawn at random, differ.

    Args:
        logits: `[members, *batch, classes]`, two members or more.

    Returns:
        `[*batch]`, from 0 to 1; it has no gradient.

    Raises:
        TreeError: there is only one member; and see `mean_logits`.

    Example:
        >>> import torch, peft_func as pf
        >>> pf.disagreement(torch.eye(3)[[0, 0, 1]][:, None])  # of three pairs, two differ
        tensor([0.6667])
    """
    logits = _members(logits, "logits")
    members, classes = len(logits), logits.shape[-1]
    if members < 2:
        raise TreeError("disagreement needs two members or more; these logits [members, *batch, classes] have one")
    chosen = logits.argmax(-1, keepdim=True) == torch.arange(classes, device=logits.device)
    votes = chosen.sum(0).to(logits.dtype)
    return 1 - (votes * (votes - 1)).sum(-1) / (members * (members - 1))


def mean_and_variance(means: Tensor, variances: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the moments of the mixture of regressors: the variance within the members and that between them.

    Args:
        means: `[members, *batch]`, what each member predicts.
        variances: `[members, *batch]`, of each member's own noise; None for members that give none.

    Returns:
        Two tensors `[*batch]`, float32 at least. The variance between the members is divided by their number.

    Raises:
        TreeError: no floating-point tensors, no member, or variances of another shape.

    Example:
        >>> import torch, peft_func as pf
        >>> pf.mean_and_variance(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.5], [0.5]]))
        (tensor([2.]), tensor([1.5000]))
    """
    means = _members(means, "means", 1)
    between = means.var(0, correction=0)
    if variances is None:
        return means.mean(0), between
    variances = _members(variances, "variances", 1)
    if variances.shape != means.shape:
        raise TreeError(f"the variances are {tuple(variances.shape)}, but the means {tuple(means.shape)}")
    return means.mean(0), variances.mean(0) + between


def _members(values: Tensor, name: str, ndim: int = 2) -> Tensor:
    """Return values of members in float32 at least, if they can be such."""
    if not isinstance(values, Tensor) or not values.is_floating_point():
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TreeError(f"the {name} are a floating-point tensor with the members first, not {kind}")
    if values.ndim < ndim or 0 in (values.shape[0], values.shape[-1]):
        wanted = "[members, *batch, classes]" if ndim == 2 else "[members, *batch]"
        raise TreeError(f"the {name} are {wanted}, not {tuple(values.shape)}; for one member, {name}[None]")
    return wide(values)


def _entropy(log_probabilities: Tensor) -> Tensor:
    # A class that is impossible (a logit of -inf) adds 0, and 0 to the gradient.
    finite = log_probabilities.masked_fill(log_probabilities == -math.inf, 0.0)
    return -(log_probabilities.exp() * finite).sum(-1)

"""Classification by the nearest class mean, a classifier without training.

    score(z, c) = -|z - mu_c|^2 / T     or   cos(z, mu_c) / T     or   <z, mu_c> / T

Mensink et al., "Distance-Based Image Classification", TPAMI 2013; SimpleShot: Wang et al., arXiv 1911.04623.
Tukey's power: Yang et al., arXiv 2101.06395; z-scores: Fei et al., ICCV 2021.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_func.ensemble.values import readable, wide
from peft_func.errors import OptionError, TreeError

POWER = 1 / 3


def _power(features: Tensor) -> Tensor:
    if readable() and bool((features < 0).any()):
        raise OptionError("powers are for features of 0 and up (after a ReLU, say); these have negative ones")
    return features**POWER


_TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda features: features,
    "l1": lambda features: F.normalize(features, p=1.0, dim=-1),
    "l2": lambda features: F.normalize(features, dim=-1),
    "zscore": lambda features: F.layer_norm(features, features.shape[-1:], eps=1e-12),
    "tukey": _power,
    "boxcox": lambda features: (_power(features) - 1) / POWER,
}

_METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "euclidean": lambda features, means: -_squared_distances(features, means),
    "cosine": lambda features, means: F.normalize(features, dim=-1) @ F.normalize(means, dim=-1).mT,
    "dot": lambda features, means: features @ means.mT,
}


def transform_features(features: Tensor, transform: str = "l2", center: Tensor | None = None) -> Tensor:
    """Normalise feature vectors, each by itself.

    Args:
        features: `[*batch, dim]`.
        transform: `"none"`; `"l1"`, `"l2"`: to norm 1; `"zscore"`: to mean 0 and standard deviation 1 over the
            vector; for features of 0 and up, `"tukey"`: their cube roots, `"boxcox"`: `3 (x^(1/3) - 1)`.
        center: `[dim]`, subtracted first; with the training features' mean and `"l2"` this is SimpleShot's CL2N.

    Returns:
        `[*batch, dim]`, float32 at least.

    Raises:
        OptionError: an unknown transform, or a power of negative features.
        TreeError: shapes or dtypes do not fit.

    Example:
        >>> import torch, peft_func as pf
        >>> pf.transform_features(torch.tensor([3.0, 4.0]), "l2")
        tensor([0.6000, 0.8000])
    """
    features = _floating(features, "features")
    if transform not in _TRANSFORMS:
        raise OptionError(f"transform={transform!r} is not one of {', '.join(map(repr, _TRANSFORMS))}")
    if center is not None:
        center = _floating(center, "center")
        if center.shape != features.shape[-1:]:
            raise TreeError(f"the center is {tuple(center.shape)} for features {tuple(features.shape)}")
        features = features - center
    return _TRANSFORMS[transform](features)


def class_means(features: Tensor, labels: Tensor, classes: int | None = None) -> Tensor:
    """Return the mean of the features of each class: its prototype.

    Args:
        features: `[n, dim]`.
        labels: int64 `[n]`.
        classes: how many there are; None: up to the highest label.

    Returns:
        `[classes, dim]`, float32 at least; differentiable in the features.

    Raises:
        TreeError: shapes or dtypes do not fit, or a label is no class.
        OptionError: classes are without samples; it names them. (Within `vmap` their means are NaN.)

    Example:
        >>> import torch, peft_func as pf
        >>> pf.class_means(torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([0, 0, 1]))
        tensor([[1.],
                [5.]])
    """
    features = _floating(features, "features")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != features.shape[:1]:
        kind = f"{tuple(labels.shape)} {labels.dtype}" if isinstance(labels, Tensor) else type(labels).__name__
        raise TreeError(f"the labels are int64 [n] for features [n, dim], not {kind} for {tuple(features.shape)}")
    if features.ndim != 2 or not len(features):
        raise TreeError(f"the features are [n, dim] with one sample or more, not {tuple(features.shape)}")
    if classes is None:
        if not readable():
            raise OptionError("within a transform the highest label is unknown; say class_means(..., classes=10)")
        classes = int(labels.max()) + 1
    elif isinstance(classes, bool) or not isinstance(classes, int) or classes < 1:
        raise OptionError(f"classes={classes!r} is no number of classes")
    member = labels[:, None] == torch.arange(classes, device=labels.device)
    count = member.sum(0)
    if readable():
        if not bool(member.any(1).all()):
            raise TreeError(f"the labels go from {labels.min()} to {labels.max()}, the classes from 0 to {classes - 1}")
        empty = (count == 0).nonzero().flatten().tolist()
        if empty:
            raise OptionError(
                f"{len(empty)} of {classes} classes have no samples: {', '.join(map(str, empty[:10]))}; "
                "add samples, or number the classes that have some from 0"
            )
    return member.to(features.dtype).mT @ features / count[:, None]


def nearest_class_mean(
    features: Tensor,
    means: Tensor,
    *,
    metric: str = "euclidean",
    transform: str = "none",
    temperature: float = 1.0,
) -> Tensor:
    """Score features by their nearness to class means: logits, whose argmax is the nearest class.

    Args:
        features: `[*batch, dim]`.
        means: `[classes, dim]`, from `pf.class_means`.
        metric: `"euclidean"`: minus the squared distance; `"cosine"`; `"dot"`.
        transform: done to features and means alike; see `pf.transform_features`.
        temperature: what the scores are divided by.

    Returns:
        `[*batch, classes]`, float32 at least; differentiable.

    Raises:
        OptionError: an unknown metric or transform, or a temperature that is not positive.
        TreeError: shapes or dtypes do not fit.

    Example:
        >>> import torch, peft_func as pf
        >>> pf.nearest_class_mean(torch.tensor([[3.0, 0.0]]), torch.eye(2))
        tensor([[ -4., -10.]])
    """
    if metric not in _METRICS:
        raise OptionError(f"metric={metric!r} is not one of {', '.join(map(repr, _METRICS))}")
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature < float("inf"):
        raise OptionError(f"temperature={temperature!r} is no positive number")
    features, means = transform_features(features, transform), transform_features(means, transform)
    if means.ndim != 2 or features.shape[-1:] != means.shape[-1:]:
        raise TreeError(
            f"the features are {tuple(features.shape)} and the means {tuple(means.shape)}; they are [*batch, dim] and "
            "[classes, dim]"
        )
    dtype = torch.promote_types(features.dtype, means.dtype)
    return _METRICS[metric](features.to(dtype), means.to(dtype)) / temperature


def _squared_distances(features: Tensor, means: Tensor) -> Tensor:
    # One matrix product. Distances do not depend on the origin, and cancel least where it is amid the means.
    origin = means.mean(0).detach()
    features, means = features - origin, means - origin
    return features.square().sum(-1, keepdim=True) + means.square().sum(-1) - 2 * features @ means.mT


def _floating(values: Tensor, name: str) -> Tensor:
    if not isinstance(values, Tensor) or not values.is_floating_point() or not values.ndim:
        kind = f"{tuple(values.shape)} {values.dtype}" if isinstance(values, Tensor) else type(values).__name__
        raise TreeError(f"the {name} are a floating-point tensor [..., dim], not {kind}")
    return wide(values)

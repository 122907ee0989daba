"""The ways to merge, `how`: where low-rank changes meet, and the rule that makes one of several there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from peft_func.ensemble.factors import concatenate, fit, inner, rejoin, truncate
from peft_func.ensemble.interpolate import slerp_weights
from peft_func.ensemble.sparsify import Rule
from peft_func.ensemble.subspace import knots
from peft_func.ensemble.values import wide_dtype
from peft_func.errors import OptionError
from peft_func.transforms.options import check_choice, check_number
from peft_func.trees.keys import Key, as_key
from peft_func.weights.matrix import LowRank

_PRUNING = ("magnitude_prune", "ties", "dare_linear", "dare_ties")

# how -> (where the changes of a place meet, the rule there). Weights that train meet as they are, whatever the first.
HOWS: Mapping[str, tuple[str, str]] = {
    "cat": ("sum", "linear"),
    "svd": ("sum", "linear"),
    "delta": ("sum", "linear"),
    "slerp": ("sum", "slerp"),
    "linear": ("factors", "linear"),
    **{name: ("factors", name) for name in _PRUNING},
    **{f"{name}_svd": ("formed", name) for name in _PRUNING},
    **{f"knots_{name}": ("basis", name) for name in _PRUNING},
}


@dataclass(frozen=True)
class Merge:
    """Checked options.

    Attributes:
        how: a key of `HOWS`.
        weights: one for each tree.
        rank: the highest rank of a merged low-rank matrix; None for what is exact.
        rule: merges tensors of one shape.
    """

    how: str
    weights: tuple[float, ...]
    rank: int | None
    rule: Rule

    def tensors(self, path: str, changes: Sequence[Tensor]) -> Tensor:
        """Merge changes that are tensors of one shape."""
        if self.how != "slerp":
            return self.rule(path, changes, self.weights)
        a, b = (change.double().flatten() for change in changes)
        return self.rule(path, changes, self._arc(path, float(a @ a), float(b @ b), float(a @ b)))

    def low_rank(self, path: str, terms: Sequence[LowRank]) -> LowRank:
        """Merge changes that are low-rank matrices of one shape; the result has scale 1."""
        space, _ = HOWS[self.how]
        if space == "factors":
            return self._factors(path, terms)
        if space == "formed":
            dtype = wide_dtype(*(tensor for term in terms for tensor in term.tensors()))
            matrix = self.rule(path, [term.dense(dtype) for term in terms], self.weights)
            U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
            return rejoin(U, S, Vh, self.rank)
        if space == "basis":
            return truncate(knots(path, terms, self.weights, self.rule), self.rank)
        weights = self.weights
        if self.how == "slerp":
            a, b = terms
            weights = self._arc(path, inner(a, a), inner(b, b), inner(a, b))
        total = concatenate(terms, weights)
        return fit(total) if self.how == "cat" else truncate(total, self.rank)

    def _factors(self, path: str, terms: Sequence[LowRank]) -> LowRank:
        strengths = [weight * term.scale for weight, term in zip(self.weights, terms, strict=True)]
        dtype = wide_dtype(*(tensor for term in terms for tensor in term.tensors()))
        roots = [sqrt(abs(strength)) for strength in strengths]
        signed = [-root if strength < 0 else root for root, strength in zip(roots, strengths, strict=True)]
        A = self.rule(f"{path}.A", [term.A.to(dtype) for term in terms], signed)
        return LowRank(self.rule(f"{path}.B", [term.B.to(dtype) for term in terms], roots), A)

    def _arc(self, path: str, aa: float, bb: float, ab: float) -> tuple[float, ...]:
        return slerp_weights(path, self.weights[1] / sum(self.weights), aa, bb, ab)


def check_weights(count: int, weights: Any) -> tuple[float, ...]:
    """Return one finite number for each tree; 1 / count each if there are none.

    Raises:
        OptionError: there are more or fewer, or one is no finite number.
    """
    if weights is None:
        return (1.0 / count,) * count
    if isinstance(weights, Tensor) and weights.dim() == 1:
        weights = weights.tolist()
    if isinstance(weights, str | Mapping) or not isinstance(weights, Sequence) or len(weights) != count:
        raise OptionError(f"merge: weights are {count} numbers, one for each tree, or None for their mean: {weights!r}")
    return tuple(float(check_number("merge", "weights", weight)) for weight in weights)


def check_merge(
    count: int, weights: Any, how: str, rank: int | None, density: float | None, majority: str, key: Key | None
) -> Merge:
    """Check the options of a merge against each other.

    Raises:
        OptionError: one is out of range, missing, or would have no effect.
    """
    check_choice("merge", "how", how, tuple(HOWS))
    check_choice("merge", "majority_sign_method", majority, ("total", "frequency"))
    _, rule = HOWS[how]
    if majority != "total" and not rule.endswith("ties"):
        raise OptionError(f"merge: how={how!r} elects no signs; majority_sign_method goes with the ties ones")
    for option, value, example in (("rank", rank, None), ("density", density, 0.2), ("key", key, 0)):
        if value is None and example is not None and _uses(how, option):
            raise OptionError(f"merge: how={how!r} needs {option}=, such as {option}={example}")
        if value is not None and not _uses(how, option):
            users = ", ".join(name for name in HOWS if _uses(name, option))
            raise OptionError(f"merge: how={how!r} has no use for {option}={value!r}; it goes with {users}")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise OptionError(f"merge: rank={rank!r} is no whole number from 1 up; None keeps what is exact")
    if density is not None and not 0.0 < check_number("merge", "density", density) <= 1.0:
        raise OptionError(f"merge: density={density!r} is a fraction of the entries, above 0 and up to 1")
    numbers = check_weights(count, weights)
    if how == "slerp":
        _check_arc(numbers)
    name = "linear" if rule == "slerp" else rule
    return Merge(how, numbers, rank, Rule(name, density, majority, None if key is None else as_key(key)))


def _uses(how: str, option: str) -> bool:
    space, rule = HOWS[how]
    match option:
        case "rank":
            return how in ("svd", "slerp") or space in ("formed", "basis")
        case "density":
            return rule in _PRUNING
        case _:
            return rule.startswith("dare")


def _check_arc(weights: tuple[float, ...]) -> None:
    if len(weights) != 2:
        raise OptionError(f"merge: how='slerp' goes between two trees, not {len(weights)}; merge them pair by pair")
    if min(weights) < 0 or sum(weights) <= 0:
        raise OptionError(
            f"merge: how='slerp' takes two weights from 0 up, not both 0, and goes the part w2 / (w1 + w2) of the way; "
            f"it got {list(weights)}"
        )

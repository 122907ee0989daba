"""Checks that methods share: options that must be in range, and patterns that give one place another value."""

import contextlib
import math
import re
from collections.abc import Mapping
from numbers import Real
from typing import TypeVar

from peft_func.errors import OptionError
from peft_func.functional.model import FunctionalModel

Number = TypeVar("Number", int, float)


def check_choice(method: str, option: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        OptionError: names the choices.
    """
    if value not in choices:
        raise OptionError(f"{method}: {option}={value!r} is not one of {', '.join(map(repr, choices))}")


def check_flag(method: str, option: str, value: object) -> None:
    """Refuse what is neither True nor False (PEFT's bias="none", say, which is true).

    Raises:
        OptionError: names the option.
    """
    if not isinstance(value, bool):
        raise OptionError(f"{method}: {option}={value!r} is neither True nor False")


def check_number(method: str, option: str, value: object) -> float:
    """Return a finite real number as an int or a float.

    Raises:
        OptionError: it is none.
    """
    if not isinstance(value, bool) and isinstance(value, Real):
        with contextlib.suppress(OverflowError):
            if math.isfinite(value):
                return int(value) if isinstance(value, int) else float(value)
    raise OptionError(f"{method}: {option}={repr(value)[:40]} is no finite number")


def check_probability(method: str, option: str, value: object) -> float:
    """Return the probability of dropping something, a number from 0 up to but not 1.

    Raises:
        OptionError: it is none.
    """
    number = check_number(method, option, value)
    if not 0.0 <= number < 1.0:
        raise OptionError(f"{method}: {option}={value!r} is a probability, from 0 up to but not 1")
    return number


class ByPath(dict[str, Number]):
    """Values by the exact names of parameters, where patterns are allowed too: what a file holds."""


def check_rank(method: str, path: str, rank: int, shape: tuple[int, ...]) -> int:
    """Return a rank that the matrix `[*batch, out, in]` can have.

    Raises:
        OptionError: the rank is no integer, below 1, or above the matrix's.
    """
    highest = min(shape[-2:])
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= highest:
        raise OptionError(
            f"{method}: rank={rank!r} for {path}, a matrix of {shape[-2]} x {shape[-1]}, whose ranks are 1 to "
            f"{highest}; choose one of them, give this place its own (rank_pattern), or leave it out: "
            f"pf.as_selector(where) & ~pf.exact([{path!r}])"
        )
    return rank


def per_place(
    method: str, option: str, patterns: Mapping[str, Number], paths: tuple[str, ...], model: FunctionalModel
) -> dict[str, Number]:
    """Return the value that a pattern gives to each place that matches one; the first pattern that matches wins.

    PEFT's rule: a pattern is a regex for the module's whole path, or for its end after a dot.

    Raises:
        OptionError: a pattern matches no place, or is no regex.
    """
    if isinstance(patterns, ByPath):
        for path in patterns.keys() - set(paths):
            raise OptionError(f"{method}: {option} has a value for {path!r}, which is none of its places")
        return dict(patterns)
    if not isinstance(patterns, Mapping):
        raise OptionError(f"{method}: {option} is a dict of patterns, not a {type(patterns).__name__}")
    values: dict[str, Number] = {}
    for pattern, value in patterns.items():
        try:
            regex = re.compile(rf"(?:.*\.)?(?:{pattern})")
        except (re.error, OverflowError, RecursionError) as error:
            raise OptionError(f"{method}: the {option} {pattern!r} is not a regular expression: {error}") from None
        matched = [path for path in paths if any(regex.fullmatch(name) for name in _places(path, model))]
        if not matched:
            raise OptionError(f"{method}: the {option} {pattern!r} matches none of its places: {', '.join(paths[:5])}")
        for path in matched:
            values.setdefault(path, value)
    return values


def _places(path: str, model: FunctionalModel) -> tuple[str, ...]:
    """Return the paths of the modules that own a weight, and of the parameter itself where it is not their `weight`."""
    paths = (path, *model.infos[path].aliases)
    own = tuple(name for name in paths if name.rpartition(".")[2] != "weight")
    return (*(name.rpartition(".")[0] for name in paths), *own)


def biases(paths: tuple[str, ...], model: FunctionalModel) -> tuple[str, ...]:
    """Return the names of the biases of the modules that own these weights."""
    found: dict[str, None] = {}
    for path in paths:
        module, dot, weight = path.rpartition(".")
        # MultiheadAttention has one in_proj_bias, also for the separate q_proj_weight, k_proj_weight, v_proj_weight.
        own = "in_proj_bias" if weight in SEPARATE_PROJECTIONS else weight.removesuffix("weight") + "bias"
        if module + dot + own in model.params:
            found[module + dot + own] = None
    return tuple(found)


SEPARATE_PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
"""What MultiheadAttention calls its projections where queries, keys and values have different widths, in order."""

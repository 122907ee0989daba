"""Selectors: which parameters a method is for.

Wherever a place is chosen, these are understood:

* a `str`: a regex that must match the whole parameter path or the whole path of its module;
* a list of `str`: PEFT's rule, the exact name or a suffix after a dot, of the parameter or of its module;
* a callable `(path, info) -> bool`;
* the selectors of this file, which combine with `&`, `|` and `~`.

A parameter with several names (tied weights, shared modules) is selected by any of them.
"""

import difflib
import fnmatch
import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from peft_func.errors import SelectorError


@dataclass(frozen=True)
class Info:
    """What is known of a parameter where it is selected.

    Attributes:
        path: its name in `model.params`, or its path in a nested tree.
        shape: its shape.
        dtype: its dtype.
        modules: the classes of the modules that own it; empty for a leaf of a tree.
        aliases: its other names, where weights are tied or modules shared.
    """

    path: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    modules: tuple[type, ...] = ()
    aliases: tuple[str, ...] = ()

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    @property
    def names(self) -> tuple[str, ...]:
        """Every path that may name it: its own and its aliases', and those of the modules that own it."""
        paths = (self.path, *self.aliases)
        return (*paths, *(path.rpartition(".")[0] for path in paths))


class Selector(ABC):
    """A predicate over `(path, info)`; combine selectors with `&`, `|` and `~`."""

    @abstractmethod
    def __call__(self, path: str, info: Info) -> bool:
        """Say whether the parameter is selected."""

    def __and__(self, other: "Where") -> "Selector":
        return AllOf((self, as_selector(other)))

    def __or__(self, other: "Where") -> "Selector":
        return AnyOf((self, as_selector(other)))

    def __rand__(self, other: "Where") -> "Selector":
        return AllOf((as_selector(other), self))

    def __ror__(self, other: "Where") -> "Selector":
        return AnyOf((as_selector(other), self))

    def __invert__(self) -> "Selector":
        return Not(self)


Where: TypeAlias = str | re.Pattern[str] | Sequence["str | Selector"] | Selector | Callable[[str, Info], bool]
"""All that may stand where a place is chosen."""


@dataclass(frozen=True)
class AllOf(Selector):
    """Selected by every one of them."""

    parts: tuple[Selector, ...]

    def __call__(self, path: str, info: Info) -> bool:
        return all(part(path, info) for part in self.parts)


@dataclass(frozen=True)
class AnyOf(Selector):
    """Selected by at least one of them."""

    parts: tuple[Selector, ...]

    def __call__(self, path: str, info: Info) -> bool:
        return any(part(path, info) for part in self.parts)


@dataclass(frozen=True)
class Not(Selector):
    """Selected where the other is not."""

    part: Selector

    def __call__(self, path: str, info: Info) -> bool:
        return not self.part(path, info)


@dataclass(frozen=True)
class Path(Selector):
    """A regex over the whole path of the parameter or of its module."""

    pattern: re.Pattern[str]

    def __call__(self, path: str, info: Info) -> bool:
        return any(self.pattern.fullmatch(name) for name in info.names)


@dataclass(frozen=True)
class Glob(Selector):
    """A shell pattern over the whole path; `*` also matches dots."""

    pattern: str

    def __call__(self, path: str, info: Info) -> bool:
        return any(fnmatch.fnmatchcase(name, self.pattern) for name in info.names)


@dataclass(frozen=True)
class Suffix(Selector):
    """The exact name, or a suffix of it after a dot."""

    name: str

    def __call__(self, path: str, info: Info) -> bool:
        return any(name == self.name or name.endswith("." + self.name) for name in info.names)


@dataclass(frozen=True)
class Exact(Selector):
    """These parameters, by name, and no others."""

    paths: frozenset[str]

    def __call__(self, path: str, info: Info) -> bool:
        return path in self.paths

    def __repr__(self) -> str:
        first = sorted(self.paths)
        return f"exact({', '.join(first[:3])}{f', and {len(first) - 3} more' if len(first) > 3 else ''})"


@dataclass(frozen=True)
class OfType(Selector):
    """Parameters of modules of these classes, subclasses included."""

    types: tuple[type, ...]

    def __call__(self, path: str, info: Info) -> bool:
        return any(issubclass(module, self.types) for module in info.modules)


@dataclass(frozen=True)
class NDim(Selector):
    """Parameters with that many dimensions."""

    ndim: int

    def __call__(self, path: str, info: Info) -> bool:
        return info.ndim == self.ndim


@dataclass(frozen=True)
class Index(Selector):
    """Parameters of the layers with these numbers: the first number in a path is its layer."""

    numbers: frozenset[int]

    def __call__(self, path: str, info: Info) -> bool:
        return any(
            int(number) in self.numbers
            for name in (info.path, *info.aliases)
            for number in [next(filter(str.isdecimal, name.split(".")), None)]
            if number is not None
        )


@dataclass(frozen=True)
class Call(Selector):
    """A user's own predicate."""

    function: Callable[[str, Info], bool]

    def __call__(self, path: str, info: Info) -> bool:
        return bool(self.function(path, info))


def path(regex: str | re.Pattern[str]) -> Selector:
    r"""Select by a regex that matches the whole parameter path or the whole module path.

    Example:
        >>> import peft_func as pf
        >>> late = pf.path(r".*\.q_proj") & pf.index(range(6, 12))
    """
    if not isinstance(regex, str) and not (isinstance(regex, re.Pattern) and isinstance(regex.pattern, str)):
        raise SelectorError(f"path takes a regex as a str, not {regex!r}")
    try:
        return Path(re.compile(regex))
    except (re.error, OverflowError, RecursionError) as error:
        raise SelectorError(
            f"{regex!r} is not a regular expression: {error}; for a shell pattern use pf.glob"
        ) from None


def glob(pattern: str) -> Selector:
    """Select by a shell pattern, such as `"encoder.*.attention.*"`; `*` also matches dots."""
    return Glob(_text("glob", pattern))


def suffix(name: str) -> Selector:
    """Select by the last parts of a path: `"q_proj"`, `"attn.proj"`, `"q_proj.weight"`."""
    return Suffix(_text("suffix", name))


def exact(paths: Iterable[str]) -> Selector:
    """Select these parameters, by their names in `model.params`, and no others."""
    if isinstance(paths, str) or not isinstance(paths, Iterable):
        raise SelectorError(f"exact takes a list of names; write pf.exact([{paths!r}])")
    return Exact(frozenset(_text("exact", path) for path in paths))


def of_type(*types: type) -> Selector:
    """Select the parameters that modules of these classes (or of subclasses) own directly."""
    if not types or not all(isinstance(kind, type) for kind in types):
        raise SelectorError(f"of_type takes classes, such as pf.of_type(torch.nn.Linear); it got {types!r}")
    return OfType(types)


def ndim(number: int) -> Selector:
    """Select parameters with that many dimensions."""
    return NDim(_whole("ndim", number))


def index(*numbers: int | Iterable[int]) -> Selector:
    """Select by layer number, the first number in a path: `pf.index(0, 3)`, `pf.index(range(6, 12))`."""
    flat = [n for item in numbers for n in (item if isinstance(item, Iterable) else [item])]
    return Index(frozenset(_whole("index", number) for number in flat))


def as_selector(where: Where) -> Selector:
    """Turn whatever stands for a place into a `Selector`."""
    if isinstance(where, Selector):
        return where
    if isinstance(where, str | re.Pattern):
        return path(where)
    if isinstance(where, Sequence) and all(isinstance(item, str | Selector) for item in where):
        return AnyOf(tuple(suffix(item) if isinstance(item, str) else item for item in where))
    if isinstance(where, type):
        raise SelectorError(f"a class is no selector; for the parameters of such modules, pf.of_type({where.__name__})")
    if callable(where):
        return Call(where)
    raise SelectorError(
        f"a {type(where).__name__} does not select parameters; give a regex, a list of names, "
        "a selector such as pf.glob('*.q_proj'), or a function (path, info) -> bool"
    )


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise SelectorError(f"{name} takes a str, not {value!r}")
    return value


def _whole(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise SelectorError(f"{name} takes whole numbers, not {value!r}")
    return value


def nearest(wanted: str, names: Iterable[str], count: int = 5) -> list[str]:
    """Return the names that look most like the wanted one, best first.

    A name is compared as a whole, and by as many of its last parts as the wanted one has.
    """
    word = re.sub(r"[^\w.]", "", wanted.replace("\\.", ".").replace("\\", "")).strip(".")
    parts = word.count(".") + 1
    by_end: dict[str, list[str]] = {}
    for name in sorted(set(names) - {""}):
        for end in (name, ".".join(name.split(".")[-parts:])):
            by_end.setdefault(end, []).append(name)
    found = [name for end in difflib.get_close_matches(word, by_end, count, cutoff=0.5) for name in by_end[end]]
    return list(dict.fromkeys(found or sorted(set(names) - {""})))[:count]


def _words(where: object) -> list[str]:
    """Return what a selector asks for by name."""
    match where:
        case str():
            return [where]
        case Path(pattern=re.Pattern(pattern=str(word))) | Glob(pattern=word) | Suffix(name=word):
            return [word]
        case Exact(paths=paths):
            return sorted(paths)[:3]
        case re.Pattern(pattern=str(word)):
            return [word]
        case AllOf(parts=parts) | AnyOf(parts=parts):
            return [word for part in parts for word in _words(part)]
        case list() | tuple():
            return [word for item in where for word in _words(item)]
        case _:
            return []


def resolve(where: Where, infos: Iterable[Info], purpose: str, noun: str = "parameters") -> tuple[str, ...]:
    """Return the paths that a selector chooses, in the order of `infos`.

    Args:
        where: what selects.
        infos: the parameters to choose from.
        purpose: who asks, for the error: `"lora"`.
        noun: what is chosen, for the error.

    Raises:
        SelectorError: nothing is selected; the message names the nearest names.
    """
    selector, infos = as_selector(where), list(infos)
    chosen = tuple(info.path for info in infos if selector(info.path, info))
    if chosen:
        return chosen
    names = [name for info in infos for name in info.names]
    # The best guess for every word first, then the second best of each.
    guesses = itertools.zip_longest(*(nearest(word, names) for word in _words(where) or [""]))
    close = dict.fromkeys(name for row in guesses for name in row if name is not None)
    raise SelectorError(
        f"{purpose}: {where!r} matches none of {len(infos)} {noun}. "
        + (f"The nearest names: {', '.join(list(close)[:6])}. " if close else "")
        + "A str is a regex over the whole path; a list holds names or their last parts, such as ['q_proj']."
    )

"""Wires: which method of an add-in runs at which sides of which modules, and how that reads as text.

    wires    := wire ("," wire)*
    wire     := "(" add-in "." method ")" ":" element*
    add-in   := name [ "(" keyword "=" value ("," keyword "=" value)* ")" ]
    element  := "..." | "->" | "(" path ")" | "{" marker "}" | "input" | "output"
    path     := name ("." name | "[" integer "]" | "[" integer ":" integer "]")*
    marker   := ("inout" | "in" | "out") integer [ "." method ]

It is the one-line grammar of ZhiJian (LAMDA, 2023, arXiv 2308.09158). The keywords of an add-in and the method of a
single marker are additions: with them, the text says all that the records of ZhiJian's configuration files say.
"""

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, TypeAlias

from peft_func.errors import OptionError

Keys: TypeAlias = tuple[str | int, ...]
"""A module as names and indices: `blocks[-1].attn.qkv` is `("blocks", -1, "attn", "qkv")`."""

NOTING = {"pre": "get_pre", "post": "get_post"}
"""The methods that note what is at a module: on the way in, and on the way out."""


@dataclass(frozen=True)
class Spot:
    """Where something was said, for errors.

    Attributes:
        label: such as `"line 2, column 7"`, or `"record 0, hook 1"`.
        excerpt: the line, and below it a caret; empty for records.
    """

    label: str
    excerpt: str = ""

    def explain(self, message: str) -> str:
        """Return a message with its place."""
        return f"{self.label}: {message}" + (f"\n{self.excerpt}" if self.excerpt else "")

    def error(self, message: str) -> OptionError:
        """Return an error that names the place."""
        return OptionError(f"wire: {self.explain(message)}")


NOWHERE = Spot("the wires")


@dataclass(frozen=True)
class End:
    """Where a wire meets the base model.

    Attributes:
        kind: `"inout"` (what is there is replaced), `"in"` (it is noted) or `"out"` (it is changed by what was noted).
        number: pairs an `in` with its `out`s.
        path: the module.
        side: `"pre"`, on the way into the module, or `"post"`, on the way out.
        method: of the add-in; None for an `in`, where `get_pre` or `get_post` notes.
        spot: where it was said; wires that differ in it only are equal.
    """

    kind: str
    number: int
    path: Keys
    side: str
    method: str | None = None
    spot: Spot = field(default=NOWHERE, compare=False, repr=False)

    @property
    def hook(self) -> str:
        """The method that runs there."""
        return self.method or NOTING[self.side]


@dataclass(frozen=True)
class Wire:
    """One add-in, and its ends in the base model.

    Attributes:
        name: of the add-in's factory.
        ends: in the order in which they were said, which is that of hooks at one side of one module.
        kwargs: what the factory is called with.
        spot: where it was said.
        passed: modules that the text only passes through; they, too, must exist.
    """

    name: str
    ends: tuple[End, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    spot: Spot = field(default=NOWHERE, compare=False, repr=False)
    passed: tuple[tuple[Keys, Spot], ...] = field(default=(), compare=False, repr=False)

    @property
    def method(self) -> str:
        """The method of the first end that has one."""
        return next(end.method for end in self.ends if end.method is not None)

    def __str__(self) -> str:
        keywords = ", ".join(f"{key}={value!r}" for key, value in self.kwargs.items())
        stations = "->...->".join(_station(list(ends), self.method) for ends in _at_one_module(self.ends))
        return f"({self.name}{f'({keywords})' if keywords else ''}.{self.method}): ...->{stations}->..."


def path_text(path: Keys) -> str:
    """Return a path as the grammar writes it.

    Example:
        >>> path_text(("blocks", -1, "attn", "qkv"))
        'blocks[-1].attn.qkv'
    """
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return text.removeprefix(".")


def draw(wires: Iterable[Wire]) -> str:
    """Return wires as text, one to a line."""
    return ",\n".join(map(str, wires))


def checked(wire: Wire) -> Wire:
    """Return a wire if its ends fit together.

    Raises:
        OptionError: it has no end, its numbers do not pair, or what it takes is not there yet where it is used.
    """
    if not any(end.kind != "in" for end in wire.ends):
        if wire.ends:
            raise wire.ends[0].spot.error(f"{_marker(wire.ends[0])} has no {{out{wire.ends[0].number}}}")
        raise wire.spot.error(
            f"{wire.name} is wired to nothing: expected a marker such as {{inout1}} beside a (module), as in "
            "...->{inout1}(fc2)->..."
        )
    taken: dict[int, End] = {}
    for end in wire.ends:
        if end.kind == "in":
            if end.number in taken:
                raise end.spot.error(f"a second {_marker(end)} in one expression; give each its own number")
            taken[end.number] = end
    given = {end.number for end in wire.ends if end.kind == "out"}
    for end in wire.ends:
        other = {"in": "out", "out": "in"}.get(end.kind)
        numbers = given if end.kind == "in" else set(taken)
        if other is not None and end.number not in numbers:
            near = sorted(numbers, key=lambda number: (abs(number - end.number), number))[:3]
            there = ", ".join(f"{{{other}{number}}}" for number in near) or f"no {{{other}...}} at all"
            raise end.spot.error(f"{_marker(end)} has no {{{other}{end.number}}}; there is {there}")
        if end.kind == "out":
            _check_flow(wire.ends, taken[end.number], end)
    for key, value in wire.kwargs.items():
        if not _is_literal(value):
            raise wire.spot.error(
                f"{wire.name} gets {key}={value!r}; the keywords of a wire are numbers, strings, booleans, None and "
                "lists or dicts of them: bind anything else to the factory (functools.partial)"
            )
    return wire


def _check_flow(ends: tuple[End, ...], source: End, sink: End) -> None:
    if ends.index(source) > ends.index(sink):
        raise sink.spot.error(f"{_marker(sink)} stands before its {_marker(source)}; the flow is from left to right")
    if source.path == sink.path and (source.side, sink.side) == ("post", "pre"):
        module = path_text(sink.path)
        raise sink.spot.error(f"what leaves ({module}) cannot change what has entered it; expected another module")


def _is_literal(value: object) -> bool:
    try:
        return bool(ast.literal_eval(repr(value)) == value)
    except (ValueError, SyntaxError, TypeError):
        return False


def _marker(end: End, method: str | None = None) -> str:
    own = f".{end.method}" if method is not None and end.method not in (None, method) else ""
    return f"{{{end.kind}{end.number}{own}}}"


def _at_one_module(ends: Iterable[End]) -> Iterable[list[End]]:
    """Group ends that can be drawn at one module without changing their order."""
    for _, same in groupby(ends, key=lambda end: end.path):
        group: list[End] = []
        for end in same:
            if group and group[-1].side == "post" and end.side == "pre":
                yield group
                group = []
            group.append(end)
        yield group


def _station(ends: list[End], method: str) -> str:
    before = "".join(_marker(end, method) for end in ends if end.side == "pre")
    after = "".join(_marker(end, method) for end in ends if end.side == "post")
    return f"{before}({path_text(ends[0].path)}){after}"

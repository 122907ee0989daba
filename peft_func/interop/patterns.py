"""Regexes from a file that is not trusted, matched in bounded time.

Python's `re` can take years for one short pattern, and a file may hold such a one. What PEFT's users write needs little
of the language: it is parsed here, and run over sets of positions instead of by backtracking. Whatever is outside
(lookarounds, references, possessive quantifiers) is refused by name.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from peft_func.errors import FileFormatError

_TOKEN = re.compile(
    r"""
      (?P<atom> \[ \^? (?: [\w.:/\ -] | \\[dwDW.\-] )+ \] | \\[dwDW] | \\[^\w\s] | [\w\-/:\ ,=@#&<>!"'~;%] | \. )
    | (?P<open> \( (?: \?: )? )
    | (?P<close> \) )
    | (?P<bar> \| )
    | (?P<anchor> [\^$] )
    | (?P<repeat> [*+?] | \{ (?P<least>\d{1,4}) (?P<comma>,)? (?P<most>\d{1,4})? \} ) \??
    """,
    re.VERBOSE | re.ASCII,
)
_PLAIN = re.compile(r"\^?(?:[\w-]|\\?\.)+\$?", re.ASCII)
_STEPS = 200_000
_LONGEST = 4096


@dataclass(frozen=True)
class _Repeat:
    item: "_Node"
    least: int
    most: int | None


@dataclass(frozen=True)
class _Anchor:
    at_end: bool


# A pattern for one character, an anchor, a repetition, or alternatives, each of which is a sequence.
_Node: TypeAlias = "re.Pattern[str] | _Anchor | _Repeat | list[list[_Node]]"


@dataclass
class _Run:
    text: str
    steps: int = field(default=_STEPS)

    def ends(self, node: _Node, starts: set[int]) -> set[int]:
        """Return the positions where a match that begins at one of `starts` can end."""
        self.steps -= 1 + len(starts)
        if self.steps < 0:
            raise TimeoutError
        match node:
            case re.Pattern():
                return {i + 1 for i in starts if i < len(self.text) and node.fullmatch(self.text[i])}
            case _Anchor(at_end=at_end):
                return starts & {len(self.text) if at_end else 0}
            case _Repeat(item=item, least=least, most=most):
                return self._repeated(item, least, most, starts)
            case alternatives:
                return {end for sequence in alternatives for end in self._sequence(sequence, starts)}

    def _sequence(self, sequence: list[_Node], starts: set[int]) -> set[int]:
        for node in sequence:
            if starts:
                starts = self.ends(node, starts)
        return starts

    def _repeated(self, item: _Node, least: int, most: int | None, starts: set[int]) -> set[int]:
        for _ in range(least):
            starts = self.ends(item, starts)
        found, new = set(starts), starts
        count = least
        while new and (most is None or count < most):
            new = self.ends(item, new) - found
            found |= new
            count += 1
        return found


class Pattern:
    r"""A regex of a file: letters, `.`, `\d`, `\w`, sets, groups, `|`, `*`, `+`, `?`, `{m,n}`, `^` and `$`.

    Args:
        source: the regex.
        place: the file and the field that it is from, for the error.

    Raises:
        FileFormatError: it is none, or uses more of the language.
    """

    def __init__(self, source: str, place: str) -> None:
        self.source, self.place = source, place
        # Without groups and quantifiers nothing can blow up, and `re` is the fastest.
        plain = len(source) <= _LONGEST and _PLAIN.fullmatch(source)
        self._plain = re.compile(rf"(?:.*\.)?(?:{source})") if plain else None
        try:
            self._tree = [] if self._plain else _parse(source)
        except (ValueError, re.error, RecursionError) as error:
            raise FileFormatError(
                f"{place} has the regex {source[:200]!r}, which is not followed here ({error}): a file is not trusted, "
                "so only names, '.', \\d, \\w, sets, groups, |, *, +, ?, {m,n}, ^ and $ are; write the names out"
            ) from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pattern) and other.source == self.source

    def __hash__(self) -> int:
        return hash(self.source)

    def fullmatch(self, name: str) -> bool:
        """Say whether it matches the whole name."""
        return bool(re.fullmatch(self.source, name)) if self._plain else self._matches(name, {0})

    def ends(self, name: str) -> bool:
        r"""Say whether it matches the whole name or what follows one of its dots: `(.*\.)?(pattern)$`."""
        if self._plain:
            return bool(self._plain.fullmatch(name))
        return self._matches(name, {0, *(i + 1 for i, letter in enumerate(name) if letter == ".")})

    def _matches(self, name: str, starts: set[int]) -> bool:
        try:
            return len(name) in _Run(name).ends(self._tree, starts)
        except (TimeoutError, RecursionError):
            raise FileFormatError(
                f"{self.place} has the regex {self.source[:200]!r}, which takes too long to match; "
                "write the names out instead"
            ) from None


def first_match(patterns: Iterable[tuple[Pattern, float]], name: str, default: float) -> float:
    """Return the value of the first pattern that matches the end of a module's path, PEFT's rule; or the default."""
    return next((value for pattern, value in patterns if pattern.ends(name)), default)


def _parse(source: str) -> list[list[_Node]]:
    if len(source) > _LONGEST:
        raise ValueError(f"it has more than {_LONGEST} characters")
    stack: list[list[list[_Node]]] = [[[]]]
    position, repeatable = 0, False
    while position < len(source):
        token = _TOKEN.match(source, position)
        if token is None or "--" in token[0]:
            raise ValueError(f"at {source[position : position + 10]!r}")
        position = token.end()
        sequence = stack[-1][-1]
        if token["open"]:
            stack.append([[]])
        elif token["close"]:
            if len(stack) == 1:
                raise ValueError("a parenthesis is closed that was not opened")
            group = stack.pop()
            stack[-1][-1].append(group)
        elif token["bar"]:
            stack[-1].append([])
        elif token["anchor"]:
            sequence.append(_Anchor(token["anchor"] == "$"))
        elif token["repeat"]:
            if not repeatable:
                raise ValueError(f"nothing to repeat before {token[0]!r}")
            sequence[-1] = _Repeat(sequence[-1], *_bounds(token))
        else:
            sequence.append(re.compile(token["atom"]))
        repeatable = bool(token["atom"] or token["close"])
    if len(stack) != 1:
        raise ValueError("a parenthesis is not closed")
    return stack[0]


def _bounds(token: re.Match[str]) -> tuple[int, int | None]:
    if token["least"] is None:
        return {"*": (0, None), "+": (1, None), "?": (0, 1)}[token["repeat"]]
    least = int(token["least"])
    if token["most"] is None:
        return least, None if token["comma"] else least
    if int(token["most"]) < least:
        raise ValueError(f"{token[0]!r} has its bounds the wrong way round")
    return least, int(token["most"])

"""A text read from left to right, which knows line and column of every token for errors."""

import re

from peft_func.addins.wiring import Spot
from peft_func.errors import OptionError


class Reader:
    """Text, read from left to right; white space between tokens is skipped."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def spot(self, at: int | None = None) -> Spot:
        """Return a position for errors: the next token's, if none is given."""
        at = self._next() if at is None else at
        start = self.text.rfind("\n", 0, at) + 1
        line = self.text[start:].partition("\n")[0]
        caret = re.sub(r"[^\t]", " ", line[: at - start]) + "^"
        column = f"column {at - start + 1}"
        if "\n" in self.text.strip():
            column = f"line {self.text.count(chr(10), 0, at) + 1}, {column}"
        return Spot(column, f"{line}\n{caret}")

    def fail(self, expected: str) -> OptionError:
        """Return an error: what was expected here, and what is here."""
        at = self._next()
        found = re.match(r"\w+|\.\.\.|->|\S", self.text[at:])
        return self.spot(at).error(f"expected {expected}, found {repr(found[0]) if found else 'the end'}")

    def accept(self, pattern: str) -> str | None:
        """Read what matches, or nothing."""
        match = re.compile(pattern).match(self.text, self._next())
        if match is None:
            return None
        self.at = match.end()
        return match[0]

    def meets(self, pattern: str) -> bool:
        """Say whether what comes next matches; nothing is read."""
        return re.compile(pattern).match(self.text, self._next()) is not None

    def expect(self, pattern: str, expected: str) -> str:
        """Read what matches.

        Raises:
            OptionError: something else is there.
        """
        found = self.accept(pattern)
        if found is None:
            raise self.fail(expected)
        return found

    @property
    def done(self) -> bool:
        """Whether only white space is left."""
        return self._next() == len(self.text)

    def _next(self) -> int:
        return len(self.text) - len(self.text[self.at :].lstrip())

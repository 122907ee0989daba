"""Wires drawn over several lines: rows of modules and add-ins, with bars where one row leads into another.

    (fc1)->|->(fc2)->|->(fc3)                     the add-in takes what enters fc2,
           |->(A.f)->|                            and changes what leaves it

An add-in in a row of modules is between two of them: its method runs after the one on its left, or else before the one
on its right. A bar on its left is where it takes, a bar on its right where it gives; a bar meets the nearest one of
another row that stands beside a module, at most five columns away. What enters the module on the right of a bar is
taken; what leaves the module on its left is changed.
"""

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from peft_func.addins.wire_parser import Header, Module, Path, copies, header, module
from peft_func.addins.wire_reader import Reader
from peft_func.addins.wiring import End, Keys, Spot, Wire, checked
from peft_func.errors import OptionError

REACH = 5

Plan: TypeAlias = tuple[str, Module, str]
"""An end: its kind, its module and its side."""


@dataclass(frozen=True)
class Bar:
    """`|`."""

    row: int
    column: int
    spot: Spot


Row: TypeAlias = list[Header | Module | Bar | None]


def is_drawing(text: str, names: Collection[str]) -> bool:
    """Say whether text is a drawing with one of these add-ins in it."""
    if re.search(r"[{}]|\)\s*:", text):
        return False
    return any(re.search(rf"\(\s*{re.escape(name)}\s*[.(]", text) for name in names)


def parse_drawing(text: str, names: Collection[str]) -> tuple[Wire, ...]:
    """Return the wires of a drawing.

    Args:
        text: the drawing.
        names: of the add-ins; all else in brackets is a module.

    Raises:
        OptionError: shows the column, and what was expected there.

    Example:
        >>> print(*parse_drawing("(fc1)->(fc2)->(A.f)->(fc3)", ["A"]))
        (A.f): ...->(fc2){inout1}->...
    """
    rows = _rows(Reader(text), names)
    every = [found for row in rows for found in row if isinstance(found, Module)]
    plain = [found for found in every if not any(isinstance(key, range) for key in found.path)]
    wires: list[Wire] = []
    for row in rows:
        for i, element in enumerate(row):
            if isinstance(element, Header):
                left, right = (row[i - 1] if i else None), (row[i + 1] if i + 1 < len(row) else None)
                wires += _wires(element, _plan(element, left, right, rows), plain)
    if not wires:
        raise OptionError(
            f"wire: the drawing has none of the add-ins {', '.join(names)} in it, as in ({next(iter(names), 'A')}.f)"
        )
    return tuple(wires)


def _rows(reader: Reader, names: Collection[str]) -> list[Row]:
    rows: list[Row] = [[] for _ in range(reader.text.count("\n") + 1)]
    addin = rf"\(\s*(?:{'|'.join(map(re.escape, names))})\s*[.(]"
    while not reader.done:
        spot, at = reader.spot(), len(reader.text) - len(reader.text[reader.at :].lstrip())
        row = reader.text.count("\n", 0, at)
        if reader.accept(r"->"):
            continue
        if reader.accept(r"\.\.\.|(?:input|output)\b"):
            rows[row].append(None)
        elif reader.accept(r"\|"):
            rows[row].append(Bar(row, at - reader.text.rfind("\n", 0, at), spot))
        elif reader.meets(addin):
            rows[row].append(header(reader))
        else:
            reader.expect(r"\(", "'->', '|', '...', a (module) or an (add-in)")
            rows[row].append(module(reader))
    return rows


def _plan(
    addin: Header, left: Header | Module | Bar | None, right: Header | Module | Bar | None, rows: list[Row]
) -> list[Plan]:
    """Say where an add-in takes and where it gives, from what is beside it in its row."""
    if not isinstance(left, Bar) and not isinstance(right, Bar):
        if isinstance(left, Module):
            return [("inout", left, "post")]
        if isinstance(right, Module):
            return [("inout", right, "pre")]
        raise addin.spot.error(f"{addin.name} touches no module: expected a (module) or '|' beside it")
    if isinstance(left, Bar):
        before, after = _met(left, rows)
        source: Plan | None = ("in", after, "pre") if after else ("in", before, "post") if before else None
    else:
        source = ("in", left, "post") if isinstance(left, Module) else None
    if isinstance(right, Bar):
        before, after = _met(right, rows)
        sink: Plan | None = ("out", before, "post") if before else ("out", after, "pre") if after else None
    else:
        sink = ("out", right, "pre") if isinstance(right, Module) else None
    if source is None or sink is None:
        side, does = ("left", "takes") if source is None else ("right", "gives")
        raise addin.spot.error(f"{addin.name} {does} nowhere: expected a (module) or '|' on its {side}")
    return [source, sink]


def _met(bar: Bar, rows: list[Row]) -> tuple[Module | None, Module | None]:
    """Return the modules on the left and on the right of the bar that this one meets."""
    found: list[tuple[int, int, Module | None, Module | None]] = []
    for row in rows:
        for i, other in enumerate(row):
            if not isinstance(other, Bar) or other.row == bar.row or abs(other.column - bar.column) > REACH:
                continue
            before, after = (row[i - 1] if i else None), (row[i + 1] if i + 1 < len(row) else None)
            left, right = (beside if isinstance(beside, Module) else None for beside in (before, after))
            if left or right:
                found.append((abs(other.column - bar.column), abs(other.row - bar.row), left, right))
    found.sort(key=lambda one: one[:2])
    if not found:
        raise bar.spot.error(f"this '|' meets none beside a module; expected one within {REACH} columns in another row")
    if len(found) > 1 and found[0][:2] == found[1][:2]:
        raise bar.spot.error("this '|' stands between two others; move it nearer to the one it means")
    return found[0][2:]


def _wires(addin: Header, plan: list[Plan], plain: list[Module]) -> Iterator[Wire]:
    own = [found for _, found, _ in plan]

    def build(at: Callable[[Path], Keys]) -> Wire:
        ends = tuple(
            End(kind, 1, at(found.path), side, None if kind == "in" else addin.method, found.spot)
            for kind, found, side in plan
        )
        passed = tuple((at(found.path), found.spot) for found in plain)
        return checked(Wire(addin.name, ends, addin.kwargs, addin.spot, passed))

    return copies(own, build)

"""From text to wires: a recursive descent whose errors show the column and say what was expected there."""

import ast
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

from peft_func.addins.wire_reader import Reader
from peft_func.addins.wiring import End, Keys, Spot, Wire, checked, path_text
from peft_func.errors import OptionError

Path: TypeAlias = tuple[str | int | range, ...]
Found = TypeVar("Found")

NAME = r"\w+(?:-\w+)*"
INTEGER = r"-?[0-9]+"
EXAMPLE = "(MLPAddin.adapt_input): ...->{inout1}(fc2)->..."


@dataclass(frozen=True)
class Module:
    """`(path)`."""

    path: Path
    spot: Spot


@dataclass(frozen=True)
class Marker:
    """`{inoutN}`, `{inN}` or `{outN}`."""

    kind: str
    number: int
    method: str | None
    spot: Spot


@dataclass(frozen=True)
class Header:
    """`(MLPAddin.adapt_input)`."""

    name: str
    method: str
    kwargs: dict[str, object]
    spot: Spot


Element: TypeAlias = Module | Marker | None
"""None is what carries no meaning: `...` and `->`."""


def parse(text: str) -> tuple[Wire, ...]:
    """Return the wires that the one-line grammar says; every copy of a range is a wire of its own.

    Raises:
        OptionError: shows the column, and what was expected there.

    Example:
        >>> wire, = parse("(A.f): ...->{in1}(fc[-1])->(fc2){out1}->...")
        >>> [(end.kind, end.path, end.side) for end in wire.ends]
        [('in', ('fc', -1), 'pre'), ('out', ('fc2',), 'post')]
    """
    reader = Reader(text)
    wires: list[Wire] = []
    while True:
        wires += _expression(reader)
        if reader.done:
            return tuple(wires)
        reader.expect(",", "',' or the end")


def header(reader: Reader) -> Header:
    """Read an add-in and its method, brackets included."""
    reader.expect(r"\(", f"'(' and an add-in with its method, as in {EXAMPLE}")
    spot = reader.spot()
    name = reader.expect(r"[^\W\d]\w*", "the name of an add-in")
    kwargs = _keywords(reader) if reader.accept(r"\(") else {}
    reader.expect(r"\.(?!\.)", f"'.' and a method of {name}, as in ({name}.adapt_input)")
    method = reader.expect(r"[^\W\d]\w*", f"a method of {name}")
    reader.expect(r"\)", "')'")
    return Header(name, method, kwargs, spot)


def module(reader: Reader) -> Module:
    """Read a module's path, without the bracket before it."""
    spot = reader.spot()
    path: list[str | int | range] = []
    if not reader.meets(r"\["):
        path.append(reader.expect(NAME, "a module's path, such as fc2 or blocks[0].attn.qkv"))
    while not reader.accept(r"\)"):
        if reader.accept(r"\."):
            path.append(reader.expect(NAME, "a name"))
        else:
            reader.expect(r"\[", "'.', '[' or ')'")
            path.append(_index(reader))
            reader.expect(r"\]", "']'")
    return Module(tuple(path), spot)


def keys_of(text: str) -> Keys:
    """Return the path that a text such as `blocks[0].attn` says, without ranges."""
    reader = Reader(f"{text})")
    path = tuple(key for key in module(reader).path if not isinstance(key, range))
    if not reader.done or text.count(":"):
        raise OptionError(f"wire: {text!r} is not the path of one module")
    return path


def copies(modules: list[Module], build: Callable[[Callable[[Path], Keys]], Found]) -> Iterator[Found]:
    """Call `build` for each step of the ranges among these modules, with what makes a path of that step.

    Raises:
        OptionError: two ranges are of unequal length.
    """
    ranges = [(key, found.spot) for found in modules for key in found.path if isinstance(key, range)]
    for key, spot in ranges:
        first = ranges[0][0]
        if len(key) != len(first):
            raise spot.error(
                f"the range [{key.start}:{key.stop}] has {len(key)} steps, and [{first.start}:{first.stop}] has "
                f"{len(first)}; ranges advance together, so they must be of one length"
            )
    for step in range(len(ranges[0][0]) if ranges else 1):
        yield build(functools.partial(_at, step))


def _at(step: int, path: Path) -> Keys:
    return tuple(key[step] if isinstance(key, range) else key for key in path)


def _index(reader: Reader) -> int | range:
    spot = reader.spot()
    start = int(reader.expect(INTEGER, "an integer, or a range such as 0:12"))
    if not reader.accept(":"):
        return start
    steps = range(start, int(reader.expect(INTEGER, "the integer at which the range stops")))
    if not steps:
        raise spot.error(f"the range [{steps.start}:{steps.stop}] is empty; it stops before its second number")
    return steps


def _keywords(reader: Reader) -> dict[str, object]:
    """Read `key=value, ...)`, with Python's literals."""
    spot = reader.spot()
    for end in re.finditer(r"\)", reader.text[reader.at :]):
        source = reader.text[reader.at : reader.at + end.start()]
        try:
            call = ast.parse(f"f({source})", mode="eval").body
            if not isinstance(call, ast.Call) or call.args or ast.unparse(call.func) != "f":
                break
            values = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
        except (SyntaxError, ValueError):
            continue
        reader.at += end.end()
        if len(values) != len(call.keywords):
            break
        return values
    raise spot.error("expected keywords with plain values, as in (Adapter(dim=8).adapt_output)")


def _expression(reader: Reader) -> Iterator[Wire]:
    head = header(reader)
    reader.expect(":", "':' and a sequence of modules and markers")
    elements = list(_elements(reader))
    ends = _ends(elements, head)
    if ends and all(marker.method for marker, *_ in ends):
        raise head.spot.error(f"{head.name}.{head.method} is used at no marker; each has a method of its own")
    modules = [element for element in elements if isinstance(element, Module)]

    def build(at: Callable[[Path], Keys]) -> Wire:
        own = tuple(
            End(marker.kind, marker.number, at(found.path), side, method, marker.spot)
            for marker, found, side, method in ends
        )
        passed = tuple((at(found.path), found.spot) for found in modules)
        return checked(Wire(head.name, _with_outs(own, head.method), head.kwargs, head.spot, passed))

    return copies(modules, build)


def _elements(reader: Reader) -> Iterator[Element]:
    while not reader.done and not reader.meets(","):
        if reader.accept(r"\.\.\.|->|(?:input|output)\b"):
            yield None
        elif reader.accept(r"\("):
            yield module(reader)
        elif reader.accept(r"\{"):
            yield _marker(reader)
        else:
            raise reader.fail("'->', '...', a (module), a {marker}, ',' or the end")


def _marker(reader: Reader) -> Marker:
    spot = reader.spot()
    kind = reader.expect("inout|in|out", "a marker: inout, in or out with a number, such as {inout1}")
    number = int(reader.expect("[0-9]+", f"a number, such as {{{kind}1}}"))
    method = reader.expect(r"[^\W\d]\w*", "a method") if reader.accept(r"\.") else None
    reader.expect(r"\}", "'}'")
    return Marker(kind, number, method, spot)


def _ends(elements: list[Element], head: Header) -> list[tuple[Marker, Module, str, str | None]]:
    """Attach every marker: to the module on its left, or else to that on its right."""
    ends: list[tuple[Marker, Module, str, str | None]] = []
    for i, marker in enumerate(elements):
        if not isinstance(marker, Marker):
            continue
        left = _beside(elements[:i][::-1])
        right = _beside(elements[i + 1 :])
        found, side = (left, "post") if left is not None else (right, "pre")
        if found is None:
            raise marker.spot.error(
                f"{{{marker.kind}{marker.number}}} touches no module: expected a (module) beside it"
            )
        if marker.kind == "in" and marker.method is not None:
            raise marker.spot.error("an {in} marker has no method of its own: what is there is noted as it is")
        ends.append((marker, found, side, None if marker.kind == "in" else marker.method or head.method))
    return ends


def _beside(elements: list[Element]) -> Module | None:
    """Return the module that only other markers stand before."""
    first = next((element for element in elements if not isinstance(element, Marker)), None)
    return first if isinstance(first, Module) else None


def _with_outs(ends: tuple[End, ...], method: str) -> tuple[End, ...]:
    """Read `{in1}...{in2}` without any out as the tutorial does: every second `in` is where it comes out."""
    ins = [end for end in ends if end.kind == "in"]
    if len(ins) < 2 or any(end.kind == "out" for end in ends):
        return ends
    numbers = [end.number for end in ins]
    if sorted(numbers) != numbers:
        wrong = next(end for end, before in zip(ins[1:], ins, strict=False) if end.number < before.number)
        raise wrong.spot.error(
            f"{{in{wrong.number}}} at ({path_text(wrong.path)}): without an {{out}}, markers pair in the order of "
            "their numbers, which must rise from left to right"
        )
    partners = {
        sink.number: source.number
        for source, sink in zip(ins[::2], ins[1::2], strict=False)
        if source.number != sink.number
    }
    return tuple(
        replace(end, kind="out", number=partners[end.number], method=method)
        if end.kind == "in" and end.number in partners
        else end
        for end in ends
    )

"""Wires as records of a configuration file: `{name, location: [path, ...], hook: [[method, side], ...], kwargs}`."""

from collections.abc import Mapping, Sequence
from typing import Any

from peft_func.addins.wire_parser import keys_of
from peft_func.addins.wiring import NOTING, End, Keys, Spot, Wire, checked
from peft_func.errors import OptionError
from peft_func.trees.select import nearest

FIELDS = ("name", "location", "hook", "kwargs")


def from_records(records: Any) -> tuple[Wire, ...]:
    """Return the wires that records say; each record is one add-in, however many locations it has.

    `get_pre` and `get_post` note what is at their location for the hooks behind them, up to the next such.

    Raises:
        OptionError: names the record, and what in it is wrong.

    Example:
        >>> record = {"name": "A", "location": [["fc", 0], ["fc", 1]], "hook": [["get_pre", "pre"], ["f", "post"]]}
        >>> print(*from_records([record]))
        (A.f): ...->{in1}(fc[0])->...->(fc[1]){out1}->...
    """
    if isinstance(records, Mapping):
        records = records["addins"] if set(records) == {"addins"} else [records]
    if not _is_list(records) or not records or not all(isinstance(record, Mapping) for record in records):
        raise OptionError(
            f"wire takes text such as '(A.f): ...->{{inout1}}(fc2)->...', or records (dicts with {', '.join(FIELDS)}); "
            f"it got {records!r:.80}"
        )
    return tuple(_wire(record, number) for number, record in enumerate(records))


def to_records(wires: Sequence[Wire]) -> list[dict[str, Any]]:
    """Return wires as records, which `from_records` reads.

    Raises:
        OptionError: records cannot say the order of two hooks of a wire at one side of one module.
    """
    return [_record(wire) for wire in wires]


def _wire(record: Mapping[str, Any], number: int) -> Wire:
    spot = Spot(f"record {number}")
    for key in record:
        if key not in FIELDS:
            raise spot.error(f"unknown field {key!r}; the nearest of its fields: {nearest(str(key), FIELDS, 1)[0]}")
    for key in FIELDS[:3]:
        if key not in record:
            raise spot.error(f"the field {key!r} is missing")
    name, kwargs = record["name"], record.get("kwargs") or {}
    if not isinstance(name, str) or not name.isidentifier():
        raise spot.error(f"name={name!r} is not the name of an add-in")
    if not isinstance(kwargs, Mapping) or not all(isinstance(key, str) and key.isidentifier() for key in kwargs):
        raise spot.error(f"kwargs={kwargs!r} is no dict of keywords")
    locations, hooks = record["location"], record["hook"]
    if not _is_list(locations) or not locations or not _is_list(hooks) or not hooks:
        raise spot.error("location is a list of paths, such as [['blocks', 0]], and hook one of [method, side] pairs")
    if len(hooks) == 1:
        hooks = list(hooks) * len(locations)
    if len(hooks) != len(locations):
        raise spot.error(
            f"{len(locations)} locations and {len(hooks)} hooks; give each location a hook, or all of them one"
        )
    ends: list[End] = []
    for i, (location, hook) in enumerate(zip(locations, hooks, strict=True)):
        ends.append(_end(location, hook, Spot(f"record {number}, hook {i}"), ends))
    return checked(Wire(name, tuple(ends), dict(kwargs), spot))


def _end(location: Any, hook: Any, spot: Spot, before: list[End]) -> End:
    path = _path(location, spot)
    if not _is_list(hook) or len(hook) != 2 or not all(isinstance(word, str) for word in hook):
        raise spot.error(f"{hook!r} is no pair of a method and a side, such as ['adapt_output', 'post']")
    method, side = hook
    if side not in NOTING:
        raise spot.error(f"the side {side!r} is neither 'pre' nor 'post'")
    if not method.isidentifier():
        raise spot.error(f"{method!r} is not the name of a method")
    number = max((end.number for end in before), default=0)
    if method in NOTING.values():
        if method != NOTING[side]:
            raise spot.error(f"{method} with the side {side!r}: at {side!r} it is {NOTING[side]}")
        if before and before[-1].kind == "in":
            raise spot.error(f"{before[-1].hook} before it is used by nothing; put each with what uses it behind it")
        return End("in", number + 1, path, side, None, spot)
    noted = [end.number for end in before if end.kind == "in"]
    if noted:
        return End("out", noted[-1], path, side, method, spot)
    return End("inout", number + 1, path, side, method, spot)


def _path(location: Any, spot: Spot) -> Keys:
    keys = [location] if isinstance(location, str) else location
    if not _is_list(keys) or not keys:
        raise spot.error(f"the location {location!r} is no path, such as ['blocks', 0, 'attn'] or 'blocks[0].attn'")
    path: list[str | int] = []
    for key in keys:
        if isinstance(key, bool) or not isinstance(key, str | int):
            raise spot.error(f"{key!r} in the location {location!r} is neither a name nor an index")
        try:
            path += [key] if isinstance(key, int) else keys_of(key)
        except OptionError:
            raise spot.error(f"{key!r} in the location {location!r} is no name of a module") from None
    return tuple(path)


def _record(wire: Wire) -> dict[str, Any]:
    # In a record all hooks behind a note may use it: those that use none come first.
    ends = [end for end in wire.ends if end.kind == "inout"]
    for source in wire.ends:
        if source.kind == "in":
            ends += [source, *(end for end in wire.ends if end.kind == "out" and end.number == source.number)]
    for place in {(end.path, end.side) for end in ends}:
        there = [end for end in ends if (end.path, end.side) == place]
        if there != [end for end in wire.ends if (end.path, end.side) == place]:
            raise there[0].spot.error(
                f"a record cannot say the order of the hooks here, of which there are {len(there)}"
            )
    record: dict[str, Any] = {
        "name": wire.name,
        "location": [list(end.path) for end in ends],
        "hook": [[end.hook, end.side] for end in ends],
    }
    return record | ({"kwargs": dict(wire.kwargs)} if wire.kwargs else {})


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple)

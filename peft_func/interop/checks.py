"""Selectors as plain data: a regex, a list of names, or a mapping of checks that must all hold."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from peft_func.addins import parts
from peft_func.addins.houlsby import Projections
from peft_func.addins.parallel import Ends
from peft_func.addins.parts import Parts
from peft_func.errors import OptionError, SelectorError
from peft_func.trees import modules, select
from peft_func.trees.modules import ClassNamed, Independent, Named, Position
from peft_func.trees.select import AllOf, AnyOf, Exact, Glob, Index, NDim, Not, Path, Selector, Suffix, Where


def at(key: str) -> str:
    """Return the beginning of a message about what stands at a key."""
    return f"{key}: " if key else ""


def one_of(name: object, known: Iterable[str], key: str) -> None:
    """Refuse a name that is not among the known ones.

    Raises:
        OptionError: says where it stands, and the nearest known name.
    """
    known = list(known)
    if name not in known:
        close = difflib.get_close_matches(str(name), known, 1, cutoff=0.5)
        raise OptionError(
            f"{at(key)}there is no {name!r}; "
            + (f"the nearest is {close[0]!r}" if close else f"there are {', '.join(known)}")
        )


def check_from(found: Any, key: str) -> Where:
    """Return the selector that a description stands for.

    Raises:
        OptionError: it is none; the message says at which key, and the nearest known name.
    """
    try:
        if isinstance(found, str):
            return select.path(found)
        if isinstance(found, list | tuple):
            items = [item if isinstance(item, str) else check_from(item, f"{key}[{i}]") for i, item in enumerate(found)]
            return select.as_selector(items)  # type: ignore[arg-type]  # what is no selector is refused there
        if not isinstance(found, Mapping) or not found:
            raise OptionError(
                f"{at(key)}a place is a regex, a list of names, or a mapping of checks, not {found!r:.60}"
            )
        for name in found:
            one_of(name, _READ, key)
        checks = [_READ[name](value, f"{key}.{name}".lstrip(".")) for name, value in found.items()]
        return checks[0] if len(checks) == 1 else AllOf(tuple(checks))
    except SelectorError as error:
        raise OptionError(f"{at(key)}{error}") from error


def describe_check(where: Where) -> Any:
    """Return a selector as plain data.

    Raises:
        OptionError: it is a function, or asks for a class that only Python knows.
    """
    if isinstance(where, str):
        return where
    if isinstance(where, list | tuple):
        return [item if isinstance(item, str) else describe_check(item) for item in where]
    if type(where) not in _WRITE:
        raise OptionError(
            f"{where!r:.80} has no place in a description; of classes it holds names: pf.class_named('Linear')"
        )
    return _WRITE[type(where)](where)


def _regex(regex: re.Pattern[str]) -> str:
    if regex.flags != re.compile("").flags:
        raise OptionError(f"the flags of {regex!r:.80} have no place in a description; write them in it: (?i)...")
    return regex.pattern


def _describe_any(where: AnyOf) -> dict[str, Any]:
    names = [part.name for part in where.parts if isinstance(part, Suffix)]
    if len(names) == len(where.parts):
        return {"suffix": names}
    return {"any": [describe_check(part) for part in where.parts]}


def _describe_all(where: AllOf) -> dict[str, Any]:
    """Return one mapping of all checks, unless two have one key."""
    found = [describe_check(part) for part in where.parts]
    flat = [item if isinstance(item, dict) else {"path": item} for item in found]
    joined = {key: value for item in flat for key, value in item.items()}
    return joined if len(joined) == sum(map(len, flat)) and len(flat) > 1 else {"all": found}


def _describe_named(where: Named | ClassNamed) -> dict[str, Any]:
    texts: Any = where.texts[0] if len(where.texts) == 1 else list(where.texts)
    options = {"within": True} if where.within else {}
    if isinstance(where, ClassNamed) and not where.subclasses:
        options["subclasses"] = False
    name = "name" if isinstance(where, Named) else "class"
    return {name: {"names": texts, **options} if options else texts}


def _names(build: Callable[..., Selector], options: tuple[str, ...]) -> Callable[[Any, str], Selector]:
    def read(value: Any, key: str) -> Selector:
        given = dict(value) if isinstance(value, Mapping) else {"names": value}
        for name, flag in given.items():
            one_of(name, ("names", *options), key)
            if name != "names" and not isinstance(flag, bool):
                raise OptionError(f"{at(key)}{name} is true or false, not {flag!r}")
        texts = given.pop("names", ())
        return _selector(build, texts if isinstance(texts, list | tuple) else [texts], key, **given)

    return read


def _one(build: Callable[..., Selector]) -> Callable[[Any, str], Selector]:
    return lambda value, key: _selector(build, [value], key)


def _several(build: Callable[..., Selector]) -> Callable[[Any, str], Selector]:
    return lambda value, key: _selector(build, value if isinstance(value, list | tuple) else [value], key)


def _selector(build: Callable[..., Selector], args: Iterable[Any], key: str, **options: Any) -> Selector:
    try:
        return build(*args, **options)
    except SelectorError as error:
        raise OptionError(f"{at(key)}{error}") from error


def _suffix(value: Any, key: str) -> Selector:
    if isinstance(value, list | tuple):
        return AnyOf(tuple(_selector(select.suffix, [item], key) for item in value))
    return _selector(select.suffix, [value], key)


def _check(found: Any, key: str) -> Selector:
    return select.as_selector(check_from(found, key))


def _list(join: Callable[[tuple[Selector, ...]], Selector]) -> Callable[[Any, str], Selector]:
    def read(value: Any, key: str) -> Selector:
        if not isinstance(value, list | tuple):
            raise OptionError(f"{at(key)}this is a list of places, not {value!r:.60}")
        return join(tuple(_check(item, f"{key}[{i}]") for i, item in enumerate(value)))

    return read


def _yes(build: Callable[[], Selector]) -> Callable[[Any, str], Selector]:
    def read(value: Any, key: str) -> Selector:
        if value is not True:
            raise OptionError(f"{at(key)}this is true, or is not there, or inside of a not; it is {value!r}")
        return build()

    return read


def _layers(build: Callable[..., Selector]) -> Callable[[Any, str], Selector]:
    """Read true for all layers, or their numbers."""
    some = _several(build)
    return lambda value, key: build() if value is True else some(value, key)


_READ: dict[str, Callable[[Any, str], Selector]] = {
    "name": _names(modules.named, ("within",)),
    "class": _names(modules.class_named, ("within", "subclasses")),
    "path": _one(select.path),
    "glob": _one(select.glob),
    "suffix": _suffix,
    "exact": _one(select.exact),
    "ndim": _one(select.ndim),
    "index": _several(select.index),
    "position": _several(modules.position),
    "independent": _yes(modules.independent),
    "blocks": _layers(parts.blocks),
    "attentions": _layers(parts.attentions),
    "mlps": _layers(parts.mlps),
    "head": _yes(parts.head),
    "projections": _yes(Projections),
    "feed_forward_ends": _yes(Ends),
    "all": _list(AllOf),
    "any": _list(AnyOf),
    "not": lambda value, key: Not(_check(value, key)),
}
"""The checks by name, and what reads each."""

_WRITE: dict[type, Callable[[Any], Any]] = {
    re.Pattern: _regex,
    Path: lambda where: _regex(where.pattern),
    Named: _describe_named,
    ClassNamed: _describe_named,
    Glob: lambda where: {"glob": where.pattern},
    Suffix: lambda where: {"suffix": where.name},
    Exact: lambda where: {"exact": sorted(where.paths)},
    NDim: lambda where: {"ndim": where.ndim},
    Index: lambda where: {"index": sorted(where.numbers)},
    Position: lambda where: {"position": sorted(where.numbers)},
    Independent: lambda where: {"independent": True},
    Parts: lambda where: {where.kind: True if where.layers is None else list(where.layers)},
    Projections: lambda where: {"projections": True},
    Ends: lambda where: {"feed_forward_ends": True},
    AllOf: _describe_all,
    AnyOf: _describe_any,
    Not: lambda where: {"not": describe_check(where.part)},
}
"""The selectors that plain data can say, and what writes each."""

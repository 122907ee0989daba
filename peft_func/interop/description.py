"""Methods as plain data, for configuration files: `method_from(description)` and back, `describe(method)`.

A method is a mapping of one known name to its options; a place is a regex, a list of names, or a mapping of checks, of
which all must hold:

    first_match:
      - {name: head, method: train}
      - {class: Linear, method: {lora: {rank: 3}}}
      - {path: stem, method: null}                                       # frozen, with all that is in it
      - {parameter: {path: .*bias}, method: {train: {name: bias}}}
    root: ResNet

    chain:
      - {lora: {where: [q_proj, v_proj], rank: 8}}
      - {train: {where: {class: "*Norm*", not: {index: [0, 1]}}}}

In a pair of `first_match` a method needs no `where`. Only the methods of this library can be named: nothing is
imported, and nothing in a file is run.
"""

import inspect
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from peft_func.addins.compose import Mixed, average, fusion, gated
from peft_func.errors import FileFormatError, MissingExtraError, OptionError, PeftFuncError
from peft_func.interop.atomic import renamed_into
from peft_func.interop.checks import at, check_from, describe_check, one_of
from peft_func.interop.files import KINDS
from peft_func.transforms.first_match import Cap, FirstMatch, first_match, parameter
from peft_func.transforms.transform import Chain, Deferred, Method, Part, chain
from peft_func.trees.select import Info, Selector, as_selector

_MIXTURES: dict[str, Callable[..., Method]] = {"average": average, "fusion": fusion, "gated": gated}
_GROUPS = {"chain": ("chain", "name"), "first_match": ("first_match", "root", "name")}
_LARGEST = 100_000


def method_from(description: Mapping[str, Any] | str | os.PathLike[str]) -> Method:
    """Return the method that a description stands for.

    Args:
        description: a mapping, or the path of a `.json`, `.yaml` or `.yml` file that holds one (YAML needs the extra
            `yaml`). Regexes in it are compiled: take files from people you trust with your time.

    Raises:
        OptionError: a name or a value in it is unknown; the message says at which key, and the nearest known name.
        FileFormatError: the file cannot be read.
        MissingExtraError: the file is YAML, and PyYAML is not installed.

    Example:
        >>> import torch, peft_func as pf
        >>> method = pf.method_from({"chain": [{"lora": {"where": ["0"], "rank": 2}}, {"train": {"where": "2"}}]})
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> list(pf.bind(method, pf.functionalize(net)).init(0)[1])
        ['lora', 'train']
        >>> pf.method_from({"lora": {"where": "0", "rnak": 2}})
        Traceback (most recent call last):
        peft_func.errors.OptionError: lora: there is no 'rnak'; the nearest is 'rank'
    """
    found = _read(description) if isinstance(description, str | os.PathLike) else description
    _check_size(found)
    return _method(found, "", None)


def describe(method: Method) -> dict[str, Any]:
    """Return a description of a method: plain dicts, lists, strings and numbers, without options at their defaults.

    `method_from(describe(method))` is the same method; classes in `root` become their names.

    Raises:
        OptionError: it holds what plain data cannot say: a method of your own, a function, or `pf.of_type`.

    Example:
        >>> import peft_func as pf
        >>> pf.describe(pf.first_match((pf.class_named("Linear"), pf.lora, {"rank": 3}), (["norm"], None)))
        {'first_match': [{'class': 'Linear', 'method': {'lora': {'rank': 3}}}, {'suffix': ['norm'], 'method': None}]}
    """
    if not isinstance(method, Part | Chain):
        raise OptionError(f"describe takes a method, such as pf.lora(...), not a {type(method).__name__}")
    return _describe(method)


def write_method(path: str | os.PathLike[str], method: Method) -> None:
    """Write the description of a method to a `.json`, `.yaml` or `.yml` file, which `method_from` reads.

    Raises:
        OptionError: as for `describe`.
        FileFormatError: the file is of another kind, or cannot be written; what was there before is still there.
        MissingExtraError: the file is YAML, and PyYAML is not installed.
    """
    text = _format(path)[1](describe(method))
    try:
        with renamed_into(FilePath(path)) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FileFormatError(f"{path} cannot be written: {error}") from error


@dataclass(frozen=True)
class Described:
    """A function `where -> method` that a description stands for."""

    description: Any
    key: str

    def __call__(self, where: Selector) -> Method:
        return _method(self.description, self.key, where)


@dataclass(frozen=True)
class _Here(Selector):
    """Stands for the places that a pair of `first_match` gives to its method."""

    def __call__(self, path: str, info: Info) -> bool:
        return True


def _method(found: Any, key: str, where: Selector | None) -> Method:
    """Build a method; `where` is for those that do not say theirs."""
    found = {found: {}} if isinstance(found, str) else found
    if not isinstance(found, Mapping):
        raise OptionError(f"{at(key)}a method is a mapping such as {{'lora': {{...}}}}, not {found!r:.60}")
    kind = next((name for name in _GROUPS if name in found), None)
    if kind is not None:
        for name in found:
            one_of(name, _GROUPS[kind], key)
        return _group(kind, found, key, where)
    if len(found) != 1:
        raise OptionError(f"{at(key)}a method is a mapping of one name to its options, not of {list(found)!r:.80}")
    (kind,) = found
    one_of(kind, (*KINDS, *_GROUPS), key)
    inner = f"{key}.{kind}".lstrip(".")
    options = dict(_mapping(found[kind] or {}, inner))
    if kind in _MIXTURES:
        return _mixture(kind, options, inner, where)
    for name in options:
        one_of(name, known_options(kind) or options, inner)
    if "where" in options:
        place = check_from(options.pop("where"), f"{inner}.where")
    elif where is not None:
        place = where
    elif inspect.signature(KINDS[kind]).parameters["where"].default is None:
        place = None  # the method knows its places
    else:
        raise OptionError(f"{at(inner)}where is missing: a regex, a list of names, or a mapping of checks")
    if isinstance(options.get("share"), Mapping):
        shares = options["share"].items()
        options["share"] = {group: check_from(each, f"{inner}.share.{group}") for group, each in shares}
    return _built(KINDS[kind], inner, place, **options)


def known_options(kind: str) -> list[str]:
    """Return the options that a method has; none if it checks them itself."""
    if kind == "dora":
        return known_options("lora")  # to which it hands them
    known = inspect.signature(KINDS[kind]).parameters.values()
    return [] if any(each.kind is each.VAR_KEYWORD for each in known) else [each.name for each in known]


def _group(kind: str, found: Mapping[str, Any], key: str, where: Selector | None) -> Method:
    inner = f"{key}.{kind}".lstrip(".")
    items = found[kind]
    if not isinstance(items, Sequence) or isinstance(items, str):
        raise OptionError(f"{at(inner)}this is a list, not {items!r:.60}")
    rest = {name: value for name, value in found.items() if name != kind}
    if kind == "chain":
        return _built(chain, inner, *(_method(item, f"{inner}[{i}]", where) for i, item in enumerate(items)), **rest)
    return _built(first_match, inner, *(_pair(item, f"{inner}[{i}]") for i, item in enumerate(items)), **rest)


def _mixture(kind: str, options: dict[str, Any], key: str, where: Selector | None) -> Method:
    items = options.pop("methods", None)
    if not isinstance(items, Sequence) or isinstance(items, str):
        raise OptionError(f"{at(key)}methods is a list of add-ins, not {items!r:.60}")
    methods = [_method(item, f"{key}.methods[{i}]", where) for i, item in enumerate(items)]
    return _built(_MIXTURES[kind], key, methods, **options)


def _pair(item: Any, key: str) -> tuple[Any, Any]:
    checks = dict(_mapping(item, key))
    if "method" not in checks:
        raise OptionError(f"{at(key)}method is missing; to leave what the check takes frozen, say so: method: null")
    found, inner = checks.pop("method"), f"{key}.method"
    action = None
    if found is not None:
        action = Described(found, inner)
        action(_Here())  # what is wrong with it is said now, not when it is bound
    if "parameter" in checks:
        check: Any = parameter(check_from(checks.pop("parameter"), f"{key}.parameter"))
        if checks:
            raise OptionError(f"{at(key)}{list(checks)!r} beside parameter; put these checks inside of it")
        return check, action
    return check_from(checks, key), action


def _built(function: Callable[..., Method], key: str, *args: Any, **options: Any) -> Method:
    try:
        return function(*args, **options)
    except (PeftFuncError, TypeError, ValueError, AttributeError, KeyError) as error:
        raise OptionError(f"{at(key)}{error}") from error


def _describe(method: Method) -> dict[str, Any]:
    named = {} if method.name is None else {"name": method.name}
    if isinstance(method, FirstMatch):
        root = [kind if isinstance(kind, str) else kind.__name__ for kind in method.root]
        roots = {"root": root[0] if len(root) == 1 else root} if root else {}
        return {"first_match": [_describe_cap(cap) for cap in method.caps], **roots, **named}
    if isinstance(method, Mixed):
        return {
            method.kind: _plain({"methods": [*map(_describe, method.methods)], "name": method.part, **method.options})
        }
    if isinstance(method, Chain) and not isinstance(method, Deferred):
        return {"chain": [_describe(part) for part in method.parts], **named}
    if not isinstance(method, Part) or method.kind not in KINDS:
        what = f"{method.name!r} is a method of your own" if isinstance(method, Part) else f"a {type(method).__name__}"
        raise OptionError(f"{what}, which no description can hold")
    usual = KINDS[method.kind](_Here())
    usually = {"name": usual.name, **(usual.options or {})}
    options = {"name": method.name, **(method.options or {}), **_patterns(method)}
    if isinstance(options.get("share"), Mapping):
        options["share"] = {group: describe_check(where) for group, where in options["share"].items()}
    given = {key: value for key, value in options.items() if key not in usually or usually[key] != value}
    where = {} if isinstance(method.where, _Here) else {"where": describe_check(method.where)}
    return {method.kind: _plain(where | given)}


def _patterns(part: Part) -> dict[str, Any]:
    """Return the patterns of a part, which its options hold only when it is bound."""
    if not inspect.isfunction(part.make):
        return {}
    inside = inspect.getclosurevars(part.make).nonlocals
    found = {name: dict(inside[name]) for name in ("rank_pattern", "alpha_pattern") if inside.get(name)}
    return {
        name: value for each in inside.values() if isinstance(each, Part) for name, value in _patterns(each).items()
    } | found


def _describe_cap(cap: Cap) -> dict[str, Any]:
    check = describe_check(cap.check)
    if cap.of_parameter:
        checks = {"parameter": check}
    elif isinstance(check, list):
        checks = describe_check(as_selector(cap.check))
    else:
        checks = {"path": check} if isinstance(check, str) else check
    action = cap.action
    method = action if action is None or isinstance(action, Part | Chain) else action(_Here())
    return {**checks, "method": None if method is None else _describe(method)}


def _plain(value: Any) -> Any:
    """Return data as plain dicts and lists, which JSON and YAML hold alike."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise OptionError(f"a {type(value).__name__}, {value!r:.60}, cannot stand in a description")


def _mapping(value: Any, key: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise OptionError(f"{at(key)}this is a mapping by name, not {value!r:.60}")
    return value


def _check_size(found: object) -> None:
    """Refuse what is far too large, such as a small YAML file whose aliases multiply or bite their own tail."""
    ahead, count = [found], 0
    while ahead:
        item = ahead.pop()
        count += 1
        if count > _LARGEST:
            raise OptionError(f"the description has more than {_LARGEST:,} entries; are there aliases in the file?")
        ahead += item.values() if isinstance(item, Mapping) else item if isinstance(item, list | tuple) else ()


def _read(path: str | os.PathLike[str]) -> Any:
    parse, _ = _format(path)
    try:
        return parse(FilePath(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} cannot be read: {error}") from error


def _format(path: str | os.PathLike[str]) -> tuple[Callable[[str], Any], Callable[[Any], str]]:
    """Return what reads and what writes the text of a file."""
    suffix = FilePath(path).suffix
    if suffix == ".json":
        return json.loads, lambda value: json.dumps(value, indent=2) + "\n"
    if suffix not in (".yaml", ".yml"):
        raise FileFormatError(f"{str(path)!r:.80} is no .json, .yaml or .yml file; a description may also be a dict")
    try:
        import yaml
    except ImportError as error:
        raise MissingExtraError(
            f"{path} is YAML, and PyYAML is not installed ({error}): pip install 'peft_func[yaml]'"
        ) from error

    def parse(text: str) -> Any:
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(re.sub(r"\s+", " ", str(error))) from error

    return parse, lambda value: str(yaml.safe_dump(value, sort_keys=False))

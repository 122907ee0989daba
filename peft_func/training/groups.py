r"""Groups of parameters with options of their own, by path: for any `torch.optim`, and for `pf.optimizer`.

    pf.groups(tree, [(r"train\..*", {"lr": 1e-4})], lr=1e-3)

is a list for `torch.optim.AdamW(...)`. Presets scale or change what the selectors gave, so they combine:
`[(r"train\..*", {"lr": 1e-4}), pf.no_decay(adapter), pf.lora_plus(16, adapter)]`.

What does not train at all needs no group: it is left out of the tree. LoRA-FA (Zhang et al., arXiv 2308.03303) is
`frozen_A, trained = pf.partition(trainable, r".*\.A")`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from peft_func.errors import OptionError, SelectorError, TreeError
from peft_func.training.lightning_selection import infos_of
from peft_func.trees.paths import join, leaves
from peft_func.trees.select import Info, Where, resolve

Options: TypeAlias = Mapping[str, Any]
"""Options of a group; one that is a function takes the value so far and gives the new one."""

Rule: TypeAlias = tuple[Where, Options]

Preset: TypeAlias = Callable[[Sequence[Info]], Sequence[Rule]]
"""Rules that are made when the leaves are known."""

Groups: TypeAlias = Mapping[Any, Options] | Sequence[Rule | Preset] | Preset
"""`{selector: options}`, or a list of `(selector, options)` and of presets, or one preset."""

Named: TypeAlias = nn.Module | Mapping[str, Any] | Iterable[tuple[str, Tensor]]


def groups(named: Named, groups: Groups, **defaults: Any) -> list[dict[str, Any]]:
    r"""Return parameter groups for any `torch.optim` optimizer, each leaf in exactly one.

    Args:
        named: a module (its parameters that require a gradient), a tree, or pairs `(name, tensor)`.
        groups: `(selector, options)` pairs or `{selector: options}`: the first that matches a leaf gives its options
            over the defaults; and presets such as `pf.no_decay()`, each of which then changes what there is. An option
            that is a function takes the value so far: `{"lr": lambda lr: lr / 10}`.
        **defaults: the options of every leaf where nothing else is said.

    Returns:
        A list of dicts with `params` (the very tensors), `param_names` (their paths) and the options. What no selector
        matches is in the last; no group is empty.

    Raises:
        SelectorError: a selector matches nothing, or only leaves that earlier ones took.
        OptionError: malformed groups, or a function of an option that has no value.
        TreeError: there is nothing to group, or two tensors have one name.

    Example:
        >>> import torch, peft_func as pf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> parts = pf.groups(net, [("1", {"lr": 1e-2})], lr=1e-3)
        >>> [(part["param_names"], part["lr"]) for part in parts]
        [(['1.weight', '1.bias'], 0.01), (['0.weight', '0.bias'], 0.001)]
        >>> optimizer = torch.optim.AdamW(parts)
    """
    tensors, infos = _described(named)
    return [
        {"params": [tensors[path] for path in paths], "param_names": list(paths), **options}
        for options, paths in assign(infos, groups, defaults)
    ]


def assign(infos: Sequence[Info], groups: Groups, defaults: Options) -> list[tuple[dict[str, Any], list[str]]]:
    """Return `(options, paths)` of every group; leaves to which the same rules apply make one."""
    rules, presets = _entries(groups)
    options: dict[str, dict[str, Any]] = {info.path: dict(defaults) for info in infos}
    marks: dict[str, tuple[int, ...]] = {info.path: () for info in infos}
    for some in (rules, *(preset(infos) for preset in presets)):
        first = _first_matches(some, infos)
        for path, number in first.items():
            marks[path] += (number,)
            if number < len(some):
                options[path] = _changed(options[path], some[number][1])
    paths: dict[tuple[int, ...], list[str]] = {}
    for path, mark in marks.items():
        paths.setdefault(mark, []).append(path)
    return [(options[paths[mark][0]], paths[mark]) for mark in sorted(paths)]


def described(tree: Mapping[str, Any]) -> list[Info]:
    """Return what selectors see of the leaves of a tree."""
    return [Info(join(keys), tuple(tensor.shape), tensor.dtype) for keys, tensor in leaves(tree)]


def _described(named: Any) -> tuple[dict[str, Tensor], list[Info]]:
    if isinstance(named, nn.Module):
        tensors: dict[str, Tensor] = {
            name: parameter for name, parameter in named.named_parameters() if parameter.requires_grad
        }
        known = infos_of(named)
        infos = [known[name] for name in tensors if name in known]
    else:
        if isinstance(named, Mapping):
            pairs: list[Any] = [(join(keys), tensor) for keys, tensor in leaves(named)]
        else:
            pairs = list(named) if isinstance(named, Iterable) else [named]
        tensors = {}
        for pair in pairs:
            if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Tensor)):
                raise TreeError(
                    f"groups takes a module, a tree or pairs (name, tensor), such as net.named_parameters(); there is "
                    f"a {type(pair).__name__}"
                )
            if pair[0] in tensors:
                raise TreeError(f"two tensors have the name {pair[0]!r}")
            tensors[pair[0]] = pair[1]
        infos = [Info(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    if not infos:
        raise TreeError("groups found nothing that trains: no leaf, and no parameter that requires a gradient")
    return tensors, infos


def _entries(groups: Any) -> tuple[list[Rule], list[Preset]]:
    """Return the pairs and the presets among groups, checked."""
    entries = list(groups.items()) if isinstance(groups, Mapping) else [groups] if callable(groups) else groups
    if isinstance(entries, str) or not isinstance(entries, Sequence):
        entries = [entries]
    rules, presets = [], []
    for entry in entries:
        if isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], Mapping):
            reserved = {"params", "param_names"} & entry[1].keys()
            if reserved:
                raise OptionError(f"groups: {reserved.pop()!r} is no option; the selector says what is in a group")
            rules.append(entry)
        elif callable(entry):
            presets.append(entry)
        else:
            raise OptionError(
                f"groups: {entry!r} is neither a pair (selector, options) nor a preset; write "
                "[(r'train\\..*', {'lr': 1e-4}), pf.no_decay()]"
            )
    return rules, presets


def _first_matches(rules: Sequence[Rule], infos: Sequence[Info]) -> dict[str, int]:
    """Return the number of the first rule that matches each path, or the number of rules."""
    found: dict[str, int] = {}
    for number, (where, _) in enumerate(rules):
        chosen = resolve(where, infos, "groups", "leaves")
        new = [path for path in chosen if path not in found]
        if not new:
            raise SelectorError(
                f"groups: all that {where!r} matches, such as {chosen[0]!r}, is taken by earlier selectors; the first "
                "that matches wins, so put the narrower one first"
            )
        found.update(dict.fromkeys(new, number))
    return {info.path: found.get(info.path, len(rules)) for info in infos}


def _changed(options: dict[str, Any], changes: Options) -> dict[str, Any]:
    new = dict(options)
    for name, value in changes.items():
        if callable(value):
            if name not in options:
                raise OptionError(f"groups: a group scales {name!r}, which has no value yet; give {name}=... as well")
            value = value(options[name])
        new[name] = value
    return new

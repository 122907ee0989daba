"""What each tensor of a PEFT folder becomes: checked on names and shapes alone, before a value is read."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from peft_func.errors import FileFormatError, OptionError, SelectorError
from peft_func.functional.model import FunctionalModel
from peft_func.interop.peft_config import Described
from peft_func.interop.peft_method import plain_lora
from peft_func.interop.peft_names import PREFIX, Slot, factor_names, obstacle, read_name
from peft_func.transforms.bind import Adapter, bind
from peft_func.transforms.lora import lora
from peft_func.transforms.options import ByPath, biases
from peft_func.transforms.train import train
from peft_func.transforms.transform import chain
from peft_func.trees.paths import Keys
from peft_func.trees.select import exact

Header = Mapping[str, tuple[int, ...]]
"""The shape of every tensor of a file."""


class Leaf(NamedTuple):
    """One leaf of our tree, in a file.

    Attributes:
        name: of the tensor.
        keys: of the leaf.
        transposed: whether the file holds the leaf's transpose.
        device: where it goes.
    """

    name: str
    keys: Keys
    transposed: bool
    device: torch.device


@dataclass(frozen=True)
class Plan:
    """How to read every file of one method and one set of names and shapes.

    Attributes:
        described: the method, from the config.
        header: names and shapes.
        adapter: the method, bound.
        leaves: in the order of the adapter's tree.
        unchanged: names of tensors that must be the base weights of this model.
    """

    described: Described
    header: Header
    adapter: Adapter
    leaves: tuple[Leaf, ...]
    unchanged: dict[str, str]


def plan_for(
    file: object,
    header: Header,
    described: Described,
    model: FunctionalModel,
    adapter: Adapter | None = None,
    *,
    allow_tied: bool = False,
) -> Plan:
    """Plan how to read a file.

    Args:
        file: the file, for messages.
        header: its names and shapes.
        described: its method.
        model: whom it is for.
        adapter: a bound adapter to read it for; None binds one.
        allow_tied: accept adapters of weights with several names.

    Raises:
        FileFormatError: a name or a shape is wrong, missing or unknown, or the adapter is of another method.
    """
    slots = {name: read_name(file, name, model) for name in header}
    names: dict[tuple[str, str], str] = {}
    for name, slot in slots.items():
        _check_slot(file, name, slot, model, allow_tied=allow_tied)
        twin = names.setdefault((slot.path, slot.leaf), name)
        if twin != name:
            raise FileFormatError(
                f"{file} has both {twin!r} and {name!r}, which are of one weight of this model, {slot.path!r}; PEFT "
                "keeps an adapter for each name of a tied weight, while here a weight has one value wherever it is used"
            )
    modules = {slot.path: slot.module for slot in slots.values() if slot.leaf in ("A", "B")}
    _check_pairs(file, header, names, modules, described)
    own = [path for path, leaf in names if leaf == "own"]
    _check_own(file, own, tuple(modules), described, model)
    if adapter is None:
        adapter = _bound(file, header, names, modules, own, described, model)
    leaves = _leaves(file, header, names, slots, adapter)
    _check_method(file, modules, described, adapter)
    unchanged = {name: slot.path for name, slot in slots.items() if slot.leaf == "base"}
    for name, path in unchanged.items():
        _check_shape(file, name, header[name], tuple(model.params[path].shape))
    return Plan(described, header, adapter, leaves, unchanged)


def under(ends: Iterable[str], model: FunctionalModel) -> dict[str, str]:
    """Return the parameters in modules whose paths end so (PEFT's rule for `modules_to_save`), by each of their names.

    The values are canonical names.
    """
    ends = tuple(ends)
    found = {}
    for name in (*model.params, *model.ties) if ends else ():
        parts = name.split(".")
        if any((PREFIX + ".".join(parts[:depth])).endswith(ends) for depth in range(1, len(parts))):
            found[name] = model.ties.get(name, name)
    return found


def all_biases(model: FunctionalModel) -> list[str]:
    """Return what `bias="all"` trains."""
    return [path for path in model.params if path == "bias" or path.endswith(".bias")]


def _check_slot(file: object, name: str, slot: Slot, model: FunctionalModel, *, allow_tied: bool) -> None:
    aliases = model.infos[slot.path].aliases
    if aliases and slot.leaf != "base" and not allow_tied:
        raise FileFormatError(
            f"{file} has {name!r}, a weight with several names in this model ({slot.path}, {', '.join(aliases)}): "
            "PEFT changes what one of them does, here a weight has one value wherever it is used. allow_tied=True "
            "loads it so, which is what PEFT's merge gives"
        )
    if slot.leaf not in ("A", "B"):
        return
    wanted, transposed = factor_names(slot.module, model)[slot.leaf]
    reason = obstacle(slot.module, slot.path, model) if slot.leaf == "A" else None
    if reason is not None:
        raise FileFormatError(f"{file} has {name!r}, which cannot be a change of the weight {slot.path!r}: {reason}")
    if transposed != slot.transposed:
        raise FileFormatError(f"{file} has {name!r}; for this module of the model it would be {wanted!r}")


def _check_pairs(
    file: object, header: Header, names: Mapping[tuple[str, str], str], modules: Mapping[str, str], described: Described
) -> None:
    if not modules:
        raise FileFormatError(f"{file} holds no tensor lora_A: there is no adapter in it")
    for path, module in modules.items():
        for leaf, other in (("A", "B"), ("B", "A")):
            if (path, leaf) not in names:
                raise FileFormatError(f"{file} has {names[path, other]!r}, but lacks the other factor of {module!r}")
        rank = _rank(file, header, names, path)
        if rank != described.rank_of(module):
            raise FileFormatError(
                f"{file}: the tensors of {module!r} have rank {rank}, while {described.place} says "
                f"{described.rank_of(module)} (r and rank_pattern); one of the two files is of another adapter"
            )


def _rank(file: object, header: Header, names: Mapping[tuple[str, str], str], path: str) -> int:
    name = names[path, "A"]
    shape = header[name]
    if len(shape) < 2 or 0 in shape:
        raise FileFormatError(f"{file}: {name!r} is {shape}; a factor has two dimensions or more, and is not empty")
    return shape[1] if name.endswith(".lora_embedding_B") else shape[0]


def _check_own(
    file: object, own: Iterable[str], places: tuple[str, ...], described: Described, model: FunctionalModel
) -> None:
    """Check that the parameters that train themselves are those that the config says."""
    own = set(own)
    wanted = set(under(described.modules_to_save, model).values())
    for end in described.heads:  # a config may have lost them, and PEFT adds them when it loads
        head = set(under([end], model).values())
        wanted |= head if own & head else set()
    if described.bias != "none":
        wanted |= set(biases(places, model) if described.bias == "lora_only" else all_biases(model))
    for path in sorted(own.intersection(places)):
        raise FileFormatError(
            f"{file} holds both an adapter of {path!r} and the whole of it; PEFT saves one of the two"
        )
    for path in sorted(own ^ wanted):
        if path in wanted:
            raise FileFormatError(f"{file} lacks {path!r}, which trains by bias or modules_to_save of its config")
        raise FileFormatError(
            f"{file} holds the whole of {path!r}, which neither bias={described.bias!r} nor modules_to_save="
            f"{list(described.modules_to_save)} of its config accounts for (PEFT's save_embedding_layers adds such "
            "tensors); load it with PEFT and save it without, or name the module in modules_to_save"
        )


def _bound(
    file: object,
    header: Header,
    names: Mapping[tuple[str, str], str],
    modules: Mapping[str, str],
    own: Iterable[str],
    described: Described,
    model: FunctionalModel,
) -> Adapter:
    ranks = {path: _rank(file, header, names, path) for path in modules}
    alphas = {path: described.alpha_of(module) for path, module in modules.items()}
    saved = set(own) - (set(biases(tuple(modules), model)) if described.bias != "none" else set())
    try:
        method = lora(
            exact(modules),
            rank=described.rank,
            alpha=described.alpha,
            rank_stabilized=described.rank_stabilized,
            dropout=described.dropout,
            init="gaussian" if described.gaussian else "default",
            rank_pattern=ByPath({path: rank for path, rank in ranks.items() if rank != described.rank}),
            alpha_pattern=ByPath({path: alpha for path, alpha in alphas.items() if alpha != described.alpha}),
            bias=described.bias != "none",
        )
        return bind(chain(method, train(exact(saved))) if saved else method, model)
    except (OptionError, SelectorError) as error:
        raise FileFormatError(f"{file} is not for this model: {error}") from error


def _leaves(
    file: object,
    header: Header,
    names: Mapping[tuple[str, str], str],
    slots: Mapping[str, Slot],
    adapter: Adapter,
) -> tuple[Leaf, ...]:
    wanted = plain_lora(adapter).keys
    found = {key for key in names if key[1] != "base"}
    for path, leaf in sorted(found ^ wanted.keys()):
        which = "has a leaf that the given adapter lacks" if (path, leaf) in found else "lacks a leaf of the adapter"
        raise FileFormatError(f"{file} {which}: {leaf} of {path!r}; it is of a method at other places")
    leaves = []
    by_keys = {keys: key for key, keys in wanted.items()}
    for keys, shape in adapter.spec.items():
        name = names[by_keys[keys]]
        slot = slots[name]
        _check_shape(file, name, header[name], shape[::-1] if slot.transposed else shape)
        leaves.append(Leaf(name, keys, slot.transposed, adapter.model.params[slot.path].device))
    return tuple(leaves)


def _check_shape(file: object, name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if shape != wanted:
        raise FileFormatError(f"{file}: {name!r} is {shape}; for this model and method it is {wanted}")


def _check_method(file: object, modules: Mapping[str, str], described: Described, adapter: Adapter) -> None:
    ours = plain_lora(adapter)
    theirs = {
        "rank_stabilized": described.rank_stabilized,
        "dropout": described.dropout,
        "alpha": {path: described.alpha_of(module) for path, module in modules.items()},
    }
    own = {**ours.options, "alpha": ours.alphas}
    for option, value in theirs.items():
        if own[option] != value:
            raise FileFormatError(
                f"{file} is of a method with another {option} than the given adapter; load it without adapter="
            )

"""Low-rank adapters of different ranks, scales and places as trees of one adapter.

A factor of rank r becomes one of rank R > r with rows (columns) of zeros, which change nothing and get no gradient:
B A = [B 0] [A; 0]. A place that an adapter lacks gets zero factors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_func.errors import OptionError
from peft_func.functional.model import FunctionalModel
from peft_func.transforms.bind import Adapter, BoundPart, bind, check_tree
from peft_func.transforms.lora import lora
from peft_func.transforms.options import ByPath
from peft_func.transforms.transform import Chain, Method, chain
from peft_func.trees.paths import Keys, Tree, insert, join, map_leaves
from peft_func.trees.select import exact
from peft_func.weights.mapping import Weights
from peft_func.weights.matrix import LowRank, Sum
from peft_func.weights.reshaped import Reshaped


def pad_ranks(
    adapters: Sequence[Adapter], trees: Sequence[Mapping[str, Any]]
) -> tuple[Adapter, dict[str, Tensor], list[Tree]]:
    """Return one adapter that all these trees fit, after padding: to be stacked, routed, ensembled or banked.

    The parts must be the same but for ranks, scales and places of low-rank parts (`pf.lora`). Where the scales of a
    place differ, its scale becomes 1 and each B takes its own: the effective weights are the same, but training from
    there is that of a scale of 1. Where they agree (`alpha=None`, say), training is that of each adapter alone.

    Args:
        adapters: bound adapters of one model.
        trees: one tree of each.

    Returns:
        `(adapter, frozen, trees)`, as if all had been bound together; the trees are new.

    Raises:
        OptionError: the adapters differ in more than ranks, scales and places, or are bound to different models.
        TreeError: a tree is not one of its adapter's.

    Example:
        >>> import torch, peft_func as pf
        >>> model = pf.functionalize(torch.nn.Linear(8, 8))
        >>> adapters = [pf.bind(pf.lora("weight", rank=rank), model) for rank in (1, 4)]
        >>> adapter, frozen, trees = pf.pad_ranks(adapters, [adapter.init(0)[1] for adapter in adapters])
        >>> [tuple(tree["lora"]["weight"]["A"].shape) for tree in trees]
        [(4, 8), (4, 8)]
    """
    if not adapters or len(adapters) != len(trees):
        raise OptionError(f"pad_ranks takes as many trees as adapters; it got {len(trees)} and {len(adapters)}")
    first = adapters[0]
    shapes = [[(part.keys, part.part.kind) for part in adapter.parts] for adapter in adapters]
    for number, (adapter, tree) in enumerate(zip(adapters, trees, strict=True)):
        if adapter.model is not first.model:
            raise OptionError(f"adapter {number} is bound to another model; bind all to one functional model")
        if shapes[number] != shapes[0]:
            raise OptionError(f"adapter {number} has other parts than adapter 0: {shapes[number]} and {shapes[0]}")
        check_tree(tree, adapter.spec)
    columns = {part.keys: [adapter.parts[i] for adapter in adapters] for i, part in enumerate(first.parts)}
    slots = {keys: _slots(parts, trees, first.model) for keys, parts in columns.items() if parts[0].part.kind == "lora"}
    whole = bind(_rebuilt(first.method, columns, slots, ()), first.model)
    return whole, whole.frozen, [_padded(whole, columns, slots, i, tree) for i, tree in enumerate(trees)]


@dataclass(frozen=True)
class _Slot:
    """What a place becomes: its rank, its scale, and the scale that each adapter has there (None where it is not)."""

    rank: int
    scale: float
    scales: tuple[float | None, ...]


def _slots(parts: Sequence[BoundPart], trees: Sequence[Mapping[str, Any]], model: FunctionalModel) -> dict[str, _Slot]:
    found = [_terms(part, tree, model) for part, tree in zip(parts, trees, strict=True)]
    slots = {}
    for path in dict.fromkeys(path for terms in found for path in terms):
        terms = [terms.get(path) for terms in found]
        scales = tuple(None if term is None else term.scale for term in terms)
        alike = {scale for scale in scales if scale is not None}
        rank = max(term.A.shape[-2] for term in terms if term is not None)
        slots[path] = _Slot(rank, alike.pop() if len(alike) == 1 else 1.0, scales)
    return slots


def _terms(part: BoundPart, tree: Mapping[str, Any], model: FunctionalModel) -> dict[str, LowRank]:
    """Return what a low-rank part adds at each of its places: its ranks and scales, whatever its options."""
    seen = Weights(model.params, model.params, model.layouts).restrict(part.seen)
    terms = {}
    for path, matrix in part.transform.apply(part.subtree(tree), seen).items():
        change = matrix.right if isinstance(matrix, Sum) else None
        change = change.inner if isinstance(change, Reshaped) else change  # a convolution in another view
        if not isinstance(change, LowRank):
            raise OptionError(f"pad_ranks: {join(part.keys)} at {path} is not the base and one low-rank matrix")
        terms[path] = change
    return terms


def _rebuilt(
    method: Method, columns: Mapping[Keys, list[BoundPart]], slots: Mapping[Keys, dict[str, _Slot]], prefix: Keys
) -> Method:
    if isinstance(method, Chain):
        inner = prefix if method.name is None else (*prefix, method.name)
        return chain(*(_rebuilt(part, columns, slots, inner) for part in method.parts), name=method.name)
    parts = columns[(*prefix, method.name)]
    if method.kind != "lora":
        if any((part.paths, part.options) != (parts[0].paths, parts[0].options) for part in parts):
            raise OptionError(f"the part {method.name!r} differs between the adapters; only low-rank parts are padded")
        return method
    places = slots[parts[0].keys]
    rest = [{name: value for name, value in (part.options or {}).items() if name not in _OWN} for part in parts]
    if any(options != rest[0] for options in rest):
        raise OptionError(f"the options of {method.name!r} differ between the adapters: {rest}")
    return lora(
        exact(places),
        **{**rest[0], "init": "default"},
        rank=next(iter(places.values())).rank,
        rank_pattern=ByPath({path: slot.rank for path, slot in places.items()}),
        alpha_pattern=ByPath({path: slot.scale * slot.rank for path, slot in places.items()}),
        bias=any(len(part.seen) > len(part.paths) for part in parts),
        name=method.name,
    )


_OWN = ("rank", "alpha", "rank_stabilized", "rank_pattern", "alpha_pattern", "bias", "init")
"""The options in which low-rank parts may differ."""


def _padded(
    whole: Adapter, columns: Mapping[Keys, list[BoundPart]], slots: Mapping[Keys, dict[str, _Slot]], i: int, given: Any
) -> Tree:
    model = whole.model
    tree: Tree = {}
    for part in whole.parts:
        subtree = columns[part.keys][i].subtree(given)
        if part.part.kind != "lora":
            insert(tree, part.keys, map_leaves(torch.clone, subtree))
            continue
        own: Tree = {}
        for path in part.seen:
            slot = slots[part.keys].get(path)
            if slot is None:  # a bias that trains: that of the base where this adapter has none
                own[path] = {"bias": subtree.get(path, {"bias": model.params[path]})["bias"].clone()}
            else:
                own[path] = _factors(whole, (*part.keys, path), slot, i, subtree.get(path))
        insert(tree, part.keys, own)
    return tree


def _factors(whole: Adapter, keys: Keys, slot: _Slot, i: int, leaf: Mapping[str, Tensor] | None) -> Tree:
    """Return A and B of one place with zeros up to the rank; only zeros for an adapter that is not there."""
    path = keys[-1]
    base, axis = whole.model.params[path], len(whole.model.layouts[path].batch)
    if leaf is None:
        dtype = torch.promote_types(base.dtype, torch.float32)
        return {name: torch.zeros(whole.spec[(*keys, name)], dtype=dtype, device=base.device) for name in ("A", "B")}
    A, B, own = leaf["A"], leaf["B"], slot.scales[i]
    missing = slot.rank - A.shape[axis]
    ratio = 1.0 if own is None or own == slot.scale else own / slot.scale
    zeros_A = A.new_zeros(*A.shape[:axis], missing, *A.shape[axis + 1 :])
    zeros_B = B.new_zeros(*B.shape[: axis + 1], missing, *B.shape[axis + 2 :])
    return {"A": torch.cat([A, zeros_A], axis), "B": torch.cat([B * ratio if ratio != 1.0 else B, zeros_B], axis + 1)}

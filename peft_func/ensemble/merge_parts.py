"""How the sub-trees of one part are merged, by what kind of method it is."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from peft_func.ensemble.deltas import delta_at
from peft_func.ensemble.rules import Merge
from peft_func.ensemble.values import wide_dtype
from peft_func.errors import OptionError
from peft_func.transforms.bind import Adapter, BoundPart
from peft_func.trees.paths import Keys, Tree, join, leaves
from peft_func.weights.mapping import Weights
from peft_func.weights.matrix import LowRank

Merged: TypeAlias = tuple[dict[Keys, Tensor], dict[str, int]]
"""The merged leaves by their keys in the sub-tree, and the ranks of low-rank matrices by path or group."""


def merge_part(merge: Merge, adapter: Adapter, part: BoundPart, kept: Sequence[str], trees: Sequence[Tree]) -> Merged:
    """Merge the sub-trees of a part, at the parameters that it keeps.

    Raises:
        OptionError: the part cannot be merged that way.
    """
    function: Callable[[Merge, Adapter, BoundPart, Sequence[str], Sequence[Tree]], Merged]
    match part.part.kind:
        case _ if not kept:
            return {}, {}
        case "lora":
            function = _low_rank
        case "train":
            function = _held
        case "gift" if merge.how in ("cat", "svd") and _is_linear(part):
            function = _generated
        case _:
            function = _leaves
    return function(merge, adapter, part, kept, [part.subtree(tree) for tree in trees])


def _is_linear(part: BoundPart) -> bool:
    """Whether what GIFT generates is linear in W phi: no block, no activation, no biases."""
    options = part.options or {}
    plain = options.get("block") == "simple_block" and options.get("activation", "identity") == "identity"
    return plain and not options.get("in_projection_bias") and not options.get("out_projection_bias")


def _low_rank(merge: Merge, adapter: Adapter, part: BoundPart, kept: Sequence[str], subtrees: Sequence[Tree]) -> Merged:
    """Merge what a low-rank part adds to each of its places, and the biases that it trains."""
    values, _ = _held(merge, adapter, part, kept, subtrees)
    merged: dict[Keys, Tensor] = {(path, "bias"): value for (path,), value in values.items()}
    ranks = {}
    params = adapter.model.params
    seen = Weights(params, params, adapter.model.layouts).restrict(part.seen)
    applied = [seen.updated(part.transform.apply(tree, seen)) for tree in subtrees]
    for path in part.paths:
        if path not in kept:
            continue
        terms: list[LowRank] = []
        for weights in applied:
            match delta_at(weights, path):
                case [LowRank() as low]:
                    terms.append(low)
                case _:
                    raise OptionError(f"merge: {join(part.keys)} at {path} is not the base and one low-rank matrix")
        low = merge.low_rank(join((*part.keys, path)), terms)
        merged |= {(path, "A"): low.A, (path, "B"): low.B}
        ranks[path] = low.A.shape[-2]
    return merged, ranks


def _held(merge: Merge, adapter: Adapter, part: BoundPart, kept: Sequence[str], subtrees: Sequence[Tree]) -> Merged:
    """Merge the weights that a part trains themselves, as changes of the base."""
    assert part.transform.holds is not None
    held = [part.transform.holds(tree) for tree in subtrees]
    merged: dict[Keys, Tensor] = {}
    for path in held[0]:
        if path in kept:
            base = adapter.model.params[path]
            dtype = wide_dtype(base, *(values[path] for values in held))
            changes = [values[path].to(dtype) - base.to(dtype) for values in held]
            merged[path,] = base.to(dtype) + merge.tensors(join((*part.keys, path)), changes)
    return merged, {}


def _generated(
    merge: Merge, adapter: Adapter, part: BoundPart, kept: Sequence[str], subtrees: Sequence[Tree]
) -> Merged:
    """Merge GIFT's generators: sum_k w_k W phi_k psi_k = W (sum_k w_k phi_k psi_k), whichever W a group shares them."""
    for other in adapter.parts:
        for path in set(part.seen) & set(other.seen) if other is not part else ():
            raise OptionError(
                f"merge: {join(part.keys)} and {join(other.keys)} both change {path}, on which what gift adds depends; "
                "how='delta' adds what they do together, exactly"
            )
    merged: dict[Keys, Tensor] = {}
    terms = {group: [LowRank(tree[group]["phi"], tree[group]["psi"]) for tree in subtrees] for group in subtrees[0]}
    lows = {group: merge.low_rank(join((*part.keys, group)), each) for group, each in terms.items()}
    rank = max(low.A.shape[-2] for low in lows.values())  # gift has one rank for all its groups
    for path in part.paths:
        highest = min(adapter.model.layouts[path].matrix_shape[-2:])
        if rank > highest:
            raise OptionError(
                f"merge: the sum of {join(part.keys)} has rank {rank}, above the {highest} of {path}; "
                f"how='svd', rank={highest} approximates it, and how='delta' adds what gift does, exactly"
            )
    for group, low in lows.items():
        missing = rank - low.A.shape[-2]
        merged[group, "phi"] = torch.nn.functional.pad(low.B, (0, missing))
        merged[group, "psi"] = torch.nn.functional.pad(low.A, (0, 0, 0, missing))
    return merged, dict.fromkeys(lows, rank)


def _leaves(merge: Merge, adapter: Adapter, part: BoundPart, kept: Sequence[str], subtrees: Sequence[Tree]) -> Merged:
    """Merge the leaves of any other method: each as its first value and the weighted sum of its changes."""
    columns = [dict(leaves(tree)) for tree in subtrees]
    if not columns[0]:
        return {}, {}
    name, kind = join(part.keys), part.part.kind or "a method of your own"
    if merge.how != "linear":
        raise OptionError(
            f"merge: the part {name!r} ({kind}) is neither low-rank nor trained weights, which how={merge.how!r} "
            "merges; how='delta' adds what it does to the weights, exactly, and how='linear' averages its leaves"
            + (", and how='cat' or 'svd' its generators" if kind == "gift" and _is_linear(part) else "")
        )
    first, other = (dict(leaves(part.subtree(adapter.init(number)[1]))) for number in range(2))
    merged = {}
    for keys, leaf in first.items():
        values = [column[keys] for column in columns]
        dtype = wide_dtype(leaf, *values)
        origin = leaf.to(dtype)
        if not torch.equal(leaf, other[keys]):
            origin = torch.zeros_like(origin)
            if abs(sum(merge.weights) - 1.0) > 1e-6:
                raise OptionError(
                    f"merge: the leaf '{name}.{join(keys)}' was drawn at random and can only be averaged, with weights "
                    f"that sum to 1, not {sum(merge.weights):g}; how='delta' adds what it does, with any weights"
                )
        merged[keys] = origin + merge.tensors(f"{name}.{join(keys)}", [value.to(dtype) - origin for value in values])
    return merged, {}

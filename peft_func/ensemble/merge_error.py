"""How far a merged adapter is from the exact sum, place by place."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from peft_func.ensemble.deltas import delta_at, formed
from peft_func.ensemble.factors import concatenate, norm
from peft_func.ensemble.merge_adapters import check_trees
from peft_func.ensemble.rules import check_weights
from peft_func.errors import OptionError
from peft_func.transforms.bind import Adapter
from peft_func.weights.mapping import Weights
from peft_func.weights.matrix import LowRank
from peft_func.weights.operator import full_precision


def merge_error(
    merged_adapter: Adapter,
    merged: Mapping[str, Any],
    adapter: Adapter,
    trees: Sequence[Mapping[str, Any]],
    weights: Sequence[float] | None = None,
) -> dict[str, float]:
    """Return the relative error of a merged tree against the exact weighted sum of what the trees change.

    Args:
        merged_adapter: the first result of `merge_adapters`.
        merged: its third result.
        adapter: what was merged.
        trees: its trees.
        weights: as there.

    Returns:
        For every parameter that one of them changes, the Frobenius norm of (merged - exact) over that of exact; where
        exact is zero, 0 or infinity. Low-rank changes are compared on their factors and never formed; others are, one
        place at a time.

    Raises:
        OptionError: as `merge_adapters`.
        TreeError: as `merge_adapters`.

    Example:
        >>> import torch, peft_func as pf
        >>> adapter = pf.bind(pf.lora("weight", rank=2), pf.functionalize(torch.nn.Linear(8, 6)))
        >>> trees = [pf.map_leaves(torch.randn_like, adapter.init(key)[1]) for key in range(2)]
        >>> small, _, tree = pf.merge_adapters(adapter, trees, how="svd", rank=3)
        >>> 0 < pf.merge_error(small, tree, adapter, trees)["weight"] < 1
        True
    """
    sources = check_trees(adapter, trees)
    (result,) = check_trees(merged_adapter, [merged])
    if merged_adapter.model.layouts != adapter.model.layouts:
        raise OptionError("merge_error compares adapters of one model; these have parameters of other names or shapes")
    numbers = check_weights(len(sources), weights)
    device = next(iter(adapter.model.params.values())).device
    with torch.no_grad(), full_precision(device):
        applied = [adapter.apply(adapter.frozen, tree) for tree in sources]
        final = merged_adapter.apply(merged_adapter.frozen, result)
        errors = {}
        for path in final:
            if all(each[path] is each.base[path] for each in (final, *applied)):
                continue
            errors[path] = _relative(*_norms(path, final, applied, numbers))
    return errors


def _norms(path: str, final: Weights, applied: Sequence[Weights], weights: Sequence[float]) -> tuple[float, float]:
    """Return the norms of merged - exact, and of exact."""
    deltas = [delta_at(each, path) for each in (final, *applied)]
    terms: list[LowRank] = []
    signed: list[float] = []
    for number, delta in zip((-1.0, *weights), deltas, strict=True):
        if isinstance(delta, torch.Tensor):
            break
        terms += delta
        signed += [number] * len(delta)
    else:
        own = len(deltas[0])
        exact = norm(concatenate(terms[own:], signed[own:])) if terms[own:] else 0.0
        return (norm(concatenate(terms, signed)) if terms else 0.0), exact
    ours, *others = (formed(delta, each, path).double() for delta, each in zip(deltas, (final, *applied), strict=True))
    total = sum((w * other for w, other in zip(weights, others, strict=True)), start=torch.zeros_like(ours))
    return float(torch.linalg.vector_norm(ours - total)), float(torch.linalg.vector_norm(total))


def _relative(error: float, exact: float) -> float:
    if exact == 0.0:
        return 0.0 if error == 0.0 else float("inf")
    return error / exact

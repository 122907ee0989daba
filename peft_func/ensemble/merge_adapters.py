"""Adapter arithmetic: several trees of one bound adapter become one.

Task arithmetic (Ilharco et al., arXiv 2212.04089) is a sum with signed weights: `how="cat"`, `"svd"` or `"delta"`, with
`weights=[1.0, -0.5]`; a single tree with the weight -1 is the negated task.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_func.ensemble.deltas import delta_at, formed
from peft_func.ensemble.merge_parts import merge_part
from peft_func.ensemble.rebuild import Plan, plan_of, rebuild
from peft_func.ensemble.rules import check_merge
from peft_func.ensemble.values import wide_dtype
from peft_func.errors import OptionError, TreeError
from peft_func.transforms.bind import Adapter, bind, check_tree
from peft_func.trees.keys import Key
from peft_func.trees.paths import Keys, Tree, insert, join, leaves
from peft_func.weights.operator import full_precision


def merge_adapters(
    adapter: Adapter,
    trees: Sequence[Mapping[str, Any]],
    weights: Sequence[float] | None = None,
    how: str = "cat",
    *,
    rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    key: Key | None = None,
) -> tuple[Adapter, dict[str, Tensor], Tree]:
    r"""Merge several trees of one bound adapter into one, bound to the same model.

    A low-rank part (`pf.lora`) changes a weight by `D_k = s B_k A_k`, a `pf.train` part by `D_k` = trained - base.
    These are merged by:

    * `"cat"`: the exact `sum_k w_k D_k`, factors side by side; ranks add (up to what the matrix can have);
    * `"svd"`: that sum, and of it the best approximation of `rank` (exact for None), at the cost of the factors;
    * `"delta"`: the exact sum for any method: low-rank as `"svd"`; what is neither low-rank nor trained itself (or is
      combined with such in a chain) becomes a `pf.train` part that holds base + sum (dropout, if any, ends there);
    * `"linear"`: HF PEFT's sum of A and B apart, with sqrt(|w s|) each: has cross terms `B_i A_j`, keeps the rank;
    * `"magnitude_prune"`, `"ties"`, `"dare_linear"`, `"dare_ties"`: pruned sums of A and B apart, as HF PEFT;
    * the same with `_svd`: pruned sums of the `D_k`, formed one place at a time, and then cut to `rank`;
    * the same after `knots_`: pruned sums of the right factors in the basis that the `D_k` share;
    * `"slerp"`: along the arc between two trees, place by place, the part w2 / (w1 + w2) of the way.

    Trained weights follow the same rule on their `D_k`. GIFT's generators are merged by `"cat"` and `"svd"` too: what
    they add is `W (sum_k w_k phi_k psi_k)`, where nothing else changes W (the rank is cut on phi psi).

    Leaves of other methods have no sum: `"linear"` moves each from its first value by the weighted sum of its changes
    (IA3: 1 + sum w (l - 1)), and those that were drawn at random by a mean, for which the weights must sum to 1; no
    other `how` but `"delta"` takes such a method.

    Args:
        adapter: the bound adapter that all the trees are of.
        trees: its second trees; they are not changed.
        weights: one number for each tree, negative ones too; None for 1 / K each.
        how: one of the above.
        rank: with `"svd"`, `"slerp"`, `"*_svd"` and `"knots_*"`, the highest rank of a place; None keeps what is exact.
        density: with pruning, the fraction of entries kept, above 0 and up to 1; of a tensor at least one is.
        majority_sign_method: with TIES, `"total"` elects the sign of the sum, `"frequency"` that of the majority.
        key: with DARE, the randomness; a mask depends on it, the leaf's path and the tree's number only.

    Returns:
        `(adapter, frozen, trainable)`: a new adapter on the same model with the same parts at the same places (low-rank
        ones with alpha = rank), `frozen` as its `init` gives it, and the merged tree: new tensors, computed in float32
        at least and rounded once to the dtype of the trees.

    Raises:
        OptionError: an option is out of range, missing or without effect, or a part cannot be merged that way.
        TreeError: a tree is not of this adapter, not on the device of the others, or not finite.

    Example:
        >>> import torch, peft_func as pf
        >>> adapter = pf.bind(pf.lora("weight", rank=2, alpha=4), pf.functionalize(torch.nn.Linear(8, 6)))
        >>> trees = [pf.map_leaves(lambda leaf: leaf + 0.1, adapter.init(key)[1]) for key in range(2)]
        >>> merged, frozen, tree = pf.merge_adapters(adapter, trees, [0.7, 0.3], how="cat")
        >>> {leaf: list(tensor.shape) for leaf, tensor in tree["lora"]["weight"].items()}
        {'A': [4, 8], 'B': [6, 4]}
        >>> first, second = (pf.delta(adapter.apply(frozen, tree))["weight"] for tree in trees)
        >>> torch.allclose(pf.delta(merged.apply(frozen, tree))["weight"], 0.7 * first + 0.3 * second, atol=1e-6)
        True
    """
    checked = check_trees(adapter, trees)
    merge = check_merge(len(checked), weights, how, rank, density, majority_sign_method, key)
    device = next(iter(adapter.model.params.values())).device
    with torch.no_grad(), full_precision(device):
        plan = plan_of(adapter) if how == "delta" else Plan.of_all(adapter)
        values: dict[Keys, Tensor] = {}
        ranks: dict[Keys, dict[str, int]] = {}
        for part in adapter.parts:
            merged, ranks[part.keys] = merge_part(merge, adapter, part, plan.kept[part.keys], checked)
            values |= {(*part.keys, *keys): value for keys, value in merged.items()}
        method, extra = rebuild(adapter, plan, ranks)
        values |= {(*extra, path): value for path, value in _sums(adapter, checked, merge.weights, plan.formed)}
        result = bind(method, adapter.model)
        dtypes = _dtypes(checked)
        tree: Tree = {}
        for keys, shape in result.spec.items():
            dtype = dtypes[keys] if keys in dtypes else adapter.model.params[keys[-1]].dtype
            value = values[keys].reshape(shape).to(dtype, copy=True).contiguous()
            if not torch.isfinite(value).all():
                raise OptionError(f"merge: {join(keys)} overflows {dtype}; use smaller weights, or a wider dtype")
            insert(tree, keys, value)
    return result, result.frozen, tree


def check_trees(adapter: Adapter, trees: Any) -> list[Tree]:
    """Return trees of one adapter, as a list.

    Raises:
        OptionError: this is no adapter, or no list of at least one tree.
        TreeError: one is not of this adapter, not on the device of the first, or not finite.
    """
    if not isinstance(adapter, Adapter):
        raise OptionError(f"merge takes a bound adapter, not a {type(adapter).__name__}; call pf.bind(method, model)")
    if isinstance(trees, Mapping) or not isinstance(trees, Sequence) or not trees:
        raise OptionError("merge takes a list of at least one tree; for a stacked tree, pf.unstack(stacked)")
    for number, tree in enumerate(trees):
        check_tree(tree, adapter.spec, {leaf.device for _, leaf in leaves(trees[0])})
        for keys, leaf in leaves(tree):
            if not torch.isfinite(leaf).all():
                raise TreeError(f"the leaf {join(keys)!r} of tree {number} holds values that are not finite")
    return [dict(tree) for tree in trees]


def _sums(
    adapter: Adapter, trees: Sequence[Tree], weights: Sequence[float], paths: Sequence[str]
) -> Iterator[tuple[str, Tensor]]:
    """Form base + the weighted sum of what the trees add, one place at a time."""
    applied = [adapter.apply(adapter.frozen, tree) for tree in trees] if paths else []
    for path in paths:
        total = adapter.model.params[path].to(wide_dtype(adapter.model.params[path]))
        for weight, each in zip(weights, applied, strict=True):
            total = total + weight * formed(delta_at(each, path), each, path)
        yield path, total


def _dtypes(trees: Sequence[Tree]) -> dict[Keys, torch.dtype]:
    """Return the dtype of every leaf: that of the trees together."""
    dtypes: dict[Keys, torch.dtype] = {}
    for tree in trees:
        for keys, leaf in leaves(tree):
            dtypes[keys] = torch.promote_types(dtypes.get(keys, leaf.dtype), leaf.dtype)
    return dtypes

"""A learned combination of trained adapters: W' = W + sum_k w_k D_k, in which only the w_k train.

One weight for each adapter, without gradients through the adapters: LoraHub (Huang et al., arXiv 2307.13269). A softmax
for each place is the idea of AdapterFusion (Pfeiffer et al., arXiv 2005.00247), without its query.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_func.ensemble.deltas import delta_at, formed
from peft_func.ensemble.factors import concatenate
from peft_func.ensemble.merge_adapters import check_trees
from peft_func.ensemble.rules import check_weights
from peft_func.ensemble.values import wide_dtype
from peft_func.errors import OptionError
from peft_func.functional.model import FunctionalModel
from peft_func.transforms.bind import Adapter
from peft_func.transforms.options import check_choice
from peft_func.transforms.transform import Changes, Part, Transform, check_name
from peft_func.trees.paths import Tree
from peft_func.trees.select import exact
from peft_func.weights.mapping import Weights
from peft_func.weights.matrix import Dense, LowRank, Matrix
from peft_func.weights.operator import Operator, full_precision


def mixture(
    adapter: Adapter,
    trees: Sequence[Mapping[str, Any]],
    *,
    per: str = "adapter",
    init: Sequence[float] | None = None,
    normalize: str | None = None,
    name: str = "mixture",
) -> Part:
    """Train how much of each of several trained adapters a model gets; the adapters are constants.

    What a low-rank method adds stays low-rank: one matrix of concatenated factors for each place, its rows scaled by
    the weights. What others add is formed, once for each tree.

    Leaves of `trainable[name][group]`: `weights` [K], with one group `"all"`, or one for each place under its path;
    float32 at least. With a softmax they are its logits.

    Args:
        adapter: the bound adapter that all the trees are of.
        trees: its K trees, copied.
        per: `"adapter"`, one weight for each adapter, or `"place"`, one for each adapter at each place.
        init: K numbers to start from; None for zeros: nothing of any adapter, or, with a softmax, their mean.
        normalize: None, or `"softmax"` for weights that are positive and sum to 1.
        name: the sub-tree.

    Returns:
        A part for `pf.bind` and `pf.chain`, on this model or one with the same names and shapes. It is a method of
        your own for files: give it again to `pf.load(path, model, method=...)`.

    Raises:
        OptionError: an option is out of range; at `bind`, another shape of a place.
        TreeError: as `merge_adapters`.

    Example:
        >>> import torch, peft_func as pf
        >>> model = pf.functionalize(torch.nn.Linear(4, 3))
        >>> adapter = pf.bind(pf.lora("weight", rank=2), model)
        >>> trees = [pf.map_leaves(torch.randn_like, adapter.init(key)[1]) for key in range(3)]
        >>> frozen, trainable = pf.bind(pf.mixture(adapter, trees), model).init(0)
        >>> trainable["mixture"]["all"]["weights"]
        tensor([0., 0., 0.])
    """
    sources = check_trees(adapter, trees)
    check_choice("mixture", "per", per, ("adapter", "place"))
    if normalize is not None:
        check_choice("mixture", "normalize", normalize, ("softmax",))
    start = check_weights(len(sources), init) if init is not None else (0.0,) * len(sources)
    with torch.no_grad(), full_precision(next(iter(adapter.model.params.values())).device):
        applied = [adapter.apply(adapter.frozen, tree) for tree in sources]
        places = {path: _place(path, applied) for path in applied[0] if _is_changed(path, applied)}
    layouts = {path: adapter.model.layouts[path] for path in places}

    def make(paths: tuple[str, ...], model: FunctionalModel) -> Transform:
        for path in places:
            if path not in paths or model.layouts[path] != layouts[path]:
                raise OptionError(f"{name}: its adapters change {path} {layouts[path].shape}, which this model has not")
        groups = {path: path if per == "place" else "all" for path in paths}

        def draw(weights: Weights, key: int) -> Tree:
            device = next(iter(weights.base.values())).device
            dtype = wide_dtype(*(place.like for place in places.values()))
            return {group: {"weights": torch.tensor(start, dtype=dtype, device=device)} for group in groups.values()}

        def apply(tree: Tree, weights: Weights) -> Changes:
            shares = {
                group: leaf["weights"].softmax(-1) if normalize else leaf["weights"] for group, leaf in tree.items()
            }
            return {path: places[path].added(path, weights, shares[group]) for path, group in groups.items()}

        return Transform(draw, apply)

    return Part(exact(places), make, check_name(name), matrices=False)


@dataclass(frozen=True)
class _Place:
    """What K trees add to one weight: low-rank, each of its rows belonging to one tree, or formed `[K, *shape]`."""

    low: LowRank | None
    owner: Tensor | None
    dense: Tensor | None

    @property
    def like(self) -> Tensor:
        tensor = self.dense if self.low is None else self.low.A
        assert tensor is not None
        return tensor

    def added(self, path: str, weights: Weights, shares: Tensor) -> Tensor | Operator | Matrix:
        shares = shares.to(self.like.dtype)
        if self.low is not None:
            assert self.owner is not None
            return weights.matrix(path) + LowRank(self.low.B, self.low.A * shares[self.owner].unsqueeze(-1))
        assert self.dense is not None
        change: Tensor = torch.tensordot(shares, self.dense, 1)
        value = weights[path]
        if isinstance(value, Tensor):
            return value.to(change.dtype) + change  # rounded once, to the weight's dtype
        return value.replace(weights.matrix(path) + Dense(value.layout.to_matrix(change.to(value.dtype))))


def _is_changed(path: str, applied: Sequence[Weights]) -> bool:
    return any(each[path] is not each.base[path] for each in applied)


def _place(path: str, applied: Sequence[Weights]) -> _Place:
    deltas = [delta_at(each, path) for each in applied]
    terms: list[LowRank] = []
    owners: list[int] = []
    for number, delta in enumerate(deltas):
        if isinstance(delta, Tensor):
            changes = [formed(change, each, path) for change, each in zip(deltas, applied, strict=True)]
            return _Place(None, None, torch.stack(changes))
        terms += delta
        owners += [number for term in delta for _ in range(term.A.shape[-2])]
    low = concatenate(terms, [1.0] * len(terms))
    return _Place(low, torch.tensor(owners, device=low.A.device), None)

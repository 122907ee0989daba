"""The method of a merged adapter: the same parts at the same places, with the ranks that the merge gave them."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from peft_func.transforms.bind import Adapter, BoundPart
from peft_func.transforms.gift import gift
from peft_func.transforms.lora import lora
from peft_func.transforms.options import ByPath
from peft_func.transforms.train import train
from peft_func.transforms.transform import Chain, Method, Part, chain
from peft_func.trees.paths import Keys
from peft_func.trees.select import exact

ADDITIVE = ("lora", "train")
"""The methods whose changes of a weight are added to it whatever its value: they merge apart from each other."""


@dataclass(frozen=True)
class Plan:
    """What becomes of every parameter that an adapter sees.

    Attributes:
        kept: for every part, the parameters that it goes on seeing.
        formed: those that leave their parts, and become trained weights.
    """

    kept: Mapping[Keys, tuple[str, ...]]
    formed: tuple[str, ...] = ()

    @classmethod
    def of_all(cls, adapter: Adapter) -> "Plan":
        """Return the plan by which every part keeps all that it has."""
        return cls({part.keys: part.seen for part in adapter.parts})


def plan_of(adapter: Adapter) -> Plan:
    """Return the plan by which additive parts keep what no other part changes, and the rest is formed."""
    formed = dict.fromkeys(path for part in adapter.parts if part.part.kind not in ADDITIVE for path in part.seen)
    for part in adapter.parts:
        biases = set(part.seen) - set(part.paths)
        if part.part.kind in ADDITIVE and biases and formed.keys() & set(part.seen):
            formed |= dict.fromkeys(path for path in part.seen if path in biases)  # they go together
    kept = {part.keys: tuple(path for path in part.seen if path not in formed) for part in adapter.parts}
    return Plan(kept, tuple(name for name in adapter.model.params if name in formed))


def rebuild(adapter: Adapter, plan: Plan, ranks: Mapping[Keys, Mapping[str, int]]) -> tuple[Method, Keys]:
    """Return the merged method, and where its part of formed weights is, or would be.

    Args:
        adapter: what was merged.
        plan: what became of its parameters.
        ranks: for every part, the new rank of each of its places or groups that has one.
    """
    bound = {part.keys: part for part in adapter.parts}

    def again(method: Method, prefix: Keys) -> list[Method]:
        if isinstance(method, Chain):
            inner = prefix if method.name is None else (*prefix, method.name)
            return [chain(*(new for part in method.parts for new in again(part, inner)), name=method.name)]
        part = bound[(*prefix, method.name)]
        kept = plan.kept[part.keys]
        if not kept:
            return []
        if method.kind == "lora":
            return [_low_rank_part(part, ranks[part.keys], bias=len(kept) > len(ranks[part.keys]))]
        if method.kind == "gift" and ranks[part.keys]:
            return [_generating_part(part, max(ranks[part.keys].values()))]
        return [method if kept == part.seen else train(exact(kept), name=method.name)]

    (*methods,) = again(adapter.method, ())
    taken = {keys[0] for keys in bound}
    name = "delta"
    while name in taken:
        name += "_2"
    if plan.formed:
        return chain(*methods, train(exact(plan.formed), name=name)), (name,)
    return (methods[0] if methods else chain()), (name,)


def _low_rank_part(part: BoundPart, ranks: Mapping[str, int], *, bias: bool) -> Part:
    assert part.options is not None  # those of pf.lora
    (rank, _), *_ = Counter(ranks.values()).most_common()
    changed = {
        "rank": rank,
        "alpha": None,
        "rank_stabilized": False,
        "rank_pattern": ByPath({path: own for path, own in ranks.items() if own != rank}),
        "alpha_pattern": ByPath(),
        "bias": bias,
    }
    return lora(exact(ranks), **{**part.options, **changed}, name=part.part.name)


def _generating_part(part: BoundPart, rank: int) -> Part:
    assert part.options is not None  # those of pf.gift
    share = part.options["share"]
    if isinstance(share, dict):
        share = {group: exact(paths) for group, paths in share.items()}
    return gift(exact(part.paths), **{**part.options, "rank": rank, "share": share}, name=part.part.name)

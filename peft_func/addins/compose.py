"""Several adapters at the same places: averaged, gated, or fused by attention.

With d_i(h) what adapter i would add (see `added`), the modules get, in place of one d(h),

    average:  sum_i w_i d_i(h)
    gated:    sum_i softmax(G h)_i d_i(h)
    fusion:   sum_i softmax((K d_i(h) + k) . (Q h + q))_i V d_i(h)

Fusion is AdapterFusion: Pfeiffer et al., "AdapterFusion: Non-Destructive Task Composition for Transfer Learning", 2021,
arXiv 2005.00247, as in the `adapters` library: V begins as the identity (and 1e-6 elsewhere), K and Q are drawn from
N(0, 0.02^2), and the skip around the adapters is added to what V gives.

The other blocks of compositions need nothing of their own:

    Stack(a, b)                 pf.chain(a, b), of the form "sequential": b gets what a made of the output
    Parallel(a, b)              pf.ensemble(adapter)(frozen, pf.stack([tree_a, tree_b]), x): one output for each
    BatchSplit(a, b)            pf.route(adapter, frozen, pf.stack([tree_a, tree_b]), index): each sample its own

(Of the form "norm" a later adapter is around the earlier: N_a(z + d_b(N_a(z))), where N_a(z) = N(z + d_a(N(z))); the
library's stack has N(z + u + d_b(N(z + u))), where u = d_a(N(z)).)
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_func.addins.added import Adds, Change, change_of
from peft_func.addins.around import nothing
from peft_func.addins.bottleneck import bottleneck, ends
from peft_func.addins.compacter import compacter
from peft_func.addins.mixes import MIXES, Add, average_options, fusion_options
from peft_func.addins.place import place_at
from peft_func.errors import OptionError
from peft_func.functional.model import FunctionalModel
from peft_func.functional.surround import Inner
from peft_func.transforms.transform import Chain, Deferred, Method, Part, Transform, chain, check_name, expanded
from peft_func.trees.keys import split
from peft_func.trees.paths import Tree
from peft_func.trees.select import Where, exact
from peft_func.weights.around import Site
from peft_func.weights.mapping import Weights


def average(methods: Sequence[Method], *, weights: Sequence[float] | None = None, name: str = "average") -> "Mixed":
    """Add a weighted sum of what several adapters add, at each place.

    The tree has one sub-tree for each adapter, under its name. For weights that sum to 1 this is the average of the
    adapters' outputs. (The `adapters` library, also in 1.3, divides it by the number of adapters once more.)

    Args:
        methods: add-ins that add to what modules give (`pf.bottleneck`, `pf.compacter`, `pf.houlsby`, `pf.pfeiffer`,
            averages and fusions of these) at the same places.
        weights: one number for each; all `1 / len(methods)` by default.
        name: the sub-tree.

    Raises:
        OptionError: a method adds nothing to modules, or names or numbers do not fit; at `bind`, if places differ.

    Example:
        >>> import torch, peft_func as pf
        >>> model = pf.functionalize(torch.nn.Sequential(torch.nn.Linear(8, 8)))
        >>> a, b = pf.bottleneck("0", rank=2, name="a"), pf.bottleneck("0", rank=4, name="b")
        >>> frozen, trainable = pf.bind(pf.average([a, b], weights=[0.7, 0.3]), model).init(0)
        >>> list(trainable["average"])
        ['a', 'b']
    """
    methods = _listed(name, methods)
    numbers = [1 / len(methods)] * len(methods) if weights is None else list(weights)
    return Mixed((), None, methods, name, "average", average_options(name, len(methods), weights=numbers))


def gated(methods: Sequence[Method], *, name: str = "gated") -> "Mixed":
    """Add what several adapters add, each weighted for each token by a softmax over linear functions of the activation.

    The tree has one sub-tree for each adapter, under its name, and `gated`: at each place `gate` [adapters, in] (G of
    the equation), zero at the start, where all weigh the same.

    Args:
        methods: as for `pf.average`.
        name: the sub-tree.

    Raises:
        OptionError: as for `pf.average`.

    Example:
        >>> import torch, peft_func as pf
        >>> model = pf.functionalize(torch.nn.Sequential(torch.nn.Linear(8, 8)))
        >>> experts = [pf.bottleneck("0", rank=2, name=f"expert_{i}") for i in range(3)]
        >>> frozen, trainable = pf.bind(pf.gated(experts), model).init(0)
        >>> list(trainable["gated"]["gated"]["0"]["gate"].shape)
        [3, 8]
    """
    return Mixed((), None, _listed(name, methods), name, "gated", {})


def fusion(methods: Sequence[Method], *, dropout: float = 0.0, name: str = "fusion") -> "Mixed":
    r"""Fuse adapters by attention (AdapterFusion): the activation asks, what the adapters add answers.

    The tree has one sub-tree for each adapter, under its name, and `fusion`: at each place `query` [out, in],
    `query_bias` [out], `key` [out, out], `key_bias` [out], `value` [out, out].

    Args:
        methods: as for `pf.average`. To fuse adapters that were trained alone, put their sub-trees into the tree, and
            keep them out of what trains by `pf.partition`.
        dropout: the probability of dropping a score of the attention, in train mode.
        name: the sub-tree.

    Raises:
        OptionError: as for `pf.average`, or `dropout` is no probability.

    Example:
        >>> import torch, peft_func as pf
        >>> model = pf.functionalize(torch.nn.Sequential(torch.nn.Linear(8, 8)))
        >>> a, b = pf.bottleneck("0", rank=2, name="a"), pf.bottleneck("0", rank=4, name="b")
        >>> trained = {method.name: pf.bind(method, model).init(1)[1][method.name] for method in (a, b)}
        >>> adapter = pf.bind(pf.fusion([a, b]), model)
        >>> frozen, tree = adapter.init(0)
        >>> fused, training = pf.partition({"fusion": {**tree["fusion"], **trained}}, r"fusion\.(a|b)\..*")
        >>> list(training["fusion"])
        ['fusion']
        >>> model(adapter.apply(frozen, pf.combine(fused, training)), torch.ones(3, 8)).shape
        torch.Size([3, 8])
    """
    methods = _listed(name, methods)
    return Mixed((), None, methods, name, "fusion", fusion_options(name, len(methods), dropout=dropout))


@dataclass(frozen=True)
class Mixed(Deferred):
    """Adapters at the same places as one part of a chain; made by `pf.average`, `pf.gated` and `pf.fusion`."""

    methods: tuple[Method, ...] = ()
    part: str = ""
    kind: str = ""
    options: Any = None

    def expand(self, model: FunctionalModel) -> Chain:
        """Return the one part in a model."""
        parts = [_one(self.part, expanded(method, model)) for method in self.methods]
        places = [part.resolve(model) for part in parts]
        for part, own in zip(parts, places, strict=True):
            odd = sorted(set(own) ^ set(places[0]))
            if odd:
                raise OptionError(
                    f"{self.part}: {parts[0].name!r} and {part.name!r} are at different places: only one of them is at "
                    f"{', '.join(odd[:4])}; give both the same places"
                )
        return chain(_mixed(exact(places[0]), parts, self.kind, self.part, self.options))


def _listed(name: str, methods: object) -> tuple[Method, ...]:
    check_name(name)
    if not isinstance(methods, list | tuple) or not methods:
        raise OptionError(f"{name} takes a list of add-ins: [pf.bottleneck(..., name='a'), ...]; it got {methods!r}")
    for method in methods:
        if not isinstance(method, Deferred):
            _one(name, method)
    return tuple(methods)


def _one(name: str, method: object) -> Part:
    """Return a method that is one part, and adds to modules."""
    if isinstance(method, Chain) and len(method.parts) == 1 and method.name is None:
        (method,) = method.parts
    if isinstance(method, Part) and method.kind in MIXABLE:
        return method
    found = getattr(method, "name", None) or type(method).__name__
    raise OptionError(
        f"{name} takes single add-ins that add to what modules give ({', '.join(MIXABLE)}); {found!r} is none of them"
    )


def _mixed(where: Where, parts: Sequence[Part], kind: str, name: str, options: Mapping[str, Any]) -> Part:
    """Make the part that mixes others."""
    if not parts:
        raise OptionError(f"{name} takes at least one add-in")
    names = [part.name for part in parts]
    for twice in (word for word in names if names.count(word) > 1 or word == kind):
        raise OptionError(f"{name}: an adapter needs another name than {twice!r}; give name='{twice}_2'")
    forms = sorted({_form(part.options or {}) for part in parts})
    if len(forms) > 1:
        raise OptionError(f"{name}: the adapters are of the forms {', '.join(forms)}; give all the same form")
    mix = MIXES[kind]
    described = [{"kind": part.kind, "name": part.name, "options": part.options} for part in parts]
    width = next((part.options["width"] for part in parts if part.options and part.options.get("width")), None)

    def make(paths: tuple[str, ...], model: FunctionalModel) -> Transform:
        places = [place_at(model, path) for path in paths]
        made = {part.name: part.make(paths, model) for part in parts}

        def draw(weights: Weights, key: int) -> Tree:
            trees = {one: dict(transform.init(weights, split(key, one))) for one, transform in made.items()}
            mixing = {
                place.path: mix.own(len(parts), *ends(place, name, forms[0], width), split(key, place.path), place.like)
                for place in places
            }
            return trees | {kind: {path: leaves for path, leaves in mixing.items() if leaves}}

        def site(path: str, *found: Site) -> Site:
            own = dict(zip(made, found, strict=True))
            change = functools.partial(mixed, mix.add, options, kind, {one: change_of(own[one]) for one in own})
            pick = functools.partial(_picked, {one: own[one].pick for one in own}, kind, path)
            return Site(path, Adds(forms[0], change), name, pick)

        each = [transform.sites for transform in made.values()]
        return Transform(draw, nothing, sites=tuple(map(site, paths, *each)))

    return Part(where, make, check_name(name), kind, {"methods": described, **options}, modules=True)


def _form(options: Mapping[str, Any]) -> str:
    """Return the form of a part from its options: its own, or that of what it mixes."""
    return str(options["form"]) if "form" in options else _form(options["methods"][0]["options"])


def _picked(
    picks: Mapping[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]], kind: str, path: str, tree: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the tensors of every adapter at a place, and those of what mixes them."""
    return {**{one: pick(tree[one]) for one, pick in picks.items()}, kind: tree.get(kind, {}).get(path, {})}


def mixed(
    add: Add, options: Mapping[str, Any], kind: str, changes: Mapping[str, Change], tree: Tree, h: Tensor, inner: Inner
) -> Tensor:
    """Return one change from several."""
    added = torch.stack([change(tree[one], h, inner) for one, change in changes.items()], -2)
    return add(options, {leaf: tensor.to(h.dtype) for leaf, tensor in tree.get(kind, {}).items()}, h, added, inner)


def mixture_at(kind: str, where: Where, *, methods: Sequence[Mapping[str, Any]], name: str, **options: Any) -> Part:
    """Make a mixture again from what a file says of it."""
    parts = [MIXABLE[one["kind"]](where, **one["options"], name=one["name"]) for one in methods]
    return _mixed(where, parts, kind, name, MIXES[kind].check(name, len(parts), **options))


MIXABLE: dict[str, Callable[..., Part]] = {
    "bottleneck": bottleneck,
    "compacter": compacter,
    **{kind: functools.partial(mixture_at, kind) for kind in MIXES},
}
"""What can be mixed, by its kind, and how it is made again."""

"""A method bound to a model: every selector resolved once, every rank and scale fixed."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_func.errors import NameMismatchError, OptionError, TreeError
from peft_func.functional.model import FunctionalModel
from peft_func.transforms.transform import Chain, Method, Part, Transform, expanded
from peft_func.trees.keys import Key, as_key, shapes_only, split
from peft_func.trees.paths import Keys, Tree, insert, join, leaves, map_leaves
from peft_func.weights.around import Around
from peft_func.weights.mapping import Weights


@dataclass(frozen=True)
class BoundPart:
    """One transform at its places in one model.

    Attributes:
        keys: where its sub-tree is: its name, below those of the named chains around it.
        part: the method it comes from.
        paths: the parameters it was selected for.
        seen: those, and the biases that go with them: what its functions see.
        transform: the two functions.
        modules: the modules it was selected for, if it is an add-in.
    """

    keys: Keys
    part: Part
    paths: tuple[str, ...]
    seen: tuple[str, ...]
    transform: Transform
    modules: tuple[str, ...] = ()

    @property
    def options(self) -> dict[str, Any] | None:
        """The options of its constructor as JSON; None for a user's own method."""
        return self.transform.options or self.part.options

    def subtree(self, tree: Mapping[str, Any]) -> Tree:
        """Return the part's own sub-tree of the adapter's tree."""
        for key in self.keys:
            tree = tree.get(key, {})  # a part without leaves has no sub-tree
        return dict(tree)


def bind(method: Method, model: FunctionalModel) -> "Adapter":
    """Resolve a method against a model's real names, shapes and module types.

    Args:
        method: `pf.lora(...)`, a chain, or your own with `pf.on`.
        model: what `pf.functionalize` returned.

    Raises:
        SelectorError: a selector matches nothing.
        OptionError: an option does not fit a place, such as a rank above the matrix's.

    Example:
        >>> import torch, peft_func as pf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = pf.functionalize(net)
        >>> adapter = pf.bind(pf.chain(pf.lora("0", rank=2), pf.train("2")), model)
        >>> frozen, trainable = adapter.init(0)
        >>> list(trainable["lora"]["0.weight"]), list(trainable["train"]), list(frozen)
        (['A', 'B'], ['2.weight', '2.bias'], ['0.weight', '0.bias'])
        >>> model(adapter.apply(frozen, trainable), torch.ones(3, 4)).shape
        torch.Size([3, 2])
    """
    if not isinstance(model, FunctionalModel):
        raise OptionError(
            f"bind takes a functional model, not a {type(model).__name__}; call pf.functionalize(net) first"
        )
    if not isinstance(method, Part | Chain):
        raise OptionError(f"bind takes a method such as pf.lora(...), not a {type(method).__name__}; see pf.on")
    return Adapter(method, model)


class Adapter:
    """A bound method: `init` draws its trees, `apply` gives effective weights. Immutable; both are pure.

    Attributes:
        method: what was bound, as it is in this model: what was deferred (`pf.first_match`) is in its place.
        model: what it was bound to.
        parts: the transforms in the order they apply.
        spec: the shape of every leaf of `trainable`, by its keys.
        held: the base weights that train themselves: they are in `trainable`, not in `frozen`.
        arounds: whether there are add-ins among the parts.
    """

    def __init__(self, method: Method, model: FunctionalModel) -> None:
        self.method = expanded(method, model)
        self.model = model
        with shapes_only():  # sizes may come from a stranger's file
            self.parts = tuple(_bound(self.method, model, ()))
        # The leaves' shapes are found by a dry run on meta tensors; an init of a user that needs real values (a
        # singular value decomposition, say) is run on the real weights, where a mistake is raised again.
        meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in model.params.items()}
        try:
            with shapes_only():
                tree, held = self._init(meta, 0)
        except (RuntimeError, TypeError, ValueError, AttributeError, ArithmeticError):
            tree, held = self._init(model.params, 0)
        self.arounds = any(part.transform.sites for part in self.parts)
        self.spec = {keys: tuple(tensor.shape) for keys, tensor in leaves(tree)}
        self.held = frozenset(held)
        self._frozen_names = frozenset(model.params) - self.held

    def init(self, key: Key) -> tuple[dict[str, Tensor], Tree]:
        """Return the two trees `(frozen, trainable)`.

        Args:
            key: an int, or a `torch.Generator` from which one number is drawn. Every leaf depends on it and on the
                leaf's own path only; no global generator is touched.

        Returns:
            `frozen`: the base weights by name, the same tensors as `model.params`, without those that train.
            `trainable`: `{name of part: {path or group: {leaf: tensor}}}`; new tensors that require no gradient yet.
        """
        return self.frozen, self._init(self.model.params, as_key(key))[0]

    @property
    def frozen(self) -> dict[str, Tensor]:
        """The base weights that do not train, the first tree of `init`: a new dict of the model's own tensors."""
        return {name: tensor for name, tensor in self.model.params.items() if name not in self.held}

    def apply(self, frozen: Mapping[str, Tensor], trainable: Mapping[str, Any]) -> Weights:
        """Return the effective weights: pure, cheap (nothing is formed) and differentiable in both trees.

        Args:
            frozen: the base weights by name, as `init` gives them.
            trainable: a tree of the same names and shapes as `init` gives; values, dtypes and devices are yours.

        Raises:
            TreeError: a leaf is missing, unknown, misshapen, or no floating-point tensor.
            NameMismatchError: a base weight is missing or unknown.
        """
        self._check(frozen, trainable)
        base = dict(frozen)
        cast = {self.model.params[name].dtype: tensor.dtype for name, tensor in frozen.items()}
        for part in self.parts:
            if part.transform.holds is not None:
                for name, tensor in part.transform.holds(part.subtree(trainable)).items():
                    own = self.model.params[name].dtype
                    base[name] = tensor.to(cast.get(own, own))  # as the frozen weights are, if all were cast
        ordered = {name: base[name] for name in self.model.params}
        weights = Weights(ordered, {**self.model.params, **frozen}, self.model.layouts)
        for part in self.parts:
            weights = _step(part, part.subtree(trainable), weights)
        return weights

    def surroundings(self, trainable: Mapping[str, Any]) -> list[Around]:
        """Return the functions around modules that `apply` puts into the weights, with the tensors of a tree."""
        trees = ((part.transform.sites, part.subtree(trainable)) for part in self.parts)
        return [site.around(tree) for sites, tree in trees for site in sites]

    def _init(self, params: Mapping[str, Tensor], key: int) -> tuple[Tree, set[str]]:
        tree: Tree = {}
        held: dict[str, Keys] = {}
        weights = Weights(params, params, self.model.layouts)
        for part in self.parts:
            drawn = part.transform.init(weights.restrict(part.seen), _split_keys(key, part.keys))
            if not isinstance(drawn, Mapping):
                raise TreeError(f"{join(part.keys)}: init gave a {type(drawn).__name__}; it gives a dict of tensors")
            # A copy of each leaf: what trains must never be the base itself.
            own = map_leaves(lambda tensor: tensor.detach().clone(), drawn)
            if any(tensor.is_meta for tensor in weights.base.values()):
                own = map_leaves(lambda tensor: tensor.to("meta"), own)  # an init need not follow the device
            insert(tree, part.keys, own)
            for name in part.transform.holds(own) if part.transform.holds else ():
                if name in held:
                    raise OptionError(f"both {join(held[name])!r} and {join(part.keys)!r} train {name!r} itself")
                held[name] = part.keys
            weights = _step(part, own, weights)
        return tree, set(held)

    def _check(self, frozen: Mapping[str, Tensor], trainable: Mapping[str, Any]) -> None:
        if not isinstance(frozen, Mapping):
            raise TreeError(f"frozen is a {type(frozen).__name__}; call adapter.apply(frozen, trainable), two dicts")
        if frozen.keys() != self._frozen_names:
            odd = sorted(frozen.keys() ^ self._frozen_names)
            raise NameMismatchError(
                f"frozen must hold the {len(self._frozen_names)} base weights that do not train; missing or unknown: "
                f"{', '.join(odd[:5])}. Pass the first tree of adapter.init"
            )
        params = self.model.params
        for name, tensor in frozen.items():
            if tensor is not params[name] and (not isinstance(tensor, Tensor) or tensor.shape != params[name].shape):
                found = tuple(tensor.shape) if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
                wanted = tuple(params[name].shape)
                raise TreeError(f"the base weight {name!r} is {found}; it must be a tensor of shape {wanted}")
        check_tree(trainable, self.spec, {tensor.device for tensor in frozen.values()})

    def __repr__(self) -> str:
        return f"Adapter({', '.join(join(part.keys) for part in self.parts)} on {self.model!r})"


def _step(part: BoundPart, tree: Tree, weights: Weights) -> Weights:
    """Apply one part to the weights that it sees, and to no others."""
    if part.transform.sites:
        return weights.surrounded(site.around(tree) for site in part.transform.sites)
    changes = part.transform.apply(tree, weights.restrict(part.seen))
    if not isinstance(changes, Mapping):
        raise TreeError(f"{join(part.keys)}: apply gave a {type(changes).__name__}; it gives a dict of new weights")
    return weights.updated(changes, part.seen)


def check_tree(
    tree: Mapping[str, Any], spec: Mapping[Keys, tuple[int, ...]], devices: Collection[torch.device] = ()
) -> None:
    """Check that a tree has exactly these leaves, and is on these devices if there are any.

    Raises:
        TreeError: names the first leaf that is missing, unknown, misshapen, of no floating-point dtype, or elsewhere.
    """
    advice = "pass the second tree of adapter.init, or one of its structure"
    seen = 0
    for keys, tensor in leaves(tree):
        shape = spec.get(keys)
        if shape is None:
            raise TreeError(f"the tree has a leaf {join(keys)!r} that this adapter does not know; {advice}")
        if tensor.shape != shape:
            raise TreeError(f"the leaf {join(keys)!r} is {tuple(tensor.shape)}, this adapter's is {shape}; {advice}")
        if not tensor.is_floating_point():
            raise TreeError(f"the leaf {join(keys)!r} is {tensor.dtype}; the leaves of an adapter are floating-point")
        if devices and tensor.device not in devices:
            there = str(next(iter(devices)))
            raise TreeError(
                f"the leaf {join(keys)!r} of the adapter is on {tensor.device}, the weights on {there}; move the tree: "
                f"pf.map_leaves(lambda t: t.to({there!r}), trainable)"
            )
        seen += 1
    if seen != len(spec):
        have = {keys for keys, _ in leaves(tree)}
        missing = [join(keys) for keys in spec if keys not in have]
        raise TreeError(f"the tree lacks {len(missing)} leaves: {', '.join(missing[:5])}; {advice}")


def _bound(method: Method, model: FunctionalModel, prefix: Keys) -> Iterator[BoundPart]:
    if isinstance(method, Chain):
        inner = prefix if method.name is None else (*prefix, method.name)
        for part in method.parts:
            yield from _bound(part, model, inner)
    else:
        paths = method.resolve(model)
        if method.modules:
            transform = method.make(paths, model)
            model.hosts.add(site.path for site in transform.sites)
            yield BoundPart((*prefix, method.name), method, (), (), transform, paths)
            return
        seen = paths if method.also is None else tuple(dict.fromkeys((*paths, *method.also(paths, model))))
        yield BoundPart((*prefix, method.name), method, paths, seen, method.make(paths, model))


def _split_keys(key: int, keys: Keys) -> int:
    for name in keys:
        key = split(key, name)
    return key

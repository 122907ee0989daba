"""A method is two pure functions at chosen places, or a chain of such."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from peft_func.errors import OptionError, SelectorError
from peft_func.functional.model import FunctionalModel
from peft_func.functional.walk import resolve_modules, settled
from peft_func.trees.paths import Tree
from peft_func.trees.select import Info, Where, as_selector, resolve
from peft_func.weights.around import Site
from peft_func.weights.mapping import Weights
from peft_func.weights.matrix import Matrix
from peft_func.weights.operator import Operator

Changes: TypeAlias = Mapping[str, Tensor | Operator | Matrix]
"""What a transform gives back: the new weights, by name, of what it changes."""


@dataclass(frozen=True)
class Transform:
    """Two pure functions, as in optax; nothing else is needed for a new method.

    Attributes:
        init: `(weights, key) -> tree`: the first values of what trains, a nested dict of tensors. `weights` is the
            mapping restricted to what was selected, as transformed so far; `key` is an int (see `pf.split`).
        apply: `(tree, weights) -> changes`: the weights that change, by name.
        holds: `tree -> {name: tensor}`: base weights that live in the tree itself (they train), or None.
        options: those of the constructor as JSON, where binding made them more definite, for files.
        sites: functions around calls of modules (see `pf.around`); a transform that has some changes no weight.
    """

    init: Callable[[Weights, int], Tree]
    apply: Callable[[Tree, Weights], Changes]
    holds: Callable[[Tree], Mapping[str, Tensor]] | None = None
    options: dict[str, Any] | None = None
    sites: tuple[Site, ...] = ()


Make: TypeAlias = Callable[[tuple[str, ...], FunctionalModel], Transform]
"""Builds a transform for the places (of parameters, or of modules) that its selector chose in a model: ranks, scales
and groups are fixed here."""


@dataclass(frozen=True)
class Part:
    """A method at its places, under its name; made by `pf.lora`, `pf.on` and the like.

    Attributes:
        where: the selector of its places.
        make: builds the transform, once, when it is bound.
        name: its sub-tree in the adapter's tree.
        options: what the constructor `kind` needs to build it again, as JSON; None for a user's own method.
        kind: the name of the constructor, for files.
        matrices: whether it looks only at parameters of two dimensions or more.
        also: further parameters that go with the chosen ones (their biases).
        modules: whether its places are modules, not parameters.
    """

    where: Where
    make: Make
    name: str
    kind: str | None = None
    options: dict[str, Any] | None = None
    matrices: bool = True
    also: Callable[[tuple[str, ...], FunctionalModel], tuple[str, ...]] | None = None
    modules: bool = False

    def resolve(self, model: FunctionalModel) -> tuple[str, ...]:
        """Return the names of the parameters it is for, or the paths of the modules.

        Raises:
            SelectorError: there are none.
        """
        if self.modules:
            return resolve_modules(self.where, model, self.name)
        infos = [info for info in model.infos.values() if info.dtype.is_floating_point]  # others cannot train
        where = settled(self.where, model)
        if not self.matrices:
            return resolve(where, infos, self.name)
        selector = as_selector(where)
        chosen = tuple(info.path for info in infos if _is_matrix(info) and selector(info.path, info))
        if chosen:
            return chosen
        vectors = resolve(where, infos, self.name)  # raises, unless it selects biases and norms
        raise SelectorError(
            f"{self.name}: the selector matches only parameters of fewer than two dimensions "
            f"({', '.join(vectors[:4])}), and {self.name} adapts matrices; to train these themselves, use pf.train"
        )


def _is_matrix(info: Info) -> bool:
    # nn.MultiheadAttention(add_bias_kv=True) has biases of three dimensions.
    return info.ndim >= 2 and info.path.rpartition(".")[2] not in ("bias_k", "bias_v")


@dataclass(frozen=True)
class Chain:
    """Methods applied left to right; a named chain has a sub-tree of its own."""

    parts: tuple["Part | Chain", ...]
    name: str | None = None


@dataclass(frozen=True)
class Deferred(Chain, ABC):
    """A chain whose parts are known once the model is, such as `pf.first_match`; until then it has none."""

    @abstractmethod
    def expand(self, model: FunctionalModel) -> Chain:
        """Return the chain that it stands for in a model."""


Method: TypeAlias = Part | Chain


def on(where: Where, transform: Transform, *, name: str) -> Part:
    r"""Put your own transform at chosen places.

    Args:
        where: a selector over all parameters, biases and norms included.
        transform: the two functions.
        name: its sub-tree in the adapter's tree.

    Example:
        >>> import torch, peft_func as pf
        >>> shift = pf.Transform(
        ...     init=lambda weights, key: {p: {"shift": torch.zeros_like(w)} for p, w in weights.items()},
        ...     apply=lambda tree, weights: {p: w + tree[p]["shift"] for p, w in weights.items()},
        ... )
        >>> adapter = pf.bind(pf.on(r".*bias", shift, name="shift"), pf.functionalize(torch.nn.Linear(4, 3)))
        >>> frozen, trainable = adapter.init(0)
        >>> list(trainable["shift"]["bias"])
        ['shift']
    """
    if not isinstance(transform, Transform):
        raise OptionError(f"on takes a pf.Transform(init, apply), not a {type(transform).__name__}")
    return Part(where, functools.partial(_as_given, transform), check_name(name), matrices=False)


def _as_given(transform: Transform, paths: tuple[str, ...], model: FunctionalModel) -> Transform:
    return transform


def chain(*methods: Method, name: str | None = None) -> Chain:
    r"""Compose methods left to right: later ones see what earlier ones made.

    Args:
        *methods: parts and chains. A chain without a name is as if its parts stood there themselves, so chaining is
            associative, and `pf.chain()` is its unit.
        name: a sub-tree of its own for the whole chain.

    Raises:
        OptionError: two parts have one name, or something is no method.

    Example:
        >>> import peft_func as pf
        >>> method = pf.chain(pf.lora(["q_proj", "v_proj"], rank=8), pf.train(r"classifier\..*"))
        >>> [part.name for part in method.parts]
        ['lora', 'train']
    """
    parts: list[Method] = []
    for method in methods:
        if not isinstance(method, Part | Chain):
            raise OptionError(
                f"chain takes methods, such as pf.lora(...); it got a {type(method).__name__}. "
                "A pf.Transform gets its places with pf.on(where, transform, name=...)"
            )
        if isinstance(method, Chain) and method.name is None and not isinstance(method, Deferred):
            parts += method.parts
        else:
            parts.append(method)
    names = [part.name for part in parts]
    twice = [name for name in names if name is not None and names.count(name) > 1]
    if twice:
        raise OptionError(f"two parts of the chain are named {twice[0]!r}; give one another name: name='{twice[0]}_2'")
    return Chain(tuple(parts), None if name is None else check_name(name))


def expanded(method: Method, model: FunctionalModel) -> Method:
    """Return a method with every deferred chain in it replaced by what it stands for in a model."""
    if isinstance(method, Deferred):
        return expanded(method.expand(model), model)
    if not isinstance(method, Chain):
        return method
    parts = tuple(expanded(part, model) for part in method.parts)
    same = all(new is old for new, old in zip(parts, method.parts, strict=True))
    return method if same else chain(*parts, name=method.name)


def check_name(name: object) -> str:
    """Return the name of a part, if it can be one.

    Raises:
        OptionError: it is empty, no string, or has a dot in it.
    """
    if not isinstance(name, str) or not name or "." in name:
        raise OptionError(f"a part's name is a word without dots, such as 'lora'; it got {name!r}")
    return name

"""Each module to the first check that says yes: a strategy as a list of pairs (check, method).

The net's modules are walked in registration order, parents before children, from the net itself (path "") on. A module
goes to the first pair whose check says yes; the walk does not go below it, and the pair's method is put at the
parameters in and under it. Where no module check says yes, the pairs for parameters are asked about the parameters that
stand directly in the module. What nothing matched is frozen. It is a selection and no more: the result in a model is an
ordinary chain, whose parts are restricted to what they got. (The "caps" of qiauil's GIFt library, as a pure function.)
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from peft_func.errors import OptionError, SelectorError
from peft_func.functional.model import FunctionalModel
from peft_func.functional.walk import below, walk
from peft_func.transforms.transform import Chain, Deferred, Method, Part, chain, check_name
from peft_func.trees.modules import ModuleInfo, OwnedInfo, says_yes
from peft_func.trees.select import AllOf, Selector, Where, as_selector, exact, nearest

Action: TypeAlias = Method | Callable[[Selector], Method] | None
"""What a pair does: a method, a function `where -> method` such as `functools.partial(pf.lora, rank=4)`, or nothing."""


@dataclass(frozen=True)
class ParameterCheck:
    """A check of the parameters that no module check took; made by `pf.parameter`."""

    where: Where


def parameter(where: Where) -> ParameterCheck:
    """Mark a check of `pf.first_match` as one of parameters: `(pf.parameter(r".*bias"), pf.train)`.

    It is asked about the parameters that stand directly in modules for which no module check says yes.

    Args:
        where: a selector over parameters.
    """
    as_selector(where)
    return ParameterCheck(where)


@dataclass(frozen=True)
class Cap:
    """A check and what to do where it says yes.

    Attributes:
        check: a selector over modules, or over parameters.
        action: what is done there.
        of_parameter: whether it asks parameters.
    """

    check: Where
    action: Action
    of_parameter: bool = False

    def method(self, names: Sequence[str], roots: Sequence[str], model: FunctionalModel) -> Method:
        """Return its method, restricted to these parameters; `roots` are the modules that it got."""
        if self.action is None:
            return chain()
        method = self.action if isinstance(self.action, Part | Chain) else self.action(exact(names))
        if not isinstance(method, Part | Chain):
            raise OptionError(
                f"first_match: the function for {self.check!r} gave a {type(method).__name__}; it takes a selector and "
                "returns a method, such as functools.partial(pf.lora, rank=4)"
            )
        return _restricted(method, exact(names), roots, model)


@dataclass(frozen=True)
class Claim:
    """A module, or a parameter, that went to a pair.

    Attributes:
        cap: the index of the pair.
        path: of the module or the parameter.
        class_name: of the module, or of the one that owns the parameter.
        parameters: the names of all parameters that went with it.
    """

    cap: int
    path: str
    class_name: str
    parameters: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.path!r} ({self.class_name})"


@dataclass(frozen=True)
class FirstMatch(Deferred):
    """A list of pairs (check, method), of which each module goes to the first; made by `pf.first_match`.

    Attributes:
        caps: the pairs.
        root: the classes of which the net must be one, or their names; empty for any.
    """

    caps: tuple[Cap, ...] = ()
    root: tuple[type | str, ...] = ()

    def claims(self, model: FunctionalModel, roots: Sequence[str] = ("",)) -> list[Claim]:
        """Return what each pair gets, in the order of the walk; nothing is checked.

        Args:
            model: the model to walk.
            roots: the modules where the walk starts.
        """
        tree, seen = walk(model._skeleton.root), set[str]()
        return [claim for path in roots for claim in self._claim(path, tree, model, seen)]

    def _claim(self, path: str, tree: dict[str, ModuleInfo], model: FunctionalModel, seen: set[str]) -> Iterator[Claim]:
        if path in seen:
            return
        seen.add(path)
        info = tree[path]
        taken = next((i for i, cap in enumerate(self.caps) if not cap.of_parameter and says_yes(cap.check, info)), None)
        if taken is not None:
            names = dict.fromkeys(name for module in below(tree, path) for name in module.own)
            yield Claim(taken, path, info.class_name, tuple(names))
            return
        for name in info.own:
            owned = OwnedInfo(**vars(model.infos[name]), owner=info)
            for i, cap in enumerate(self.caps):
                if cap.of_parameter and says_yes(cap.check, owned):
                    yield Claim(i, name, info.class_name, (name,))
                    break
        for child in info.children:
            yield from self._claim(child, tree, model, seen)

    def expand(self, model: FunctionalModel, roots: Sequence[str] = ("",)) -> Chain:
        """Return the chain of its methods, each at what it got.

        Raises:
            OptionError: the net is of another class than `root` asks for.
            SelectorError: a pair got nothing, its method selects nothing in a module that it got, or two pairs got one
                tensor under two of its names.
        """
        self._check_root(model, roots)
        claims = self.claims(model, roots)
        _check_shared(claims, self.caps)
        methods = []
        for number, cap in enumerate(self.caps):
            own = [claim for claim in claims if claim.cap == number]
            if not own:
                raise SelectorError(self._no_match(cap, model, claims))
            names = tuple(dict.fromkeys(name for claim in own for name in claim.parameters))
            method = cap.method(names, [claim.path for claim in own if not cap.of_parameter], model)
            methods.append(method)
            chosen = selected(method, model)
            for claim in own if cap.action is not None else ():
                if chosen.isdisjoint(claim.parameters):
                    raise SelectorError(
                        f"first_match: {claim} goes to {cap.check!r}, whose method selects none of its parameters "
                        f"({', '.join(claim.parameters[:4]) or 'it has none'}). A pair before it with None leaves it "
                        "frozen: (check, None)"
                    )
        return chain(*methods, name=self.name)

    def _check_root(self, model: FunctionalModel, roots: Sequence[str]) -> None:
        for path in roots if self.root else ():
            found = type(model._skeleton.root.get_submodule(path))
            if not any(base in self.root or base.__name__ in self.root for base in found.__mro__):
                wanted = " or ".join(kind if isinstance(kind, str) else kind.__name__ for kind in self.root)
                place = f"the module {path!r}" if path else "the net"
                raise OptionError(
                    f"first_match is for nets of class {wanted} (root=), and {place} is a {found.__name__}"
                )

    def _no_match(self, cap: Cap, model: FunctionalModel, claims: Sequence[Claim]) -> str:
        """Say why a pair got nothing: earlier ones took it all, or there is no such module."""
        tree = walk(model._skeleton.root)
        infos: list[Any] = list(tree.values())
        if cap.of_parameter:
            infos = [OwnedInfo(**vars(model.infos[name]), owner=info) for info in tree.values() for name in info.own]
        what = "parameter" if cap.of_parameter else "module"
        there = [info.path for info in infos if says_yes(cap.check, info)]
        if there:
            taken = ", ".join(dict.fromkeys(str(claim) for claim in claims[:5]))
            return (
                f"first_match: {cap.check!r} gets nothing: {', '.join(map(repr, there[:3]))} went to other pairs, or "
                f"with modules above. Taken: {taken}. The first pair that says yes gets the {what}: put the "
                "narrower check first"
            )
        names = {word for info in infos for path in info.names for word in (path, path.rpartition(".")[2])}
        names |= {kind.__name__ for info in infos for kind in info.modules}
        words = re.findall(r"['\"]([^'\"]*)['\"]", repr(cap.check))
        close = dict.fromkeys(name for word in words for name in nearest(word, names, 4))
        return f"first_match: {cap.check!r} matches no {what} of the {len(infos)}. " + (
            f"The nearest names: {', '.join(list(close)[:6])}" if close else "print(pf.tour(model)) lists them"
        )


def first_match(
    *caps: tuple[Where | ParameterCheck, Action] | tuple[Where | ParameterCheck, Action, Mapping[str, Any]],
    root: type | str | Sequence[type | str] | None = None,
    name: str | None = None,
) -> FirstMatch:
    r"""Give each module of a net to the first check that says yes.

    The order of the walk is that of `pf.tour`: the net itself, path "", is first (so `r".*"` takes it whole), then its
    modules in registration order, parents before children. The walk does not go below a module that was taken. What no
    check takes stays frozen, and its BatchNorm statistics are returned by `model.with_state` as always. A shared module
    is met once, under all of its paths.

    Args:
        *caps: pairs `(check, method)`. The check is any selector, read over modules (a regex for the whole path, a list
            of names, `pf.named`, `pf.class_named`, `pf.of_type`, `pf.index`, `pf.position`, ...), or over parameters as
            `pf.parameter(check)`. The method is a function `where -> method` (`pf.train`,
            `functools.partial(pf.lora, rank=4)`), which a third element may give options (`(check, pf.lora, {"rank":
            4})`); a method, whose own selector then chooses among what the check took; a `first_match`, which walks
            what was taken; or None, which leaves it frozen.
        root: the class that the net must have, its name, or several.
        name: a sub-tree of its own for all of its parts. Parts of one name need `name=` of their own, as in a chain.

    Raises:
        OptionError: a pair is none; at `bind`, the net is of no class of `root`.
        SelectorError: at `bind`, a pair gets nothing, or its method selects nothing in a module that it got.

    Example:
        >>> import torch, peft_func as pf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
        >>> method = pf.first_match(
        ...     (pf.position(-1), pf.train),
        ...     (pf.class_named("Linear"), pf.lora, {"rank": 2}),
        ...     (pf.parameter(r".*bias"), pf.train, {"name": "bias"}),
        ... )
        >>> frozen, trainable = pf.bind(method, pf.functionalize(net)).init(0)
        >>> {part: list(tree) for part, tree in trainable.items()}
        {'train': ['2.weight', '2.bias'], 'lora': ['0.weight'], 'bias': ['1.bias']}
    """
    roots = () if root is None else (root,) if isinstance(root, type | str) else tuple(root)
    if not all(isinstance(kind, type | str) for kind in roots):
        raise OptionError(f"first_match: root={root!r} is no class, name of a class, or list of such")
    if not caps:
        raise OptionError("first_match takes pairs (check, method), such as (pf.named('fc'), pf.train); it got none")
    return FirstMatch((), None if name is None else check_name(name), tuple(map(_cap, caps)), roots)


def _cap(pair: object) -> Cap:
    if not isinstance(pair, tuple) or len(pair) not in (2, 3):
        raise OptionError(
            f"first_match takes pairs (check, method), such as (pf.named('fc'), pf.train); it got {pair!r}"
        )
    check, action, options = (*pair, {})[:3]
    if not (action is None or isinstance(action, Part | Chain) or callable(action)):
        raise OptionError(
            f"first_match: a {type(action).__name__} is no method for {check!r}; give a method, a function where -> "
            "method, or None"
        )
    if options:
        if action is None or isinstance(action, Part | Chain):
            raise OptionError(f"first_match: the options {dict(options)!r} need a function to go to, such as pf.lora")
        action = functools.partial(action, **options)  # a copy: pairs share no mutable options
    of_parameter = isinstance(check, ParameterCheck)
    if of_parameter and isinstance(action, FirstMatch):
        raise OptionError(f"first_match: {check!r} gets parameters, and a first_match walks modules")
    where = check.where if isinstance(check, ParameterCheck) else check
    as_selector(where)
    return Cap(where, action, of_parameter)


def _restricted(method: Method, names: Selector, roots: Sequence[str], model: FunctionalModel) -> Method:
    """Return a method at those of its places that are among these parameters."""
    if isinstance(method, FirstMatch):
        return method.expand(model, roots)
    if isinstance(method, Deferred):
        method = method.expand(model)
    if isinstance(method, Chain):
        return chain(*(_restricted(part, names, roots, model) for part in method.parts), name=method.name)
    own = as_selector(method.where)
    return method if own == names else replace(method, where=AllOf((names, own)))


def selected(method: Method, model: FunctionalModel) -> set[str]:
    """Return the names of the parameters that a method without deferred parts selects; none is no error."""
    if isinstance(method, Chain):
        return {name for part in method.parts for name in selected(part, model)}
    with contextlib.suppress(SelectorError):
        return set(method.resolve(model))
    return set()


def _check_shared(claims: Sequence[Claim], caps: Sequence[Cap]) -> None:
    """Refuse two pairs that got one tensor: tied weights, or a module shared by two that were taken."""
    first: dict[str, Claim] = {}
    for claim in claims:
        for name in claim.parameters:
            other = first.setdefault(name, claim)
            if other.cap != claim.cap and not caps[other.cap].action is caps[claim.cap].action is None:
                raise SelectorError(
                    f"first_match: {name!r} is shared by {other} and {claim}, which go to {caps[other.cap].check!r} "
                    f"and to {caps[claim.cap].check!r}; let one check take both"
                )

"""Selectors over modules: what is known of a module where it is chosen, and checks of its name, class and place.

The selectors of `trees.select` (regex, list of names, `pf.glob`, `pf.of_type`, `pf.index`, ...) read a module as they
read a parameter: a module has one path and its aliases. Those of this file combine with them by `&`, `|` and `~`, and
`named` and `class_named` also select parameters, by the names and classes of the modules that own them.

For those who come from qiauil's GIFt library, its factories and what they are in a pair `(check, method)` of
`pf.first_match`:

    mc_name_equal2("fc1")                         pf.named("fc1")
    mc_name_equal2_sequence(["fc1", "fc2"])       pf.named("fc1", "fc2")
    mc_name_in("fc1 fc2")                         pf.named("fc1 fc2", within=True)
    mc_name_in_sequence(["fc1 fc2", "conv1"])     pf.named("fc1 fc2", "conv1", within=True)
    mc_name_contains("fc")                        pf.named("*fc*")
    mc_name_contains_sequence(["fc", "conv"])     pf.named("*fc*", "*conv*")
    mc_cname_...                                  pf.class_named(..., subclasses=False), likewise
    ma_replace(factory)                           the method: pf.lora, pf.train, functools.partial(pf.lora, rank=3), ...
    pc_independent()                              pf.parameter(pf.independent())
"""

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NoReturn, cast

from peft_func.errors import SelectorError
from peft_func.trees.select import Info, Selector, Where, as_selector


@dataclass(frozen=True)
class ModuleInfo:
    """What a check sees of a module; it stands where selectors take an `Info`.

    Attributes:
        path: its path, "" for the net itself.
        modules: its class, as the only element.
        aliases: its other paths, where it is shared.
        own: the names in `model.params` of the parameters that are directly in it.
        children: the paths of the modules directly in it.
        position: its index among its siblings.
        siblings: how many modules its parent has; 0 for the net itself.
    """

    path: str
    modules: tuple[type, ...]
    aliases: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    children: tuple[str, ...] = ()
    position: int = 0
    siblings: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Every path of the module."""
        return (self.path, *self.aliases)

    @property
    def class_name(self) -> str:
        """The name of its class."""
        return self.modules[0].__name__

    def _refuse(self) -> NoReturn:
        raise SelectorError(
            f"the module {self.path!r} ({self.class_name}) has no shape, dtype or dimensions; ask these of a "
            "parameter: (pf.parameter(check), method)"
        )

    shape = dtype = ndim = property(_refuse)


@dataclass(frozen=True)
class OwnedInfo(Info):
    """A parameter, together with the module in which a walk met it."""

    owner: ModuleInfo = field(kw_only=True)


def says_yes(check: Where, info: ModuleInfo | Info) -> bool:
    """Ask a check about a module or a parameter."""
    return as_selector(check)(info.path, cast("Info", info))


@dataclass(frozen=True)
class Named(Selector):
    """Modules by their own name, the last one of their path; parameters by theirs, or by their module's."""

    texts: tuple[str, ...]
    within: bool = False

    def __call__(self, path: str, info: Info) -> bool:
        return any(_fits(last, self) for name in info.names if (last := name.rpartition(".")[2]))

    def __repr__(self) -> str:
        return _call("named", self.texts, within=self.within)


@dataclass(frozen=True)
class ClassNamed(Selector):
    """Modules by the name of their class, or of a class that it derives from; parameters by that of their module."""

    texts: tuple[str, ...]
    within: bool = False
    subclasses: bool = True

    def __call__(self, path: str, info: Info) -> bool:
        classes = [base for kind in info.modules for base in (kind.__mro__ if self.subclasses else (kind,))]
        return any(_fits(kind.__name__, self) for kind in classes)

    def __repr__(self) -> str:
        exactly = {} if self.subclasses else {"subclasses": False}
        return _call("class_named", self.texts, within=self.within, **exactly)


@dataclass(frozen=True)
class Position(Selector):
    """Modules by their index among their siblings."""

    numbers: frozenset[int]

    def __call__(self, path: str, info: Info) -> bool:
        owner = _owner(info, "position")
        return bool({owner.position, owner.position - owner.siblings} & self.numbers) if owner.siblings else False

    def __repr__(self) -> str:
        return _call("position", sorted(self.numbers))


@dataclass(frozen=True)
class Independent(Selector):
    """Modules that have both modules and parameters of their own; parameters that stand directly in such a one."""

    def __call__(self, path: str, info: Info) -> bool:
        owner = _owner(info, "independent")
        return bool(owner.children and owner.own)

    def __repr__(self) -> str:
        return _call("independent", ())


def named(*texts: str, within: bool = False) -> Selector:
    """Select by a module's own name, the last of its path: `pf.named("fc1")`, `pf.named("*proj*", "gate")`.

    Args:
        *texts: names, or shell patterns for them; one that fits is enough. The net itself has no name.
        within: turn the question round: the module's name occurs in a text.

    Raises:
        SelectorError: a text is no string, or there is none.

    Example:
        >>> import torch, peft_func as pf
        >>> model = pf.functionalize(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)))
        >>> list(pf.bind(pf.train(pf.named("0") & pf.class_named("Linear")), model).init(0)[1]["train"])
        ['0.weight', '0.bias']
    """
    return Named(_texts("named", texts), within)


def class_named(*texts: str, within: bool = False, subclasses: bool = True) -> Selector:
    """Select by the name of a module's class: `pf.class_named("Linear")`, `pf.class_named("*Norm*")`.

    `pf.of_type(nn.Linear)` asks for the class itself; this needs no import, so it can be written in a file.

    Args:
        *texts: names, or shell patterns for them; one that fits is enough.
        within: turn the question round: the class's name occurs in a text.
        subclasses: also take classes that derive from one whose name fits.

    Raises:
        SelectorError: a text is no string, or there is none.

    Example:
        >>> import torch, peft_func as pf
        >>> model = pf.functionalize(torch.nn.TransformerEncoderLayer(4, 2, 8))
        >>> list(pf.bind(pf.train(pf.class_named("Linear") & pf.named("out_*")), model).init(0)[1]["train"])
        ['self_attn.out_proj.weight', 'self_attn.out_proj.bias']
    """
    return ClassNamed(_texts("class_named", texts), within, subclasses)


def position(*numbers: int) -> Selector:
    """Select modules by their index among their siblings; `pf.position(-1)` is the last module of each parent.

    Only `pf.first_match` walks the modules, so only its checks can ask this. (`pf.index` asks for layer numbers.)

    Raises:
        SelectorError: a number is no int, or there is none.
    """
    if not numbers or not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        raise SelectorError(f"position takes whole numbers, such as pf.position(0, -1); it got {numbers!r}")
    return Position(frozenset(numbers))


def independent() -> Selector:
    """Select modules with both modules and parameters of their own, or the parameters that stand beside modules.

    Only `pf.first_match` walks the modules, so only its checks can ask this: `(pf.parameter(pf.independent()),
    pf.train)` trains class tokens and position embeddings that stand directly in a vision transformer.
    """
    return Independent()


def _fits(name: str, selector: Named | ClassNamed) -> bool:
    if selector.within:
        return any(name in text for text in selector.texts)
    return any(fnmatch.fnmatchcase(name, text) for text in selector.texts)


def _owner(info: ModuleInfo | Info, what: str) -> ModuleInfo:
    owner = info if isinstance(info, ModuleInfo) else getattr(info, "owner", None)
    if owner is None:
        raise SelectorError(f"pf.{what} asks for a place in the tree of modules, which only pf.first_match walks")
    return owner


def _texts(name: str, texts: Iterable[object]) -> tuple[str, ...]:
    found = tuple(texts)
    if not found or not all(isinstance(text, str) and text for text in found):
        raise SelectorError(f"{name} takes names, such as pf.{name}('fc1', 'fc2'); it got {found!r}")
    return cast("tuple[str, ...]", found)


def _call(name: str, args: Iterable[object], *, within: bool = False, **options: object) -> str:
    options |= {"within": True} if within else {}
    return f"{name}({', '.join([*map(repr, args), *(f'{key}={value!r}' for key, value in options.items())])})"

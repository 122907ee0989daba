"""The modules of a net in the order of a walk: registration order, parents before children, each module once."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from torch import nn

from peft_func.errors import SelectorError
from peft_func.trees.modules import ModuleInfo
from peft_func.trees.select import AllOf, AnyOf, Info, Not, Selector, Where, as_selector, resolve

if TYPE_CHECKING:
    from peft_func.functional.model import FunctionalModel


def walk(net: nn.Module) -> dict[str, ModuleInfo]:
    """Return what is known of every module, by path; the net itself, "", comes first.

    A shared module has one entry, at its first path, with the others as aliases; `own` and `children` hold first names.
    """
    every = list(net.named_modules(remove_duplicate=False))
    paths: dict[nn.Module, list[str]] = {}
    for path, module in every:
        paths.setdefault(module, []).append(path)
    names = {id(tensor): name for name, tensor in net.named_parameters()}
    place = {net: (0, 0)}
    for parent, (path, *_) in paths.items():
        children = list(parent.named_children())
        for position, (name, child) in enumerate(children):
            if paths[child][0] == (f"{path}.{name}" if path else name):  # its siblings are those at its first path
                place[child] = (position, len(children))
    return {
        first: ModuleInfo(
            path=first,
            modules=(type(module),),
            aliases=tuple(others),
            own=tuple(names[id(tensor)] for tensor in module.parameters(recurse=False)),
            children=tuple(paths[child][0] for child in module.children()),
            position=place[module][0],
            siblings=place[module][1],
        )
        for module, (first, *others) in paths.items()
    }


def below(tree: dict[str, ModuleInfo], path: str) -> Iterator[ModuleInfo]:
    """Yield a module and all those under it, each once, parents first."""
    seen: set[str] = set()
    ahead = [path]
    while ahead:
        info = tree[ahead.pop()]
        if info.path not in seen:
            seen.add(info.path)
            yield info
            ahead += reversed(info.children)


class Structural(Selector):
    """A selector that asks the whole model, not one place: what it chooses is known once the model is."""

    @abstractmethod
    def within(self, model: "FunctionalModel") -> Selector:
        """Return what it stands for in a model."""

    def __call__(self, path: str, info: Info) -> bool:
        raise SelectorError(f"{self!r} asks the whole model; it cannot be asked about {path!r} alone")


def settled(where: Where, model: "FunctionalModel") -> Where:
    """Return a selector in which what asks the whole model is replaced by what it stands for there."""
    if isinstance(where, str):
        return where
    selector = as_selector(where)
    if isinstance(selector, Structural):
        return selector.within(model)
    if isinstance(selector, AllOf | AnyOf) and any(settled(part, model) is not part for part in selector.parts):
        return type(selector)(tuple(as_selector(settled(part, model)) for part in selector.parts))
    if isinstance(selector, Not) and (part := settled(selector.part, model)) is not selector.part:
        return Not(as_selector(part))
    return where


def resolve_modules(where: Where, model: "FunctionalModel", purpose: str) -> tuple[str, ...]:
    """Return the paths of the modules of a model that a selector chooses, in the order of a walk.

    Raises:
        SelectorError: there are none; the message names the nearest.
    """
    infos = cast("list[Info]", list(walk(model._skeleton.root).values()))
    return resolve(settled(where, model), infos, purpose, "modules")

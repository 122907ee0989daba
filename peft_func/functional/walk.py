"""The modules of a net in the order of a walk: registration order, parents before children, each module once."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from torch import nn

from peft_func.trees.modules import ModuleInfo
from peft_func.trees.select import Info, Where, resolve

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


def resolve_modules(where: Where, model: "FunctionalModel", purpose: str) -> tuple[str, ...]:
    """Return the paths of the modules of a model that a selector chooses, in the order of a walk.

    Raises:
        SelectorError: there are none; the message names the nearest.
    """
    infos = cast("list[Info]", list(walk(model._skeleton.root).values()))
    return resolve(where, infos, purpose, "modules")

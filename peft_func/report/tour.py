"""The modules of a net in the order in which `pf.first_match` meets them."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from peft_func.errors import OptionError
from peft_func.functional.model import FunctionalModel
from peft_func.functional.walk import walk
from peft_func.report.table import aligned


@dataclass(frozen=True)
class Stop:
    """A module on a tour.

    Attributes:
        name: its own name, the last of its path.
        path: its path, "" for the net itself.
        class_name: the name of its class.
        count: how many values the parameters directly in it have.
        has_children: whether there are modules in it.
        parameters: the names of the parameters directly in it; where weights are tied, their first names.
        aliases: its other paths, where it is shared.
    """

    name: str
    path: str
    class_name: str
    count: int
    has_children: bool
    parameters: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tour:
    """The modules of a net; iterate over it, or `print` it.

    Attributes:
        stops: the modules, parents before children, each once.
        total: how many values the net's parameters have; what is tied counts once.
    """

    stops: tuple[Stop, ...]
    total: int

    def __iter__(self) -> Iterator[Stop]:
        return iter(self.stops)

    def __len__(self) -> int:
        return len(self.stops)

    def __str__(self) -> str:
        cells = [("path", "name", "class", "children", "own values")]
        for stop in self.stops:
            children = "yes" if stop.has_children else ""
            cells.append((stop.path or "(the net)", stop.name, stop.class_name, children, f"{stop.count:,}"))
        lines = aligned(cells, "<<<<>")
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], f"{len(self):,} modules, {self.total:,} values"])


def tour(net: nn.Module | FunctionalModel) -> Tour:
    """Return the modules of a net: path, name, class, whether it has children, and what it holds itself.

    Args:
        net: a module, or its functional model.

    Raises:
        OptionError: it is neither.

    Example:
        >>> import torch, peft_func as pf
        >>> print(pf.tour(torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU())))
        path       name  class       children  own values
        -------------------------------------------------
        (the net)        Sequential  yes                0
        0          0     Linear                        36
        1          1     ReLU                           0
        3 modules, 36 values
    """
    if not isinstance(net, nn.Module | FunctionalModel):
        raise OptionError(f"tour takes a module or what pf.functionalize made of it, not a {type(net).__name__}")
    root = net._skeleton.root if isinstance(net, FunctionalModel) else net
    sizes = {name: tensor.numel() for name, tensor in root.named_parameters()}
    stops = tuple(
        Stop(
            info.path.rpartition(".")[2],
            info.path,
            info.class_name,
            sum(sizes[name] for name in info.own),
            bool(info.children),
            info.own,
            info.aliases,
        )
        for info in walk(root).values()
    )
    return Tour(stops, sum(sizes.values()))

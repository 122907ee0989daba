"""What trains in a transformer without anything added to it: its head, its last blocks, or all of it.

The parts are found by structure, once the model is known; each preset is then an ordinary `pf.train`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from peft_func.addins.structure import Structure, structure_of
from peft_func.errors import OptionError, SelectorError
from peft_func.functional.model import FunctionalModel
from peft_func.transforms.options import check_flag
from peft_func.transforms.train import train
from peft_func.transforms.transform import Chain, Deferred, Part, chain, check_name
from peft_func.trees.select import exact


@dataclass(frozen=True)
class _Preset(Deferred, ABC):
    part: str = "train"

    def expand(self, model: FunctionalModel) -> Chain:
        """Return the chain of one `pf.train` that it stands for."""
        modules = self._modules(structure_of(model), model)
        names = [
            path
            for path, info in model.infos.items()
            if info.dtype.is_floating_point
            and any(name.startswith(f"{module}.") for name in (path, *info.aliases) for module in modules)
        ]
        return chain(train(exact(names), name=self.part))

    @abstractmethod
    def _modules(self, structure: Structure, model: FunctionalModel) -> tuple[str, ...]:
        """Return the paths of the modules that train."""


@dataclass(frozen=True)
class LinearProbe(_Preset):
    """The head alone, or with the norms behind the blocks; made by `pf.linear_probe`."""

    norm: bool = False

    def _modules(self, structure: Structure, model: FunctionalModel) -> tuple[str, ...]:
        return (*(structure.norms if self.norm else ()), _head(structure, model))


@dataclass(frozen=True)
class Partial(_Preset):
    """The last blocks, the norms behind them and the head; made by `pf.partial`."""

    count: int = 1

    def _modules(self, structure: Structure, model: FunctionalModel) -> tuple[str, ...]:
        if self.count > len(structure.blocks):
            raise OptionError(f"partial: the last {self.count} of {len(structure.blocks)} blocks")
        last = [block.path for block in structure.blocks[len(structure.blocks) - self.count :]]
        return (*last, *structure.norms, _head(structure, model))


def linear_probe(*, norm: bool = False, name: str = "train") -> LinearProbe:
    """Train the head only: the last linear map behind the blocks.

    Args:
        norm: also train the norms behind the blocks (`fc_norm` and the like).
        name: the sub-tree.

    Raises:
        SelectorError: at `bind`, no blocks or no head are found; name the head: `pf.train(["classifier"])`.

    Example:
        >>> import torch, peft_func as pf
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> net = torch.nn.Sequential(torch.nn.TransformerEncoder(layer, 2), torch.nn.Linear(8, 3))
        >>> list(pf.bind(pf.linear_probe(), pf.functionalize(net)).init(0)[1]["train"])
        ['1.weight', '1.bias']
    """
    check_flag("linear_probe", "norm", norm)
    return LinearProbe((), None, check_name(name), norm)


def partial(count: int = 1, *, name: str = "train") -> Partial:
    """Train the last blocks, the norms behind them, and the head.

    Args:
        count: how many blocks; 0 for none of them.
        name: the sub-tree.

    Raises:
        OptionError: at `bind`, there are fewer blocks.
        SelectorError: at `bind`, no blocks or no head are found.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise OptionError(f"partial takes a number of blocks, such as pf.partial(2); it got {count!r}")
    return Partial((), None, check_name(name), count)


def full(*, name: str = "train") -> Part:
    """Train every parameter."""
    return train(".*", name=name)


def _head(structure: Structure, model: FunctionalModel) -> str:
    if structure.head is None:
        raise SelectorError(
            f"{model!r} has no linear map behind its blocks; name what trains: pf.train(['classifier'])"
        )
    return structure.head

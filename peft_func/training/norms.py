"""Normalisation layers: their parameters, and the modules themselves, in base weights and in adapters' trees."""

import re
from dataclasses import dataclass

from torch import nn

from peft_func.errors import OptionError
from peft_func.functional.model import FunctionalModel
from peft_func.training.schedule import leaf_infos
from peft_func.transforms.bind import Adapter
from peft_func.trees.select import Info, Selector

# BatchNorm, SyncBatchNorm and InstanceNorm are the subclasses of the first.
_TYPES = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_NAME = re.compile(r"\w*Norm(Act|Gated)?(\dd)?")


@dataclass(frozen=True)
class Norms(Selector):
    """Parameters of normalisation layers, and such layers as modules; in trees, the paths known to be theirs."""

    paths: frozenset[str] = frozenset()

    def __call__(self, path: str, info: Info) -> bool:
        # By its name alone, a module without parameters of its own may as well be a wrapper (PreNorm).
        named = bool(getattr(info, "own", True))
        return path in self.paths or any(_is_norm(kind, named=named) for kind in info.modules)

    def __repr__(self) -> str:
        return "norms()"


def norms(of: FunctionalModel | Adapter | None = None) -> Selector:
    r"""Select normalisation layers: the parameters that they own, or, where modules are selected, the layers.

    These are torch's BatchNorm, SyncBatchNorm, InstanceNorm, LayerNorm, GroupNorm and RMSNorm with their subclasses,
    and classes that are named as norms: `LlamaRMSNorm`, `BatchNormAct2d`.

    Args:
        of: None where modules are known, as in `pf.bind` and `pf.with_modes`. Trees know none: to select in a tree of
            base weights give the model, in an adapter's tree the adapter.

    Raises:
        OptionError: it is neither.

    Example:
        >>> import torch, peft_func as pf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))
        >>> model = pf.functionalize(net)
        >>> list(pf.partition(model.params, pf.norms(model))[0])
        ['1.weight', '1.bias']
        >>> adapter = pf.bind(pf.train(r"[12]\..*"), model)
        >>> list(pf.partition(adapter.init(0)[1], ~pf.norms(adapter))[0]["train"])
        ['2.weight', '2.bias']
    """
    if of is None:
        return Norms()
    if isinstance(of, FunctionalModel):
        infos = of.infos
    elif isinstance(of, Adapter):
        infos = {**of.model.infos, **{path: info for path, info in leaf_infos(of).items() if isinstance(info, Info)}}
    else:
        raise OptionError(f"norms takes a functional model, an adapter or nothing, not a {type(of).__name__}")
    is_norm = Norms()
    return Norms(frozenset(path for path, info in infos.items() if is_norm(info.path, info)))


def _is_norm(kind: type, *, named: bool) -> bool:
    return issubclass(kind, _TYPES) or (named and any(_NAME.fullmatch(base.__name__) for base in kind.__mro__))

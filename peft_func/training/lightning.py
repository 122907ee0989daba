"""The door to Lightning: `pf.lightning.FunctionalModule`, `FunctionalFinetuning` and `BackboneFinetuning`.

Lightning is imported when one of the names is first asked for, not before. It is the extra `lightning`.

Example:
    >>> import torch, peft_func as pf
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> module = pf.lightning.FunctionalModule(net, pf.lora("0", rank=2), loss=torch.nn.functional.cross_entropy)
    >>> sorted(module.state_dict())
    ['adapted.lora.0.weight.A', 'adapted.lora.0.weight.B']
"""

import importlib
from typing import TYPE_CHECKING, Any

from peft_func.errors import MissingExtraError

if TYPE_CHECKING:
    from peft_func.training.lightning_backbone import BackboneFinetuning as BackboneFinetuning
    from peft_func.training.lightning_callbacks import FunctionalFinetuning as FunctionalFinetuning
    from peft_func.training.lightning_module import FunctionalModule as FunctionalModule

_HOMES = {
    "BackboneFinetuning": "peft_func.training.lightning_backbone",
    "FunctionalFinetuning": "peft_func.training.lightning_callbacks",
    "FunctionalModule": "peft_func.training.lightning_module",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"pf.lightning has no {name!r}; it has {', '.join(_HOMES)}")
    try:
        importlib.import_module("lightning")
    except ImportError as error:
        raise MissingExtraError(
            f"pf.lightning.{name} needs Lightning, which cannot be imported ({error}): "
            "pip install 'peft_func[lightning]'"
        ) from error
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*_HOMES, "__doc__", "__name__"])

"""What cannot become a pure function, and what to do instead."""

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils import parametrize

from peft_func.errors import ModuleRefusedError

_BY_NAME = {
    "DataParallel": "pass its .module, and split the batch yourself",
    "DistributedDataParallel": "pass its .module; gradients of trees are reduced with torch.distributed",
    "FullyShardedDataParallel": "pass the module before it is wrapped",
    "OptimizedModule": "pass its ._orig_mod, and compile the call of the functional model instead",
}


def check_module(module: object) -> None:
    """Refuse a module of which a call is no function of its tensors.

    Raises:
        ModuleRefusedError: names the module, where it is, and what to do.
    """
    if not isinstance(module, nn.Module):
        raise ModuleRefusedError(f"functionalize takes an nn.Module; it got a {type(module).__name__}")
    for path, part in module.named_modules():
        place = f"{path or 'the module'} ({type(part).__name__})"
        if isinstance(part, torch.jit.ScriptModule):
            raise ModuleRefusedError(
                f"{place} is scripted, its weights cannot be given from outside; pass the eager one"
            )
        for kind in type(part).__mro__:
            if kind.__name__ in _BY_NAME and kind.__module__.startswith("torch."):
                raise ModuleRefusedError(f"{place} cannot be a pure function; {_BY_NAME[kind.__name__]}")
        if parametrize.is_parametrized(part):
            raise ModuleRefusedError(
                f"{place} is parametrized in {', '.join(part.parametrizations)}; call "
                "torch.nn.utils.parametrize.remove_parametrizations on a copy of it first"
            )
        for name, tensor in [*part._parameters.items(), *part._buffers.items()]:
            if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
                raise ModuleRefusedError(
                    f"{place} has no shape for {name!r} yet; run one batch through the module first"
                )

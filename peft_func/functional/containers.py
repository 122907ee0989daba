"""Tensors as nested modules: the leaf `lora -> encoder.0.weight -> A` is the parameter `lora.encoder.0.weight.A`.

The registries are filled directly, because the doors of `nn.Module` refuse the names of its own methods, and `train` is
the name of a part.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from peft_func.errors import OptionError


class Container(nn.Module):
    """A module that only holds; what is in it is used by the module at the top."""


class NormContainer(Container, nn.LayerNorm):
    """What it holds are a LayerNorm's weights: Trainer lets them decay unless the class says so."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def extra_repr(self) -> str:
        return ""


@dataclass(frozen=True)
class Place:
    """Where a tensor is held, which may be put another there: by `to`, by `functional_call`."""

    table: dict[str, Any]
    name: str

    def get(self) -> Tensor:
        """Return the tensor that is there now."""
        tensor: Tensor = self.table[self.name]
        return tensor


def hold_parameter(root: nn.Module, path: str, tensor: Tensor, kind: type[Container] = Container) -> Place:
    """Register a parameter under its path, in a container of this kind.

    Raises:
        OptionError: it would hide a method or an attribute of the module.
    """
    first = path.partition(".")[0]
    if first != "train" and (hasattr(type(root), first) or first in vars(root)):
        hidden = f"{type(root).__name__}.{first}"
        raise OptionError(f"the part {first!r} would hide {hidden}; give it another name: name='my_{first}'")
    holder, name = _holder(root, path, kind)
    holder._parameters[name] = nn.Parameter(tensor)
    return Place(holder._parameters, name)


def hold_buffer(root: nn.Module, path: str, tensor: Tensor, *, persistent: bool) -> Place:
    """Register a buffer under its path."""
    holder, name = _holder(root, path)
    holder._buffers[name] = tensor
    if not persistent:
        holder._non_persistent_buffers_set.add(name)
    return Place(holder._buffers, name)


def _holder(root: nn.Module, path: str, kind: type[Container] = Container) -> tuple[nn.Module, str]:
    *inner, name = path.split(".")
    for depth, key in enumerate(inner, 1):
        child = root._modules.get(key)
        if child is None:
            child = root._modules[key] = kind() if depth == len(inner) else Container()
        root = child
    return root, name

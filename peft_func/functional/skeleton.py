"""The private copy of a module on which pure calls run: its structure, without its tensors.

A call makes a structural clone (new module objects, the same Python attributes), puts the weights of that call into
it and runs it. The clone is nobody else's: threads do not meet, what `forward` assigns to `self` is gone with it, and
because the weights stay bound, activation checkpointing recomputes with them whenever backward runs.
"""

import copy
import functools
import re
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

_REGISTRIES = ("_parameters", "_buffers", "_modules")
_HOOKS = tuple(name for name in vars(nn.Module()) if re.fullmatch("_(forward|backward)(_pre)?_hooks(_.*)?", name))
_OWN_ATTRIBUTES = frozenset(vars(nn.Module()))


class Skeleton:
    """A module tree on the meta device, and how to clone it.

    Attributes:
        root: the private copy; never called, and written to only by its owner.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self._modules = list(root.modules())
        self._handles = _handles(self._modules)
        number = {module: i for i, module in enumerate(self._modules)}
        names: dict[int, str] = {}
        for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
            names.setdefault(id(tensor), name)

        def slots(table: Mapping[str, Tensor | None]) -> list[tuple[str, str | None]]:
            return [(key, None if tensor is None else names[id(tensor)]) for key, tensor in table.items()]

        self._plans = [
            (
                type(module),
                {key: value for key, value in vars(module).items() if key not in _REGISTRIES},
                slots(module._parameters),
                slots(module._buffers),
                [(key, None if child is None else number[child]) for key, child in module._modules.items()],
                [key for key, value in vars(module).items() if key not in _OWN_ATTRIBUTES and _is_mutable(value)],
                [(key, vars(module)[key].copy()) for key in _HOOKS],
            )
            for module in self._modules
        ]

    def clone(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> nn.Module:
        """Return a structural clone with these tensors in place, under the names that `root` gives them."""
        # Attributes are set in the dicts directly: nn.Module's own __setattr__ costs more than the rest of the call,
        # and accepts only nn.Parameter where a parameter was.
        made = [cls.__new__(cls) for cls, *_ in self._plans]
        memo: dict[int, Any] | None = None
        for module, (_, attributes, param_slots, buffer_slots, child_slots, mutable, hooks) in zip(
            made, self._plans, strict=True
        ):
            contents = vars(module)
            contents.update(attributes)
            contents["_parameters"] = {key: None if name is None else params[name] for key, name in param_slots}
            contents["_buffers"] = {key: None if name is None else buffers[name] for key, name in buffer_slots}
            contents["_modules"] = {key: None if i is None else made[i] for key, i in child_slots}
            for key, table in hooks:  # some modules register hooks on themselves when they are first called
                contents[key] = table.copy() if table else OrderedDict()
            for key in mutable:
                # Lists of blocks, bound methods and the like must speak of the clone, and what is appended to a list
                # must not reach the next call.
                if memo is None:
                    memo = {**self._handles, **{id(old): new for old, new in zip(self._modules, made, strict=True)}}
                contents[key] = copy.deepcopy(contents[key], memo)
        return made[0]

    def copy(self) -> nn.Module:
        """Return a deep copy of the private module, for a caller that changes its modes."""
        return structural_copy(self.root)


def _is_mutable(value: object) -> bool:
    """Whether an attribute could carry something from one call to the next, or refers to modules of the tree."""
    if isinstance(value, types.MethodType | functools.partial | nn.Module):
        return True
    if isinstance(value, list | tuple | set | dict):
        items = value.values() if isinstance(value, dict) else value
        return not isinstance(value, tuple) or any(_is_mutable(item) for item in items)
    return False


def structural_copy(module: nn.Module) -> nn.Module:
    """Return a deep copy of a module with its parameters and buffers on meta; ties and shared modules are kept."""
    memo: dict[int, Any] = _handles(module.modules())
    for part in module.modules():
        for param in part._parameters.values():
            if param is not None and id(param) not in memo:
                memo[id(param)] = nn.Parameter(_hollow(param), requires_grad=param.requires_grad)
        for buffer in part._buffers.values():
            if buffer is not None and id(buffer) not in memo:
                memo[id(buffer)] = _hollow(buffer)
    with _ShareTensors():
        return copy.deepcopy(module, memo)


def _handles(modules: Iterable[nn.Module]) -> dict[int, Any]:
    """Return the handles of hooks that modules keep in attributes, by id: deepcopy cannot copy them, nor need it."""
    kept = (value for module in modules for key, value in vars(module).items() if key not in _REGISTRIES)
    handles = (item for value in kept for item in (value if isinstance(value, list | tuple) else (value,)))
    return {id(handle): handle for handle in handles if isinstance(handle, RemovableHandle)}


def _hollow(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


class _ShareTensors(TorchFunctionMode):
    """Tensors in plain attributes are shared with the copy: deepcopy would refuse those that have a graph."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return args[0] if func is Tensor.__deepcopy__ else func(*args, **(kwargs or {}))

"""What of a net can be reached through `pf.Adapted`: its plain attributes, and its methods as pure calls."""

import inspect
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from peft_func.errors import AttributeRefusedError

if TYPE_CHECKING:
    from peft_func.training.adapted import Adapted

# Methods that only change how the forward pass runs, never a weight: they are called on the private copy.
SWITCHES = frozenset(
    f"{what}_{how}" for what in ("activation_checkpointing", "gradient_checkpointing") for how in ("enable", "disable")
) | {"enable_input_require_grads", "disable_input_require_grads", "set_attn_implementation"}

# Methods whose purpose is to write weights, modules or files. A pure call would drop what they do, silently.
_WRITES = re.compile(
    r"(add|convert|delete|dequantize|disable|enable|freeze|from|init|initialize|load|merge|prune|push|quantize|register|"
    r"remove|replace|reset|resize|save|set|tie|unfreeze|unload|update|upgrade)(_.*)?"
)

_NOTHING = object()


def attribute_of(module: "Adapted", root: nn.Module, name: str) -> Any:
    """Return an attribute of the net, for a module over it that has no attribute of that name itself.

    Raises:
        AttributeRefusedError: there is none, or it cannot be had: a tensor, a module, or a method that writes.
    """
    kind = type(root).__name__
    for registry, instead in (
        (root._modules, f"take it from the net, or see its activations with pf.observe(module.model, {name!r})"),
        (root._parameters, f"its value is module.weights()[{name!r}]"),
        (root._buffers, f"it is in dict(module.named_buffers())[{name!r}]"),
    ):
        if name in registry:
            raise AttributeRefusedError(f"{name!r} of {kind} is not an attribute of Adapted; {instead}")
    if name in vars(root):
        value = vars(root)[name]
        return _call_of(module, name) if inspect.ismethod(value) else value
    value = inspect.getattr_static(type(root), name, _NOTHING)  # None is a value
    if value is _NOTHING:
        raise AttributeRefusedError(f"neither Adapted nor {kind} has an attribute {name!r}")
    if isinstance(value, property):
        return getattr(module.bound_net(), name)  # it may look at tensors
    if isinstance(value, staticmethod | classmethod) or not callable(value):
        return getattr(root, name)
    if name in SWITCHES:
        return _switch_of(module, name)
    if name.startswith("_") or _WRITES.fullmatch(name):
        raise AttributeRefusedError(
            f"{kind}.{name} is not reachable through Adapted: what it writes would be lost with the call. Call it on "
            "the net before pf.Adapted(net, ...), or on a copy that has loaded module.merged_state_dict()"
        )
    return _call_of(module, name)


def belongs_to(root: nn.Module, name: str) -> bool:
    """Whether an attribute that is set is one of the net's, such as `generation_config`, and not the module's own.

    Raises:
        AttributeRefusedError: it is a tensor or a module of the net.
    """
    if any(name in registry for registry in (root._modules, root._parameters, root._buffers)):
        raise AttributeRefusedError(
            f"{name!r} of {type(root).__name__} cannot be set through Adapted: what trains was chosen without it; set "
            "it on the net before pf.Adapted(net, ...)"
        )
    held = vars(root).get(name, inspect.getattr_static(type(root), name, callable))
    return not name.startswith("_") and not callable(held)


def _call_of(module: "Adapted", name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        output = module.model.method(name).with_state(module.weights(), module.state(), *args, **kwargs)[0]
        if isinstance(output, nn.Module):
            raise AttributeRefusedError(
                f"{name}() gives a module of the net ({type(output).__name__}), which lives for one call: what is "
                "changed or hooked there would be lost. Do it on the net before pf.Adapted(net, ...)"
            )
        return output

    call.__name__ = name
    return call


def _switch_of(module: "Adapted", name: str) -> Callable[..., Any]:
    def switch(*args: Any, **kwargs: Any) -> Any:
        return module.reshape_net(lambda root: getattr(root, name)(*args, **kwargs))

    switch.__name__ = name
    return switch

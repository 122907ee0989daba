"""From effective weights back to plain tensors."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from peft_func.errors import AddinError, OptionError
from peft_func.weights.around import Around
from peft_func.weights.buffers import check_buffers
from peft_func.weights.chunks import Scratch, form, form_into, is_plain
from peft_func.weights.mapping import Weights
from peft_func.weights.operator import Operator


def merge(weights: Mapping[str, Tensor | Operator], *, into: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the effective weights as plain tensors.

    Where no gradient is needed, each is formed in one pass, some rows at a time, with no temporary of its size.

    Args:
        weights: what `adapter.apply` returned, or any mapping of names to tensors and operators.
        into: tensors that receive the values, such as another model's `dict(net.named_parameters())`: one of the shape,
            dtype and device of the parameter for each name that a transform changed, and for any others. They share
            no memory with the weights, or with each other. They are written without a graph, as by an optimizer: leaves
            that require gradients are welcome, results of a graph are not. Nothing is written before all is checked.

    Returns:
        A new dict of all names. What no transform changed is the same tensor object; what one changed is a new tensor
        of the parameter's dtype, computed in float32 at least and rounded once. Differentiable; nothing is written.
        With `into`, the tensors of `into` stand at their names, and there are no gradients.

    Raises:
        AddinError: there are add-ins, which no weight can hold; the message names them.
        OptionError: `into` cannot receive the values; the message names the first tensor and says why.

    Example:
        >>> import torch, peft_func as pf
        >>> net = torch.nn.Linear(4, 3)
        >>> adapter = pf.bind(pf.lora("weight", rank=2), pf.functionalize(net))
        >>> merged = pf.merge(adapter.apply(*adapter.init(0)))
        >>> net.load_state_dict(merged)
        <All keys matched successfully>
        >>> served = torch.nn.Linear(4, 3)
        >>> merged = pf.merge(adapter.apply(*adapter.init(0)), into=dict(served.named_parameters()))
        >>> merged["weight"] is served.weight
        True
    """
    refuse_arounds(weights)
    if into is not None:
        return _written(weights, into)
    scratch: Scratch = {}
    return {path: form(value, scratch) if isinstance(value, Operator) else value for path, value in weights.items()}


def _written(weights: Mapping[str, Tensor | Operator], into: Mapping[str, Tensor]) -> dict[str, Tensor]:
    check_buffers(weights, into, _changed(weights))
    with torch.no_grad():
        # What cannot be written in chunks is formed first: it may raise, and then nothing is written.
        values = {
            path: value.materialise() if isinstance(value, Operator) and not is_plain(value) else value
            for path, value in weights.items()
        }
        scratch: Scratch = {}
        for path, buffer in into.items():
            value = values[path]
            if isinstance(value, Operator):
                form_into(value, buffer, scratch)
            else:
                buffer.copy_(value)
    return {path: into[path] if path in into else cast("Tensor", value) for path, value in weights.items()}


def _changed(weights: Mapping[str, Tensor | Operator]) -> list[str]:
    base = weights.base if isinstance(weights, Weights) else weights
    return [path for path, value in weights.items() if isinstance(value, Operator) or value is not base[path]]


def refuse_arounds(weights: Mapping[str, Tensor | Operator]) -> None:
    """Refuse effective weights that are not all of the model.

    Raises:
        AddinError: there are add-ins.
    """
    places: dict[str, list[str]] = {}
    for around in arounds_of(weights):
        places.setdefault(around.part, []).append(around.path or "the model itself")
    if places:
        found = "; ".join(
            f"{part!r} at {', '.join(dict.fromkeys(paths[:3]))}{' and more' if len(paths) > 3 else ''}"
            for part, paths in places.items()
        )
        raise AddinError(
            f"add-ins cannot be folded into weights: {found}. For a plain nn.Module that carries them call "
            "pf.export_module(adapter, frozen, trainable)"
        )


def arounds_of(weights: Mapping[str, Tensor | Operator]) -> tuple[Around, ...]:
    """Return the functions around calls of modules that a mapping carries; a plain dict carries none."""
    return weights.arounds if isinstance(weights, Weights) else ()


def delta(weights: Mapping[str, Tensor | Operator]) -> dict[str, Tensor]:
    """Return `effective - base` for every weight that a transform changed, or that trains itself.

    Args:
        weights: what `adapter.apply` returned.

    Returns:
        `{name: tensor}` in the parameter's shape and dtype; the difference is taken before the rounding.

    Raises:
        OptionError: the mapping does not know its base.
    """
    if not isinstance(weights, Weights):
        raise OptionError("delta needs what adapter.apply returns: a plain mapping does not know its base weights")
    changes = {}
    for path, value in weights.items():
        base = weights.base[path]
        if isinstance(value, Operator):
            exact = value.exact()
            changes[path] = (exact - base.to(exact.dtype)).to(value.dtype)
        elif value is not base:
            changes[path] = value - base
    return changes

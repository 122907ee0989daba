"""From effective weights back to plain tensors."""

from collections.abc import Mapping

from torch import Tensor

from peft_func.errors import AddinError, OptionError
from peft_func.weights.around import Around
from peft_func.weights.mapping import Weights
from peft_func.weights.operator import Operator


def merge(weights: Mapping[str, Tensor | Operator]) -> dict[str, Tensor]:
    """Return the effective weights as plain tensors.

    Args:
        weights: what `adapter.apply` returned, or any mapping of names to tensors and operators.

    Returns:
        A new dict. What no transform changed is the same tensor object; what one changed is a new tensor of the
        parameter's dtype, computed in float32 at least and rounded once. Differentiable; nothing is written.

    Raises:
        AddinError: there are add-ins, which no weight can hold; the message names them.

    Example:
        >>> import torch, peft_func as pf
        >>> net = torch.nn.Linear(4, 3)
        >>> adapter = pf.bind(pf.lora("weight", rank=2), pf.functionalize(net))
        >>> merged = pf.merge(adapter.apply(*adapter.init(0)))
        >>> net.load_state_dict(merged)
        <All keys matched successfully>
    """
    refuse_arounds(weights)
    return {path: value.materialise() if isinstance(value, Operator) else value for path, value in weights.items()}


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

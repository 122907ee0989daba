"""What must hold of the weights of a call: their names, shapes, dtypes and devices are those of the model."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peft_func.errors import TreeError
from peft_func.trees.select import nearest
from peft_func.weights.operator import Operator


def check_fit(name: str, weight: Any, own: Tensor, kinds: dict[Any, tuple[str, Any]]) -> None:
    """Check a weight's shape, and that dtype and device changed, if they did, as they did for all weights alike."""
    if not isinstance(weight, (Tensor, Operator)):
        raise TreeError(f"the weight {name!r} is a {type(weight).__name__}; weights are tensors or operators")
    if weight is not own and weight.shape != own.shape:
        raise TreeError(f"the weight {name!r} is {tuple(weight.shape)}; this model's is {tuple(own.shape)}")
    kind = (weight.dtype, weight.device)
    first, expected = kinds.setdefault((own.dtype, own.device), (name, kind))
    if kind != expected:
        raise TreeError(
            f"the weight {name!r} is {kind[0]} on {kind[1]}, but {first!r} is {expected[0]} on {expected[1]}; "
            f"cast or move all weights alike, e.g. weights[{name!r}].to({str(expected[1])!r}, {expected[0]})"
        )


def name_difference(
    what: str, given: Mapping[str, Any], wanted: Mapping[str, Any], ties: Mapping[str, str] | None = None
) -> str:
    """Say which names are missing, and which are too many."""
    extra, missing = [n for n in given if n not in wanted], [n for n in wanted if n not in given]
    text = f"the {what} must have the names of this model"
    if missing:
        text += f"; missing: {', '.join(missing[:5])}" + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
    if extra:
        text += f"; unknown: {', '.join(map(repr, extra[:5]))}"
        known = (ties or {}).get(extra[0])
        text += (
            f" ({extra[0]} is another name of {known})"
            if known
            else f" (nearest: {', '.join(nearest(extra[0], wanted, 3))})"
        )
    return text + f". Give all of model.{'params' if what == 'weights' else 'state'}, or what adapter.apply returned."

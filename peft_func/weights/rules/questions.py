"""What modules ask of a weight before they use it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peft_func.weights.carrier import GROUP_RULES, Carrier, Rule, getter, implements


def answers(*functions: Any) -> Callable[[Rule], Rule]:
    """Register a rule whether or not the weight differs along the batch."""
    return lambda rule: implements(*functions)(implements(*functions, rules=GROUP_RULES)(rule))


@answers(getter("device"))
def device(input: Carrier) -> torch.device:
    return input.op.device


@answers(getter("is_meta"))
def is_meta(input: Carrier) -> bool:
    return input.op.device.type == "meta"


@answers(getter("is_cuda"))
def is_cuda(input: Carrier) -> bool:
    return input.op.device.type == "cuda"


@answers(getter("is_cpu"))
def is_cpu(input: Carrier) -> bool:
    return input.op.device.type == "cpu"


@answers(getter("requires_grad"))
def requires_grad(input: Carrier) -> bool:
    return input.op.requires_grad


@answers(getter("is_leaf"))
def is_leaf(input: Carrier) -> bool:
    return False


@answers(Tensor.__repr__, Tensor.__format__)
def represent(input: Carrier, *args: Any, **kwargs: Any) -> str:
    return f"Carrier({input.op!r})"

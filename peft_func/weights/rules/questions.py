"""What modules ask of a weight before they use it."""

from typing import Any

import torch
from torch import Tensor

from peft_func.weights.carrier import Carrier, getter, implements


@implements(getter("device"))
def device(input: Carrier) -> torch.device:
    return input.op.device


@implements(getter("is_meta"))
def is_meta(input: Carrier) -> bool:
    return input.op.device.type == "meta"


@implements(getter("is_cuda"))
def is_cuda(input: Carrier) -> bool:
    return input.op.device.type == "cuda"


@implements(getter("is_cpu"))
def is_cpu(input: Carrier) -> bool:
    return input.op.device.type == "cpu"


@implements(getter("requires_grad"))
def requires_grad(input: Carrier) -> bool:
    return input.op.requires_grad


@implements(getter("is_leaf"))
def is_leaf(input: Carrier) -> bool:
    return False


@implements(Tensor.__repr__, Tensor.__format__)
def represent(input: Carrier, *args: Any, **kwargs: Any) -> str:
    return f"Carrier({input.op!r})"

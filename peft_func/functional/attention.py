"""Scaled-dot-product attention where PyTorch's fused kernels on the CPU have no rule: under `vmap` and forward mode.

Under `vmap` they run in a slow loop, with a warning; in forward mode (`jvp`, `jacfwd`, `hessian`) they fail. There, a
model of ours uses the composed form, which has rules for everything.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from peft_func.weights.rules.attention import multi_head_attention_forward

_WITHOUT_RULE = (torch._C._functorch.TransformType.Vmap, torch._C._functorch.TransformType.Jvp)


def composed_attention() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which attention is composed of plain operators, if a transform is active that needs it."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    needed = any(level.key() in _WITHOUT_RULE for level in stack)
    return _Composed() if needed else contextlib.nullcontext()


class _Composed(TorchFunctionMode):
    # A mode is this thread's own; torch.nn.attention.sdpa_kernel would switch the whole process.
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attend(*args, **(kwargs or {}))
        if func is F.multi_head_attention_forward:
            with self:  # its body calls the former, and a mode is off inside its own handler
                return multi_head_attention_forward(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is not None and attn_mask.dtype is torch.bool:  # the composed form takes only what is added
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
    result, _ = torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return result

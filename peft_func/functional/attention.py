"""Scaled-dot-product attention where PyTorch's fused kernels on the CPU have no rule: inside functorch's transforms.

Under `vmap` they run in a slow loop, with a warning, and so does their backward in a `jacrev`; in forward mode (`jvp`,
`jacfwd`, `hessian`) and in the second derivative they fail. There, a model of ours calls the same kernels through
functions that have the rule or, where these cannot be used or the work is small, the composed form, which has them all.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch
from torch.overrides import TorchFunctionMode

from peft_func.functional.fused_attention import (
    DTYPES,
    composed_attention,
    fused_attention,
    in_forward_mode,
    pulled_back,
)
from peft_func.weights.fused import under_autocast
from peft_func.weights.rules.attention import multi_head_attention_forward

_SMALL = 2**16  # scores; below, the calls of the functions around the kernels cost more than what these save

_SDPA, _MULTI_HEAD = F.scaled_dot_product_attention, F.multi_head_attention_forward
_Kind = _functorch.TransformType


def attention_in_transforms() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which attention has the rules that the active transforms need, if any is active."""
    stack = _functorch.get_interpreter_stack() or []
    needed = any(level.key() in (_Kind.Vmap, _Kind.Grad, _Kind.Jvp) for level in stack)
    return _Attention(stack) if needed else contextlib.nullcontext()


class _Attention(TorchFunctionMode):
    # A mode is this thread's own; torch.nn.attention.sdpa_kernel would switch the whole process.
    def __init__(self, stack: list[Any]) -> None:
        super().__init__()
        kinds = [level.key() for level in stack]
        self._mapped = [
            _functorch.CVmapInterpreterPtr(level).batchSize() for level in stack if level.key() == _Kind.Vmap
        ]
        self._once = kinds == [_Kind.Grad]
        self._fuses = {*kinds} <= {_Kind.Vmap, _Kind.Grad} and not in_forward_mode()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is _SDPA:
            return self._attend(*args, **(kwargs or {}))
        if func is _MULTI_HEAD:
            with self:  # its body calls the former, and a mode is off inside its own handler
                return multi_head_attention_forward(*args, **(kwargs or {}))
        return func(*args, **kwargs) if kwargs else func(*args)

    def _attend(
        self,
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
        query, key, value, mask = _converted(query, key, value, attn_mask)
        options = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        return self._attend_on_cpu(query, key, value, mask, dropout_p, options)

    def _attend_on_cpu(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, options: dict[str, Any]
    ) -> Tensor:
        kernel = dropout_p == 0 and _are_plain(query, key, value, mask) and not _tracked(mask)
        if self._once and not any(_tracked_below(tensor) for tensor in (query, key, value)):
            if kernel:
                return _attend_once(query, key, value, mask, options)
            return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, **options)
        if self._fuses and kernel:
            grouped = options["enable_gqa"]
            keys, values = (_every_head(query, tensor) if grouped else tensor for tensor in (key, value))
            if _fits(query, keys, values, mask) and self._scores(query, keys) >= _SMALL:
                full = None if mask is None else mask[(None,) * (4 - mask.dim())]
                return fused_attention(query, keys, values, full, options["is_causal"], options["scale"])
        return composed_attention(query, key, value, mask, dropout_p=dropout_p, **options)

    def _scores(self, query: Tensor, key: Tensor) -> int:
        return math.prod((*query.shape[:3], key.shape[2], *self._mapped))


def _attend_once(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
    """Call torch's own under one level of `grad`, so that its backward is that of the composed form where it is mapped.

    That costs a few hooks, where a `Function` in Python would slow down every small model under `torch.func.grad`.
    """
    # One node for each of them, even if they are the same tensor.
    views: list[Any] = [tensor.view_as(tensor) for tensor in (query, key, value)]
    output: Any = F.scaled_dot_product_attention(*views, attn_mask=mask, **options)  # type: ignore[misc]
    tracked = {i: view for i, view in enumerate(views) if view.requires_grad}
    if not tracked:
        return output  # type: ignore[no-any-return]
    grads: dict[int, Tensor] = {}

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return composed_attention(query, key, value, mask, **options)

    def before(grad: Tensor) -> Tensor | None:
        stack = _functorch.get_interpreter_stack() or []
        grads.clear()
        if len(stack) <= all(_functorch.unwrap_if_dead(view) is view for view in tracked.values()):
            return None  # nothing but the level of the forward, or nothing at all
        composed = pulled_back(attend, grad, query, key, value)
        grads.update((i, composed[i]) for i in tracked)
        return torch.zeros(grad.shape, dtype=grad.dtype)  # the kernel runs once, for nothing

    output.register_hook(before)
    for i, view in tracked.items():
        view.register_hook(partial(grads.pop, i))  # by default, what the kernel gave
    return output  # type: ignore[no-any-return]


def _converted(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> list[Any]:
    """Return the tensors as autocast has them, and the mask as what is added to the scores."""
    tensors: list[Any] = [query, key, value, mask]
    if under_autocast(query.device):
        tensors = [None if tensor is None else _lowered(tensor) for tensor in tensors]
    if mask is not None and mask.dtype is torch.bool:
        zeros = torch.zeros_like(mask, dtype=tensors[0].dtype)
        tensors[3] = zeros.masked_fill(~mask, float("-inf"))
    return tensors


def _lowered(tensor: Tensor) -> Tensor:
    lowers = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype("cpu")) if lowers else tensor


def _every_head(query: Tensor, tensor: Tensor) -> Tensor:
    """Return keys or values with each head repeated for the heads of the query that share it."""
    if query.dim() != 4 or tensor.dim() != 4 or not tensor.shape[1] or query.shape[1] % tensor.shape[1]:
        return tensor
    return tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1)


def _are_plain(*tensors: Tensor | None) -> bool:
    """Whether none is of a subclass, such as a weight that is an operator; a `Function` would not dispatch on it."""
    return all(tensor is None or type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)


def _fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether the fused kernel can take these; with some others it reads memory that is not theirs."""
    if query.dtype not in DTYPES or any(
        tensor.dtype != query.dtype or tensor.device != query.device for tensor in (key, value)
    ):
        return False
    if query.dim() != 4 or key.shape != value.shape or key.shape != (*query.shape[:2], key.shape[-2], query.shape[-1]):
        return False
    if not query.numel() or not key.numel():
        return False
    if mask is None:
        return True
    scores = (*query.shape[:3], key.shape[2])
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    return (
        mask.dtype in (query.dtype, torch.float32)
        and mask.device == query.device
        and 2 <= mask.dim() <= 4
        and all(size in (1, full) for size, full in zip(shape, scores, strict=True))
    )


def _tracked(tensor: Tensor | None) -> bool:
    """Whether a tensor requires a gradient at any level."""
    return tensor is not None and (tensor.requires_grad or _tracked_below(tensor))


def _tracked_below(tensor: Tensor) -> bool:
    """Whether a tensor requires a gradient below the level that wraps it, or at all if none does."""
    wrapped = _functorch.is_functorch_wrapped_tensor(tensor)
    return _tracked(_functorch.get_unwrapped(tensor)) if wrapped else tensor.requires_grad

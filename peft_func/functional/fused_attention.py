"""PyTorch's fused attention on the CPU, and its backward, as functions that `vmap` folds into one call of the kernel.

The kernels have no batching rule of their own, and the backward has no derivative. Here a mapped axis joins the batch
axis, at every level of a nested `vmap`; the second derivative, and what else the kernels lack, is that of the composed
form, softmax(scale * q k^T + mask) v. FlashAttention: Dao et al. 2022, https://arxiv.org/abs/2205.14135.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    """Return the attention of `[batch, heads, length, dim]` tensors on the CPU by the fused kernel.

    Args:
        query: [B, H, L, E], of a dtype in `DTYPES`.
        key: [B, H, S, E], likewise.
        value: [B, H, S, E], likewise.
        mask: what is added to the scores, each of its four axes full or 1. It gets no gradient.
        is_causal: whether position i sees positions up to i only.
        scale: of the scores; 1 / sqrt(E) by default.
    """
    output: Tensor = _Attention.apply(query, key, value, mask, is_causal, scale)[0]  # type: ignore[no-untyped-call]
    return output


def composed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
) -> Tensor:
    """Return the same by plain operators, for all shapes that PyTorch takes; these have every rule."""
    if mask is not None and is_causal:  # the fused kernel takes both, this one either
        seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        mask, is_causal = mask.masked_fill(~seen, float("-inf")), False
    output: Tensor = torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]
    return output


def in_forward_mode() -> bool:
    """Whether a `jvp` or a dual level is active, in which the kernels fail."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return forward_ad._current_level >= 0 or any(
        level.key() == torch._C._functorch.TransformType.Jvp for level in stack
    )


def pulled_back(function: Callable[..., Tensor], grad: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of a function of tensors, as a function of all of them."""
    grads: tuple[Tensor, ...] = torch.func.vjp(function, *tensors)[1](grad)
    return grads


class _Attention(Function):
    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
    ) -> Any:
        return _kernel(*map(_rows, (query, key, value)), 0.0, is_causal, attn_mask=mask, scale=scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.is_causal, ctx.scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        query, key, value, mask, output, logsumexp = ctx.saved_tensors
        options = ctx.is_causal, ctx.scale
        if in_forward_mode():
            grads = pulled_back(lambda q, k, v: composed_attention(q, k, v, mask, *options), grad, query, key, value)
        else:
            given = grad, query, key, value, mask, output, logsumexp
            grads = _AttentionBackward.apply(*given, *options)  # type: ignore[no-untyped-call]
        return *grads, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *operands: Any) -> Any:
        return _fold(_Attention, 0, info.batch_size, in_dims, operands)


class _AttentionBackward(Function):
    @staticmethod
    def forward(
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        output: Tensor,
        logsumexp: Tensor,
        is_causal: bool,
        scale: float | None,
    ) -> Any:
        tensors = map(_rows, (grad, query, key, value, output))
        return _kernel_backward(*tensors, logsumexp, 0.0, is_causal, attn_mask=mask, scale=scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        # Output and logsumexp are functions of the others; what depends on them is in the derivative of those.
        *tensors, _output, _logsumexp, ctx.is_causal, ctx.scale = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *seeds: Tensor) -> Any:
        *tensors, mask = ctx.saved_tensors

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return composed_attention(query, key, value, mask, ctx.is_causal, ctx.scale)

        grads = torch.func.vjp(partial(pulled_back, attend), *tensors)[1](seeds)
        return *grads, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *operands: Any) -> Any:
        return _fold(_AttentionBackward, 1, info.batch_size, in_dims, operands)


def _rows(tensor: Tensor) -> Tensor:
    """Return a tensor whose rows lie together in memory; the kernel reads them as if they did."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _fold(
    function: type[Function], query: int, count: int, in_dims: Sequence[int | None], operands: Sequence[Any]
) -> Any:
    """Call a function with the mapped axis joined to the batch axis, and take them apart in what it returns.

    Args:
        function: one of those above.
        query: the place of the query among the operands; key, value and mask follow it.
        count: the size of the mapped axis.
        in_dims: where it is in each operand, or None.
        operands: what the function takes.
    """

    def join(place: int, operand: Any, dim: int | None) -> Any:
        if not isinstance(operand, Tensor):
            return operand
        if dim is None and place == query + 3 and operand.shape[0] == 1:
            return operand  # one mask for the whole batch is one for all batches
        tensor = operand.expand(count, *operand.shape) if dim is None else operand.movedim(dim, 0)
        return tensor.expand(count, batch, *tensor.shape[2:]).flatten(0, 1)

    dim, first = in_dims[query], operands[query]
    batch = first.shape[0] if dim is None else first.movedim(dim, 0).shape[1]
    joined = [join(place, *pair) for place, pair in enumerate(zip(operands, in_dims, strict=True))]
    outputs = tuple(output.unflatten(0, (count, batch)) for output in function.apply(*joined))  # type: ignore[no-untyped-call]
    return outputs, (0,) * len(outputs)

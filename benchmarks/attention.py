"""Attention under `vmap` on the CPU: PyTorch's slow loop, the composed form, and ours, in turn."""

import statistics
import warnings
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import interleave
from peft_func.functional.attention import attention_in_transforms
from peft_func.functional.fused_attention import composed_attention


def attention_under_vmap(
    members: int = 8, shape: tuple[int, int, int, int] = (4, 12, 64, 32), rounds: int = 7
) -> dict[str, dict[str, float]]:
    """Time the forward and the gradients of query, key and value of all members.

    Args:
        members: how many `vmap` maps over; query, key and value differ from member to member.
        shape: of one member's query, key and value: [batch, heads, length, dim].
        rounds: how many times each is timed.

    Returns:
        Median seconds: `{"forward" or "gradient": {form: seconds}}`.
    """
    tensors = torch.randn(3, members, *shape, generator=torch.Generator().manual_seed(0)).unbind()
    forms: dict[str, Callable[..., Tensor]] = {
        "slow loop": F.scaled_dot_product_attention,
        "composed": lambda *qkv: composed_attention(*qkv, None, is_causal=False, scale=None),
        "ours": _ours,
    }

    def median(calls: Mapping[str, Callable[[], object]], title: str) -> dict[str, float]:
        return {name: statistics.median(each) for name, each in interleave(calls, rounds, title=title).items()}

    def forward(form: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.vmap(form)(*tensors)

    def gradient(form: Callable[..., Tensor]) -> Callable[[], object]:
        slopes = torch.func.grad(lambda *qkv: form(*qkv).square().sum(), argnums=(0, 1, 2))
        return lambda: torch.vmap(slopes)(*tensors)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*performance drop")
        return {
            title: median({name: make(form) for name, form in forms.items()}, title)
            for title, make in (("forward", forward), ("gradient", gradient))
        }


def _ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with attention_in_transforms():
        return F.scaled_dot_product_attention(query, key, value)

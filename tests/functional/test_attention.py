"""Attention under vmap and in forward mode: no slow loop, no warning, the values of the fused kernels."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import peft_func as pf
from tests.zoo import randn


class Attend(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.query = nn.Linear(8, 8)
        self.options = options

    def forward(self, x):
        heads = lambda t: t.unflatten(-1, (2, 4)).transpose(-2, -3)
        return F.scaled_dot_product_attention(heads(self.query(x)), heads(x), heads(x), **self.options)


MASK = torch.tensor([[True, False, True], [True, True, True], [False, True, True]])
EMPTY = torch.tensor([[False, False, False], [True, True, True], [False, True, True]])
OPTIONS = [
    {},
    {"is_causal": True},
    {"attn_mask": MASK},
    {"attn_mask": EMPTY},
    {"attn_mask": MASK.double()},
    {"scale": 0.3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "causal", "mask", "a row of nothing", "bias", "scale"])
def test_vmap_is_the_loop_and_forward_mode_is_reverse_mode(options):
    model, x = pf.functionalize(Attend(**options).double()), randn(5, 3, 8)
    adapter = pf.bind(pf.lora("query", rank=2), model)
    frozen, tree = adapter.init(0)
    members = [pf.map_leaves(lambda t, i=i: t + 0.1 * i, tree) for i in range(1, 4)]
    call = lambda t: model(adapter.apply(frozen, t), x)
    loss = lambda t: call(t).square().sum()
    stacked = pf.stack(members)
    assert torch.allclose(torch.vmap(call)(stacked), torch.stack([call(t) for t in members]), atol=1e-12)
    grads = pf.unstack(torch.vmap(torch.func.grad(loss))(stacked))
    for member, grad in zip(members, grads, strict=True):
        alone = torch.func.grad(loss)(member)
        for (_, a), (_, b) in zip(pf.leaves(grad), pf.leaves(alone), strict=True):
            assert torch.allclose(a, b, atol=1e-10)
        _, slope = torch.func.jvp(loss, (member,), (pf.map_leaves(torch.ones_like, member),))
        assert torch.allclose(slope, sum(leaf.sum() for _, leaf in pf.leaves(alone)), atol=1e-10)
    hessian = torch.func.hessian(loss)(members[0])
    block = hessian["lora"]["query.weight"]["B"]["lora"]["query.weight"]["B"].reshape(16, 16)
    assert torch.allclose(block, block.T, atol=1e-10)


def test_outside_of_transforms_the_fused_kernel_runs():
    model, x = pf.functionalize(Attend().double()), randn(5, 3, 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(model.params, x)
    names = {event.key for event in profile.key_averages()}
    assert any("flash_attention" in name for name in names)

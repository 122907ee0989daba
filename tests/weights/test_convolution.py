"""Convolutions with a structured weight equal those with its dense form: every size, stride, padding, group."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import peft_func as pf
from tests.zoo import randn

PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@st.composite
def convolutions(draw, transposed: bool) -> nn.Module:
    dims = draw(st.sampled_from([1, 2, 3]))
    groups = draw(st.sampled_from([1, 2, 4]))
    few = lambda low, high: draw(st.tuples(*[st.integers(low, high)] * dims))
    channels = (groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3)))
    options = {"kernel_size": few(1, 3), "dilation": few(1, 2), "groups": groups, "bias": draw(st.booleans())}
    if transposed:
        stride = few(1, 3)
        extra = tuple(draw(st.integers(0, s - 1)) for s in stride)
        return TRANSPOSED[dims](*channels, stride=stride, padding=few(0, 1), output_padding=extra, **options).double()
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    if draw(st.booleans()):
        return PLAIN[dims](*channels, padding="same", padding_mode=mode, **options).double()
    return PLAIN[dims](*channels, stride=few(1, 3), padding=few(0, 2), padding_mode=mode, **options).double()


METHODS = st.sampled_from(
    [
        pf.lora("weight", rank=1, alpha=3),
        pf.dora("weight", rank=1),
        pf.gift("weight", rank=1),
        pf.ia3("weight"),
        pf.ia3("weight", side="input"),
        pf.chain(pf.lora("weight", rank=1), pf.gift("weight", rank=1), pf.ia3("weight", side="input")),
        pf.chain(pf.ia3("weight"), pf.gift("weight", rank=1), pf.magnitude("weight")),
    ]
)


def check(net: nn.Module, method: object, batched: bool) -> None:
    net.eval()
    with torch.no_grad():
        for i, param in enumerate(net.parameters()):
            param.copy_(randn(*param.shape, seed=i))
    model = pf.functionalize(net)
    adapter = pf.bind(method, model)
    frozen, tree = adapter.init(0)
    tree = pf.map_leaves(lambda t: t + randn(*t.shape, seed=7), tree)
    weights = adapter.apply(frozen, tree)
    x = randn(*[2][: int(batched)], net.in_channels, *[6] * (net.weight.dim() - 2), seed=5)
    with pf.densify("error"):
        y = model(weights, x)
    expected = model(pf.merge(weights), x)
    assert y.shape == expected.shape
    assert torch.allclose(y, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@given(convolutions(transposed=False), METHODS, st.booleans())
def test_convolution(net, method, batched):
    check(net, method, batched or net.padding_mode != "zeros")  # torch pads only batches in some modes


@given(convolutions(transposed=True), METHODS, st.booleans())
def test_transposed_convolution(net, method, batched):
    check(net, method, batched)


def test_the_factored_update_of_each_group_is_what_the_leaves_say():
    net = nn.Conv2d(4, 6, (2, 3), groups=2).double()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.lora("weight", rank=2, alpha=3), model)
    frozen, tree = adapter.init(0)
    tree = pf.map_leaves(lambda t: t + randn(*t.shape), tree)
    A, B = tree["lora"]["weight"]["A"], tree["lora"]["weight"]["B"]
    assert A.shape == (2, 2, 2, 3)
    assert B.shape == (6, 2, 1, 1)
    change = pf.delta(adapter.apply(frozen, tree))["weight"]
    assert torch.allclose(change, 1.5 * torch.einsum("or,rihw->oihw", B[..., 0, 0], A), atol=1e-12)


def test_the_leaves_of_a_transposed_convolution_have_its_inputs_and_outputs():
    net = nn.ConvTranspose1d(4, 6, 3, groups=2).double()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.lora("weight", rank=2), model)
    frozen, tree = adapter.init(0)
    tree = pf.map_leaves(lambda t: t + randn(*t.shape), tree)
    A, B = tree["lora"]["weight"]["A"], tree["lora"]["weight"]["B"]
    assert A.shape == (2, 4, 3)
    assert B.shape == (3, 2, 1)
    change = pf.delta(adapter.apply(frozen, tree))["weight"]
    assert torch.allclose(change, torch.einsum("or,rik->iok", B[..., 0], A), atol=1e-12)

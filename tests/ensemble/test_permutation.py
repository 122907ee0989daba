"""A permuted network computes what it computed, found by structure or written by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import peft_func as pf
from tests.ensemble.nets import BasicBlock, Bottleneck, ResNet, shake


class Centered(nn.Module):
    def forward(self, x):
        return x - x.mean(-1, keepdim=True)


class OddReLU(nn.ReLU):
    def forward(self, x):
        return super().forward(x - x[..., :1])


def mlp():
    return nn.Sequential(
        nn.Linear(5, 7), nn.ReLU(), nn.Sequential(nn.BatchNorm1d(7), nn.Dropout(), nn.Linear(7, 6), nn.LayerNorm(6)),
        nn.GELU(), nn.Linear(6, 6, bias=False), nn.RMSNorm(6), nn.Tanh(), nn.Linear(6, 3), nn.Sigmoid(),
    )  # fmt: skip


def vgg():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Dropout2d(), nn.AdaptiveAvgPool2d(3), nn.Flatten(),
        nn.Linear(72, 5), nn.ReLU(), nn.Linear(5, 2),
    )  # fmt: skip


def grouped():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=3), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.ReLU(),
        nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 8 * 8, 3),
    )  # fmt: skip


def grouped_at_the_end():
    net = ResNet(BasicBlock)
    net.layer2[1].conv2 = nn.Conv2d(6, 6, 3, 1, 1, groups=2, bias=False)
    net.layer1[0].conv1 = nn.Conv2d(4, 4, 3, 1, 1, groups=2, bias=False)
    return net


IMAGES = (2, 3, 12, 12)
# The net, its inputs, and the units of each permutation that it has.
ZOO = {
    "mlp": (mlp, (4, 5), {"0": 7, "2.2": 6, "4": 6}),
    "vgg": (vgg, IMAGES, {"0": 6, "4": 8, "9": 5}),
    "grouped": (grouped, IMAGES, {"4": 4, "6": 4}),
    "norm first": (
        lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)), (3, 5), {"1": 4},
    ),
    "sequences": (lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)), (3, 6, 5), {"0": 4}),
    "one layer": (lambda: nn.Sequential(nn.Linear(5, 4)), (3, 5), {}),
    "resnet, basic": (
        lambda: ResNet(BasicBlock), (2, 3, 32, 32),
        {
            "conv1": 4, "layer1.0.conv1": 4, "layer1.1.conv1": 4, "layer2.0.conv1": 6, "layer2.0.downsample.0": 6,
            "layer2.1.conv1": 6,
        },
    ),
    "resnet, bottleneck": (
        lambda: ResNet(Bottleneck), (2, 3, 32, 32),
        {
            "conv1": 4, "layer1.0.downsample.0": 8, "layer2.0.downsample.0": 12,
            **{f"layer1.{i}.conv{j}": 4 for i in (0, 1) for j in (1, 2)},
            **{f"layer2.{i}.conv{j}": 6 for i in (0, 1) for j in (1, 2)},
        },
    ),
    "resnet, grouped here and there": (
        grouped_at_the_end, (2, 3, 32, 32), {"layer1.1.conv1": 4, "layer2.0.conv1": 6},
    ),
    "resnext": (
        lambda: ResNet(Bottleneck, groups=2), (2, 3, 32, 32),
        {"conv1": 4, "layer1.0.downsample.0": 8, "layer2.0.downsample.0": 12},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ZOO)
def test_a_permuted_network_computes_the_same(name):
    make, shape, units = ZOO[name]
    net = shake(make())
    model, x = pf.functionalize(net), torch.randn(shape).double()
    spec, state_spec = pf.permutation_spec(net)
    assert spec.keys() == units.keys()
    permutations = {name: torch.randperm(count) for name, count in units.items()}
    params = pf.permute(model.params, spec, permutations)
    state = pf.permute(model.state, state_spec, permutations)
    expected, _ = model.with_state(model.params, model.state, x)
    found, _ = model.with_state(params, state, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert list(params) == list(model.params)
    if units:
        assert any(not torch.equal(params[path], model.params[path]) for path in params)
        back = pf.permute(params, spec, {name: order.argsort() for name, order in permutations.items()})
        assert all(torch.equal(back[path], model.params[path]) for path in back)


@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet, basic"])
def test_each_permutation_alone_computes_the_same_and_no_place_is_idle(name):
    make, shape, units = ZOO[name]
    net = shake(make())
    model, x = pf.functionalize(net), torch.randn(shape).double()
    spec, state_spec = pf.permutation_spec(net)
    identity = {name: torch.arange(count) for name, count in units.items()}
    expected = model(model.params, x)
    for one, count in units.items():
        permutations = {**identity, one: torch.arange(count).roll(1)}
        state = pf.permute(model.state, state_spec, permutations)
        params = pf.permute(model.params, spec, permutations)
        torch.testing.assert_close(model.with_state(params, state, x)[0], expected, rtol=0, atol=1e-10)
        for i in range(len(spec[one])):  # with one place left out, it computes something else
            partial = {**spec, one: [place for j, place in enumerate(spec[one]) if j != i]}
            wrong = pf.permute(model.params, partial, permutations)
            assert (model.with_state(wrong, state, x)[0] - expected).abs().max() > 1e-8, spec[one][i]


@given(order=st.permutations(range(5)), block=st.integers(1, 3), axis=st.sampled_from([0, 1, -1]))
def test_blocks_move_as_one(order, block, axis):
    tensor = torch.arange(5 * block * 5 * block).reshape(5 * block, 5 * block)
    found = pf.permute({"w": tensor}, {"p": [("w", axis, block)]}, {"p": torch.tensor(order)})["w"]
    index = [i * block + k for i in order for k in range(block)]
    assert torch.equal(found, tensor[index] if axis == 0 else tensor[:, index])


def test_it_is_pure_and_differentiable():
    tree = {"a": torch.randn(3, 2), "b": torch.randn(4)}
    before = {name: tensor.clone() for name, tensor in tree.items()}
    order = {"p": torch.tensor([2, 0, 1])}
    found = pf.permute(tree, {"p": [("a", 0)]}, order)
    assert found["b"] is tree["b"]
    assert all(torch.equal(tree[name], before[name]) for name in tree)
    grad = torch.func.grad(lambda t: (pf.permute(t, {"p": [("a", 0)]}, order)["a"][0]).sum())(tree)
    assert grad["a"].tolist() == [[0, 0], [0, 0], [1, 1]]


TREE = {"a": torch.zeros(3, 2), "b": torch.zeros(4)}


@pytest.mark.parametrize(
    ("spec", "order", "said"),
    [
        ({"p": [("c", 0)]}, [0, 1, 2], "'c'.*does not hold"),
        ({"p": [("a", 2)]}, [0, 1, 2], "axis 2"),
        ({"p": [("a", 0), ("b", 0)]}, [0, 1, 2], "3 units.*'b' has 4"),
        ({"p": [("a", 0, 2)]}, [0, 1, 2], "blocks of 2"),
        ({"p": []}, [0], "no places"),
        ({"p": [("a", 0)]}, [0, 1], "no reordering of 3"),
        ({"p": [("a", 0)]}, [0, 1, 1], "no reordering"),
        ({"p": [("a", 0)]}, [1, 2, 3], "no reordering"),
        ({"p": [("a", 0)]}, [0.0, 1.0, 2.0], "no reordering"),
        ({"q": [("a", 0)]}, [0, 1, 2], "no permutation 'q'; given are p"),
    ],
)
def test_bad_permutations(spec, order, said):
    with pytest.raises(pf.TreeError, match=said):
        pf.permute(TREE, spec, {"p": torch.tensor(order)})


def pre_activation():
    net = ResNet(BasicBlock)
    net.layer2[0].bn1 = nn.BatchNorm2d(4)  # it normalises what comes in
    return net


def squeezed():
    net = ResNet(BasicBlock)
    net.layer1[0].se = nn.Linear(4, 4)
    return net


def deep_stem():
    net = ResNet(BasicBlock)
    net.conv1 = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    return net


def shared():
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.ReLU(), layer)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4), Centered(), nn.Linear(4, 2)), "1: a Centered"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1), nn.Linear(4, 2)), "1: a Softmax"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.GroupNorm(2, 4), nn.Linear(4, 2)), "1: a GroupNorm"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Flatten(), nn.Linear(8, 2)), "2: a Linear"),
        (lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(4, 2)), "1: a Linear"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.AvgPool1d(2), nn.Linear(2, 2)), "1: a AvgPool1d"),
        (lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.LayerNorm(4), nn.Conv1d(4, 2, 1)), "1: a LayerNorm"),
        (lambda: nn.Sequential(nn.ConvTranspose1d(4, 4, 1), nn.ReLU()), "0: a ConvTranspose1d"),
        (lambda: nn.Sequential(nn.Linear(4, 4), OddReLU(), nn.Linear(4, 2)), "1: a OddReLU"),
        (shared, "twice"),
        (deep_stem, "conv1: a Sequential"),
        (pre_activation, "layer2.0.bn1"),
        (squeezed, "layer1.0.se: a Linear"),
        (lambda: nn.TransformerEncoderLayer(4, 2), "TransformerEncoderLayer"),
    ],
)
def test_what_is_not_understood_is_named(make, said):
    with pytest.raises(pf.OptionError, match=said) as error:
        pf.permutation_spec(make())
    assert "by hand" in str(error.value)


def test_models_and_effective_weights_are_pointed_to_what_is_meant():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model = pf.functionalize(net)
    with pytest.raises(pf.OptionError, match="FunctionalModel; give it net"):
        pf.permutation_spec(model)
    adapter = pf.bind(pf.lora("0", rank=2), model)
    weights, order = adapter.apply(*adapter.init(0)), {"0": torch.tensor([1, 0, 3, 2])}
    spec, _ = pf.permutation_spec(net)
    with pytest.raises(pf.TreeError, match=r"pf\.merge"):
        pf.permute(weights, spec, order)
    with pytest.raises(pf.TreeError, match=r"pf\.merge"):
        pf.repair(model, weights, [model.params], [torch.randn(3, 4)])
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(pf.permute(pf.merge(weights), spec, order), x), net(x))

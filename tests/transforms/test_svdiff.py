"""SVDiff against the plain formula: W' = U diag(relu(sigma + shift)) V^T, with the decomposition made anew."""

import math

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft_func as pf
from tests.transforms.plain import GRADS, VALUES, as_matrix, as_stored, call, grads_of, learnable, random_like, same
from tests.transforms.resnet18 import resnet18_names
from tests.transforms.test_lora import VIEWED
from tests.zoo import ZOO, ids, randn, seeded


def shifted(net, path, shift, conv="balanced"):
    """The formula, in the shape that the module stores; `net` is float64."""
    weight = net.get_parameter(path).detach()
    matrix = as_matrix(net, path, weight)
    whole, kernel = matrix.shape, weight.shape[2:]
    module = net.get_submodule(path.rpartition(".")[0])
    if isinstance(module, nn.modules.conv._ConvNd) and conv == "balanced" and len(kernel) > 1:
        matrix = matrix.reshape(-1, matrix.shape[-1] // kernel[0])
    U, sigma, Vt = torch.linalg.svd(matrix, full_matrices=False)
    changed = U @ torch.diag_embed(torch.relu(sigma + shift)) @ Vt
    return as_stored(net, path, changed.reshape(whole))


LAYERS = {
    "linear": (lambda: nn.Linear(5, 7), randn(4, 5)),
    "wide": (lambda: nn.Linear(7, 3, bias=False), randn(2, 4, 7)),
    "hf_conv1d": (lambda: Conv1D(7, 5), randn(4, 5)),
    "embedding": (lambda: nn.Embedding(11, 6), ids(3, 7, high=11)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), randn(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), dilation=2, padding=1), randn(2, 4, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (3, 5, 1), padding="same"), randn(1, 2, 4, 5, 4)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4, padding=1, padding_mode="circular"), randn(2, 8, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8, bias=False), randn(2, 8, 5, 5)),
    "unbatched": (lambda: nn.Conv2d(4, 6, 3), randn(4, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 9, 3, groups=3, stride=2), randn(2, 6, 4, 4)),
}


@pytest.mark.parametrize("conv", ["balanced", "out_as_h"])
@pytest.mark.parametrize("layer", LAYERS)
def test_layer_equals_the_formula(layer, conv):
    build, x = LAYERS[layer]
    net = seeded(lambda: nn.Sequential(build()))()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.svdiff("0", conv=conv), model)
    frozen, start = adapter.init(0)
    ours, theirs = learnable(random_like(start)), learnable(random_like(start))
    with pf.densify("error"):
        weights = adapter.apply(frozen, ours)
        out = model(weights, x)
    weight = shifted(net, "0.weight", theirs["svdiff"]["0.weight"]["shift"], conv)
    expected = torch.func.functional_call(net, {"0.weight": weight}, (x,))
    same(out, expected, VALUES)
    same(pf.merge(weights)["0.weight"], weight, VALUES)
    same(grads_of(out, ours), grads_of(expected, theirs), GRADS)


@pytest.mark.parametrize("name", ["tied", "shared", "attention", "encoder_layer", "experts", "conv", "gpt2"])
def test_every_matrix_of_a_model_equals_the_formula(name):
    animal = ZOO[name]
    net = animal.build()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.svdiff(".*"), model)
    frozen, start = adapter.init(0)
    ours, theirs = learnable(random_like(start)), learnable(random_like(start))
    args, kwargs = animal.inputs(5)
    out = animal.output(model(adapter.apply(frozen, ours), *args, **kwargs))
    weights = {path: shifted(net, path, leaf["shift"]) for path, leaf in theirs["svdiff"].items()}
    expected = call(net, weights, animal, 5)
    same(out, expected, VALUES)
    same(grads_of(out, ours), grads_of(expected, theirs), GRADS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mlp", "conv", "experts"])
def test_at_init_every_weight_is_the_base_bit_for_bit(name, dtype):
    model = pf.functionalize(ZOO[name].build().to(dtype))
    adapter = pf.bind(pf.svdiff(".*"), model)
    frozen, start = adapter.init(0)
    for path, weight in pf.merge(adapter.apply(frozen, start)).items():
        assert torch.equal(weight, model.params[path])
        assert weight.dtype is dtype
    wide = torch.promote_types(dtype, torch.float32)
    assert {leaf["shift"].dtype for leaf in start["svdiff"].values()} == {wide}


def test_a_shift_below_minus_sigma_removes_the_direction_and_gets_no_gradient():
    net = seeded(lambda: nn.Linear(5, 4))()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.svdiff("weight"), model)
    frozen = adapter.init(0)[0]
    shift = torch.tensor([0.5, -0.1, -100.0, -1e6], dtype=torch.float64).requires_grad_()
    tree = {"svdiff": {"weight": {"shift": shift}}}
    weight = pf.merge(adapter.apply(frozen, tree))["weight"]
    assert int(torch.linalg.matrix_rank(weight.detach())) == 2
    (grad,) = torch.autograd.grad(weight.sin().sum(), shift)
    assert (grad != 0).tolist() == [True, True, False, False]
    same(weight, shifted(net, "weight", shift), 1e-9)


def test_what_cannot_shrink_is_as_flat_as_relu_at_zero():
    net = nn.Linear(3, 3, bias=False).double()
    net.weight.data.zero_()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.svdiff("weight"), model)
    frozen, start = adapter.init(0)
    tree = learnable(start)
    weight = pf.merge(adapter.apply(frozen, tree))["weight"]
    assert not weight.any()
    assert not torch.autograd.grad(weight.sum(), tree["svdiff"]["weight"]["shift"])[0].any()


@pytest.mark.parametrize("layer", VIEWED)
def test_there_is_a_shift_for_every_singular_value_of_the_view(layer):
    build, balanced, out_as_h = VIEWED[layer]
    model = pf.functionalize(nn.Sequential(build()))
    for conv, view in {"balanced": balanced, "out_as_h": out_as_h}.items():
        adapter = pf.bind(pf.svdiff("0", conv=conv), model)
        assert adapter.spec == {("svdiff", "0.weight", "shift"): (min(view),)}


def test_resnet18_trains_11157_values():
    adapter = pf.bind(pf.svdiff(".*"), pf.functionalize(resnet18_names()))
    assert sum(math.prod(shape) for shape in adapter.spec.values()) == 11_157


def test_the_file_holds_the_shifts_alone(tmp_path):
    net = seeded(lambda: nn.Sequential(nn.Conv2d(3, 32, 5), nn.Flatten(), nn.Linear(32, 300)))()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.svdiff(".*"), model)
    frozen, start = adapter.init(0)
    tree = random_like(start)
    file = tmp_path / "a.safetensors"
    pf.save(file, adapter, tree)
    with safe_open(file, "pt") as opened:
        held = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    assert held == {"svdiff.0.weight.shift": [15], "svdiff.2.weight.shift": [32]}
    assert file.stat().st_size < sum(p.nbytes for p in net.parameters()) / 20
    again, frozen, loaded = pf.load(file, pf.functionalize(net))
    same(pf.merge(again.apply(frozen, loaded)), pf.merge(adapter.apply(frozen, tree)), 0.0)


def test_in_a_chain_the_bases_are_those_of_the_frozen_weight():
    net = seeded(lambda: nn.Linear(5, 4))()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.chain(pf.lora("weight", rank=2), pf.svdiff("weight")), model)
    frozen, start = adapter.init(0)
    tree = random_like(start)
    leaf, shift = tree["lora"]["weight"], tree["svdiff"]["weight"]["shift"]
    expected = shifted(net, "weight", shift) + leaf["B"] @ leaf["A"]
    same(pf.merge(adapter.apply(frozen, tree))["weight"], expected)
    own = pf.bind(pf.chain(pf.svdiff("weight"), pf.train("weight")), model)
    frozen, start = own.init(0)
    same(pf.merge(own.apply(frozen, start))["weight"], net.weight.detach(), 0.0)
    tree = {"svdiff": tree["svdiff"], "train": pf.map_leaves(lambda t: t + 1, start["train"])}
    same(pf.merge(own.apply(frozen, tree))["weight"], shifted(net, "weight", shift) + 1)


def test_a_half_precision_base_is_decomposed_in_float32():
    net = seeded(lambda: nn.Linear(5, 4))().bfloat16()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.svdiff("weight"), model)
    frozen, start = adapter.init(0)
    tree = pf.map_leaves(torch.Tensor.float, random_like(start))
    U, sigma, Vt = torch.linalg.svd(net.weight.detach().float(), full_matrices=False)
    exact = U @ torch.diag(torch.relu(sigma + tree["svdiff"]["weight"]["shift"])) @ Vt
    weights = adapter.apply(frozen, tree)
    same(pf.merge(weights)["weight"].float(), exact, 2**-8)
    x = randn(3, 5).bfloat16()
    y = model(weights, x)
    assert y.dtype is torch.bfloat16
    same(y.float(), x.float() @ exact.T + net.bias.detach().float(), 0.05)


@pytest.mark.parametrize("conv", ["factored", "Balanced", None])
def test_an_unknown_view_is_refused(conv):
    with pytest.raises(pf.OptionError, match="'balanced', 'out_as_h'"):
        pf.svdiff(".*", conv=conv)


def test_options_are_keyword_only_and_biases_are_no_matrices():
    with pytest.raises(TypeError):
        pf.svdiff(".*", "balanced")
    with pytest.raises(pf.SelectorError, match="fewer than two dimensions"):
        pf.bind(pf.svdiff(".*bias"), pf.functionalize(nn.Linear(3, 3)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_base_that_is_not_finite_is_refused_by_name(bad):
    net = nn.Linear(3, 3)
    net.weight.data[1, 2] = bad
    adapter = pf.bind(pf.svdiff("weight"), pf.functionalize(net))
    with pytest.raises(pf.OptionError, match="svdiff: the base weight 'weight' cannot be decomposed"):
        adapter.init(0)


def test_peft_folders_hold_no_svdiff(tmp_path):
    adapter = pf.bind(pf.svdiff("weight"), pf.functionalize(nn.Linear(3, 3)))
    with pytest.raises(pf.OptionError, match=r"pf\.save"):
        pf.save_peft(tmp_path / "folder", adapter, adapter.init(0)[1])

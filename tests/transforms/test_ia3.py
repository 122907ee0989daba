"""IA3 against HF PEFT's: whole outputs, bias included, or the inputs of feed-forward layers."""

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft_func as pf
from tests.transforms.peer import Peer, compare
from tests.transforms.plain import GRADS, VALUES, as_matrix, as_stored, call, grads_of, learnable, random_like, same
from tests.zoo import ZOO, randn, seeded

MATRICES = ~pf.suffix("bias_k") & ~pf.suffix("bias_v")
LAYERS = {
    "linear": (lambda: nn.Linear(5, 7), (4, 5)),
    "linear_without_bias": (lambda: nn.Linear(5, 7, bias=False), (2, 3, 5)),
    "hf_conv1d": (lambda: Conv1D(7, 5), (2, 4, 5)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 8)),
    "conv2d_without_bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), (2, 4, 7, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2), (2, 2, 4, 3, 4)),
}


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("layer", LAYERS)
def test_layer_equals_peft_in_outputs_gradients_and_merged_weights(layer, side):
    build, shape = LAYERS[layer]
    net = seeded(lambda: nn.Sequential(build()))()
    feedforward = ["0"] if side == "input" else []
    peer = Peer(net, peft.IA3Config(target_modules=["0"], feedforward_modules=feedforward))
    compare(net, peer, pf.ia3(["0"], side=side, scale_bias=side == "output"), (randn(*shape),))


TRANSFORMERS = {
    "bert": (["key", "value"], [r"output.dense"]),
    "gpt2": (["c_attn"], ["mlp.c_proj"]),
    "llama": (["k_proj", "v_proj"], ["down_proj"]),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_both_sides_in_one_chain_equal_one_config_of_peft(name):
    outputs, inputs = TRANSFORMERS[name]
    animal = ZOO[name]
    net = animal.build()
    model = pf.functionalize(net)
    peer = Peer(net, peft.IA3Config(target_modules=outputs + inputs, feedforward_modules=inputs))
    method = pf.chain(pf.ia3(outputs, scale_bias=True, name="out"), pf.ia3(inputs, side="input", name="in"))
    adapter = pf.bind(method, model)
    frozen, start = adapter.init(0)
    values = peer.tree()
    tree = learnable({part: {path: values[path] for path in start[part]} for part in start})
    (x,), _ = animal.inputs(4)
    weights = adapter.apply(frozen, tree)
    ours, theirs = animal.output(model(weights, x)), animal.output(peer.model(x))
    same(ours, theirs, VALUES)
    (theirs * theirs.cos()).sum().backward()
    grads = grads_of(ours, tree)
    wanted = peer.tree(grad=True)
    same(grads, [wanted[path]["scale"] for part in start for path in start[part]], GRADS)
    same({n: t.detach() for n, t in model.state_dict(weights).items()}, peer.merged(), VALUES)


def scaled(net, path, scale, side):
    weight = net.get_parameter(path).detach()
    matrix = as_matrix(net, path, weight)
    if side == "output":
        return as_stored(net, path, scale.unsqueeze(-1) * matrix)
    taps = matrix.shape[-1] // scale.shape[-1]
    return as_stored(net, path, matrix * scale.repeat_interleave(taps, -1).unsqueeze(-2))


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("name", ZOO)
def test_every_matrix_of_a_model_equals_the_formula(name, side):
    animal = ZOO[name]
    net = animal.build()
    model = pf.functionalize(net)
    where = pf.of_type(nn.Linear, nn.Conv2d) if name == "vit" else MATRICES  # not its class token and positions
    adapter = pf.bind(pf.ia3(where, side=side), model)
    frozen, start = adapter.init(0)
    ours, theirs = learnable(random_like(start)), learnable(random_like(start))
    args, kwargs = animal.inputs(2)
    out = animal.output(model(adapter.apply(frozen, ours), *args, **kwargs))
    weights = {path: scaled(net, path, leaf["scale"], side) for path, leaf in theirs["ia3"].items()}
    expected = call(net, weights, animal, 2)
    same(out, expected, VALUES)
    same(grads_of(out, ours), grads_of(expected, theirs), GRADS)
    assert all(leaf["scale"].eq(1).all() for leaf in start["ia3"].values())


class Projected(nn.Module):
    """The output of the projections, told from what attention does with them."""

    def __init__(self, kdim):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, kdim=kdim, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x)[0]


@pytest.mark.parametrize("kdim", [None, 8])
def test_scale_bias_scales_the_whole_output_of_attention_projections(kdim):
    net = seeded(lambda: Projected(kdim))()
    if kdim is not None:  # separate projections, which share one in_proj_bias
        net.attn._qkv_same_embed_dim = False
        packed = net.attn.in_proj_weight.data
        del net.attn.in_proj_weight
        for name, rows in zip("qkv", packed.chunk(3), strict=True):
            net.attn.register_parameter(f"{name}_proj_weight", nn.Parameter(rows.clone()))
        net.attn.register_parameter("in_proj_weight", None)
    model = pf.functionalize(net)
    where = r"attn\.((q|k|v)_proj_weight|in_proj_weight)"
    adapter = pf.bind(pf.ia3(where, scale_bias=True), model)
    frozen, start = adapter.init(0)
    tree = pf.map_leaves(lambda t: t * 3, start)  # every projection is three times what it was: weight and bias
    merged = pf.merge(adapter.apply(frozen, tree))
    same(merged["attn.in_proj_bias"], 3 * net.attn.in_proj_bias.detach())
    assert len(start["ia3"]) == (1 if kdim is None else 3)


def test_the_scale_of_a_grouped_transposed_convolution_is_that_of_its_outputs():
    net = seeded(lambda: nn.ConvTranspose2d(6, 9, 3, groups=3))()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.ia3(".*", scale_bias=True), model)
    frozen, start = adapter.init(0)
    tree, x = random_like(start), randn(2, 6, 4, 4)
    scale = tree["ia3"]["weight"]["scale"].repeat(3)
    same(model(adapter.apply(frozen, tree), x), net(x) * scale.view(1, -1, 1, 1))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: pf.ia3(".*", side="left"), ["'left'", "'output'", "'input'"]),
        (lambda: pf.ia3(".*", side="input", scale_bias=True), ["scale_bias", "side='output'"]),
        (lambda: pf.ia3(".*", side=None), ["None", "'output'"]),
    ],
)
def test_errors_name_the_choices(make, words):
    with pytest.raises(pf.OptionError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


def test_a_zero_scale_removes_the_weight_and_trains_on():
    net = seeded(lambda: nn.Linear(4, 3))()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.ia3("weight"), model)
    frozen, start = adapter.init(0)
    tree = learnable(pf.map_leaves(torch.zeros_like, start))
    out = model(adapter.apply(frozen, tree), randn(2, 4))
    same(out, net.bias.detach().expand(2, 3))
    assert grads_of(out, tree)[0].abs().min() > 0


@pytest.mark.parametrize("method", [pf.ia3(".*"), pf.lora(".*", rank=1)], ids=["ia3", "lora"])
def test_everything_of_an_attention_with_bias_kv_runs(method):
    animal = ZOO["attention"]
    model = pf.functionalize(animal.build())
    adapter = pf.bind(method, model)
    frozen, start = adapter.init(0)
    weights = adapter.apply(frozen, random_like(start))
    args, kwargs = animal.inputs(0)
    same(model(weights, *args, **kwargs), model(pf.merge(weights), *args, **kwargs))

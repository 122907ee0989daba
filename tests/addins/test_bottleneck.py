"""Bottlenecks against plain PyTorch, written anew, in real transformers."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import peft_func as pf
from tests.laws.conformance import close, perturbed
from tests.zoo import ZOO, ids, randn, seeded

ACT = {"relu": nn.ReLU(), "gelu": nn.GELU(), "tanh": nn.Tanh(), "silu": nn.SiLU(), "mish": nn.Mish()}


class Plain(nn.Module):
    """The adapter of the papers as a module: what it adds, without its skip."""

    def __init__(self, leaves, act="relu", scale=1.0, norm=None):
        super().__init__()
        self.down, self.up = nn.Linear(1, 1), nn.Linear(1, 1)
        self.down.weight, self.down.bias = nn.Parameter(leaves["down"]), nn.Parameter(leaves["down_bias"])
        self.up.weight, self.up.bias = nn.Parameter(leaves["up"]), nn.Parameter(leaves["up_bias"])
        self.act, self.where = ACT[act], norm
        self.scale = nn.Parameter(leaves["scale"]) if "scale" in leaves else scale
        if norm:
            self.norm = nn.LayerNorm(len(leaves["norm"])).double()
            self.norm.weight, self.norm.bias = nn.Parameter(leaves["norm"]), nn.Parameter(leaves["norm_bias"])

    def forward(self, h):
        h = self.norm(h) if self.where == "in" else h
        h = self.up(self.act(self.down(h)))
        return self.scale * (self.norm(h) if self.where == "out" else h)

    def grads(self):
        found = {"down": self.down.weight, "down_bias": self.down.bias, "up": self.up.weight, "up_bias": self.up.bias}
        if isinstance(self.scale, nn.Parameter):
            found["scale"] = self.scale
        if self.where:
            found |= {"norm": self.norm.weight, "norm_bias": self.norm.bias}
        return {leaf: tensor.grad for leaf, tensor in found.items()}


class Behind(nn.Module):
    """A module, and an adapter behind it that adds to its first output."""

    def __init__(self, module, plain):
        super().__init__()
        self.module, self.plain = module, plain

    def forward(self, *args, **kwargs):
        y = self.module(*args, **kwargs)
        return (y[0] + self.plain(y[0]), *y[1:]) if isinstance(y, tuple) else y + self.plain(y)


class Beside(Behind):
    """A module, and an adapter on what it gets."""

    def forward(self, x, *args, **kwargs):
        return self.module(x, *args, **kwargs) + self.plain(x)


class HoulsbyOutput(nn.Module):
    """BERT's `output` with `output_adapter` of Houlsby et al.: between the dropout and the sum."""

    def __init__(self, module, plain):
        super().__init__()
        self.module, self.plain = module, plain

    def forward(self, hidden, skip):
        hidden = self.module.dropout(self.module.dense(hidden))
        hidden = hidden + self.plain(hidden)
        return self.module.LayerNorm(hidden + skip)


class PfeifferOutput(HoulsbyOutput):
    """BERT's `output` with the adapter of Pfeiffer et al.: it gets the norm of the sum, and skips from before it."""

    def forward(self, hidden, skip):
        hidden = self.module.dropout(self.module.dense(hidden))
        down_input = self.module.LayerNorm(hidden + skip)
        hidden = self.plain(down_input) + hidden
        return self.module.LayerNorm(hidden + skip)


class BesideOutput(HoulsbyOutput):
    """BERT's `output` with the adapter of He et al.: the skip is the input of the feed-forward part."""

    def forward(self, hidden, skip):
        hidden = self.module.dropout(self.module.dense(hidden)) + self.plain(skip)
        return self.module.LayerNorm(hidden + skip)


def put(net, path, wrap, plain):
    holder, _, name = path.rpartition(".")
    setattr(net.get_submodule(holder), name, wrap(net.get_submodule(path), plain))


HF = "bert.encoder.layer.{}.", "transformer.h.{}.", "model.layers.{}.", "vit.layers.{}."
BERT, GPT2, LLAMA, VIT = ([prefix.format(i) for i in range(2)] for prefix in HF)
# For each: animal, method, and pairs of a place of ours and how a plain net gets an adapter where the authors have it.
PLACES = {
    "houlsby bert": ("bert", pf.houlsby, [
        pair for at in BERT for pair in (
            (f"{at}attention.output.dense", f"{at}attention.output", HoulsbyOutput),
            (f"{at}output.dense", f"{at}output", HoulsbyOutput),
        )
    ]),
    "pfeiffer bert": ("bert", pf.pfeiffer, [(f"{at}output.LayerNorm", f"{at}output", PfeifferOutput) for at in BERT]),
    "houlsby gpt2": ("gpt2", pf.houlsby, [
        pair for at in GPT2
        for pair in ((f"{at}attn.c_proj", f"{at}attn", Behind), (f"{at}mlp.c_proj", f"{at}mlp", Behind))
    ]),
    "pfeiffer gpt2": ("gpt2", pf.pfeiffer, [(at[:-1], at[:-1], Behind) for at in GPT2]),
    "houlsby llama": ("llama", pf.houlsby, [
        pair for at in LLAMA
        for pair in ((f"{at}self_attn.o_proj", f"{at}self_attn", Behind), (f"{at}mlp.down_proj", f"{at}mlp", Behind))
    ]),
    "pfeiffer llama": ("llama", pf.pfeiffer, [(at[:-1], at[:-1], Behind) for at in LLAMA]),
    "houlsby vit": ("vit", pf.houlsby, [
        pair for at in VIT
        for pair in ((f"{at}attention.o_proj", f"{at}attention", Behind), (f"{at}mlp.fc2", f"{at}mlp", Behind))
    ]),
    "pfeiffer vit": ("vit", pf.pfeiffer, [(at[:-1], at[:-1], Behind) for at in VIT]),
    "parallel adapter bert": (
        "bert", pf.parallel_adapter, [(f"{at}output.dense", f"{at}output", BesideOutput) for at in BERT],
    ),
    "parallel adapter gpt2": (
        "gpt2", pf.parallel_adapter, [(f"{at}mlp.c_proj", f"{at}mlp", Beside) for at in GPT2],
    ),
    "parallel adapter llama": (
        "llama", pf.parallel_adapter, [(f"{at}mlp.down_proj", f"{at}mlp", Beside) for at in LLAMA],
    ),
    "parallel adapter vit": ("vit", pf.parallel_adapter, [(f"{at}mlp.fc2", f"{at}mlp", Beside) for at in VIT]),
    "parallel llama": (
        "llama", functools.partial(pf.bottleneck, pf.mlps(), form="parallel"),
        [(f"{at}mlp", f"{at}mlp", Beside) for at in LLAMA],
    ),
    "parallel gpt2": (
        "gpt2", functools.partial(pf.bottleneck, pf.mlps(), form="parallel"),
        [(f"{at}mlp", f"{at}mlp", Beside) for at in GPT2],
    ),
}  # fmt: skip
OPTIONS = [
    {"rank": 3},
    {"reduction": 4, "activation": "gelu", "scale": 4.0},
    {"rank": 2, "activation": "tanh", "scale": "learned", "layer_norm": "in"},
    {"rank": 2, "activation": "silu", "layer_norm": "out", "scale": 0.5},
]


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("number", range(len(OPTIONS)))
def test_values_and_gradients_are_those_of_the_papers(name, number):
    animal, method, places = PLACES[name]
    options = OPTIONS[number]
    net = ZOO[animal].build()
    adapter = pf.bind(method(**options, name="own"), pf.functionalize(net))
    frozen, tree = adapter.init(number)
    assert list(tree["own"]) == [place for place, *_ in places]
    leaves = pf.map_leaves(lambda t: t.requires_grad_(), perturbed(tree, 3, 0.5))
    plain = copy.deepcopy(net)
    adapters = {}
    scale = options.get("scale", 1.0)
    for place, path, wrap in places:
        own = {leaf: tensor.detach().clone() for leaf, tensor in leaves["own"][place].items()}
        adapters[place] = Plain(own, options.get("activation", "relu"), scale, options.get("layer_norm"))
        put(plain, path, wrap, adapters[place])
    args, kwargs = ZOO[animal].inputs(5)
    ours = ZOO[animal].output(adapter.model(adapter.apply(frozen, leaves), *args, **kwargs))
    theirs = ZOO[animal].output(plain(*args, **kwargs))
    assert close(ours, theirs, 1e-12)
    assert not close(ours, ZOO[animal].output(net(*args, **kwargs)), 1e-3)
    (ours * ours.cos()).sum().backward()
    (theirs * theirs.cos()).sum().backward()
    for place, own in leaves["own"].items():
        assert close({leaf: tensor.grad for leaf, tensor in own.items()}, adapters[place].grads(), 1e-9)


class PostNorm(nn.Module):
    """DistilBERT's block, which ends with a norm, with an adapter of Pfeiffer's."""

    def __init__(self, block, plain):
        super().__init__()
        self.block, self.plain = block, plain

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        attended, _ = self.block.attention(hidden_states, attention_mask=attention_mask, **kwargs)
        middle = self.block.sa_layer_norm(attended + hidden_states)
        z = self.block.ffn(middle)
        normed = self.block.output_layer_norm(z + middle)
        return self.block.output_layer_norm(self.plain(normed) + z + middle)


def distilbert():
    config = transformers.DistilBertConfig(
        vocab_size=32, dim=16, hidden_dim=24, n_layers=1, n_heads=2, max_position_embeddings=16, dropout=0.0,
        attention_dropout=0.0,
    )  # fmt: skip
    return transformers.DistilBertModel(config)


def test_pfeiffer_is_told_that_blocks_end_with_a_norm():
    net = seeded(distilbert)()
    adapter = pf.bind(pf.pfeiffer(post_norm=True, rank=2), pf.functionalize(net))
    frozen, tree = adapter.init(0)
    tree = perturbed(tree, 1, 0.5)
    assert list(tree["pfeiffer"]) == ["transformer.layer.0.output_layer_norm"]
    plain = copy.deepcopy(net)
    put(plain, "transformer.layer.0", PostNorm, Plain(next(iter(tree["pfeiffer"].values()))))
    x = ids(2, 5, high=32)
    ours = adapter.model(adapter.apply(frozen, tree), x).last_hidden_state
    assert close(ours, plain(x).last_hidden_state, 1e-12)


def encoder(norm_first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    return lambda: nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize("norm_first", [False, True])
def test_torch_encoder_layers(norm_first):
    """In eval mode, too, where torch's layers would go their fast path."""
    net = seeded(encoder(norm_first))()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.chain(pf.houlsby(rank=2), pf.pfeiffer(rank=2)), model)
    frozen, tree = adapter.init(0)
    tree = perturbed(tree, 1, 0.5)
    ends = [f"layers.{i}.norm2" if not norm_first else f"layers.{i}" for i in range(2)]
    assert list(tree["pfeiffer"]) == ends
    d = {path: Plain(leaves) for path, leaves in (tree["houlsby"] | tree["pfeiffer"]).items()}
    x = h = randn(2, 3, 8)
    for i, block in enumerate(net.layers):
        at = f"layers.{i}"
        attend = lambda z, block=block: block.self_attn(z, z, z, need_weights=False)[0]
        feed = lambda z, block=block: block.linear2(F.relu(block.linear1(z)))
        behind = lambda z, path: z + d[path](z)
        if norm_first:
            h = h + behind(attend(block.norm1(h)), f"{at}.self_attn")
            h = h + behind(feed(block.norm2(h)), f"{at}.linear2")
            h = behind(h, at)
        else:
            h = block.norm1(h + behind(attend(h), f"{at}.self_attn"))
            z = h + behind(feed(h), f"{at}.linear2")
            h = block.norm2(z + d[f"{at}.norm2"](block.norm2(z)))
    assert close(model(adapter.apply(frozen, tree), x), h, 1e-12)


def test_places_in_an_encoder_with_a_decoder():
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    model = pf.functionalize(seeded(lambda: transformers.T5Model(config))())
    adapter = pf.bind(pf.chain(pf.houlsby(rank=2), pf.pfeiffer(rank=2)), model)
    ends = "layer.0.SelfAttention.o", "layer.1.EncDecAttention.o", "layer.2.DenseReluDense.wo"
    assert adapter.parts[0].modules == (
        "encoder.block.0.layer.0.SelfAttention.o",
        "encoder.block.0.layer.1.DenseReluDense.wo",
        *(f"decoder.block.0.{end}" for end in ends),
    )
    assert adapter.parts[1].modules == ("encoder.block.0", "decoder.block.0")
    frozen, tree = adapter.init(0)
    x = ids(2, 5, high=32)
    call = lambda weights: model(weights, input_ids=x, decoder_input_ids=x).last_hidden_state
    assert close(call(adapter.apply(frozen, tree)), call(model.params), 1e-12)
    assert not close(call(adapter.apply(frozen, perturbed(tree, 1))), call(model.params), 1e-3)


def test_blocks_of_several_widths():
    config = transformers.SwinConfig(
        image_size=8, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2
    )
    model = pf.functionalize(seeded(lambda: transformers.SwinModel(config))())
    adapter = pf.bind(pf.pfeiffer(rank=2), model)
    frozen, tree = adapter.init(0)
    assert [list(own["down"].shape) for own in tree["pfeiffer"].values()] == [[2, 8], [2, 16]]
    assert model(adapter.apply(frozen, tree), randn(1, 3, 8, 8)).last_hidden_state.shape == (1, 4, 16)


def test_a_parallel_adapter_of_two_widths_and_one_in_a_tuple():
    net = nn.Linear(6, 3).double()
    adapter = pf.bind(pf.bottleneck("", form="parallel", rank=2, activation="mish"), pf.functionalize(net))
    tree = perturbed(adapter.init(0)[1], 1, 0.5)
    x = randn(4, 6)
    plain = Plain(tree["bottleneck"][""], "mish")
    assert close(adapter.model(adapter.apply(adapter.frozen, tree), x), net(x) + plain(x), 1e-12)

    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    adapter = pf.bind(pf.bottleneck("", rank=2), pf.functionalize(attention))
    tree = perturbed(adapter.init(0)[1], 1, 0.5)
    x = randn(2, 3, 8)
    y, weights = attention(x, x, x)
    ours, own_weights = adapter.model(adapter.apply(adapter.frozen, tree), x, x, x)
    assert close(ours, y + Plain(tree["bottleneck"][""])(y), 1e-12)
    assert close(own_weights, weights, 1e-12)


def test_dropout_is_for_training_only():
    net = nn.Sequential(nn.Linear(6, 6)).double()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.bottleneck("0", rank=4, dropout=0.5, activation="tanh"), model)
    tree = perturbed(adapter.init(0)[1], 1, 0.5)
    weights, x, own = adapter.apply(adapter.frozen, tree), randn(4, 6), tree["bottleneck"]["0"]
    y = net(x)
    assert close(model.eval()(weights, x), y + Plain(own, "tanh")(y), 1e-12)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ours = model.train()(weights, x)
        torch.manual_seed(0)
        hidden = F.dropout(torch.tanh(F.linear(y, own["down"], own["down_bias"])), 0.5)
    assert close(ours, y + F.linear(hidden, own["up"], own["up_bias"]), 1e-12)

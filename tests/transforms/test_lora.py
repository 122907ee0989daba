"""LoRA against HF PEFT where PEFT is right, and against the plain formula where it is known to be wrong."""

import math
import warnings

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft_func as pf
from tests.transforms.peer import KNOWN_WARNINGS, Peer, compare
from tests.transforms.plain import GRADS, VALUES, call, grads_of, learnable, leaves_of, low_rank, random_like, same
from tests.transforms.resnet18 import SEED_TABLE, resnet18_names
from tests.zoo import ZOO, ids, randn, seeded


class SelfAttention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, **options)

    def forward(self, x):
        return self.attn(x, x, x)[0]


def sequential(*layers):
    return lambda: nn.Sequential(*[layer() for layer in layers])


LAYERS = {
    "linear": (lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3, bias=False)), (4, 5), ["0", "2"]),
    "linear3d": (lambda: nn.Sequential(nn.Linear(5, 7)), (2, 4, 5), ["0"]),
    "hf_conv1d": (lambda: nn.Sequential(Conv1D(7, 5)), (4, 5), ["0"]),
    "hf_conv1d3d": (lambda: nn.Sequential(Conv1D(7, 5)), (2, 4, 5), ["0"]),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3, stride=2, padding=1)), (2, 4, 9), ["0"]),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1)), (2, 4, 9, 8), ["0"]),
    "conv2d_uneven": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, (1, 3), stride=(2, 1), padding=(0, 2), bias=False)), (2, 4, 9, 8), ["0"],
    ),
    "conv2d_same": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding="same")), (2, 4, 5, 6), ["0"]),
    "conv2d_pointwise": (lambda: nn.Sequential(nn.Conv2d(4, 6, 1)), (2, 4, 5, 6), ["0"]),
    "conv2d_patches": (lambda: nn.Sequential(nn.Conv2d(3, 8, 4, stride=4)), (2, 3, 8, 8), ["0"]),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 6, 3, stride=2, padding=1)), (2, 2, 5, 6, 5), ["0"]),
    "two_convs": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.Tanh(), nn.Conv2d(6, 3, 3)), (2, 4, 7, 7), ["0", "2"]),
}  # fmt: skip


@pytest.mark.parametrize("stabilized", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_layer_equals_peft_in_outputs_gradients_and_merged_weights(layer, stabilized):
    build, shape, where = LAYERS[layer]
    net = seeded(build)()
    peer = Peer(net, peft.LoraConfig(r=3, lora_alpha=5, target_modules=where, use_rslora=stabilized))
    compare(net, peer, pf.lora(where, rank=3, alpha=5, rank_stabilized=stabilized), (randn(*shape),))


@pytest.mark.parametrize("options", [{"batch_first": True}, {"bias": False}])
def test_packed_attention_equals_peft(options):
    net = seeded(lambda: SelfAttention(**options))()
    peer = Peer(net, peft.LoraConfig(r=3, lora_alpha=5, target_modules=["attn"]))
    # PEFT takes the output projection along, and adds its update twice (0.21.2: `merge` adds it, then calls the inner
    # layer's `merge`), so that update is 0 here; tests of the formula have both projections.
    peer.layers["attn.out_proj"].lora_B["default"].weight.data.zero_()
    compare(net, peer, pf.lora(["attn", "out_proj"], rank=3, alpha=5), (randn(2, 5, 8),))


def test_embedding_equals_peft_with_its_factors_swapped():
    net = seeded(lambda: nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 4)))()
    peer = Peer(net, peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0", "1"]))
    compare(net, peer, pf.lora(["0", "1"], rank=3, alpha=5), (ids(3, 7, high=11),))


TRANSFORMERS = {
    "bert": (["query", "value"], 4, 7),
    "bert_all": (["query", "key", "value", "dense"], 3, 2),
    "bert_embeddings": (["word_embeddings", "position_embeddings"], 4, 7),
    "gpt2": (["c_attn"], 4, 7),
    "gpt2_all": (["c_attn", "c_proj", "c_fc"], 2, 16),
    "llama": (["q_proj", "v_proj"], 4, 7),
    "llama_all": (["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 4, 8),
    "llama_ends": (["embed_tokens", "lm_head"], 4, 8),
    "vit": (["q_proj", "v_proj", "query", "value"], 4, 7),
    "vit_patches": (["projection", "fc1", "fc2"], 3, 4),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer_equals_peft(name, bias):
    where, rank, alpha = TRANSFORMERS[name]
    animal = ZOO[name.partition("_")[0]]
    net = animal.build()
    config = {"r": rank, "lora_alpha": alpha, "target_modules": where, "bias": "lora_only" if bias else "none"}
    peer = Peer(net, peft.LoraConfig(**config))
    assert bool(peer.biases()) is (bias and name not in ("bert_embeddings", "llama", "llama_all", "llama_ends"))
    (x,), _ = animal.inputs(3)
    x = x.clamp(min=1) if name == "bert_embeddings" else x  # not the padding row, see below
    compare(net, peer, pf.lora(where, rank=rank, alpha=alpha, bias=bias), (x,), animal.output)


def test_regex_of_modules_equals_peft():
    animal = ZOO["llama"]
    net = animal.build()
    where = r"model\.layers\.1\..*(q|up)_proj"
    compare(net, Peer(net, peft.LoraConfig(r=2, lora_alpha=3, target_modules=where)), pf.lora(where, rank=2, alpha=3),
            animal.inputs(0)[0], animal.output)  # fmt: skip


PATTERNS = [
    {"q_proj": 4, "model.layers.0.self_attn.q_proj": 2},
    {"model.layers.0.self_attn.q_proj": 2, "q_proj": 4},
    {r"layers\.\d+\.self_attn\.(q|v)_proj": 2, "layers.1.mlp.up_proj": 5},
    {"q_proj|up_proj": 2},
    {"layers.1.*": 6, r".*v_proj": 1},
    {"^model.layers.0.mlp.up_proj": 6},
    {"self_attn.v_proj": 5, "v_proj": 1, "up_proj": 7},
]


@pytest.mark.parametrize("stabilized", [False, True])
@pytest.mark.parametrize("alphas", PATTERNS[:4])
@pytest.mark.parametrize("ranks", PATTERNS)
def test_patterns_for_rank_and_alpha_win_as_in_peft(ranks, alphas, stabilized):
    animal = ZOO["llama"]
    net = animal.build()
    where = ["q_proj", "v_proj", "up_proj"]
    peer = Peer(
        net,
        peft.LoraConfig(r=3, lora_alpha=7, target_modules=where, rank_pattern=ranks, alpha_pattern=alphas,
                        use_rslora=stabilized),
    )  # fmt: skip
    method = pf.lora(where, rank=3, alpha=7, rank_pattern=ranks, alpha_pattern=alphas, rank_stabilized=stabilized)
    compare(net, peer, method, animal.inputs(0)[0], animal.output)


@pytest.mark.parametrize("ranks", [{r"(?!q_proj)\w+": 5}, {r".*t\w*": 5, "q_proj": 2}])
def test_patterns_look_at_module_paths_and_not_at_the_word_weight(ranks):
    net = seeded(lambda: nn.ModuleDict({"q_proj": nn.Linear(6, 6), "out": nn.Linear(6, 6)}))()
    peer = Peer(net, peft.LoraConfig(r=3, target_modules=["q_proj", "out"], rank_pattern=ranks))
    adapter = pf.bind(pf.lora(["q_proj", "out"], rank=3, rank_pattern=ranks), pf.functionalize(net))
    ours = {path: leaf["A"].shape for path, leaf in adapter.init(0)[1]["lora"].items()}
    assert ours == {path: leaf["A"].shape for path, leaf in peer.tree().items()}


def test_without_alpha_the_scale_is_one_whatever_the_rank_of_the_place():
    net = ZOO["mlp"].build()
    adapter = pf.bind(pf.lora(".*", rank=2, rank_pattern={"0": 3}), pf.functionalize(net))
    frozen, start = adapter.init(0)
    tree = random_like(start)
    weights = {path: net.get_parameter(path) + low_rank(net, path, leaf, 1.0) for path, leaf in tree["lora"].items()}
    same({p: t for p, t in pf.merge(adapter.apply(frozen, tree)).items() if p in weights}, weights)


# What PEFT gets wrong or cannot do: dilation, circular padding, groups, transposed convolutions, padding rows.
FORMULA = {
    "dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=1), (2, 4, 9, 8)),
    "dilated1d": (lambda: nn.Conv1d(4, 6, 3, dilation=3, stride=2), (2, 4, 15)),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 5, 6)),
    "reflect": (lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="reflect"), (2, 4, 5)),
    "replicate": (lambda: nn.Conv3d(2, 6, 3, padding=1, padding_mode="replicate"), (1, 2, 4, 4, 4)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4, padding=1), (2, 8, 5, 5)),
    "grouped_strided": (lambda: nn.Conv2d(8, 4, (3, 1), groups=2, stride=2, dilation=(2, 1)), (2, 8, 7, 5)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), (2, 8, 5, 5)),
    "depth_multiplier": (lambda: nn.Conv1d(4, 12, 5, groups=4, padding="same"), (2, 4, 9)),
    "pointwise3d": (lambda: nn.Conv3d(4, 6, 1), (2, 4, 3, 3, 3)),
    "flat3d": (lambda: nn.Conv3d(4, 6, (1, 1, 3)), (2, 4, 3, 3, 3)),
    "unbatched": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 6, 6)),
    "transposed1d": (lambda: nn.ConvTranspose1d(6, 4, 3, stride=2, output_padding=1), (2, 6, 5)),
    "transposed2d": (lambda: nn.ConvTranspose2d(6, 4, (3, 2), stride=2, padding=1, dilation=(1, 2)), (2, 6, 5, 4)),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 3, 2, stride=2), (1, 4, 3, 3, 3)),
    "transposed_grouped": (lambda: nn.ConvTranspose2d(6, 9, 3, groups=3, stride=2), (2, 6, 4, 4)),
    "transposed_unbatched": (lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), (6, 4, 4)),
    "bilinear": (lambda: _Bilinear(), (3, 5)),
}


class _Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.form = nn.Bilinear(5, 5, 4)

    def forward(self, x):
        return self.form(x, x.cos())


@pytest.mark.parametrize("layer", FORMULA)
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.filterwarnings("ignore::peft_func.DensifyWarning")
def test_what_peft_cannot_do_equals_the_formula(layer, rank):
    build, shape = FORMULA[layer]
    if layer in ("depthwise", "depth_multiplier"):
        assert min(build().weight.flatten(1).shape) >= rank
    net = seeded(build)()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.lora(".*", rank=rank, alpha=3 * rank), model)
    frozen, start = adapter.init(0)
    (path,) = start["lora"]
    x, y = randn(*shape).requires_grad_(), randn(*shape).requires_grad_()
    ours, theirs = learnable(random_like(start)), learnable(random_like(start))
    out = model(adapter.apply(frozen, ours), x)
    weight = net.get_parameter(path) + low_rank(net, path, theirs["lora"][path], 3.0)
    expected = torch.func.functional_call(net, {path: weight}, (y,))
    same(out, expected, VALUES)
    same(grads_of(out, ours | {"x": x}), grads_of(expected, theirs | {"x": y}), GRADS)


MATRICES = ~pf.suffix("bias_k") & ~pf.suffix("bias_v")


@pytest.mark.parametrize("name", ["tied", "shared", "attention", "encoder_layer", "experts", "conv", "gpt2"])
def test_every_matrix_of_a_model_equals_the_formula(name):
    animal = ZOO[name]
    net = animal.build()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.lora(MATRICES, rank=2, alpha=3), model)
    frozen, start = adapter.init(0)
    ours, theirs = learnable(random_like(start)), learnable(random_like(start))
    args, kwargs = animal.inputs(5)
    out = animal.output(model(adapter.apply(frozen, ours), *args, **kwargs))
    weights = {p: net.get_parameter(p) + low_rank(net, p, leaf, 1.5) for p, leaf in theirs["lora"].items()}
    assert set(weights) == {n for n, p in net.named_parameters() if p.dim() > 1 and n.rpartition(".")[2][:4] != "bias"}
    expected = call(net, weights, animal, 5)
    same(out, expected, VALUES)
    same(grads_of(out, ours), grads_of(expected, theirs), GRADS)


def test_padding_rows_of_an_embedding_get_no_gradient_not_even_through_the_shared_factor():
    net = seeded(lambda: nn.Sequential(nn.Embedding(9, 4, padding_idx=2)))()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.lora("0", rank=2), model)
    frozen, start = adapter.init(0)
    ours, theirs = learnable(random_like(start)), learnable(random_like(start))
    x = torch.tensor([[2, 3, 2, 8], [1, 1, 2, 0]])
    out = model(adapter.apply(frozen, ours), x)
    weight = net[0].weight.detach() + low_rank(net, "0.weight", theirs["lora"]["0.weight"], 1.0)
    expected = nn.functional.embedding(x, weight, padding_idx=2)
    same(out, expected)
    grads = grads_of(out, ours)
    same(grads, grads_of(expected, theirs), GRADS)
    assert not grads[1][2].any()


# First values.


def distance(sample, cdf):
    """Kolmogorov and Smirnov's distance of a sample from a distribution."""
    ordered = sample.flatten().double().sort().values
    steps = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
    return (cdf(ordered) - steps).abs().max().item()


WIDE = {
    "linear": (lambda: nn.Linear(400, 60), 400),
    "conv2d": (lambda: nn.Conv2d(40, 60, (3, 4)), 480),
    "hf_conv1d": (lambda: Conv1D(60, 400), 400),
    "attention": (lambda: nn.MultiheadAttention(400, 4), 400),
}


@pytest.mark.parametrize("init", ["default", "gaussian"])
@pytest.mark.parametrize("layer", WIDE)
def test_first_values_have_the_distribution_of_peft(layer, init):
    build, fan_in = WIDE[layer]
    net = seeded(lambda: nn.Sequential(build()))()
    bound, std = 1 / math.sqrt(fan_in), 1 / 50

    def cdf(x):
        if init == "default":
            return ((x + bound) / (2 * bound)).clamp(0, 1)
        return 0.5 * (1 + torch.erf(x / (std * math.sqrt(2))))

    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=KNOWN_WARNINGS[0])
        torch.manual_seed(0)
        config = peft.LoraConfig(r=50, target_modules=["0"], init_lora_weights=init == "default" or init)
        theirs = peft.get_peft_model(seeded(lambda: nn.Sequential(build()))(), config)
    theirs = next(p for n, p in theirs.named_parameters() if "lora_A" in n)
    path = "0.in_proj_weight" if layer == "attention" else "0.weight"
    adapter = pf.bind(pf.lora(pf.exact([path]), rank=50, init=init), pf.functionalize(net))
    draws = [adapter.init(key)[1]["lora"][path] for key in range(2)]
    for leaf in draws:
        assert leaf["A"].shape == theirs.shape
        assert not leaf["B"].any()
        assert distance(leaf["A"], cdf) < 1.63 / math.sqrt(leaf["A"].numel())  # one in a hundred
    assert distance(theirs.detach(), cdf) < 1.63 / math.sqrt(theirs.numel())
    assert not torch.equal(draws[0]["A"], draws[1]["A"])


def test_a_half_precision_weight_gets_float32_factors_as_in_peft():
    net = nn.utils.skip_init(nn.Linear, 6, 4, dtype=torch.bfloat16)
    leaf = pf.bind(pf.lora("weight", rank=2), pf.functionalize(net)).init(0)[1]["lora"]["weight"]
    assert {t.dtype for t in leaf.values()} == {torch.float32}


# Dropout.


def dropping(name="mlp", where=".*", p=0.5, extra=()):
    animal = ZOO[name]
    model = pf.functionalize(animal.build())
    adapter = pf.bind(pf.chain(pf.lora(where, rank=2, dropout=p), *extra), model)
    frozen, start = adapter.init(0)
    return animal, model, adapter, frozen, random_like(start)


DROPPED = {
    "linear": (lambda: nn.Linear(5, 4), (3, 5)),
    "hf_conv1d": (lambda: Conv1D(4, 5), (3, 5)),
    "conv2d": (lambda: nn.Conv2d(4, 4, 3, groups=2, padding=1, padding_mode="circular"), (1, 4, 3, 3)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 4, 3, groups=2), (1, 4, 3)),
    "attention": (lambda: SelfAttention(batch_first=True), (1, 3, 8)),
}


@pytest.mark.parametrize("layer", ["linear", "hf_conv1d", "conv2d", "transposed"])
def test_dropout_in_train_mode_has_the_deterministic_output_as_its_mean(layer):
    build, shape = DROPPED[layer]
    net = seeded(build)()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.lora(".*", rank=2, dropout=0.3), model)
    frozen, start = adapter.init(0)
    weights, x = adapter.apply(frozen, random_like(start)), randn(*shape)
    torch.manual_seed(0)
    draws = torch.stack([model.train()(weights, x) for _ in range(800)])
    standard_error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - model(weights, x)).abs() <= 5 * standard_error + 1e-12).all()
    assert (draws.std(0) > 0).all()


def test_dropout_is_on_the_inputs_of_the_branch_and_not_on_the_base():
    net = seeded(lambda: nn.Linear(5, 4))()
    model = pf.functionalize(net).train()
    adapter = pf.bind(pf.lora(".*", rank=2, dropout=0.5, alpha=6), model)
    frozen, start = adapter.init(0)
    tree, x = random_like(start), randn(7, 5)
    torch.manual_seed(3)
    out = model(adapter.apply(frozen, tree), x)
    torch.manual_seed(3)
    A, B = tree["lora"]["weight"]["A"], tree["lora"]["weight"]["B"]
    same(out, net(x) + 3 * (nn.functional.dropout(x, 0.5) @ A.T @ B.T))
    zero = pf.map_leaves(torch.zeros_like, tree)
    same(model(adapter.apply(frozen, zero), x), net(x), 0.0)


def test_dropout_of_peft_draws_the_same_masks():
    net = seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)))()
    peer = Peer(net, peft.LoraConfig(r=2, lora_alpha=3, lora_dropout=0.4, target_modules=["0", "2"]))
    model, x = pf.functionalize(net).train(), randn(6, 5)
    adapter = pf.bind(pf.lora(["0", "2"], rank=2, alpha=3, dropout=0.4), model)
    torch.manual_seed(5)
    ours = model(adapter.apply(adapter.init(0)[0], {"lora": peer.tree()}), x)
    torch.manual_seed(5)
    same(ours, peer.model.train()(x), VALUES)


@pytest.mark.parametrize("name", ["mlp", "conv", "attention", "bert", "gpt2", "experts"])
def test_dropout_has_no_effect_in_eval_mode_nor_on_merged_weights(name):
    animal, model, adapter, frozen, tree = dropping(name, MATRICES)
    twin = pf.bind(pf.lora(MATRICES, rank=2), model)
    args, kwargs = animal.inputs(0)
    weights, certain = adapter.apply(frozen, tree), twin.apply(frozen, tree)
    same(animal.output(model(weights, *args, **kwargs)), animal.output(model(certain, *args, **kwargs)), 0.0)
    same(pf.merge(weights), pf.merge(certain), 0.0)
    same(pf.delta(weights), pf.delta(certain), 0.0)
    same(model.train().state_dict(weights), model.state_dict(certain), 0.0)


CHAINS = {
    "lora": lambda w: [pf.lora(w, rank=2, name="more")],
    "gift": lambda w: [pf.gift(w, rank=2, share="none")],
    "ia3": lambda w: [pf.ia3(w), pf.ia3(w, side="input", name="in")],
    "magnitude": lambda w: [pf.magnitude(w)],
    "lora_magnitude": lambda w: [pf.lora(w, rank=2, name="more"), pf.magnitude(w)],
    "gift_magnitude": lambda w: [pf.gift(w, rank=2, share="none"), pf.magnitude(w)],
    "ia3_magnitude": lambda w: [pf.ia3(w, side="input"), pf.magnitude(w)],
}


@pytest.mark.parametrize("behind", CHAINS)
@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_dropout_before_other_methods_is_pure_in_apply_eval_and_merge(name, behind):
    where = ".*"
    animal, model, adapter, frozen, tree = dropping(name, where, extra=CHAINS[behind](where))
    _, _, twin, _, _ = dropping(name, where, p=0.0, extra=CHAINS[behind](where))
    args, kwargs = animal.inputs(0)
    weights, certain = adapter.apply(frozen, tree), twin.apply(frozen, tree)
    same(animal.output(model(weights, *args, **kwargs)), animal.output(model(certain, *args, **kwargs)), 1e-12)
    same(pf.merge(weights), pf.merge(certain), 1e-12)


@pytest.mark.parametrize("behind", ["gift", "ia3", "magnitude", "gift_magnitude"])
def test_dropout_before_other_methods_drops_inputs_only(behind):
    """A unit that no input reaches makes no noise: with x = 0 the output is the same in every draw."""
    net = seeded(lambda: nn.Conv2d(4, 6, 3, padding=1))()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.chain(pf.lora(".*", rank=2, dropout=0.5), *CHAINS[behind](".*")), model)
    frozen, start = adapter.init(0)
    weights = adapter.apply(frozen, random_like(start))
    # On an input of one pixel and one channel, a mask either keeps or drops it: every output of the branch is 0 or
    # twice its value, so there are two outputs in all. Noise in the weights would give more.
    x = torch.zeros(1, 4, 5, 5, dtype=torch.float64)
    x[0, 1, 2, 2] = 1.0
    torch.manual_seed(0)
    draws = torch.stack([model.train()(weights, x) for _ in range(40)])
    assert len(draws.flatten(1).unique(dim=0)) <= (2 if "gift" not in behind else 3)


def test_dropout_under_vmap_differs_for_each_member_and_needs_the_word_different():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        animal, model, adapter, frozen, tree = dropping("mlp")
        (x,), _ = animal.inputs(0)
        stacked = pf.stack([tree, tree])
        run = lambda t: model.train()(adapter.apply(frozen, t), x)
        with pytest.raises(RuntimeError, match="randomness"):
            torch.vmap(run)(stacked)
        first, second = torch.vmap(run, randomness="different")(stacked)
        assert not torch.allclose(first, second)
        first, second = torch.vmap(run, randomness="same")(stacked)
        same(first, second, 1e-12)


class Sine(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))

    def forward(self, x):
        return x @ torch.sin(self.weight).T


@pytest.mark.filterwarnings("ignore::peft_func.DensifyWarning")
def test_a_weight_that_must_be_formed_cannot_have_dropout_in_train_mode():
    model = pf.functionalize(seeded(Sine)())
    adapter = pf.bind(pf.lora("weight", rank=2, dropout=0.1), model)
    frozen, start = adapter.init(0)
    weights, x = adapter.apply(frozen, random_like(start)), randn(3, 5)
    with pytest.raises(pf.LeakError, match=r"sin.*'weight'.*dropout=0"):
        model.train()(weights, x)
    same(model(weights, x), x @ torch.sin(pf.merge(weights)["weight"]).T)


def test_options_of_lora_that_a_leaf_count_shows():
    adapter = pf.bind(pf.lora(MATRICES, rank=2, bias=True), pf.functionalize(ZOO["attention"].build()))
    tree = adapter.init(0)[1]["lora"]
    assert tree["packed.in_proj_bias"].keys() == {"bias"}
    assert all(leaf.keys() == ({"bias"} if path.endswith("bias") else {"A", "B"}) for path, leaf in tree.items())
    assert len(leaves_of(tree)) == len(adapter.spec)


def test_biases_of_three_dimensions_are_no_candidates():
    """`nn.MultiheadAttention(add_bias_kv=True)` has biases of shape [1, 1, E]; biases are never candidates."""
    adapter = pf.bind(pf.lora(".*", rank=1), pf.functionalize(ZOO["attention"].build()))
    assert not {path for path in adapter.init(0)[1]["lora"] if "bias" in path}


# Other views of a convolution's weight.


def test_balanced_resnet18_has_the_leaves_of_the_seeds_table():
    adapter = pf.bind(pf.lora(".*", rank=3, conv="balanced"), pf.functionalize(resnet18_names()))
    tree = adapter.init(0)[1]["lora"]
    shapes = {path.removesuffix(".weight"): (tuple(t["B"].shape), tuple(t["A"].shape)) for path, t in tree.items()}
    assert list(shapes.items()) == list(SEED_TABLE.items())
    assert sum(math.prod(shape) for shape in adapter.spec.values()) == 75_063


VIEWED = {
    "1d": (lambda: nn.Conv1d(4, 6, 3), (6, 12), (6, 12)),
    "1d_grouped": (lambda: nn.Conv1d(4, 6, 5, groups=2), (6, 10), (6, 10)),
    "2d": (lambda: nn.Conv2d(4, 6, (3, 2)), (18, 8), (6, 24)),
    "2d_depthwise": (lambda: nn.Conv2d(4, 8, (5, 3), groups=4), (40, 3), (8, 15)),
    "2d_pointwise": (lambda: nn.Conv2d(4, 6, 1), (6, 4), (6, 4)),
    "3d": (lambda: nn.Conv3d(4, 6, (2, 3, 5), groups=2), (12, 30), (6, 60)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, (3, 2), groups=2), (9, 8), (3, 24)),
    "linear": (lambda: nn.Linear(5, 7), (7, 5), (7, 5)),
    "hf_conv1d": (lambda: Conv1D(7, 5), (7, 5), (7, 5)),
}


@pytest.mark.parametrize("layer", VIEWED)
def test_leaves_of_a_view_are_plain_matrices(layer):
    build, balanced, out_as_h = VIEWED[layer]
    for conv, (h, w) in {"balanced": balanced, "out_as_h": out_as_h}.items():
        highest = min(h, w)
        model = pf.functionalize(nn.Sequential(build()))
        leaf = pf.bind(pf.lora("0", rank=highest, conv=conv), model).init(0)[1]["lora"]["0.weight"]
        assert leaf["B"].shape == (h, highest)
        assert leaf["A"].shape == (highest, w)
        assert leaf["A"].is_contiguous()
        assert not leaf["B"].any()
        assert 0.5 / math.sqrt(w) < leaf["A"].abs().max() <= 1 / math.sqrt(w)
        with pytest.raises(pf.OptionError, match=rf"rank={highest + 1} for 0.weight, a matrix of {h} x {w}"):
            pf.bind(pf.lora("0", rank=highest + 1, conv=conv), model)


def in_view(net, path, matrix):
    """Entries read row by row: as the stored weight, or as the matrix of a transposed convolution's."""
    weight = net.get_parameter(path)
    if isinstance(net.get_submodule(path.rpartition(".")[0]), nn.modules.conv._ConvTransposeNd):
        return matrix.reshape(weight.transpose(0, 1).shape).transpose(0, 1)
    return matrix.reshape(weight.shape)


@pytest.mark.parametrize("conv", ["balanced", "out_as_h"])
@pytest.mark.parametrize("layer", [name for name in FORMULA if name != "bilinear"])
def test_every_view_equals_the_formula(layer, conv):
    build, shape = FORMULA[layer]
    net = seeded(build)()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.lora(".*", rank=2, alpha=6, conv=conv), model)
    frozen, start = adapter.init(0)
    x, y = randn(*shape).requires_grad_(), randn(*shape).requires_grad_()
    ours, theirs = learnable(random_like(start)), learnable(random_like(start))
    with pf.densify("error"):
        out = model(adapter.apply(frozen, ours), x)
    leaf = theirs["lora"]["weight"]
    weight = net.weight + in_view(net, "weight", 3.0 * (leaf["B"] @ leaf["A"]))
    expected = torch.func.functional_call(net, {"weight": weight}, (y,))
    same(out, expected, VALUES)
    same(grads_of(out, ours | {"x": x}), grads_of(expected, theirs | {"x": y}), GRADS)
    same(pf.merge(adapter.apply(frozen, ours))["weight"], weight, VALUES)


def test_out_as_h_is_the_factored_form_with_flat_leaves():
    animal = ZOO["conv"]
    model, (args, kwargs) = pf.functionalize(animal.build()), animal.inputs(1)
    factored, flat = (pf.bind(pf.lora(".*", rank=2, conv=conv), model) for conv in ("factored", "out_as_h"))
    frozen, start = factored.init(5)
    same(pf.map_leaves(lambda leaf: leaf.flatten(1), start), flat.init(5)[1], 0.0)
    tree = random_like(start)
    flattened = pf.map_leaves(lambda leaf: leaf.flatten(1), tree)
    ours, theirs = flat.apply(frozen, flattened), factored.apply(frozen, tree)
    same(model(ours, *args, **kwargs), model(theirs, *args, **kwargs), 0.0)


@pytest.mark.parametrize("layer", ["transposed2d", "transposed_grouped", "grouped", "dilated1d"])
def test_dropout_of_a_balanced_update_is_of_the_input_of_its_own_convolution(layer):
    build, shape = FORMULA[layer]
    net = seeded(build)()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.lora("weight", rank=2, alpha=6, dropout=0.4, conv="balanced"), model)
    frozen, start = adapter.init(0)
    tree, x = random_like(start), randn(*shape)
    leaf = tree["lora"]["weight"]
    change = in_view(net, "weight", 3.0 * (leaf["B"] @ leaf["A"]))
    weights = adapter.apply(frozen, tree)
    torch.manual_seed(3)
    out = model.train()(weights, x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.4)
    own = {"weight": change, "bias": torch.zeros_like(net.bias)}
    same(out, net(x) + torch.func.functional_call(net, own, (dropped,)))
    assert (out - model(weights, x)).abs().max() > 1e-3
    same(model(weights, x), torch.func.functional_call(net, {"weight": net.weight + change}, (x,)))
    same(pf.merge(weights)["weight"], net.weight.detach() + change)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_balanced_update_of_half_precision_is_the_merged_weight_bit_for_bit(dtype):
    net = seeded(lambda: nn.Conv2d(4, 6, 3))().to(dtype)
    model, x = pf.functionalize(net), randn(2, 4, 6, 6).to(dtype)
    adapter = pf.bind(pf.lora("weight", rank=2, conv="balanced"), model)
    frozen, start = adapter.init(0)
    tree = pf.map_leaves(torch.Tensor.float, random_like(start))
    weights = adapter.apply(frozen, tree)
    assert torch.equal(model(weights, x), model(pf.merge(weights), x))


@pytest.mark.parametrize("conv", ["balanced", "out_as_h"])
def test_dora_takes_every_view(conv):
    net = seeded(lambda: nn.Conv2d(4, 6, (3, 2), groups=2))()
    model, x = pf.functionalize(net), randn(2, 4, 5, 6)
    adapter = pf.bind(pf.dora("weight", rank=2, alpha=6, conv=conv), model)
    frozen, start = adapter.init(0)
    same(model(adapter.apply(frozen, start), x), net(x).detach())
    leaf = random_like(start)["dora"]["weight"]
    V = net.weight.detach() + (3.0 * (leaf["B"] @ leaf["A"])).reshape(net.weight.shape)
    weight = V * (leaf["magnitude"] / V.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    with pf.densify("error"):
        out = model(adapter.apply(frozen, {"dora": {"weight": leaf}}), x)
    same(out, torch.func.functional_call(net, {"weight": weight}, (x,)))


@pytest.mark.parametrize("conv", ["Balanced", "outash", "", None, 2])
def test_an_unknown_view_is_refused(conv):
    with pytest.raises(pf.OptionError, match="'factored', 'balanced', 'out_as_h'"):
        pf.lora(".*", conv=conv)


@pytest.mark.parametrize("conv", ["balanced", "out_as_h"])
def test_a_view_is_saved_but_not_in_the_format_of_peft(conv, tmp_path):
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(6, 3)).double()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.lora(".*", rank=2, conv=conv, rank_pattern={"0": 4}), model)
    frozen, start = adapter.init(0)
    tree = random_like(start)
    pf.save(tmp_path / "a.safetensors", adapter, tree)
    again, frozen, loaded = pf.load(tmp_path / "a.safetensors", model)
    same(loaded, tree, 0.0)
    same(pf.merge(again.apply(frozen, loaded)), pf.merge(adapter.apply(frozen, tree)), 0.0)
    with pytest.raises(pf.OptionError, match=rf"'0.weight' as conv='{conv}'.*pf\.save"):
        pf.save_peft(tmp_path / "folder", adapter, tree)
    linear = pf.bind(pf.lora("2", rank=2, conv=conv), model)  # where there is no convolution, the views are one
    pf.save_peft(tmp_path / "folder", linear, linear.init(0)[1])

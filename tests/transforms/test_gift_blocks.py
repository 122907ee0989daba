"""The blocks of GIFT against plain modules with the names of the authors' checkpoints, and what a bound GIFT does."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft_func as pf
from peft_func.transforms import gift_blocks
from peft_func.transforms.gift_schema import schema_of
from tests.transforms.plain import GRADS, as_matrix, as_stored, call, grads_of, learnable, leaves_of, random_like, same
from tests.zoo import ZOO, randn, seeded


class L2(nn.Module):
    def forward(self, x):
        return x / x.square().sum(-1, keepdim=True).sqrt()


class HardSigmoid(nn.Module):
    def forward(self, x):
        return F.relu6(x + 3) / 6


NORMS = {"none": lambda r: nn.Identity(), "l2": lambda r: L2(), "ln": nn.LayerNorm}
ACTIVATIONS = {
    "identity": nn.Identity(), "sigmoid": nn.Sigmoid(), "standard_sigmoid": nn.Sigmoid(), "hsigmoid": HardSigmoid(),
    "softmax": nn.Softmax(-1), "gelu": nn.GELU(),
}  # fmt: skip


class Mlp(nn.Module):
    def __init__(self, size, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(size, hidden), nn.Linear(hidden, size)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Cluster(nn.Module):
    def __init__(self, r, count, activation):
        super().__init__()
        self.cluster, self.activation = nn.Linear(r, count), activation

    def forward(self, x):
        weights = ACTIVATIONS[self.activation](self.cluster(x).T)
        if self.activation in ("sigmoid", "hsigmoid"):
            weights = weights / len(x)
        return L2()(torch.einsum("mn,nr->mr", weights, x))


class Attention(nn.Module):
    def __init__(self, r, heads, clusters=None, activation=None):
        super().__init__()
        self.heads = heads
        if clusters is None:
            self.qkv = nn.Linear(r, 3 * r)
        else:
            self.q, self.k, self.v = (nn.Linear(r, r) for _ in range(3))
            self.cluster = Cluster(r, clusters, activation)
        self.proj = nn.Linear(r, r)

    def forward(self, x):
        if hasattr(self, "qkv"):
            q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).permute(1, 2, 0, 3)
        else:
            z = self.cluster(x)
            q, k, v = (
                layer(y).view(len(y), self.heads, -1).permute(1, 0, 2)
                for layer, y in ((self.q, x), (self.k, z), (self.v, z))
            )
        y = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        return self.proj(y.permute(1, 0, 2).reshape(x.shape))


class Block(nn.Module):
    def __init__(self, kind, r, tokens, o):
        super().__init__()
        norm = NORMS[o.get("norm", "l2")]
        heads, ratio = o.get("num_heads", 1), o.get("mlp_ratio", 2)
        clusters = (o.get("num_clusters", 64), o.get("cluster_activation", "sigmoid")) if "pamcat" in kind else ()
        self.kind = kind
        if kind == "pamcat_attn":
            self.norm, self.attn = norm(r), Attention(r, heads, *clusters)
        elif kind == "mlp":
            self.norm1, self.mlp = norm(r), Mlp(r, int(ratio * r))
        elif kind == "mlp_mixer":
            self.norm1, self.mlp1 = norm(r), Mlp(tokens, o.get("num_mixed_tokens", 64))
            self.norm2, self.mlp2 = norm(r), Mlp(r, int(o.get("channel_mixing_ratio", 2) * r))
        else:
            self.norm1, self.attn = norm(r), Attention(r, heads, *clusters)
            self.norm2, self.mlp = norm(r), Mlp(r, int(ratio * r))

    def forward(self, x):
        if self.kind == "pamcat_attn":
            return x + self.attn(self.norm(x))
        if self.kind == "mlp":
            return x + self.mlp(self.norm1(x))
        if self.kind == "mlp_mixer":
            x = x + self.mlp1(self.norm1(x).T).T
            return x + self.mlp2(self.norm2(x))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Generator(nn.Module):
    """What the authors' modules do with a weight `[out, in]`: `in_projection`, `blocks`, `out_projection`."""

    def __init__(self, out, width, r, kind="simple_block", bias=(False, False), **o):
        super().__init__()
        self.in_projection = nn.Linear(width, r, bias=bias[0])
        if kind == "simple_block":
            self.blocks = nn.ModuleList([ACTIVATIONS[o.get("activation", "identity")]])
        else:
            self.blocks = nn.ModuleList([Block(kind, r, out, o) for _ in range(o.get("num_blocks", 1))])
        self.out_projection = nn.Linear(r, width, bias=bias[1])

    def forward(self, weight):
        x = self.in_projection(weight)
        for block in self.blocks:
            x = block(x)
        return self.out_projection(x)

    def update(self, leaf, weight):
        """Run it with the leaves of a group: their names are those of its state dict."""
        names = {"phi": "in_projection.weight", "psi": "out_projection.weight",
                 "phi_bias": "in_projection.bias", "psi_bias": "out_projection.bias"}  # fmt: skip
        state = {names[name]: t.T if t.dim() == 2 else t for name, t in leaf.items() if name != "blocks"}
        state |= {".".join(("blocks", *keys)): t for keys, t in pf.leaves(leaf.get("blocks", {}))}
        assert set(state) == set(self.state_dict())  # a module takes no other names
        return torch.func.functional_call(self, state, (weight,), strict=True)


CASES = {
    "mlp": {"block": "mlp"},
    "mlp ln deep": {"block": "mlp", "norm": "ln", "num_blocks": 3, "mlp_ratio": 1.7},
    "mlp none": {"block": "mlp", "norm": "none", "mlp_ratio": 4},
    "mixer": {"block": "mlp_mixer"},
    "mixer ln deep": {"block": "mlp_mixer", "norm": "ln", "num_blocks": 2, "num_mixed_tokens": 5},
    "mixer ratio": {"block": "mlp_mixer", "norm": "none", "channel_mixing_ratio": 0.5},
    "transformer": {"block": "transformer"},
    "transformer heads": {"block": "transformer", "num_heads": 2, "norm": "ln", "num_blocks": 2, "mlp_ratio": 1},
    "pamcat": {"block": "pamcat_transformer"},
    "pamcat heads": {
        "block": "pamcat_transformer", "num_heads": 4, "norm": "ln", "num_clusters": 3, "num_blocks": 2,
        "cluster_activation": "softmax",
    },
    "pamcat attn": {"block": "pamcat_attn"},
    "pamcat attn ln": {"block": "pamcat_attn", "num_blocks": 2, "norm": "ln", "num_heads": 2},
    **{f"cluster {a}": {"block": "pamcat_attn", "cluster_activation": a, "num_clusters": 5} for a in ACTIVATIONS},
    **{f"activation {a}": {"activation": a} for a in ACTIVATIONS},
    "biases": {"in_projection_bias": True, "out_projection_bias": True},
    "in": {"block": "mlp", "in_projection_bias": True},
    "out": {"block": "pamcat_attn", "out_projection_bias": True},
}  # fmt: skip


def peer_of(out, width, r, options):
    o = dict(options)
    bias = (o.pop("in_projection_bias", False), o.pop("out_projection_bias", False))
    return Generator(out, width, r, o.pop("block", "simple_block"), bias, **o).double()


def expected_weight(net, path, leaf, options, rank):
    """W + psi(g(phi(W))) by the plain modules, for one matrix or for each of several experts."""
    weight = net.get_parameter(path).detach()
    matrix = as_matrix(net, path, weight)
    peer = peer_of(*matrix.shape[-2:], rank, options)
    if matrix.dim() == 3:
        return as_stored(net, path, matrix + torch.stack([peer.update(leaf, one) for one in matrix]))
    return as_stored(net, path, matrix + peer.update(leaf, matrix))


def bound(net, rank=4, where=".*", **options):
    model = pf.functionalize(net)
    adapter = pf.bind(pf.gift(where, rank=rank, **options), model)
    frozen, start = adapter.init(0)
    return model, adapter, frozen, start


@pytest.mark.parametrize("case", CASES)
def test_a_block_is_the_plain_modules_in_value_and_every_gradient(case):
    net = seeded(lambda: nn.Linear(7, 10))()
    model, adapter, frozen, start = bound(net, where="weight", **CASES[case])
    assert not pf.delta(adapter.apply(frozen, start))["weight"].any()  # nothing changes at first, to the bit
    ours, theirs = learnable(random_like(start)), learnable(random_like(start))
    (group,) = theirs["gift"]
    merged = pf.merge(adapter.apply(frozen, ours))["weight"]
    plain = expected_weight(net, "weight", theirs["gift"][group], CASES[case], 4)
    same(merged, plain)
    grads = grads_of(merged, ours)
    same(grads, grads_of(plain, theirs), GRADS)
    # What moves all inputs of a softmax alike has no effect: a bias of the keys, one of the clusters' softmax.
    idle = ["attn.k.bias", *(["cluster.bias"] if CASES[case].get("cluster_activation") == "softmax" else [])]
    names = [".".join(keys) for keys, _ in pf.leaves(ours)]
    for name, grad in zip(names, grads, strict=True):
        assert grad.abs().max() > 1e-12 or name.endswith(tuple(idle)), name
    x = randn(5, 7)
    with pf.densify("error"):
        same(model(adapter.apply(frozen, ours), x), F.linear(x, plain, net.bias))


@pytest.mark.parametrize("name", ["conv", "tied", "shared", "attention", "encoder_layer", "experts", "gpt2"])
@pytest.mark.parametrize("case", ["mlp ln deep", "mixer ln deep", "pamcat heads", "biases"])
def test_every_kind_of_layer(name, case):
    animal, options = ZOO[name], {"rank": 2, **CASES[case]}
    if "num_heads" in options:
        options["num_heads"] = 2
    net = animal.build()
    where = ~pf.suffix("bias_k") & ~pf.suffix("bias_v")
    model, adapter, frozen, start = bound(net, where=where, share="none", **options)
    rank = options.pop("rank")
    ours, theirs = learnable(random_like(start)), learnable(random_like(start))
    args, kwargs = animal.inputs(2)
    with pf.densify("allow"):
        out = animal.output(model(adapter.apply(frozen, ours), *args, **kwargs))
    plain = {p: expected_weight(net, p, theirs["gift"][p], options, rank) for p in adapter.parts[0].paths}
    expected = call(net, plain, animal, 2)
    same(out, expected, 1e-9)
    same(grads_of(out, ours), grads_of(expected, theirs), 1e-7)


TOTALS = {
    "simple_block": 2048, "mlp": 3120, "mlp_mixer": 11440, "transformer": 4208, "pamcat_transformer": 5296,
    "pamcat_attn": 4224,
}  # fmt: skip


@pytest.mark.parametrize("block", TOTALS)
def test_numbers_that_train_for_width_64_and_rank_16(block):
    start = bound(nn.Linear(64, 64), 16, "weight", block=block)[3]
    assert sum(leaf.numel() for leaf in leaves_of(start)) == TOTALS[block]
    biased = bound(nn.Linear(64, 64), 16, "weight", block=block, in_projection_bias=True, out_projection_bias=True)[3]
    assert sum(leaf.numel() for leaf in leaves_of(biased)) == TOTALS[block] + 16 + 64


def test_the_first_values_are_those_of_linear_layers_by_key_and_path():
    options = {"where": "weight", "block": "mlp", "norm": "ln", "num_blocks": 2, "in_projection_bias": True}
    tree = bound(nn.Linear(64, 9), 8, **options)[3]["gift"]["weight"]
    assert tree["phi_bias"].abs().max() <= 1 / 8
    assert tree["phi_bias"].any()
    first, second = tree["blocks"]["0"], tree["blocks"]["1"]
    assert torch.equal(first["norm1"]["weight"], torch.ones(8))
    assert not first["norm1"]["bias"].any()
    for name, inputs in {"fc1": 8, "fc2": 16}.items():
        for leaf in ("weight", "bias"):
            values = first["mlp"][name][leaf]
            assert 0.5 * inputs**-0.5 < values.abs().max() <= inputs**-0.5
            assert not torch.equal(values, second["mlp"][name][leaf])
    alone = bound(nn.Linear(64, 9), 8, "weight")[3]["gift"]["weight"]
    assert torch.equal(alone["phi"], tree["phi"])  # an option changes no other leaf


def test_tokens_that_are_zero_have_finite_gradients():
    """The row of an embedding's padding has no direction."""
    net = nn.Embedding(6, 5, padding_idx=2).double()
    model, adapter, frozen, start = bound(net, 4, "weight", block="pamcat_transformer", num_clusters=3)
    tree = learnable(random_like(start))
    out = model(adapter.apply(frozen, tree), torch.arange(6))
    assert all(grad.isfinite().all() for grad in grads_of(out, tree))


CHUNKED = {
    "qkv": (lambda: nn.ModuleDict({"qkv": nn.Linear(6, 12)}), "qkv.weight", ("q", None, "v")),
    "one": (lambda: nn.ModuleDict({"qkv": nn.Linear(6, 12)}), "qkv.weight", {"qkv": (None, "k", None)}),
    "shared": (lambda: nn.ModuleDict({"kv": nn.Linear(6, 12)}), "kv.weight", ("kv", "kv")),
    "conv1d": (lambda: nn.ModuleDict({"c_attn": Conv1D(12, 6)}), "c_attn.weight", ("q", None, "v")),
    "packed": (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight", ("q", "k", None)),
    "experts": (lambda: nn.ParameterDict({"up": nn.Parameter(torch.randn(3, 8, 6))}), "up", (None, "up")),
}


@pytest.mark.parametrize("case", CHUNKED)
@pytest.mark.parametrize("options", [{}, {"block": "mlp_mixer", "out_projection_bias": True}], ids=["plain", "mixer"])
def test_parts_of_a_fused_weight_have_generators_of_their_own(case, options):
    build, path, chunks = CHUNKED[case]
    net = seeded(build)()
    _, adapter, frozen, start = bound(net, 2, path, chunks=chunks, **options)
    tree = random_like(start)
    names = chunks["qkv"] if isinstance(chunks, dict) else chunks
    target = (path.removesuffix(".weight"),) if path.endswith(".weight") else (path,)
    assert set(tree["gift"]) == {f"{target[0]}.{name}" for name in names if name}
    matrix = as_matrix(net, path, net.get_parameter(path).detach()) if case != "experts" else net["up"].detach()
    parts = []
    for name, rows in zip(names, matrix.chunk(len(names), -2), strict=True):
        if name is None:
            parts.append(rows)
            continue
        peer, leaf = peer_of(*rows.shape[-2:], 2, options), tree["gift"][f"{target[0]}.{name}"]
        each = [one + peer.update(leaf, one) for one in rows.reshape(-1, *rows.shape[-2:])]
        parts.append(torch.stack(each).view(rows.shape))
    whole = torch.cat(parts, -2)
    merged = pf.merge(adapter.apply(frozen, tree))[path]
    same(merged.mT if case == "conv1d" else merged, whole)
    for i, name in enumerate(names):
        if name is None:  # untouched, to the bit
            assert torch.equal(parts[i], (merged.mT if case == "conv1d" else merged).chunk(len(names), -2)[i])


def test_chunks_of_one_target_leave_others_whole_and_all_may_share():
    net = seeded(lambda: nn.ModuleDict({"qkv": nn.Linear(6, 18), "proj": nn.Linear(6, 6)}))()
    options = {"where": r".*weight", "chunks": {"qkv": ("q", None, "v")}}
    assert set(bound(net, 2, **options)[3]["gift"]) == {"qkv.q", "qkv.v", "proj"}
    assert set(bound(net, 2, **options, share="all")[3]["gift"]) == {"all"}
    alone = bound(net, 2, **options, share="none")[3]["gift"]
    assert set(alone) == {"qkv.weight.q", "qkv.weight.v", "proj.weight"}
    chosen = bound(net, 2, **options, share={"a": "qkv", "b": "proj"})[3]["gift"]
    assert set(chosen) == {"a.q", "a.v", "b"}


DEEP = {"block": "mlp", "num_blocks": 2, "drop_path": 0.4, "norm": "none"}
LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), lambda: randn(3, 6)),
    "conv": (lambda: nn.Conv2d(3, 5, 2), lambda: randn(2, 3, 4, 4)),
    "conv1d": (lambda: Conv1D(5, 6), lambda: randn(3, 6)),
    "embedding": (lambda: nn.Embedding(5, 6), lambda: torch.arange(5)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_stochastic_depth_drops_whole_blocks_in_train_mode_only(layer):
    build, inputs = LAYERS[layer]
    net, x = seeded(build)(), inputs()
    model, adapter, frozen, start = bound(net, 2, "weight", **DEEP)
    tree = random_like(start)
    leaf = tree["gift"]["weight"]
    matrix = as_matrix(nn.ModuleDict({"m": net}), "m.weight", net.weight.detach())
    C = matrix @ leaf["phi"]

    def change(block, x):
        fc1, fc2 = leaf["blocks"][block]["mlp"]["fc1"], leaf["blocks"][block]["mlp"]["fc2"]
        return F.linear(F.gelu(F.linear(x, fc1["weight"], fc1["bias"])), fc2["weight"], fc2["bias"])

    first = C + change("0", C)  # a rate of 0
    after = [first + scale * change("1", first) for scale in (1.0, 0.0, 1 / 0.6)]
    stored = [as_stored(nn.ModuleDict({"m": net}), "m.weight", matrix + G @ leaf["psi"]) for G in after]
    plain, dropped, kept = (torch.func.functional_call(net, {"weight": w}, (x,)) for w in stored)
    weights = adapter.apply(frozen, tree)
    same(pf.merge(weights)["weight"], stored[0])
    same(model(weights, x), plain)
    seen = set()
    for seed in range(30):
        torch.manual_seed(seed)
        with pf.densify("error"):
            y = model.train()(weights, x)
        found = [torch.allclose(y, option) for option in (dropped, kept)]
        assert sum(found) == 1
        seen.add(found[0])
        torch.manual_seed(seed)
        assert torch.equal(y, model.train()(weights, x))
    assert seen == {True, False}


def test_stochastic_depth_differs_between_members():
    model, adapter, frozen, start = bound(seeded(lambda: nn.Linear(6, 5))(), 2, "weight", **DEEP)
    stacked = pf.stack([random_like(start)] * 24)
    x = randn(3, 6)
    for how, count in itertools.product(("fold", "vmap"), range(2)):
        torch.manual_seed(count)
        out = pf.ensemble(adapter, model=model.train(), how=how)(frozen, stacked, x)
        assert len({round(float(y.sum()), 9) for y in out}) == 2
    calm = pf.ensemble(adapter)(frozen, stacked, x)
    same(calm, model(adapter.apply(frozen, random_like(start)), x).expand(24, 3, 5))


def test_a_single_block_has_no_stochastic_depth():
    model, adapter, frozen, start = bound(seeded(lambda: nn.Linear(6, 5))(), 2, "weight", block="mlp", drop_path=0.9)
    weights, x = adapter.apply(frozen, random_like(start)), randn(3, 6)
    assert torch.equal(model(weights, x), model.train()(weights, x))


@pytest.mark.parametrize("dtype", [torch.float32, "float32", torch.float64, torch.bfloat16, "float16"])
@pytest.mark.parametrize("options", [{}, {"block": "pamcat_attn"}], ids=["identity", "attention"])
def test_the_generator_has_a_dtype_of_its_own(dtype, options):
    net = nn.Linear(8, 6).bfloat16()
    model, adapter, frozen, start = bound(net, 4, "weight", dtype=dtype, **options)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {leaf.dtype for leaf in leaves_of(start)} == {wanted}
    tree = pf.map_leaves(lambda t: t + 0.1, start)
    weights = adapter.apply(frozen, tree)
    y = model(weights, randn(3, 8).bfloat16())
    assert y.dtype == pf.merge(weights)["weight"].dtype == torch.bfloat16
    leaf = pf.map_leaves(lambda t: t.double(), tree)["gift"]["weight"]
    update = peer_of(6, 8, 4, options).update(leaf, net.weight.detach().double())
    change = pf.delta(weights)["weight"].double()
    assert (change - update).abs().max() < 0.02 * update.abs().max() + 0.01


def test_generation_is_out_of_the_reach_of_autocast():
    _, adapter, frozen, start = bound(seeded(lambda: nn.Linear(8, 6))().float(), 4, "weight", block="transformer")
    tree = pf.map_leaves(lambda t: t.float(), random_like(start))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = pf.merge(adapter.apply(frozen, tree))["weight"]
    assert torch.equal(inside, pf.merge(adapter.apply(frozen, tree))["weight"])


def test_blocks_may_have_axes_in_front():
    schema = schema_of("pamcat_transformer", {"num_clusters": 3, "num_heads": 2, "norm": "ln"})
    draw = lambda path, shape, bound: torch.full(shape, bound, dtype=torch.float64)
    trees = [random_like(gift_blocks.init(schema, 4, 6, draw), seed) for seed in range(3)]
    C = randn(3, 6, 4)
    expected = torch.stack([gift_blocks.apply(schema, tree, one) for tree, one in zip(trees, C, strict=True)])
    same(gift_blocks.apply(schema, pf.stack(trees), C), expected)
    one = [gift_blocks.apply(schema, trees[0], each) for each in C]
    same(gift_blocks.apply(schema, trees[0], C), torch.stack(one))

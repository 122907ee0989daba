"""Weights that differ along the batch, in whatever modules do with weights: route is the loop over samples."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft_func as pf
from tests.ensemble.side_by_side import Many
from tests.zoo import randn

INDEX = [2, 0, -1, 2]
SORTED = [1, 1, 0, 0]


class Uses(nn.Module):
    """A linear module, some parameters, and a function that uses them."""

    def __init__(self, use, **shapes):
        super().__init__()
        self.lin = nn.Linear(5, 5)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))
        self.use = [use]

    def forward(self, x):
        return self.lin(torch.tanh(self.use[0](self, x)))


def check(net, method, *args, index=(INDEX, SORTED), **kwargs):
    many = Many(net, method)
    for some in index:
        many.check_route(some, *args, **kwargs)


USES = {
    "scalar times": (lambda m, x: m.p * x, ()),
    "times scalar": (lambda m, x: x * m.p, ()),
    "minus scalar": (lambda m, x: m.p - x, ()),
    "over scalar": (lambda m, x: x / m.p, ()),
    "one plus": (lambda m, x: (1 + m.p) * x, (5,)),
    "number minus": (lambda m, x: (2 - m.p) * x, (5,)),
    "exp of it": (lambda m, x: m.p.exp() * x, (5,)),
    "exp of a scalar": (lambda m, x: m.p.exp() * x, ()),
    "vector over": (lambda m, x: m.p / (x * x + 1), (5,)),
    "vector minus": (lambda m, x: x - m.p, (5,)),
    "positions": (lambda m, x: x + m.p, (3, 5)),
    "positions of one": (lambda m, x: x + m.p, (1, 3, 5)),
    "token by expand": (lambda m, x: torch.cat([m.p.expand(len(x), -1, -1), x], 1), (1, 1, 5)),
    "token by expand, its size": (lambda m, x: torch.cat([m.p.expand(x.shape[0], 2, 5), x], 1), (1, 2, 5)),
    "token by expand, as one size": (lambda m, x: torch.cat([m.p.expand((len(x), -1, -1)), x], 1), (1, 1, 5)),
    "token by expand, broadcast": (lambda m, x: torch.cat([m.p.expand(len(x), 2, 5), x], 1), (1, 1, 5)),
    "token by expand_as": (lambda m, x: x + m.p.expand_as(x), (1, 1, 5)),
    "token by repeat": (lambda m, x: torch.cat([m.p.repeat(len(x), 1, 1), x], 1), (1, 2, 5)),
    "token repeated twice": (lambda m, x: torch.cat([m.p.repeat(len(x), 2, 1), x], 1), (1, 2, 5)),
    "token of two dimensions": (lambda m, x: torch.cat([m.p.expand(len(x), 1, -1), x], 1), (1, 5)),
    "token of one dimension": (lambda m, x: torch.cat([m.p.expand(len(x), 1, -1), x], 1), (5,)),
    "product": (lambda m, x: x @ m.p, (5, 5)),
    "product with its transpose": (lambda m, x: x @ m.p.T, (5, 5)),
    "matmul": (lambda m, x: torch.matmul(x, m.p.transpose(0, 1)), (5, 5)),
    "product on the left": (lambda m, x: (m.p @ x.mT).mT, (5, 5)),
    "einsum": (lambda m, x: torch.einsum("btd,de->bte", x, m.p), (5, 5)),
    "times another weight": (lambda m, x: F.linear(x, m.p * m.lin.weight), (5,)),
    "in place": (lambda m, x: x.clone().add_(m.p), (5,)),
    "norm of a weight": (lambda m, x: F.linear(x, m.p / m.p.norm()), (5, 5)),
    "detached": (lambda m, x: x + m.p.detach(), (5,)),
    "by rows": (lambda m, x: F.linear(x.flatten(0, 1), m.p).view(x.shape), (5, 5)),
    "sequence first": (lambda m, x: F.linear(x.transpose(0, 1), m.p).transpose(0, 1), (5, 5)),
    "one position first": (lambda m, x: x + F.linear(x[:, :1].transpose(0, 1), m.p).transpose(0, 1), (5, 5)),
    "an index": (lambda m, x: x * m.p[1], (3, 5)),
    "of a single vector": (lambda m, x: x + F.linear(m.lin.bias, m.p), (5, 5)),
}


@pytest.mark.parametrize("name", list(USES))
def test_parameters_of_the_users_own(name):
    use, shape = USES[name]
    other = pf.train("lin.weight", name="lin") if name == "times another weight" else pf.lora("lin", rank=1)
    check(Uses(use, p=shape), pf.chain(pf.train("p"), other), randn(4, 3, 5))


# Where a length is that of the batch by chance.
CHANCE = {
    "scalar times weight": (lambda m, x: F.linear(x, m.p * m.w), {"p": (), "w": (4, 4)}),
    "vector times weight": (lambda m, x: F.linear(x, m.p * m.w), {"p": (4,), "w": (4, 4)}),
    "vector times its transpose": (lambda m, x: F.linear(x, (m.p * m.w.T).T), {"p": (4,), "w": (4, 4)}),
    "queries": (lambda m, x: x + F.linear(m.w, m.p), {"p": (4, 4), "w": (4, 4)}),
    "positions": (lambda m, x: x + F.embedding(torch.arange(4), m.p), {"p": (4, 4)}),
    "bias": (lambda m, x: x + m.p, {"p": (4,)}),
    "product": (lambda m, x: x @ m.p, {"p": (4, 4)}),
    "product, sequence first": (lambda m, x: (x.transpose(0, 1) @ m.p).transpose(0, 1), {"p": (4, 4)}),
    "norm, sequence first": (
        lambda m, x: F.layer_norm(x.transpose(0, 1), (4,), m.p).transpose(0, 1), {"p": (4,)}
    ),
    "sum, sequence first": (lambda m, x: (x.transpose(0, 1) + m.p).transpose(0, 1), {"p": (4,)}),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CHANCE))
@pytest.mark.parametrize("length", [4, 1, 2])
def test_a_length_that_is_the_batchs_by_chance(name, length):
    use, shapes = CHANCE[name]
    if name in ("queries", "positions") and length == 2:
        length = 4
    net = Uses(use, **shapes)
    net.lin = nn.Linear(4, 4)
    check(net, pf.chain(pf.train("p"), pf.lora("lin", rank=1)), randn(4, length, 4), index=[INDEX, [0, 1, 2, 0]])


class Positions(nn.Module):
    """Learned positions, as nanoGPT has them."""

    def __init__(self):
        super().__init__()
        self.tok, self.pos = nn.Embedding(9, 6), nn.Embedding(8, 6)
        self.out = nn.Linear(6, 5)
        self.register_buffer("ids", torch.arange(8)[None])

    def forward(self, x, absolute=False):
        ids = self.ids[:, : x.shape[1]] if absolute else torch.arange(x.shape[1])
        return self.out(torch.tanh(self.tok(x) + self.pos(ids)))


@pytest.mark.parametrize("where", [".*", "pos", "tok", "tok|pos", "out"])
@pytest.mark.parametrize("length", [4, 3, 1])
@pytest.mark.parametrize("absolute", [False, True])
def test_positions_may_be_as_many_as_samples(where, length, absolute):
    check(Positions(), pf.lora(where, rank=2), torch.arange(4 * length).view(4, length) % 9, absolute=absolute)


CONVS = {
    "1d": (nn.Conv1d(4, 6, 3, padding=1, groups=2), (4, 4, 5)),
    "1d no bias": (nn.Conv1d(3, 4, 2, bias=False), (4, 3, 4)),
    "2d": (nn.Conv2d(3, 4, (3, 1), stride=2, padding=1), (4, 3, 4, 4)),
    "2d grouped": (nn.Conv2d(4, 6, 3, padding="same", groups=2, padding_mode="circular"), (4, 4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), (4, 4, 4, 4)),
    "3d": (nn.Conv3d(2, 3, 2), (4, 2, 3, 3, 3)),
    "transposed 1d": (nn.ConvTranspose1d(3, 4, 3, stride=2), (4, 3, 4)),
    "transposed 2d": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1), (4, 4, 3, 3)),
    "transposed 3d": (nn.ConvTranspose3d(2, 3, 2), (4, 2, 2, 2, 2)),
}
METHODS = {
    "lora": lambda where: pf.lora(where, rank=1, alpha=3, bias=True),
    "gift": lambda where: pf.gift(where, rank=1, share="none"),
    "ia3": lambda where: pf.ia3(where),
    "ia3 in": lambda where: pf.ia3(where, side="input"),
    "dora": lambda where: pf.dora(where, rank=1),
    "train": lambda where: pf.train(where),
    "chain": lambda where: pf.chain(pf.lora(where, rank=1), pf.gift(where, rank=1, share="none"), pf.magnitude(where)),
}


@pytest.mark.parametrize("name", list(CONVS))
@pytest.mark.parametrize("method", list(METHODS))
def test_convolutions(name, method):
    net, shape = CONVS[name]
    many = Many(nn.Sequential(net), METHODS[method](".*weight" if method != "train" else ".*"))
    many.check_route(INDEX, randn(*shape))
    many.check_ensemble(randn(*shape))


NORMS = {
    "layer": (nn.LayerNorm(5), (4, 3, 5)),
    "layer over two": (nn.LayerNorm((3, 5)), (4, 3, 5)),
    "layer, all as long": (nn.LayerNorm(4), (4, 4, 4)),
    "rms": (nn.RMSNorm(5), (4, 3, 5)),
    "group": (nn.GroupNorm(2, 4), (4, 4, 3)),
    "instance": (nn.InstanceNorm1d(3, affine=True), (4, 3, 5)),
    "instance with statistics": (nn.InstanceNorm1d(3, affine=True, track_running_stats=True), (4, 3, 5)),
    "batch": (nn.BatchNorm1d(3), (4, 3, 5)),
    "batch of vectors": (nn.BatchNorm1d(4), (4, 4)),
    "batch 2d": (nn.BatchNorm2d(3), (4, 3, 2, 2)),
    "prelu": (nn.PReLU(3), (4, 3, 5)),
    "bilinear": (nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 2)), (4, 5)),
    "llama": (transformers.models.llama.modeling_llama.LlamaRMSNorm(5), (4, 3, 5)),
}


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")  # prelu under torch's vmap
@pytest.mark.parametrize("name", list(NORMS))
def test_norms(name):
    net, shape = NORMS[name]
    many = Many(nn.Sequential(net), pf.train(".*"))
    many.check_route(INDEX, randn(*shape))
    many.check_route([0, 1, 2, 0], randn(*shape))
    many.check_ensemble(randn(*shape))


def test_conv1d_of_transformers_joins_positions_to_the_batch():
    net = nn.Sequential(Conv1D(6, 5), nn.GELU(), Conv1D(3, 6))
    for method in METHODS.values():
        check(net, method(".*weight"), randn(4, 3, 5))
        check(net, method(".*weight"), randn(4, 5))
        check(net, method(".*weight"), randn(4, 4, 5))


class Attend(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, **options)
        self.bag = options

    def forward(self, q, k, v, **options):
        if not self.attn.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        y, weights = self.attn(q, k, v, **options)
        y = y if self.attn.batch_first else y.transpose(0, 1)
        return y if weights is None or weights.dim() != 3 else torch.cat([y, weights], -1)


MASK = torch.tensor([[False, False, True], [False] * 3, [False, True, True], [False] * 3])
CAUSAL = torch.triu(torch.ones(3, 3, dtype=torch.bool), 1)
ATTENTION = {
    "packed": ({}, {}),
    "no weights": ({}, {"need_weights": False}),
    "no bias": ({"bias": False}, {}),
    "padding": ({}, {"key_padding_mask": MASK}),
    "padding, no weights": ({}, {"key_padding_mask": MASK, "need_weights": False}),
    "causal": ({}, {"attn_mask": CAUSAL}),
    "zero": ({"add_zero_attn": True}, {"key_padding_mask": MASK}),
    "bias on keys": ({"add_bias_kv": True}, {}),
    "weights of heads": ({}, {"average_attn_weights": False}),
}


@pytest.mark.parametrize("name", list(ATTENTION))
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("method", ["lora", "dora", "train"])
def test_attention(name, batch_first, method):
    options, arguments = ATTENTION[name]
    net = Attend(batch_first=batch_first, **options)
    x = randn(4, 3, 8)
    check(net, METHODS[method](".*"), x, x, x, **arguments)
    Many(net, METHODS[method](".*")).check_ensemble(x, x, x, **arguments)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("length", [4, 5])
def test_attention_with_keys_of_other_widths(batch_first, length):
    net = Attend(batch_first=batch_first, kdim=6, vdim=7, add_bias_kv=True)
    check(net, pf.lora(".*weight", rank=1), randn(4, 3, 8), randn(4, length, 6), randn(4, length, 7))


@pytest.mark.parametrize("length", [1, 4])
def test_attention_over_as_many_positions_as_samples(length):
    x = randn(4, length, 8)
    for batch_first in (True, False):
        check(Attend(batch_first=batch_first), pf.lora(".*weight", rank=1), x, x, x)


class Windows(nn.Module):
    """Attention inside windows: more of them than samples."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        y = x.reshape(2 * len(x), -1, 8)
        return self.attn(y, y, y)[0].reshape(x.shape)


@pytest.mark.parametrize("where", [".*", "attn.out_proj"])
def test_attention_in_windows(where):
    check(Windows(), pf.lora(where, rank=1), randn(4, 6, 8))


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_encoder(batch_first):
    class Encode(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=batch_first)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x, mask):
            if batch_first:
                return self.encoder(x, src_key_padding_mask=mask)
            return self.encoder(x.transpose(0, 1), src_key_padding_mask=mask).transpose(0, 1)

    for method in (pf.lora(".*", rank=1, bias=True), pf.train(r".*(norm|bias).*"), pf.ia3(".*linear1")):
        check(Encode(), method, randn(4, 3, 8), MASK)


@pytest.mark.filterwarnings("ignore:the effective weight")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("where", [".*", "head"])
def test_recurrent_cells(kind, where):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = kind(5, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.cell(x)[0])

    many = Many(Net(), pf.lora(where, rank=1))
    many.check_route(INDEX, randn(4, 3, 5))
    many.check_ensemble(randn(4, 3, 5), options={"chunk_size": 2})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_bases_and_autocast(dtype):
    net = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3)).to(dtype)
    x = randn(4, 5).to(dtype)
    lora = pf.lora(".*", rank=2, bias=True)
    for method in (lora, pf.train(".*"), pf.dora(".*", rank=1), pf.gift("0", rank=1), pf.ia3("0")):
        model = pf.functionalize(net)
        adapter = pf.bind(method, model)
        frozen, tree = adapter.init(0)
        members = [pf.map_leaves(lambda t, k=k: t + 0.1 * k, tree) for k in range(3)]
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                y = model(pf.route(adapter, frozen, pf.stack(members), torch.tensor(INDEX)), x)
                rows = [
                    model(model.params if k < 0 else adapter.apply(frozen, members[k]), x[i : i + 1])
                    for i, k in enumerate(INDEX)
                ]
            assert y.dtype == rows[0].dtype
            assert torch.allclose(
                y.float(), torch.cat(rows).float(), atol=0.1 if enabled or dtype == torch.bfloat16 else 1e-5
            )


def test_nothing_is_formed_where_there_are_rules():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.conv = nn.Embedding(9, 5), nn.Conv1d(5, 5, 3, padding=1)
            self.lin, self.hf = nn.Linear(5, 6), Conv1D(4, 6)

        def forward(self, ids):
            return self.hf(self.lin(self.conv(self.embed(ids).mT).mT))

    ids = torch.arange(12).view(4, 3) % 9
    for name in ("lora", "gift", "ia3", "ia3 in", "dora"):
        many = Many(Net(), METHODS[name](".*weight"))
        with pf.densify("error"):
            many.routed(many.stacked, INDEX, ids)
            pf.ensemble(many.adapter, how="fold")(many.frozen, many.stacked, ids)


@pytest.mark.parametrize("method", ["lora", "train", "ia3"])
def test_the_row_of_the_padding_gets_no_gradient(method):
    net = nn.Sequential(nn.Embedding(9, 5, padding_idx=0), nn.Linear(5, 3))
    many = Many(net, METHODS[method]("0.*"))
    ids = torch.tensor([[0, 1, 2], [3, 0, 0], [1, 0, 4], [0, 0, 5]])
    many.check_route(INDEX, ids)
    many.check_ensemble(ids)

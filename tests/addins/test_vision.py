"""The add-ins of vision transformers against plain PyTorch, on transformers' ViT and on one of timm's shape."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import peft_func as pf
from tests.addins.timm_vit import TimmViT
from tests.zoo import ZOO, randn, seeded

TOLERANCE = {"atol": 1e-10, "rtol": 1e-10}


@dataclass
class Net:
    """A vision transformer, and its steps one by one."""

    net: nn.Module
    x: torch.Tensor
    model: pf.FunctionalModel
    paths: list[str]
    norms: tuple[str, str]
    attention: str
    embed: Any
    classify: Any
    logits: Any

    def steps(self, path):
        block = self.net.get_submodule(path)
        attend = block.get_submodule(self.attention)
        first = lambda out: out[0] if isinstance(out, tuple) else out
        one, two = (block.get_submodule(norm) for norm in self.norms)
        return one, lambda h: first(attend(h)), two, block.mlp

    def run(self, method, change=0.2):
        adapter = pf.bind(method, self.model)
        frozen, tree = adapter.init(0)
        generator = torch.Generator().manual_seed(1)
        move = lambda t: t + change * torch.randn(t.shape, dtype=t.dtype, generator=generator)
        tree = pf.map_leaves(move, tree)
        return tree[method.name], self.logits(self.model(adapter.apply(frozen, tree), self.x))


def timm(**options):
    net = seeded(lambda: TimmViT(**options))()
    return Net(
        net, randn(2, 1, 6, 6, seed=3), pf.functionalize(net), ["blocks.0", "blocks.1", "blocks.2"],
        ("norm1", "norm2"), "attn", net.embed, net.classify, lambda out: out,
    )  # fmt: skip


def hugging_face():
    net = ZOO["vit"].build()
    classify = lambda x: net.classifier(net.vit.layernorm(x)[:, 0])
    return Net(
        net, randn(2, 1, 8, 8, seed=3), pf.functionalize(net), ["vit.layers.0", "vit.layers.1"],
        ("layernorm_before", "layernorm_after"), "attention", net.vit.embeddings, classify, lambda out: out.logits,
    )  # fmt: skip


@pytest.fixture(params=[timm, lambda: timm(pool="mean"), hugging_face], ids=["timm", "timm mean", "transformers"])
def vit(request):
    return request.param()


def bottleneck(leaves, x, scale, act=torch.relu):
    return scale * (act(x @ leaves["down"].T + leaves["down_bias"]) @ leaves["up"].T + leaves["up_bias"])


@pytest.mark.parametrize("form", ["parallel", "sequential"])
@torch.no_grad()
def test_adaptformer(vit, form):
    tree, got = vit.run(pf.adaptformer(rank=3, form=form))
    assert list(tree) == vit.paths
    x = vit.embed(vit.x)
    for path in vit.paths:
        norm1, attend, norm2, mlp = vit.steps(path)
        x = x + attend(norm1(x))
        h = mlp(norm2(x))
        x = h + x + bottleneck(tree[path], x if form == "parallel" else h, 0.1)
    torch.testing.assert_close(got, vit.classify(x), **TOLERANCE)


@torch.no_grad()
def test_adaptformer_with_norms_and_a_learned_scale(vit):
    for option in ("in", "out"):
        tree, got = vit.run(pf.adaptformer(rank=3, scale="learned", layer_norm=option))
        x = vit.embed(vit.x)
        for path in vit.paths:
            norm1, attend, norm2, mlp = vit.steps(path)
            leaves = tree[path]
            x = x + attend(norm1(x))
            normed = lambda h, own=leaves: F.layer_norm(h, (h.shape[-1],), own["norm"], own["norm_bias"])
            inside = normed(x) if option == "in" else x
            branch = bottleneck(leaves, inside, 1.0)
            x = x + mlp(norm2(x)) + leaves["scale"] * (normed(branch) if option == "out" else branch)
        torch.testing.assert_close(got, vit.classify(x), **TOLERANCE)


@pytest.mark.parametrize("norm_first", [False, True])
@torch.no_grad()
def test_adaptformer_takes_what_the_block_adds_to(norm_first):
    """With norms last the branch takes what the feed-forward part takes; with norms first, what its norm takes."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    net = seeded(lambda: nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))()
    model, x = pf.functionalize(net), randn(2, 3, 8)
    adapter = pf.bind(pf.adaptformer(rank=3), model)
    frozen, tree = adapter.init(0)
    tree = pf.map_leaves(lambda t: t + 0.2 * randn(*t.shape, seed=t.numel()), tree)
    got = model(adapter.apply(frozen, tree), x)
    for name, part in net.layers.named_children():
        leaves = tree["adaptformer"][f"layers.{name}"]
        attend = lambda h, part=part: part.self_attn(h, h, h, need_weights=False)[0]
        mlp = lambda h, part=part: part.linear2(torch.relu(part.linear1(h)))
        if norm_first:
            x = x + attend(part.norm1(x))
            x = x + mlp(part.norm2(x)) + bottleneck(leaves, x, 0.1)
        else:
            x = part.norm1(x + attend(x))
            x = part.norm2(x + mlp(x) + bottleneck(leaves, x, 0.1))
    torch.testing.assert_close(got, x, **TOLERANCE)


@torch.no_grad()
def test_adaptformer_on_bert():
    net = ZOO["bert"].build()
    model, ids = pf.functionalize(net), torch.arange(10).reshape(2, 5)
    adapter = pf.bind(pf.adaptformer(rank=3), model)
    frozen, tree = adapter.init(0)
    tree = pf.map_leaves(lambda t: t + 0.2 * randn(*t.shape, seed=t.numel()), tree)
    x = net.bert.embeddings(ids)
    for i, layer in enumerate(net.bert.encoder.layer):
        x = layer.attention(x)[0]
        h = layer.output.dense(layer.intermediate(x))
        x = layer.output.LayerNorm(h + x + bottleneck(tree["adaptformer"][f"bert.encoder.layer.{i}"], x, 0.1))
    expected = net.classifier(net.bert.pooler(x))
    torch.testing.assert_close(model(adapter.apply(frozen, tree), ids).logits, expected, **TOLERANCE)


def convolved(leaves, x, scale):
    act = lambda h: h * torch.sigmoid(1.702 * h)
    h = act(x @ leaves["down"].T + leaves["down_bias"])
    side = round((h.shape[1] - 1) ** 0.5)
    convolve = lambda maps: F.conv2d(maps, leaves["conv"], leaves["conv_bias"], padding=1)
    patches = convolve(h[:, 1:].reshape(len(h), side, side, -1).permute(0, 3, 1, 2)) if side else None
    token = convolve(h[:, :1].reshape(len(h), 1, 1, -1).permute(0, 3, 1, 2))
    patches = patches if side else h[:, :0].mT
    h = torch.cat([token.flatten(2), patches.flatten(2)], 2).transpose(1, 2)
    return scale * (act(h) @ leaves["up"].T + leaves["up_bias"])


@torch.no_grad()
def test_convpass(vit):
    tree, got = vit.run(pf.convpass(rank=3, scale=0.7))
    x = vit.embed(vit.x)
    for path in vit.paths:
        norm1, attend, norm2, mlp = vit.steps(path)
        h = norm1(x)
        x = x + attend(h) + convolved(tree[f"{path}.{vit.attention}"], h, 0.7)
        h = norm2(x)
        x = x + mlp(h) + convolved(tree[f"{path}.mlp"], h, 0.7)
    torch.testing.assert_close(got, vit.classify(x), **TOLERANCE)


def test_convpass_init_and_grids():
    model = pf.functionalize(nn.Linear(8, 8).double())
    adapter = pf.bind(pf.convpass("", rank=2, prefix=2, grid=(3, 5)), model)
    frozen, tree = adapter.init(0)
    conv = tree["convpass"][""]["conv"]
    assert torch.equal(conv.sum((2, 3)), torch.eye(2, dtype=conv.dtype))
    assert torch.equal(conv[..., 1, 1], torch.eye(2, dtype=conv.dtype))
    weights = adapter.apply(frozen, tree)
    assert model(weights, randn(2, 17, 8)).shape == (2, 17, 8)
    with pytest.raises(pf.AddinError, match=r"16 tokens behind the 2 .* no grid of 3 x 5; give grid="):
        model(weights, randn(2, 18, 8))
    with pytest.raises(pf.AddinError, match="not \\[batch, tokens, features\\]"):
        model(weights, randn(17, 8))


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("keep", [False, True])
@torch.no_grad()
def test_vpt(vit, deep, keep):
    tree, got = vit.run(pf.vpt(tokens=3, deep=deep, keep=keep))
    assert list(tree) == (vit.paths if deep else vit.paths[:1])
    x = vit.embed(vit.x)
    spread = lambda prompt: prompt.unsqueeze(0).expand(len(x), -1, -1)
    for i, path in enumerate(vit.paths):
        if i == 0:
            x = torch.cat([x[:, :1], spread(tree[path]["prompt"]), x[:, 1:]], 1)
        elif deep:
            x = torch.cat([x[:, :1], spread(tree[path]["prompt"]), x[:, 4:]], 1)
        norm1, attend, norm2, mlp = vit.steps(path)
        x = x + attend(norm1(x))
        x = x + mlp(norm2(x))
    if not keep:
        x = torch.cat([x[:, :1], x[:, 4:]], 1)
    torch.testing.assert_close(got, vit.classify(x), **TOLERANCE)


def test_vpt_is_drawn_from_the_bound_of_the_paper():
    vit = hugging_face()  # patches of 4 x 4 of one channel, width 16
    prompts = pf.bind(pf.vpt(tokens=500), vit.model).init(0)[1]["vpt"]["vit.layers.1"]["prompt"]
    bound = (6 / (16 + 16)) ** 0.5
    assert prompts.abs().max() <= bound
    assert prompts.abs().max() > 0.99 * bound
    assert abs(prompts.mean()) < 0.02


def test_vpt_refuses_masks_and_other_models():
    bert = pf.functionalize(ZOO["bert"].build())
    with pytest.raises(pf.OptionError, match="prefix=0"):
        pf.bind(pf.vpt(), bert)
    with pytest.raises(pf.OptionError, match="bound="):
        pf.bind(pf.vpt(prefix=1), bert)
    adapter = pf.bind(pf.vpt(prefix=1, bound=0.1), bert)
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    with pytest.raises(pf.AddinError, match="one entry for each of the 5 tokens"):
        bert(adapter.apply(*adapter.init(0)), torch.arange(5)[None], attention_mask=mask)
    llama = pf.functionalize(ZOO["llama"].build())
    adapter = pf.bind(pf.vpt(prefix=0, bound=0.1), llama)
    with pytest.raises(pf.AddinError, match="positions"):
        llama(adapter.apply(*adapter.init(0)), torch.arange(5)[None])
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
    with pytest.raises(pf.OptionError, match="batch_first"):
        pf.bind(pf.vpt(prefix=0, bound=0.1), pf.functionalize(layers))


@pytest.mark.parametrize("where", [pf.blocks(), pf.blocks(0, 2)], ids=["all blocks", "some"])
@pytest.mark.parametrize("deep", [False, True])
@torch.no_grad()
def test_convpass_knows_prompts(deep, where):
    """Seven prompts and nine patches are no grid of 4 x 4: prompts are maps of one pixel."""
    vit = timm()
    method = pf.chain(pf.vpt(where, tokens=7, deep=deep), pf.convpass(pf.mlps(), rank=2, scale=0.7))
    adapter = pf.bind(method, vit.model)
    frozen, tree = adapter.init(0)
    tree = pf.map_leaves(lambda t: t + 0.2 * randn(*t.shape, seed=t.numel()), tree)
    x = vit.embed(vit.x)
    for i, path in enumerate(vit.paths):
        if path in tree["vpt"]:
            prompt = tree["vpt"][path]["prompt"].expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], prompt, x[:, 8 if i else 1 :]], 1)
        norm1, attend, norm2, mlp = vit.steps(path)
        x = x + attend(norm1(x))
        h, leaves = norm2(x), tree["convpass"][f"{path}.mlp"]
        image = convolved(leaves, torch.cat([h[:, :1], h[:, 8:]], 1), 0.7)
        single = torch.cat([convolved(leaves, h[:, j : j + 1], 0.7) for j in range(1, 8)], 1)
        x = x + mlp(h) + torch.cat([image[:, :1], single, image[:, 1:]], 1)
    x = torch.cat([x[:, :1], x[:, 8:]], 1)
    torch.testing.assert_close(vit.model(adapter.apply(frozen, tree), vit.x), vit.classify(x), **TOLERANCE)


@torch.no_grad()
def test_convpass_knows_tokens_that_ask():
    vit = timm()
    convpass = pf.convpass(pf.mlps(), rank=2, scale=0.7)
    adapter = pf.bind(pf.chain(convpass, pf.vqt(tokens=10)), vit.model)
    frozen, tree = adapter.init(0)
    tree = pf.map_leaves(lambda t: t + 0.2 * randn(*t.shape, seed=t.numel()), tree)
    x, told = vit.embed(vit.x), []
    for path in vit.paths:
        norm1, attend, norm2, mlp = vit.steps(path)
        leaves = tree["convpass"][f"{path}.mlp"]
        z = tree["vqt"][path]["query"].expand(len(x), -1, -1)
        z = z + asked(vit.net.get_submodule(f"{path}.attn"), norm1(z), norm1(x), fused=True)
        alone = [convolved(leaves, norm2(z)[:, j : j + 1], 0.7) for j in range(10)]
        told.append((z + mlp(norm2(z)) + torch.cat(alone, 1)).flatten(1))
        x = x + attend(norm1(x))
        x = x + mlp(norm2(x)) + convolved(leaves, norm2(x), 0.7)
    expected = vit.classify(x) + torch.cat(told, 1) @ tree["vqt"]["head"]["weight"].T
    torch.testing.assert_close(vit.model(adapter.apply(frozen, tree), vit.x), expected, **TOLERANCE)


@pytest.mark.parametrize("form", ["weights", "activations"])
@torch.no_grad()
def test_ssf(vit, form):
    where = pf.of_type(nn.Linear, nn.LayerNorm, nn.Conv2d)
    tree, got = vit.run(pf.ssf(where, form=form))
    twin = copy.deepcopy(vit.net)
    for path, module in twin.named_modules():
        if isinstance(module, nn.Linear | nn.LayerNorm | nn.Conv2d):
            scale, shift = tree[path]["scale"], tree[path]["shift"]
            if isinstance(module, nn.Conv2d):
                scale, shift = scale[:, None, None], shift[:, None, None]
            module.register_forward_hook(lambda m, a, y, scale=scale, shift=shift: y * scale + shift)
    torch.testing.assert_close(got, vit.logits(twin(vit.x)), **TOLERANCE)
    assert len(tree) == sum(isinstance(m, nn.Linear | nn.LayerNorm | nn.Conv2d) for m in twin.modules())


def test_ssf_says_where_weights_cannot_hold_it():
    llama = pf.functionalize(ZOO["llama"].build())
    with pytest.raises(pf.OptionError, match="form='activations'"):
        pf.bind(pf.ssf(["q_proj"]), llama)
    with pytest.raises(pf.OptionError, match="neither the weight nor the bias"):
        pf.bind(pf.ssf("cls_token"), pf.functionalize(TimmViT()))
    grouped = pf.functionalize(nn.ConvTranspose2d(4, 6, 3, groups=2))
    with pytest.raises(pf.OptionError, match="form='activations'"):
        pf.bind(pf.ssf(".*"), grouped)
    adapter = pf.bind(pf.ssf("", form="activations"), grouped)
    assert adapter.init(0)[1]["ssf"][""]["scale"].shape == (6,)


@pytest.mark.parametrize("how", ["tt", "tk"])
@torch.no_grad()
def test_fact(how):
    vit = timm()
    tree, got = vit.run(pf.fact(pf.blocks(), rank=2, scale=0.5, how=how))
    U, V = tree["shared"]["U"], tree["shared"]["V"]
    twin = copy.deepcopy(vit.net)
    count = 0
    for path in vit.paths:
        for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            weight, leaves = twin.get_submodule(f"{path}.{name}").weight, tree[f"{path}.{name}.weight"]
            rows, columns = weight.shape[0] // 8, weight.shape[1] // 8
            for i in range(rows):
                for j in range(columns):
                    if how == "tt":
                        sigma = leaves["sigma"][2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
                    else:
                        C = tree["shared"]["C"]
                        sigma = sum(leaves["p"][k, i, j] * C[:, :, k] for k in range(2))
                    weight[8 * i : 8 * i + 8, 8 * j : 8 * j + 8] += 0.5 * V @ sigma @ U
                    count += 1
    assert count == 12 * 3  # as in the paper: 3 + 1 + 4 + 4 blocks a layer
    torch.testing.assert_close(got, vit.logits(twin(vit.x)), **TOLERANCE)


def test_fact_refuses_what_is_no_grid_of_blocks():
    vit = hugging_face()  # 16 and 24 wide
    with pytest.raises(pf.OptionError, match="no whole number of blocks of 16"):
        pf.bind(pf.fact(pf.blocks()), vit.model)
    pf.bind(pf.fact(pf.blocks(), width=8), vit.model)
    with pytest.raises(pf.OptionError, match="ranks are 1 to 8"):
        pf.bind(pf.fact(pf.blocks(), width=8, rank=9), vit.model)
    with pytest.raises(pf.OptionError, match="whole number"):
        pf.fact(pf.blocks(), rank=2.5)


def asked(attend, asking, seen, fused):
    if fused:
        q, k, v = attend.qkv(asking).chunk(3, -1)[0], *attend.qkv(seen).chunk(3, -1)[1:]
    else:
        q, k, v = attend.q_proj(asking), attend.k_proj(seen), attend.v_proj(seen)
    size = q.shape[-1] // 2
    heads = []
    for i in range(2):
        part = slice(i * size, (i + 1) * size)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / size**0.5
        heads.append(scores.softmax(-1) @ v[..., part])
    return (attend.proj if fused else attend.o_proj)(torch.cat(heads, -1))


@pytest.mark.parametrize("pool", ["none", "mean"])
@torch.no_grad()
def test_vqt(vit, pool):
    tree, got = vit.run(pf.vqt(tokens=3, pool=pool))
    (head,) = tree.keys() - set(vit.paths)
    x, told = vit.embed(vit.x), []
    for path in vit.paths:
        norm1, attend, norm2, mlp = vit.steps(path)
        z = tree[path]["query"].expand(len(x), -1, -1)
        own = vit.net.get_submodule(path).get_submodule(vit.attention)
        z = z + asked(own, norm1(z), norm1(x), isinstance(vit.net, TimmViT))
        z = z + mlp(norm2(z))
        told.append(z.mean(1) if pool == "mean" else z.reshape(len(z), -1))
        x = x + attend(norm1(x))
        x = x + mlp(norm2(x))
    expected = vit.classify(x) + torch.cat(told, -1) @ tree[head]["weight"].T
    torch.testing.assert_close(got, expected, **TOLERANCE)


@torch.no_grad()
def test_vqt_of_torchs_own_attention():
    """Asking torch's attention is the block on all tokens, with a mask that hides those that ask."""

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.encoder(x)[:, 0])

    net = seeded(Classifier)()
    model, x = pf.functionalize(net), randn(2, 5, 8)
    adapter = pf.bind(pf.vqt(tokens=2), model)
    frozen, tree = adapter.init(0)
    tree = pf.map_leaves(lambda t: t + 0.2 * randn(*t.shape, seed=t.numel()), tree)
    got, told = model(adapter.apply(frozen, tree), x), []
    mask = torch.zeros(7, 7, dtype=torch.bool)
    mask[:, 5:] = True
    for i, layer in enumerate(net.encoder.layers):
        query = tree["vqt"][f"encoder.layers.{i}"]["query"].expand(2, -1, -1)
        both = layer(torch.cat([x, query], 1), src_mask=mask)
        x = both[:, :5]
        told.append(both[:, 5:].flatten(1))
    expected = net.head(x[:, 0]) + torch.cat(told, 1) @ tree["vqt"]["head"]["weight"].T
    torch.testing.assert_close(got, expected, **TOLERANCE)


def test_vqt_refuses_attentions_that_are_not_plain():
    llama, bert = (pf.functionalize(ZOO[name].build()) for name in ("llama", "bert"))
    adapter = pf.bind(pf.vqt(), llama)
    with pytest.raises(pf.AddinError, match="positions"):
        llama(adapter.apply(*adapter.init(0)), torch.arange(5)[None])
    with pytest.raises(pf.OptionError, match="no block of a transformer"):
        pf.bind(pf.vqt(pf.attentions()), bert)
    with pytest.raises(pf.OptionError, match="not the path of a linear map"):
        pf.bind(pf.vqt(head="bert"), bert)


def names(method, model):
    return list(pf.bind(method, model).init(0)[1]["train"])


def test_presets(vit):
    every = list(vit.model.params)
    head = [name for name in every if name.startswith(("head", "classifier"))]
    norm = [name for name in every if name.startswith(("norm.", "vit.layernorm."))]
    last = [name for name in every if name.startswith(vit.paths[-1] + ".")]
    assert len(head) == 2
    assert len(norm) == 2
    assert names(pf.linear_probe(), vit.model) == head
    assert sorted(names(pf.linear_probe(norm=True), vit.model)) == sorted(head + norm)
    assert sorted(names(pf.partial(1), vit.model)) == sorted(last + head + norm)
    assert sorted(names(pf.partial(0), vit.model)) == sorted(head + norm)
    assert names(pf.full(), vit.model) == every
    with pytest.raises(pf.OptionError, match="the last 9 of"):
        pf.bind(pf.partial(9), vit.model)
    chained = pf.bind(pf.chain(pf.vpt(tokens=2), pf.linear_probe(name="head")), vit.model)
    assert set(chained.init(0)[1]) == {"vpt", "head"}


def test_presets_and_files(tmp_path):
    vit = timm()
    adapter = pf.bind(pf.chain(pf.adaptformer(rank=2), pf.lora(pf.suffix("qkv"), rank=2), pf.partial(1)), vit.model)
    frozen, tree = adapter.init(0)
    pf.save(tmp_path / "a.safetensors", adapter, tree)
    again, frozen, loaded = pf.load(tmp_path / "a.safetensors", vit.model)
    expected = vit.model(adapter.apply(frozen, tree), vit.x)
    torch.testing.assert_close(vit.model(again.apply(frozen, loaded), vit.x), expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: pf.adaptformer(form="across"),
        lambda: pf.adaptformer(rank=0),
        lambda: pf.adaptformer(rank=None),
        lambda: pf.convpass(grid=3),
        lambda: pf.convpass(grid=(3, -1)),
        lambda: pf.convpass(dropout=1.0),
        lambda: pf.convpass(init="zero"),
        lambda: pf.vpt(tokens=0),
        lambda: pf.vpt(deep="yes"),
        lambda: pf.vpt(bound=-1.0),
        lambda: pf.vqt(pool="max"),
        lambda: pf.vqt(tokens=None),
        lambda: pf.ssf(".*", form="merged"),
        lambda: pf.fact(".*", how="cp"),
        lambda: pf.partial(-1),
        lambda: pf.linear_probe(norm="yes"),
    ],
)
def test_options_out_of_range(make):
    with pytest.raises(pf.OptionError):
        make()


def test_a_model_without_blocks():
    model = pf.functionalize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    for method in (pf.adaptformer(), pf.vpt(prefix=0, bound=0.1), pf.linear_probe(), pf.partial(1)):
        with pytest.raises(pf.SelectorError, match="no list of modules of one class"):
            pf.bind(method, model)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [pf.adaptformer(rank=2), pf.convpass(rank=2), pf.vpt(tokens=2), pf.vpt(tokens=2, deep=False), pf.vqt(tokens=2)],
    ids=["adaptformer", "convpass", "vpt", "vpt shallow", "vqt"],
)
def test_compiled_without_a_graph_break(method):
    vit = timm()
    adapter = pf.bind(method, vit.model)
    frozen, tree = adapter.init(0)
    members = [pf.map_leaves(lambda t, i=i: t + 0.2 * randn(*t.shape, seed=i), tree) for i in range(2)]
    call = lambda tree: vit.model(adapter.apply(frozen, tree), vit.x)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    compiled(tree)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for member in members:
            torch.testing.assert_close(compiled(member), call(member), **TOLERANCE)

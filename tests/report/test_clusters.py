"""Maps of GIFT's clusters against an independent derivation: plain hooks on a plain module with merged weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import peft_func as pf
from peft_func.cli.digits import load_digits
from peft_func.cli.train import draw_members, fit_members, pretrain
from peft_func.cli.vit import VisionTransformer, vision_transformer
from tests.zoo import bert, gpt2, ids

OUT = r".*out_proj"


def moved(tree, scale=0.3):
    generator = torch.Generator().manual_seed(1)
    return pf.map_leaves(lambda t: t + scale * torch.randn(t.shape, generator=generator).to(t.dtype), tree)


def bound(module, method):
    adapter = pf.bind(method, pf.functionalize(module))
    frozen, trainable = adapter.init(0)
    return adapter, frozen, moved(trainable)


def hooked(plain, state, names, *args, **kwargs):
    """Inputs and outputs of modules of a plain module with these weights, by plain hooks."""
    merged = copy.deepcopy(plain).eval()
    merged.load_state_dict(state, strict=True)
    found = {}
    for name in names:
        merged.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: found.__setitem__(name, (args[0].detach(), output.detach()))
        )
    merged(*args, **kwargs)
    return found


def expected_tokens(W, phi, x, y, b):
    """`(before, after)` `[batch, tokens, rank]`: C^T Y^T in the other order, from the tensors alone."""
    C = W @ phi
    return (x @ W.T + b) @ C, y @ C


def deit(height=8, width=8, channels=3):
    """A transformers ViT with a class token, and registers if asked."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, num_channels=channels,
        image_size=(height, width), patch_size=2,
    )  # fmt: skip
    return ViTModel(config, add_pooling_layer=False).double()


@pytest.mark.parametrize("share", ["target", "none", "all"])
def test_the_demo_transformer(share):
    plain = vision_transformer(0, 5).double()
    adapter, frozen, tree = bound(plain, pf.gift(OUT, rank=3, share=share))
    images = torch.rand(4, 8, 8, dtype=torch.float64)
    clusters = pf.cluster_maps(adapter, frozen, tree, images)
    names = [f"blocks.{i}.out_proj" for i in range(3)]
    assert list(clusters) == names
    assert len(clusters) == 3
    assert clusters.inputs is images
    found = hooked(plain, adapter.model.state_dict(adapter.apply(frozen, tree)), names, images)
    for name in names:
        group = {"target": "out_proj", "none": f"{name}.weight", "all": "all"}[share]
        W, b = frozen[f"{name}.weight"], frozen[f"{name}.bias"]
        before, after = expected_tokens(W, tree["gift"][group]["phi"], *found[name], b)
        maps = clusters[name]
        for raw, wanted in ((maps.before, before), (maps.after, after)):
            assert raw.dtype == torch.float64
            for patch in range(16):
                torch.testing.assert_close(raw[:, :, patch // 4, patch % 4], wanted[:, patch], rtol=0, atol=1e-10)
        assert not torch.allclose(maps.before, maps.after)
        assert maps.chance.shape[1] % maps.rank == 0
        assert maps.rank == 3


@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 10)])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_vision_transformer_with_a_class_token(height, width, channels):
    plain = deit(height, width, channels)
    adapter, frozen, tree = bound(plain, pf.gift(r".*attention\.o_proj", rank=2))
    [group] = tree["gift"]
    pixels = torch.rand(2, channels, height, width, dtype=torch.float64)
    clusters = pf.cluster_maps(adapter, frozen, tree, pixel_values=pixels)
    names = list(clusters)
    assert len(names) == 2
    found = hooked(plain, adapter.model.state_dict(adapter.apply(frozen, tree)), names, pixel_values=pixels)
    for name in names:
        wanted = expected_tokens(
            frozen[f"{name}.weight"], tree["gift"][group]["phi"], *found[name], frozen[f"{name}.bias"]
        )
        for raw, tokens in zip((clusters[name].before, clusters[name].after), wanted, strict=True):
            patches = tokens[:, 1:].reshape(2, height // 2, width // 2, 2)
            torch.testing.assert_close(raw, patches.permute(0, 3, 1, 2), rtol=0, atol=1e-10)


def test_a_grid_and_extra_tokens_that_are_given():
    class Registers(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Parameter(torch.randn(5, 4))
            self.proj = nn.Linear(4, 6)

        def forward(self, x):  # [batch, 4, h, w]: a patch for each pixel
            patches = x.flatten(2).mT
            return self.proj(torch.cat([self.tokens.expand(len(x), -1, -1), patches], 1))

    plain = Registers().double()
    adapter, frozen, tree = bound(plain, pf.gift("proj", rank=2))
    images = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    with pytest.raises(pf.OptionError, match=r"20 tokens for images of 3 x 5.*grid=\(h, w\)"):
        pf.cluster_maps(adapter, frozen, tree, images)
    pixels = torch.einsum("bihw,oi->bohw", images, frozen["proj.weight"]) + frozen["proj.bias"][:, None, None]
    C = frozen["proj.weight"] @ tree["gift"]["proj"]["phi"]
    wanted = torch.einsum("bohw,or->brhw", pixels, C)
    for options in ({"grid": (3, 5)}, {"extra_tokens": 5}, {"grid": (3, 5), "extra_tokens": 5}):
        maps = pf.cluster_maps(adapter, frozen, tree, images, **options)["proj"]
        torch.testing.assert_close(maps.before, wanted)
    for options in ({"grid": (3, 5), "extra_tokens": 4}, {"grid": (3, 7)}, {"extra_tokens": 4}):
        with pytest.raises(pf.OptionError, match="20 tokens"):
            pf.cluster_maps(adapter, frozen, tree, images, **options)


def test_feature_maps_of_a_convolution():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.ReLU(inplace=True)).double()
    adapter, frozen, tree = bound(plain, pf.gift("0", rank=2))
    images = torch.rand(2, 3, 8, 6, dtype=torch.float64)
    maps = pf.cluster_maps(adapter, frozen, tree, images)["0"]
    W, leaf = frozen["0.weight"], tree["gift"]["0"]
    C = W.flatten(1) @ leaf["phi"]
    new = W + (C @ leaf["psi"]).reshape(W.shape)
    for raw, weight in ((maps.before, W), (maps.after, new)):
        Y = F.conv2d(images, weight, frozen["0.bias"], stride=2, padding=1)
        torch.testing.assert_close(raw, torch.einsum("bohw,or->brhw", Y, C))
    assert maps.before.shape == (2, 2, 4, 3)


def test_outputs_that_are_grids_already():
    plain = nn.Sequential(nn.Linear(3, 5)).double()
    adapter, frozen, tree = bound(plain, pf.gift("0", rank=2))
    images = torch.rand(2, 4, 7, 3, dtype=torch.float64)  # channels last
    maps = pf.cluster_maps(adapter, frozen, tree, images)["0"]
    Y = images @ frozen["0.weight"].T + frozen["0.bias"]
    C = frozen["0.weight"] @ tree["gift"]["0"]["phi"]
    torch.testing.assert_close(maps.before, (Y @ C).permute(0, 3, 1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    plain = vision_transformer(0, 5).to(dtype)
    adapter, frozen, tree = bound(plain, pf.gift(OUT, rank=3))
    maps = pf.cluster_maps(adapter, frozen, tree, torch.rand(2, 8, 8).to(dtype))["blocks.1.out_proj"]
    assert maps.before.dtype == maps.after.dtype == torch.promote_types(dtype, torch.float32)
    assert maps.after.isfinite().all()
    assert maps.scaled(size=(8, 8)).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("masked", [True, False])
def test_text(masked):
    plain = bert().double()
    adapter, frozen, tree = bound(plain, pf.gift(r".*attention\.output\.dense", rank=2))
    numbers = ids(2, 6, high=32)
    mask = torch.ones_like(numbers)
    mask[1, 4:] = 0
    kwargs = {"input_ids": numbers} | ({"attention_mask": mask} if masked else {})
    clusters = pf.cluster_maps(adapter, frozen, tree, **kwargs)
    names = list(clusters)
    found = hooked(plain, adapter.model.state_dict(adapter.apply(frozen, tree)), names, **kwargs)
    [leaf] = tree["gift"].values()
    for name in names:
        before, after = expected_tokens(frozen[f"{name}.weight"], leaf["phi"], *found[name], frozen[f"{name}.bias"])
        maps = clusters[name]
        torch.testing.assert_close(maps.before, before, rtol=0, atol=1e-10)
        torch.testing.assert_close(maps.after, after, rtol=0, atol=1e-10)
        real = slice(0, 4) if masked else slice(None)
        values = after[1, real]
        wanted = (values - values.min(0).values) / (values.max(0).values - values.min(0).values)
        torch.testing.assert_close(maps.scaled()[1, real], wanted)
        assert not masked or not maps.scaled()[1, 4:].any()
        cut = maps.thresholded()[1, real]
        assert torch.equal(cut > 0, wanted >= 0.5)
    with pytest.raises(pf.OptionError, match="tokens"):
        clusters.scores(torch.ones(2, 3, 3, dtype=torch.bool))


def test_transposed_weights():
    plain = gpt2().double().eval()
    adapter, frozen, tree = bound(plain, pf.gift(r".*attn\.c_proj", rank=2))
    numbers = ids(2, 6, high=32)
    clusters = pf.cluster_maps(adapter, frozen, tree, numbers)
    found = hooked(plain, adapter.model.state_dict(adapter.apply(frozen, tree)), list(clusters), numbers)
    for name, maps in clusters.items():
        W, b = frozen[f"{name}.weight"].T, frozen[f"{name}.bias"]
        before, after = expected_tokens(W, tree["gift"]["c_proj"]["phi"], *found[name], b)
        torch.testing.assert_close(maps.before, before)
        torch.testing.assert_close(maps.after, after)


def test_before_and_after_in_a_chain():
    """Before takes the weight as GIFT receives it, after what the model ends with."""
    plain = VisionTransformer(3, depth=1, width=8, heads=2).double()
    method = pf.chain(
        pf.lora(OUT, rank=2, name="first"), pf.gift(OUT, rank=2, name="middle"), pf.dora(OUT, rank=2, name="last"),
        pf.train(r"head\..*"), pf.train(r".*out_proj\.bias", name="bias"),
    )  # fmt: skip
    adapter, frozen, tree = bound(plain, method)
    images, name = torch.rand(2, 8, 8, dtype=torch.float64), "blocks.0.out_proj"
    maps = pf.cluster_maps(adapter, frozen, tree, images, part="middle")[name]
    found = hooked(plain, adapter.model.state_dict(adapter.apply(frozen, tree)), [name], images)[name]
    leaf = tree["first"][f"{name}.weight"]
    W = frozen[f"{name}.weight"] + leaf["B"] @ leaf["A"]
    bias = tree["bias"][f"{name}.bias"]
    before, after = expected_tokens(W, tree["middle"]["out_proj"]["phi"], *found, bias)
    torch.testing.assert_close(maps.before.flatten(2).mT, before)
    torch.testing.assert_close(maps.after.flatten(2).mT, after)


def test_a_part_of_a_named_chain_and_some_of_its_places():
    plain = vision_transformer(0, 5)
    adapter, frozen, tree = bound(plain, pf.chain(pf.lora(r".*fc1", rank=2), pf.chain(pf.gift(OUT, rank=2), name="in")))
    images = torch.rand(2, 8, 8)
    assert len(pf.cluster_maps(adapter, frozen, tree, images, part="in.gift")) == 3
    some = pf.cluster_maps(adapter, frozen, tree, images, part="in.gift", where=pf.index(1))
    assert list(some) == ["blocks.1.out_proj"]
    for wrong, words in (("gift", "no part 'gift'.*part='in.gift'"), ("lora", "is no pf.gift")):
        with pytest.raises(pf.OptionError, match=words):
            pf.cluster_maps(adapter, frozen, tree, images, part=wrong)
    with pytest.raises(pf.SelectorError, match=r"places of 'in\.gift'"):
        pf.cluster_maps(adapter, frozen, tree, images, part="in.gift", where=r".*fc1")
    other, *trees = bound(plain, pf.lora(OUT, rank=2))
    with pytest.raises(pf.OptionError, match=r"pf\.gift part"):
        pf.cluster_maps(other, *trees, images)
    with pytest.raises(pf.SelectorError, match=r"nearest: blocks\.1\.out_proj"):
        some["blocks.1.out_prj"]


@pytest.mark.parametrize(
    "options",
    [
        {"block": "mlp", "in_projection_bias": True},
        {"block": "transformer", "out_projection_bias": True, "drop_path": 0.5, "num_blocks": 2},
        {"block": "simple_block", "activation": "gelu"},
        {"in_projection_bias": True, "out_projection_bias": True},
    ],
    ids=str,
)
def test_other_blocks_and_biases(options):
    """W' - W = C psi + 1 b^T tells C, since psi has full rank."""
    plain = VisionTransformer(3, depth=2, width=8, heads=2).double()
    adapter, frozen, tree = bound(plain, pf.gift(OUT, rank=3, **options))
    images = torch.rand(2, 8, 8, dtype=torch.float64)
    merged = pf.merge(adapter.apply(frozen, tree))
    leaf = tree["gift"]["out_proj"]
    found = hooked(plain, merged, ["blocks.1.out_proj"], images)
    maps = pf.cluster_maps(adapter, frozen, tree, images, where=pf.index(1))["blocks.1.out_proj"]
    delta = merged["blocks.1.out_proj.weight"] - frozen["blocks.1.out_proj.weight"]
    C = (delta - leaf.get("psi_bias", torch.zeros(8))) @ torch.linalg.pinv(leaf["psi"])
    assert maps.rank == 3
    torch.testing.assert_close(maps.after.flatten(2).mT, found["blocks.1.out_proj"][1] @ C)


def test_parts_of_fused_weights_have_their_clusters_one_after_the_other():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(4, 12)

        def forward(self, x):
            return self.qkv(x.flatten(1)[..., None].expand(-1, -1, 4))

    adapter, frozen, tree = bound(
        Fused().double(), pf.gift("qkv", rank=2, chunks=("q", None, "v"), out_projection_bias=True)
    )
    images = torch.rand(2, 3, 3, dtype=torch.float64)
    maps = pf.cluster_maps(adapter, frozen, tree, images)["qkv"]
    W, b = frozen["qkv.weight"], frozen["qkv.bias"]
    Y = (images.flatten(1)[..., None].expand(-1, -1, 4) @ W.T) + b
    parts = [Y[..., rows] @ (W[rows] @ tree["gift"][f"qkv.{name}"]["phi"]) for name, rows in
             (("q", slice(0, 4)), ("v", slice(8, 12)))]  # fmt: skip
    torch.testing.assert_close(maps.before.flatten(2).mT, torch.cat(parts, -1))


def test_a_module_that_is_called_twice_has_maps_of_each_call():
    cell = nn.Linear(3, 3).double()
    adapter, frozen, tree = bound(nn.Sequential(cell, nn.Tanh(), cell), pf.gift("0", rank=2))
    images = torch.rand(2, 4, 4, 3, dtype=torch.float64)
    clusters = pf.cluster_maps(adapter, frozen, tree, images)
    assert list(clusters) == ["0#1", "0#2"]
    W = pf.merge(adapter.apply(frozen, tree))["0.weight"]
    hidden = torch.tanh(images @ W.T + frozen["0.bias"])
    C = frozen["0.weight"] @ tree["gift"]["0"]["phi"]
    wanted = (hidden @ frozen["0.weight"].T + frozen["0.bias"]) @ C
    torch.testing.assert_close(clusters["0#2"].before.permute(0, 2, 3, 1), wanted)


def test_it_is_pure_repeatable_and_looks_in_eval_mode():
    plain = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4), nn.BatchNorm2d(3)).train()
    adapter, frozen, tree = bound(plain, pf.gift("1", rank=2))
    images = torch.rand(2, 3, 5, 4)
    state = {name: t.clone() for name, t in plain.state_dict().items()}
    seed = torch.random.get_rng_state()
    first, second = (pf.cluster_maps(adapter, frozen, tree, images)["1"] for _ in range(2))
    assert torch.equal(seed, torch.random.get_rng_state())
    for when in ("before", "after", "chance"):
        assert torch.equal(first.raw(when), second.raw(when))
    other = pf.cluster_maps(adapter, frozen, tree, images, key=1)["1"]
    assert torch.equal(first.after, other.after)
    assert not torch.equal(first.chance, other.chance)
    assert all(torch.equal(t, state[name]) for name, t in plain.state_dict().items())
    assert adapter.model.mixing_norm is not None  # still in train mode


def test_maps_are_differentiable():
    adapter, frozen, tree = bound(nn.Sequential(nn.Linear(3, 4)).double(), pf.gift("0", rank=2))
    images = torch.rand(2, 3, 3, 3, dtype=torch.float64)

    def total(t):
        return pf.cluster_maps(adapter, frozen, t, images)["0"].before.sum()

    grads = torch.func.grad(total)(tree)["gift"]["0"]
    W = frozen["0.weight"]
    Y = (images @ W.T + frozen["0.bias"]).sum((0, 1, 2))
    torch.testing.assert_close(grads["phi"], (W.T @ Y)[:, None].expand(-1, 2))
    assert not grads["psi"].any()


def test_vmap_over_adapters():
    adapter, frozen, tree = bound(vision_transformer(0, 5).double(), pf.gift(OUT, rank=2))
    trees = [tree, moved(tree)]
    images = torch.rand(2, 8, 8, dtype=torch.float64)

    def maps(t):
        found = pf.cluster_maps(adapter, frozen, t, images)["blocks.2.out_proj"]
        return found.before, found.after, found.chance

    every = torch.func.vmap(maps, randomness="same")(pf.stack(trees))
    for number, t in enumerate(trees):
        for both, one in zip(every, maps(t), strict=True):
            torch.testing.assert_close(both[number], one)


def test_maps_are_full_precision_under_autocast():
    adapter, frozen, tree = bound(vision_transformer(0, 5), pf.gift(OUT, rank=2))
    images = torch.rand(2, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        maps = pf.cluster_maps(adapter, frozen, tree, images)["blocks.0.out_proj"]
    plain = pf.cluster_maps(adapter, frozen, tree, images)["blocks.0.out_proj"]
    assert maps.after.dtype == maps.chance.dtype == torch.float32
    torch.testing.assert_close(maps.after, plain.after, rtol=0.05, atol=0.05 * float(plain.after.abs().max()))


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 4)
        self.mix = nn.MultiheadAttention(4, 2, batch_first=True)
        self.table = nn.Embedding(6, 4)

    def forward(self, x):
        y = x.flatten(2).mT
        y = self.mix(y, y, y, need_weights=False)[0]
        return self.head(y.mean(1)) + self.table.weight.sum()


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("head", r"returns \[2, 4\]"),
        (r"mix\.out_proj", "not called"),
        (r"mix\.in_proj_weight", "no weight of a linear layer"),
        ("table", "no weight of a linear layer"),
    ],
)
def test_places_without_tokens_are_refused(place, words):
    adapter, frozen, tree = bound(Pooled(), pf.gift(place, rank=2))
    with pytest.raises(pf.OptionError, match=words):
        pf.cluster_maps(adapter, frozen, tree, torch.rand(2, 4, 3, 3))


def test_inputs_that_do_not_tell_are_refused():
    adapter, frozen, tree = bound(nn.Sequential(nn.Unflatten(1, (4, 3)), nn.Linear(3, 3)), pf.gift("1", rank=2))
    with pytest.raises(pf.OptionError, match="no images; give grid"):
        pf.cluster_maps(adapter, frozen, tree, torch.rand(2, 12))
    assert pf.cluster_maps(adapter, frozen, tree, torch.rand(2, 12), grid=(2, 2))["1"].after.shape == (2, 2, 2, 2)
    for wrong in ({"grid": (0, 5)}, {"grid": 4}, {"extra_tokens": -1}):
        with pytest.raises(pf.OptionError, match=r"grid is|extra_tokens is"):
            pf.cluster_maps(adapter, frozen, tree, torch.rand(2, 12), **wrong)
    with pytest.raises(pf.OptionError, match="bound adapter"):
        pf.cluster_maps(adapter.model, frozen, tree, torch.rand(2, 12))
    with pytest.raises(pf.OptionError, match="no tensor"):
        pf.cluster_maps(adapter, frozen, tree)


def test_tokens_on_the_first_axis_are_not_taken_for_the_batch():
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.lstm = nn.Linear(1, 3), nn.LSTM(3, 3)

        def forward(self, images):
            return self.lstm(self.lin(images.flatten(1).T[..., None]))

    adapter, frozen, tree = bound(First(), pf.gift("lin", rank=1))
    with pytest.raises(pf.OptionError, match="lstm has the batch on the second axis"):
        pf.cluster_maps(adapter, frozen, tree, torch.rand(4, 2, 2))
    with pytest.raises(pf.OptionError, match=r"returns \[4, 3, 3\] for a batch of 3"):
        pf.cluster_maps(adapter, frozen, tree, torch.rand(3, 2, 2))


def test_the_trained_demo_and_its_scores():
    digits = load_digits(0, per_class=40)
    net = vision_transformer(0, 5)
    pretrain(net, digits.old, 0, steps=40)
    adapter = pf.bind(pf.chain(pf.gift(OUT, rank=4), pf.train(r"head\..*")), pf.functionalize(net))
    frozen, stacked = draw_members(adapter, [0])
    stacked, curves = fit_members(adapter, frozen, stacked, [0], digits.new, steps=60)
    assert curves.loss[-1] < 0.8 * curves.loss[0]
    [tree] = pf.unstack(stacked)
    images = digits.new_test.images[:60]
    scores = pf.cluster_maps(adapter, frozen, tree, images).scores(images > 0.5)
    assert scores.area == pytest.approx(float((images > 0.5).double().mean()))
    for rows in (scores.iou, scores.pointing):
        assert [row.place for row in rows] == [f"blocks.{i}.out_proj" for i in range(3)]
        for row in rows:
            assert len(row.clusters) == 4
            assert row.after == pytest.approx((max(row.clusters), sum(row.clusters) / 4))
            assert row.clusters[row.best] == max(row.clusters)
            assert all(0 <= value <= 1 for pair in (row.before, row.after, row.chance) for value in pair)
    text = str(scores)
    assert "blocks.2.out_proj" in text
    assert "pointing accuracy" in text
    assert "masks cover" in text
    assert len({len(line.rstrip()) for line in text.splitlines() if line.startswith("blocks")}) == 1

"""Options of bottlenecks and of the presets: first values, files, bad input."""

import pytest
import torch
import transformers
from torch import nn

import peft_func as pf
from tests.laws.conformance import close, perturbed
from tests.zoo import ZOO, randn, seeded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_float32_leaves(dtype):
    model = pf.functionalize(nn.Linear(8, 8).to(dtype))
    adapter = pf.bind(pf.bottleneck("", rank=2, scale="learned", layer_norm="in"), model)
    frozen, tree = adapter.init(0)
    assert {tensor.dtype for _, tensor in pf.leaves(tree)} == {torch.float32}
    x = torch.ones(2, 8, dtype=dtype)
    assert torch.equal(model(adapter.apply(frozen, tree), x), model(model.params, x))


def test_first_values():
    adapter = pf.bind(pf.bottleneck("", reduction=3, layer_norm="out"), pf.functionalize(nn.Linear(10, 64)))
    leaves = adapter.init(0)[1]["bottleneck"][""]
    assert leaves["down"].shape == (21, 64)
    assert leaves["down"].abs().max() <= 1 / 8
    assert leaves["down"].std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.05)
    assert not any(leaves[leaf].any() for leaf in ("down_bias", "up", "up_bias", "norm_bias"))
    small = pf.bind(pf.bottleneck("", reduction=16), pf.functionalize(nn.Linear(10, 4)))
    assert small.init(0)[1]["bottleneck"][""]["down"].shape == (1, 4)


@pytest.mark.parametrize("options", [{"rank": 41}, {"reduction": 0.19}, {"reduction": 1e-308}, {"rank": 10**6}])
def test_a_rank_beyond_reason(options):
    with pytest.raises(pf.OptionError, match=r"'0'.*8 features.*highest is 40"):
        pf.bind(pf.bottleneck("0", form="parallel", **options), pf.functionalize(nn.Sequential(nn.Linear(8, 10))))


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"form": "series"}, "form='series'"),
        ({"activation": "swish"}, "activation='swish'"),
        ({"scale": "learn"}, "scale='learn'"),
        ({"scale": float("nan")}, "finite"),
        ({"reduction": 0}, "reduction=0"),
        ({"rank": 10**15}, "from 1 to"),
        ({"rank": 0}, "rank=0"),
        ({"rank": True}, "rank=True"),
        ({"rank": 2.0}, "rank=2.0"),
        ({"layer_norm": True}, "layer_norm=True"),
        ({"dropout": 1.0}, "probability"),
        ({"width": -4}, "width=-4"),
        ({"name": "a.b"}, "without dots"),
    ],
)
def test_options_out_of_range(options, found):
    with pytest.raises(pf.OptionError, match=found):
        pf.bottleneck("0", **options)
    if "form" not in options:
        with pytest.raises(pf.OptionError, match=found):
            pf.houlsby(**options)
        with pytest.raises(pf.OptionError, match=found):
            pf.pfeiffer(**options)
        with pytest.raises(pf.OptionError, match=found):
            pf.parallel_adapter(**options)


def test_presets_refuse_what_they_cannot_do():
    plain = pf.functionalize(nn.Sequential(nn.Linear(4, 4)))
    for preset in (pf.houlsby, pf.pfeiffer, pf.parallel_adapter):
        with pytest.raises(pf.OptionError, match="knows its form"):
            preset(form="parallel")
        with pytest.raises(pf.SelectorError):
            pf.bind(preset(), plain)
        with pytest.raises(pf.SelectorError):
            pf.bind(preset("nowhere"), pf.functionalize(ZOO["bert"].build()))
    with pytest.raises(pf.OptionError, match="post_norm"):
        pf.pfeiffer(post_norm="yes")
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    experts = pf.functionalize(seeded(lambda: transformers.MixtralModel(config))())
    with pytest.raises(pf.SelectorError, match="no feed-forward part"):
        pf.bind(pf.houlsby(), experts)
    with pytest.raises(pf.SelectorError, match="has a feed-forward part"):
        pf.bind(pf.parallel_adapter(), experts)
    adapter = pf.bind(pf.pfeiffer(rank=2), experts)
    assert adapter.init(0)[1]["pfeiffer"]["layers.0"]["down"].shape == (2, 16)
    narrowed = pf.bind(pf.houlsby(pf.index(1), rank=2), pf.functionalize(ZOO["llama"].build()))
    assert narrowed.parts[0].modules == ("model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj")


@pytest.mark.parametrize("preset", [pf.houlsby, pf.pfeiffer, pf.parallel_adapter])
def test_presets_are_saved(preset, tmp_path):
    model = pf.functionalize(ZOO["bert"].build())
    adapter = pf.bind(preset(pf.index(1), rank=2, scale="learned"), model)
    tree, args = perturbed(adapter.init(0)[1], 1, 0.5), ZOO["bert"].inputs(0)[0]
    pf.save(tmp_path / "a.safetensors", adapter, tree)
    again, frozen, loaded = pf.load(tmp_path / "a.safetensors", model)
    assert again.parts[0].modules == adapter.parts[0].modules
    y = model(adapter.apply(adapter.frozen, tree), *args).logits
    assert torch.equal(model(again.apply(frozen, loaded), *args).logits, y)
    assert not close(y, model(model.params, *args).logits, 1e-3)


def test_a_width_that_no_weight_tells():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Conv1d(4, 4, 1), nn.Embedding(3, 5)).double()
    model = pf.functionalize(net)
    with pytest.raises(pf.OptionError, match=r"'1' \(Tanh\).*width="):
        pf.bind(pf.bottleneck("1"), model)
    with pytest.raises(pf.OptionError, match="not on the last axis"):
        pf.bind(pf.bottleneck("2"), model)
    assert pf.bind(pf.bottleneck("3", rank=2), model).init(0)[1]["bottleneck"]["3"]["down"].shape == (2, 5)
    model = pf.functionalize(nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double())
    adapter = pf.bind(pf.bottleneck("1", width=4, rank=2), model)
    assert model(adapter.apply(*adapter.init(0)), randn(2, 4)).shape == (2, 4)
    wrong = pf.bind(pf.bottleneck("1", width=3, rank=2), model)
    with pytest.raises(pf.AddinError, match=r"'1'.*4 features.*width=4"):
        model(wrong.apply(*wrong.init(0)), randn(2, 4))

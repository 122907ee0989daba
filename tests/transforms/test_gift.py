"""GIFT against a plain re-derivation, W + (W phi) psi, on every kind of layer; who shares; how many parameters."""

import pytest
import torch
import transformers
from torch import nn

import peft_func as pf
from tests.transforms.plain import GRADS, VALUES, as_matrix, as_stored, call, grads_of, learnable, random_like, same
from tests.zoo import ZOO, seeded

GENERATED = ~pf.suffix("bias_k") & ~pf.suffix("bias_v")


def generated(net, path, leaf):
    """W + (W phi) psi, computed on the matrix and stored back."""
    weight = net.get_parameter(path).detach()
    matrix = as_matrix(net, path, weight)
    return as_stored(net, path, matrix + (matrix @ leaf["phi"]) @ leaf["psi"])


def check(net, animal, method, group_of):
    model = pf.functionalize(net)
    adapter = pf.bind(method, model)
    frozen, start = adapter.init(0)
    ours, theirs = learnable(random_like(start)), learnable(random_like(start))
    args, kwargs = animal.inputs(2)
    weights = adapter.apply(frozen, ours)
    out = animal.output(model(weights, *args, **kwargs))
    plain = {path: generated(net, path, theirs["gift"][group_of(path)]) for path in adapter.parts[0].paths}
    expected = call(net, plain, animal, 2)
    same(out, expected, VALUES)
    same(grads_of(out, ours), grads_of(expected, theirs), GRADS)
    same({path: tensor for path, tensor in pf.merge(weights).items() if path in plain}, plain, VALUES)
    return start


@pytest.mark.parametrize("name", ZOO)
def test_every_matrix_of_a_model_equals_the_formula(name):
    net = ZOO[name].build()
    where = GENERATED if name != "vit" else pf.of_type(nn.Linear, nn.Conv2d)
    start = check(net, ZOO[name], pf.gift(where, rank=2, share="none"), lambda path: path)
    for path, leaf in start["gift"].items():
        width = as_matrix(net, path, net.get_parameter(path)).shape[-1]
        assert {k: list(t.shape) for k, t in leaf.items()} == {"phi": [width, 2], "psi": [2, width]}
        assert leaf["phi"].abs().max() <= width**-0.5
        assert not leaf["psi"].any()


@pytest.mark.parametrize("name", ["llama", "bert", "vit", "mlp"])
@pytest.mark.parametrize("share", ["target", "all"])
def test_places_that_share_have_one_pair_and_each_its_own_update(name, share):
    animal = ZOO[name]
    net = animal.build()
    group_of = (lambda path: "all") if share == "all" else (lambda path: path.split(".")[-2])
    start = check(net, animal, pf.gift(animal.narrow, rank=2, share=share), group_of)
    assert len(start["gift"]) < len(pf.bind(pf.gift(animal.narrow, rank=2, share="none"), pf.functionalize(net)).spec)


def test_groups_by_selector_have_the_names_that_were_given():
    animal = ZOO["llama"]
    share = {"early": pf.index(0), "late, whatever": r".*layers\.1\..*"}
    start = check(
        animal.build(), animal, pf.gift(["q_proj", "v_proj"], rank=3, share=share),
        lambda path: "early" if ".0." in path else "late, whatever",
    )  # fmt: skip
    assert list(start["gift"]) == list(share)


def test_targets_are_shared_over_depth_by_their_last_name():
    model = pf.functionalize(ZOO["llama"].build())
    tree = pf.bind(pf.gift(["q_proj", "v_proj", "down_proj"], rank=2), model).init(0)[1]["gift"]
    assert {name: list(leaf["phi"].shape) for name, leaf in tree.items()} == {
        "q_proj": [16, 2],
        "v_proj": [16, 2],
        "down_proj": [24, 2],
    }
    packed = pf.bind(pf.gift("packed.*weight", rank=2), pf.functionalize(ZOO["attention"].build())).init(0)[1]["gift"]
    assert set(packed) == {"packed.in_proj_weight", "out_proj"}


def test_a_tied_weight_is_generated_once():
    animal = ZOO["tied"]
    check(animal.build(), animal, pf.gift("head", rank=2), lambda path: "embed")


def test_input_side_form_is_the_same_number():
    """y = (x + (x psi^T) phi^T) W^T, the form that never makes a second dense weight."""
    net = seeded(lambda: nn.Linear(6, 9))()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.gift("weight", rank=3), model)
    frozen, start = adapter.init(0)
    tree = random_like(start)
    (leaf,) = tree["gift"].values()
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)
    with pf.densify("error"):
        same(model(adapter.apply(frozen, tree), x), net(x + (x @ leaf["psi"].T) @ leaf["phi"].T))


def count(tree):
    return sum(leaf.numel() for pair in tree["gift"].values() for leaf in pair.values())


def on_meta(make, config):
    with torch.device("meta"):
        return pf.functionalize(make(config))


def test_vit_base_with_rank_16_on_the_attention_outputs_trains_24576_numbers():
    model = on_meta(transformers.ViTModel, transformers.ViTConfig())
    where = r".*(attention\.output\.dense|attention\.o_proj)\.weight"
    adapter = pf.bind(pf.gift(where, rank=16), model)
    assert len(adapter.parts[0].paths) == 12
    assert count(adapter.init(0)[1]) == 24_576


@pytest.mark.parametrize(
    ("where", "rank", "numbers"),
    [
        (["q_proj", "v_proj"], 64, 1_048_576),
        (["q_proj", "v_proj"], 16, 262_144),
        (["q_proj", "v_proj"], 128, 2_097_152),
        (["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"], 64, 3_506_176),
    ],
)
def test_llama_7b_trains_the_numbers_of_the_paper(where, rank, numbers):
    model = on_meta(transformers.LlamaForCausalLM, transformers.LlamaConfig())  # the defaults are LLaMA-7B's
    adapter = pf.bind(pf.gift(where, rank=rank), model)
    assert len(adapter.parts[0].paths) == 32 * len(where)
    frozen, tree = adapter.init(0)
    assert count(tree) == numbers
    weights = adapter.apply(frozen, tree)
    assert weights[adapter.parts[0].paths[0]].shape == (4096, 4096)


def test_roberta_base_with_rank_32_on_query_and_value_trains_98304_numbers():
    model = on_meta(transformers.RobertaModel, transformers.RobertaConfig(vocab_size=50265))
    assert count(pf.bind(pf.gift(["query", "value"], rank=32), model).init(0)[1]) == 98_304


def test_a_model_on_the_meta_device_runs_there_to_its_output_shape():
    animal = ZOO["llama"]
    with torch.device("meta"):
        net = seeded(lambda: nn.Sequential(nn.Linear(6, 9)))()
    model = pf.functionalize(net)
    method = pf.chain(pf.lora("0", rank=2), pf.gift("0", rank=2), pf.ia3("0", scale_bias=True), pf.magnitude("0"))
    adapter = pf.bind(method, model)
    out = model(adapter.apply(*adapter.init(0)), torch.empty(4, 6, dtype=torch.float64, device="meta"))
    assert out.is_meta
    assert out.shape == (4, 9)
    assert animal is ZOO["llama"]


WIDTHS = {
    "all": (".*", "all", ["'all'", "0.weight", "5", "2.weight", "8"]),
    "target": (r".*", "target", ["'0'", "0.0.weight", "1.0.weight"]),
    "groups": (".*", {"both": ".*"}, ["'both'", "0.weight", "2.weight"]),
}


@pytest.mark.parametrize("case", WIDTHS)
def test_places_of_two_widths_in_one_group_are_named_and_share_none_is_offered(case):
    where, share, words = WIDTHS[case]
    net = ZOO["mlp"].build()
    if case == "target":
        net = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(6, 4)))
    with pytest.raises(pf.OptionError) as caught:
        pf.bind(pf.gift(where, rank=2, share=share), pf.functionalize(net))
    for word in [*words, "share='none'"]:
        assert word in str(caught.value)


ERRORS = {
    "in no group": (lambda: pf.gift(".*", rank=2, share={"a": "0"}), ["2.weight", "'a'", "none"]),
    "in two groups": (lambda: pf.gift("2", rank=2, share={"a": "2", "b": ".*"}), ["2.weight", "['a', 'b']"]),
    "a group of nothing": (lambda: pf.gift("2", rank=2, share={"a": "2", "b": "nowhere"}), ["'b'", "nowhere"]),
    "rank 0": (lambda: pf.gift("0", rank=0), ["0.weight", "rank=0"]),
    "rank True": (lambda: pf.gift("0", rank=True), ["0.weight", "rank=True"]),
    "rank 2.5": (lambda: pf.gift("0", rank=2.5), ["0.weight", "rank=2.5"]),
    "rank above": (lambda: pf.gift("0", rank=6), ["0.weight", "1 to 5"]),
    "block": (lambda: pf.gift("0", rank=2, block="mlp_block"), ["'mlp_block'", "'simple_block'"]),
    "share": (lambda: pf.gift("0", rank=2, share="depth"), ["'depth'", "'target'", "'all'", "'none'"]),
    "share None": (lambda: pf.gift("0", rank=2, share=None), ["None", "'none'"]),
    "share list": (lambda: pf.gift("0", rank=2, share=["0"]), ["share", "'none'"]),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_place_and_the_choices(case):
    make, words = ERRORS[case]
    with pytest.raises(pf.OptionError) as caught:
        pf.bind(make(), pf.functionalize(ZOO["mlp"].build()))
    assert isinstance(caught.value, ValueError)
    for word in words:
        assert word in str(caught.value)

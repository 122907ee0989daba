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
    "block": (lambda: pf.gift("0", rank=2, block="mlp_block"), ["'mlp_block'", "'simple_block'", "'pamcat_attn'"]),
    "block None": (lambda: pf.gift("0", rank=2, block=None), ["None", "'simple_block'"]),
    "block list": (lambda: pf.gift("0", rank=2, block=["mlp"]), ["['mlp']", "'simple_block'"]),
    "a misspelt option": (lambda: pf.gift("0", rank=2, gift_paramters={}), ["'gift_paramters'", "activation"]),
    "another block's": (lambda: pf.gift("0", rank=2, block="mlp", num_heads=2), ["'num_heads'", "'mlp'", "mlp_ratio"]),
    "in the dict": (lambda: pf.gift("0", rank=2, block={"block_type": "mlp", "heads": 1}), ["'heads'", "mlp_ratio"]),
    "twice": (lambda: pf.gift("0", rank=2, block={"act_layer": "gelu"}, activation="gelu"), ["activation", "twice"]),
    "activation": (lambda: pf.gift("0", rank=2, activation="relu"), ["'relu'", "'hsigmoid'"]),
    "clusters' one": (lambda: pf.gift("0", rank=2, block="pamcat_attn", cluster_activation=""), ["''", "'softmax'"]),
    "norm": (lambda: pf.gift("0", rank=2, block="mlp", norm="batch"), ["'batch'", "'l2'", "'ln'"]),
    "no blocks": (lambda: pf.gift("0", rank=2, block="mlp", num_blocks=0), ["num_blocks=0", "1"]),
    "too many blocks": (lambda: pf.gift("0", rank=2, block="mlp", num_blocks=10**9), ["num_blocks", "65536"]),
    "clusters True": (lambda: pf.gift("0", rank=2, block="pamcat_attn", num_clusters=True), ["num_clusters=True"]),
    "mixed 2.5": (lambda: pf.gift("0", rank=2, block="mlp_mixer", num_mixed_tokens=2.5), ["num_mixed_tokens=2.5"]),
    "ratio 0": (lambda: pf.gift("0", rank=2, block="mlp", mlp_ratio=0), ["mlp_ratio=0"]),
    "ratio nan": (lambda: pf.gift("0", rank=2, block="mlp", mlp_ratio=float("nan")), ["mlp_ratio=nan"]),
    "ratio small": (lambda: pf.gift("0", rank=2, block="mlp", mlp_ratio=0.3), ["mlp_ratio=0.3", "rank=2"]),
    "channels": (lambda: pf.gift("0", rank=2, block="mlp_mixer", channel_mixing_ratio=0.3), ["channel_mixing_ratio"]),
    "heads": (lambda: pf.gift("0", rank=3, block="transformer", num_heads=2), ["num_heads=2", "rank=3"]),
    "drop_path 1": (lambda: pf.gift("0", rank=2, block="mlp", drop_path=1), ["drop_path=1"]),
    "bias": (lambda: pf.gift("0", rank=2, in_projection_bias="none"), ["in_projection_bias='none'"]),
    "bias 1": (lambda: pf.gift("0", rank=2, out_projection_bias=1), ["out_projection_bias=1"]),
    "float8": (lambda: pf.gift("0", rank=2, dtype="float8"), ["'float8'", "bfloat16"]),
    "int8": (lambda: pf.gift("0", rank=2, dtype=torch.int8), ["torch.int8", "float32"]),
    "chunks str": (lambda: pf.gift("0", rank=2, chunks="qkv"), ["'qkv'", "('q', None, 'v')"]),
    "chunks of numbers": (lambda: pf.gift("0", rank=2, chunks=(True, False)), ["(True, False)", "('q', None, 'v')"]),
    "chunks of nothing": (lambda: pf.gift("0", rank=2, chunks=(None, None)), ["(None, None)", "where"]),
    "chunks unequal": (lambda: pf.gift("0", rank=2, chunks=("a", "b", "c")), ["0.weight", "8 rows", "3"]),
    "chunks nowhere": (lambda: pf.gift("0", rank=2, chunks={"qkv": ("a", "b")}), ["'qkv'", "0.weight"]),
    "chunks of two": (lambda: pf.gift("0", rank=2, chunks={"0": ("a",), "0.weight": ("b",)}), ["0.weight", "0, 0.w"]),
    "rank above a part": (lambda: pf.gift("0", rank=5, chunks=("a", "b")), ["rank=5", "1 to 4"]),
    "two groups of one name": (
        lambda: pf.gift("0|2", rank=2, share={"a": "0", "a.b": "2"}, chunks={"0": ("b",)}),
        ["'a.b'", "two groups"],
    ),
    "heights": (
        lambda: pf.gift("2|4", rank=2, share="all", block="mlp_mixer"),
        ["2.weight", "4.weight", "8", "3", "mlp_mixer"],
    ),
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


# What the authors' code gets wrong, or refuses, done right.


def test_parts_of_a_fused_layer_can_be_chosen():
    net = nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(6, 18)})}).double()
    model = pf.functionalize(net)
    for target in ("qkv", "attn.qkv"):
        method = pf.gift([target], rank=2, chunks={target: ("q", None, "v")}, block="mlp")
        adapter = pf.bind(method, model)
        frozen, tree = adapter.init(0)
        assert set(tree["gift"]) == {"qkv.q", "qkv.v"}
        change = pf.delta(adapter.apply(frozen, random_like(tree)))["attn.qkv.weight"]
        assert [bool(part.any()) for part in change.chunk(3)] == [True, False, True]


def test_a_target_may_be_a_string_and_a_name_at_the_top():
    model = pf.functionalize(nn.ModuleDict({"head": nn.Linear(4, 3), "body": nn.Linear(4, 4)}))
    for where in ("head", ["head"], "hea.", r"head\.weight"):
        assert pf.bind(pf.gift(where, rank=2), model).parts[0].paths == ("head.weight",)


def test_layers_are_chosen_by_number():
    model = pf.functionalize(ZOO["llama"].build())
    adapter = pf.bind(pf.gift(pf.suffix("q_proj") & pf.index(1), rank=2), model)
    assert adapter.parts[0].paths == ("model.layers.1.self_attn.q_proj.weight",)


def test_the_dtype_is_torch_s_or_its_name():
    model = pf.functionalize(nn.Linear(4, 4))
    for dtype in (torch.bfloat16, "bfloat16"):
        tree = pf.bind(pf.gift("weight", rank=2, dtype=dtype), model).init(0)[1]
        assert {leaf.dtype for leaf in tree["gift"]["weight"].values()} == {torch.bfloat16}


def test_all_options_of_the_authors_dict_are_known_by_their_names():
    model = pf.functionalize(nn.Linear(8, 8))
    theirs = {
        "block_type": "pamcat_transformer", "num_blocks": 2, "num_heads": 2, "mlp_ratio": 2.0, "drop_path": 0.1,
        "norm_layer": "ln", "num_clusters": 6, "cluster_activation": "softmax",
    }  # fmt: skip
    ours = {("norm" if name == "norm_layer" else name): value for name, value in theirs.items()}
    kind = ours.pop("block_type")
    by_dict = pf.bind(pf.gift("weight", rank=4, block=theirs), model)
    by_name = pf.bind(pf.gift("weight", rank=4, block=kind, **ours), model)
    assert by_dict.spec == by_name.spec
    assert by_dict.parts[0].options == by_name.parts[0].options
    assert pf.bind(pf.gift("weight", rank=4, block={"act_layer": "gelu"}), model).parts[0].options["block"] == {
        "block_type": "simple_block",
        "activation": "gelu",
    }


def test_attention_does_not_need_a_fused_kernel_and_has_second_derivatives():
    net = seeded(lambda: nn.Linear(6, 5))()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.gift("weight", rank=2, block="transformer"), model)
    frozen, start = adapter.init(0)
    loss = lambda tree: model(adapter.apply(frozen, tree), torch.ones(2, 6).double()).square().sum()
    tree = random_like(start)
    curvature = torch.func.jvp(torch.func.grad(loss), (tree,), (pf.map_leaves(torch.ones_like, tree),))[1]
    ones = pf.map_leaves(torch.ones_like, tree)
    slope = lambda step: torch.func.grad(loss)(pf.map_leaves(lambda t, u: t + step * u, tree, ones))
    by_difference = pf.map_leaves(lambda a, b: (a - b) / 2e-5, slope(1e-5), slope(-1e-5))
    same(curvature, by_difference, 1e-4)


FULL = {
    "rank": 2, "in_projection_bias": True, "out_projection_bias": True, "chunks": {"0": ("a", None)}, "share": "none",
    "dtype": "float64",
    "block": {
        "block_type": "pamcat_transformer", "num_blocks": 2, "num_heads": 2, "mlp_ratio": 1.5, "drop_path": 0.25,
        "norm": "ln", "num_clusters": 3, "cluster_activation": "hsigmoid",
    },
}  # fmt: skip


def test_merge_save_and_load_work_with_all_options(tmp_path):
    animal = ZOO["mlp"]
    net = animal.build()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.gift("0|2", **FULL), model)
    frozen, start = adapter.init(0)
    tree = random_like(start)
    pf.save(tmp_path / "a.safetensors", adapter, tree)
    again, base, loaded = pf.load(tmp_path / "a.safetensors", model)
    assert again.parts[0].options == adapter.parts[0].options == {**FULL, "chunks": {"0": ["a", None]}}
    (x,), _ = animal.inputs(1)
    y = model(adapter.apply(frozen, tree), x)
    assert torch.equal(model(again.apply(base, loaded), x), y)
    net.load_state_dict(model.state_dict(adapter.apply(frozen, tree)), strict=True)
    same(net(x), y)


def test_the_names_of_a_tree_are_strict():
    model = pf.functionalize(nn.Linear(4, 4))
    adapter = pf.bind(pf.gift("weight", rank=2, block="mlp"), model)
    frozen, tree = adapter.init(0)
    tree["gift"]["weight"]["backbone"] = torch.zeros(1)
    with pytest.raises(pf.TreeError, match=r"gift\.weight\.backbone"):
        adapter.apply(frozen, tree)
    del tree["gift"]["weight"]["backbone"], tree["gift"]["weight"]["blocks"]["0"]["mlp"]["fc1"]["bias"]
    with pytest.raises(pf.TreeError, match=r"blocks\.0\.mlp\.fc1\.bias"):
        adapter.apply(frozen, tree)


def test_what_was_saved_before_there_were_blocks_has_the_same_options():
    adapter = pf.bind(pf.gift("weight", rank=2), pf.functionalize(nn.Linear(4, 4)))
    assert adapter.parts[0].options == {"rank": 2, "share": "target", "block": "simple_block"}

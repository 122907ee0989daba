"""WeGeFT against plain re-derivations on both sides, its dropout of weights, who shares, and what it trains."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import peft_func as pf
from tests.laws.test_nothing_dense import Watch
from tests.transforms.plain import GRADS, VALUES, as_matrix, as_stored, call, grads_of, learnable, random_like, same
from tests.zoo import ZOO, randn, seeded


def bias_name(net, path):
    """The bias of the module that owns a weight, and the rows of it that are the weight's own."""
    module, _, weight = path.rpartition(".")
    names = dict(net.named_parameters())
    if weight in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        first = "qkv".index(weight[0]) * 8
        return f"{module}.in_proj_bias", slice(first, first + 8)
    bias = f"{module}.in_proj_bias" if weight == "in_proj_weight" else f"{module}.bias"
    return (bias, slice(None)) if bias in names and weight != "bias_k" else (None, None)


def generated(net, paths, leaf_of, scale_of, side):
    """Every changed parameter: W + s (W phi^T) psi, or (I + s phi psi) of W and of the bias."""
    plain = {}
    for path in paths:
        leaf, scale = leaf_of(path), scale_of(path)
        matrix = as_matrix(net, path, net.get_parameter(path).detach().clone())
        if side == "input":
            matrix = matrix + scale * (matrix @ leaf["phi"].T) @ leaf["psi"]
        else:
            edit = torch.eye(matrix.shape[-2], dtype=matrix.dtype) + scale * leaf["phi"] @ leaf["psi"]
            matrix = edit @ matrix
            bias, rows = bias_name(net, path)
            if bias is not None:
                value = plain.get(bias, net.get_parameter(bias).detach())
                edited = torch.cat([edit @ part for part in value[rows].split(len(edit))])
                first = rows.start or 0
                plain[bias] = torch.cat([value[:first], edited, value[first + len(edited) :]])
        plain[path] = as_stored(net, path, matrix)
    return plain


def check(net, animal, method, leaf_of, scale_of, side):
    model = pf.functionalize(net)
    adapter = pf.bind(method, model)
    frozen, start = adapter.init(0)
    ours, theirs = learnable(random_like(start)), learnable(random_like(start))
    args, kwargs = animal.inputs(2)
    weights = adapter.apply(frozen, ours)
    out = animal.output(model(weights, *args, **kwargs))
    plain = generated(net, adapter.parts[0].paths, lambda path: theirs["wegeft"][leaf_of(path)], scale_of, side)
    expected = call(net, plain, animal, 2)
    same(out, expected, VALUES)
    same(grads_of(out, ours), grads_of(expected, theirs), GRADS)
    assert set(pf.delta(weights)) == set(plain)
    same({path: pf.merge(weights)[path] for path in plain}, plain, VALUES)
    return start["wegeft"]


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("name", ZOO)
def test_every_matrix_of_a_model_equals_the_formula(name, side):
    net = ZOO[name].build()
    where = ~pf.suffix("bias_k") & ~pf.suffix("bias_v") if name != "vit" else pf.of_type(nn.Linear, nn.Conv2d)
    method = pf.wegeft(where, rank=2, alpha=3, share="none", side=side)
    start = check(net, ZOO[name], method, lambda path: path, lambda path: 1.5, side)
    for path, leaf in start.items():
        n = as_matrix(net, path, net.get_parameter(path)).shape[-1 if side == "input" else -2]
        assert {k: list(t.shape) for k, t in leaf.items()} == {
            "phi": [2, n] if side == "input" else [n, 2],
            "psi": [2, n],
        }
        assert not leaf["phi"].any()
        assert leaf["psi"].any()
        assert leaf["psi"].abs().max() <= n**-0.5


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("share", ["target", "all", {"early": pf.index(0), "late": pf.index(1)}], ids=str)
def test_places_that_share_have_one_pair_and_each_its_own_alpha(share, side):
    def leaf_of(path):
        return {"target": "q_proj", "all": "all"}.get(str(share), "early" if ".0." in path else "late")

    start = check(
        ZOO["llama"].build(), ZOO["llama"],
        pf.wegeft(["q_proj"], rank=2, alpha=4, share=share, side=side, alpha_pattern={r"layers\.1\..*": 5}),
        leaf_of, lambda path: 2.5 if ".1." in path else 2.0, side,
    )  # fmt: skip
    assert list(start) == list(dict.fromkeys(leaf_of(f"layers.{i}.q_proj") for i in range(2)))


def test_sides_are_mixed_by_two_parts():
    model = pf.functionalize(ZOO["llama"].build())
    method = pf.chain(
        pf.wegeft(["q_proj"], rank=2), pf.wegeft(["down_proj"], rank=2, side="output", name="wegeft_output")
    )
    tree = pf.bind(method, model).init(0)[1]
    assert list(tree["wegeft"]) == ["q_proj"]
    assert list(tree["wegeft_output"]["down_proj"]["phi"].shape) == [16, 2]


def test_alpha_none_is_the_rank_and_the_output_side_edits_what_the_layer_gives():
    """y' = y + phi psi y: an edit of the representation, with the bias in it."""
    net = seeded(lambda: nn.Linear(6, 9))()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.wegeft("weight", rank=3, side="output"), model)
    frozen, start = adapter.init(0)
    tree = random_like(start)
    (leaf,) = tree["wegeft"].values()
    x = randn(4, 6)
    y = net(x)
    with pf.densify("error"):
        same(model(adapter.apply(frozen, tree), x), y + (y @ leaf["psi"].T) @ leaf["phi"].T)


def test_rank_and_alpha_patterns_give_targets_their_own():
    model = pf.functionalize(ZOO["llama"].build())
    method = pf.wegeft(["q_proj", "v_proj"], rank=2, rank_pattern={"v_proj": 4}, alpha_pattern={"v_proj": 8})
    tree = pf.bind(method, model).init(0)[1]["wegeft"]
    assert {group: list(leaf["phi"].shape) for group, leaf in tree.items()} == {"q_proj": [2, 16], "v_proj": [4, 16]}


def test_init_random_draws_phi_too_and_otherwise_as_psi():
    net = seeded(lambda: nn.Linear(6, 9))()
    for side, n in (("input", 6), ("output", 9)):
        adapter = pf.bind(pf.wegeft("weight", rank=3, side=side, init="random"), pf.functionalize(net))
        (leaf,) = adapter.init(0)[1]["wegeft"].values()
        phi = leaf["phi"] if side == "input" else leaf["phi"].T
        assert phi.any()
        assert not torch.equal(phi, leaf["psi"])
        assert max(t.abs().max() for t in leaf.values()) <= n**-0.5


# --- dropout ---------------------------------------------------------------------------------------------------------


def dropping(net, where="weight", side="input", dropout=0.5, **options):
    model = pf.functionalize(net)
    adapter = pf.bind(pf.wegeft(where, rank=2, alpha=3, side=side, dropout=dropout, share="none", **options), model)
    frozen, start = adapter.init(0)
    return model, adapter, frozen, random_like(start)


def in_training(W, leaf, mask, side):
    if side == "input":
        return W + 1.5 * ((mask * W) @ leaf["phi"].T) @ leaf["psi"]
    return W + 1.5 * leaf["phi"] @ (leaf["psi"] @ (mask * W))


@pytest.mark.parametrize("side", ["input", "output"])
def test_entries_of_the_weight_are_dropped_on_the_way_to_the_update_only(side):
    net = seeded(lambda: nn.Linear(6, 9, bias=False))()
    model, adapter, frozen, tree = dropping(net, side=side, dropout=0.3)
    (leaf,) = tree["wegeft"].values()
    x = randn(4, 6)
    theirs = learnable(leaf)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        ours = learnable(tree)
        y = model.train()(adapter.apply(frozen, ours), x)
        torch.manual_seed(5)
        mask = F.dropout(torch.ones(9, 6, dtype=torch.float64), 0.3)
    assert 0 < (mask == 0).sum() < 54
    expected = x @ in_training(net.weight.detach(), theirs, mask, side).T
    same(y, expected)
    same(grads_of(y, ours), grads_of(expected, theirs), GRADS)


@pytest.mark.parametrize("side", ["input", "output"])
def test_the_mean_over_masks_is_the_weight_without_dropout(side):
    net = seeded(lambda: nn.Linear(6, 9))()
    model, adapter, frozen, tree = dropping(net, side=side)
    x = randn(4, 6)
    weights = adapter.apply(frozen, tree)
    exact = model(weights, x)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = torch.stack([model.train()(weights, x) for _ in range(4000)])
    deviation = (draws.mean(0) - exact).abs() / (draws.std(0) / 4000**0.5)
    assert draws.std(0).min() > 0.01
    assert deviation.max() < 4.5  # 36 entries: more than that has a chance of 2.4e-4
    assert torch.equal(exact, model(weights, x))  # eval mode draws nothing


def test_a_merge_and_eval_mode_have_no_dropout_and_take_the_one_product_form():
    net = seeded(lambda: nn.Linear(6, 9))()
    model, adapter, frozen, tree = dropping(net)
    plain = pf.bind(pf.wegeft("weight", rank=2, alpha=3, share="none"), model)
    weights = adapter.apply(frozen, tree)
    rng = torch.get_rng_state()
    same(pf.merge(weights), pf.merge(plain.apply(frozen, tree)), 0.0)
    with Watch([net.weight]) as watch:
        y = model(weights, randn(4, 6))
    assert watch.made == []
    assert torch.equal(rng, torch.get_rng_state())
    same(y, model(plain.apply(frozen, tree), randn(4, 6)), 0.0)


LAYERS = {
    "HF Conv1D": (lambda: transformers.pytorch_utils.Conv1D(9, 6), lambda: randn(4, 6)),
    "embedding": (lambda: nn.Embedding(9, 6), lambda: torch.tensor([[0, 3, 3, 8]])),
    "grouped convolution": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: randn(2, 4, 5, 5)),
    "transposed convolution": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), lambda: randn(2, 4, 5)),
}


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("layer", LAYERS)
def test_other_layers_drop_too(layer, side):
    build, inputs = LAYERS[layer]
    net = seeded(build)()
    model, adapter, frozen, tree = dropping(net, side=side)
    (leaf,) = tree["wegeft"].values()
    x = inputs()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        y = model.train()(adapter.apply(frozen, tree), x)
        torch.manual_seed(1)
        mask = F.dropout(torch.ones_like(as_matrix(net, "weight", net.weight)), 0.5).detach()
    matrix = as_matrix(net, "weight", net.weight.detach())
    plain = {"weight": as_stored(net, "weight", in_training(matrix, leaf, mask, side))}
    if side == "output" and layer != "embedding":
        edit = torch.eye(len(matrix), dtype=torch.float64) + 1.5 * leaf["phi"] @ leaf["psi"]
        plain["bias"] = torch.cat([edit @ part for part in net.bias.detach().split(len(edit))])
    same(y, torch.func.functional_call(net, plain, (x,)))


def test_experts_and_packed_attention_drop_in_train_mode():
    for name, where in (("experts", ".*"), ("attention", r".*in_proj_weight"), ("gpt2", ["c_attn", "c_fc"])):
        animal = ZOO[name]
        args, kwargs = animal.inputs(0)
        for side in ("input", "output"):
            model, adapter, frozen, tree = dropping(animal.build(), where, side)
            weights = adapter.apply(frozen, tree)
            with torch.random.fork_rng(), pf.densify("error"):
                first, second = (animal.output(model.train()(weights, *args, **kwargs)) for _ in range(2))
                still = animal.output(model(weights, *args, **kwargs))
            assert not torch.equal(first, second)
            same(still, animal.output(model(pf.merge(weights), *args, **kwargs)))


def test_training_keeps_one_dropped_copy_of_the_weight_and_nothing_else_as_large():
    net = seeded(lambda: nn.Linear(53, 37))()
    model, adapter, frozen, tree = dropping(net)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model.train()(adapter.apply(frozen, learnable(tree)), randn(29, 53).requires_grad_())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    own = net.weight.untyped_storage()
    large = [size for pointer, size in storages.items() if size >= own.nbytes() and pointer != own.data_ptr()]
    assert large == [own.nbytes()]


@pytest.mark.parametrize("side", ["input", "output"])
def test_vmap_draws_masks_as_its_randomness_says(side):
    net = seeded(lambda: nn.Linear(6, 9))()
    model, adapter, frozen, tree = dropping(net, side=side)
    x = randn(4, 6)
    stacked = pf.stack([tree, tree, tree])

    def one(tree):
        return model.train()(adapter.apply(frozen, tree), x)

    with torch.random.fork_rng():
        different = torch.vmap(one, randomness="different")(stacked)
        alike = torch.vmap(one, randomness="same")(stacked)
    assert not torch.equal(different[0], different[1])
    assert not torch.equal(different[1], different[2])
    same(alike[0], alike[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(one)(stacked)


@pytest.mark.parametrize("how", ["fold", "vmap"])
def test_members_of_an_ensemble_drop_their_own_entries(how):
    net = seeded(lambda: nn.Linear(6, 9))()
    model, adapter, frozen, tree = dropping(net)
    train = pf.functionalize(net.train())
    stacked = pf.stack([tree, tree])
    with torch.random.fork_rng():
        ys = pf.ensemble(pf.bind(adapter.method, train), how=how)(frozen, stacked, randn(4, 6))
    assert not torch.isclose(ys[0], ys[1]).all()
    still = pf.ensemble(adapter, how=how)(frozen, stacked, randn(4, 6))
    same(still[0], model(adapter.apply(frozen, tree), randn(4, 6)))
    same(still[0], still[1])


def test_routing_in_eval_mode_has_no_dropout():
    net = seeded(lambda: nn.Linear(6, 9))()
    model, adapter, frozen, tree = dropping(net)
    x = randn(3, 6)
    y = model(pf.route(adapter, frozen, pf.stack([tree, tree]), torch.tensor([1, -1, 0])), x)
    alone = model(adapter.apply(frozen, tree), x)
    same(y, torch.stack([alone[0], net(x)[1], alone[2]]))


def test_a_weight_before_it_in_a_chain_is_formed_and_then_dropped():
    net = seeded(lambda: nn.Linear(6, 9, bias=False))()
    model = pf.functionalize(net)
    method = pf.chain(pf.lora("weight", rank=1, dropout=0.5), pf.wegeft("weight", rank=2, dropout=0.5))
    adapter = pf.bind(method, model)
    frozen, start = adapter.init(0)
    tree = random_like(start)
    lora, (leaf,) = tree["lora"]["weight"], tree["wegeft"].values()
    x = randn(4, 6)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        y = model.train()(adapter.apply(frozen, tree), x)
        torch.manual_seed(2)
        mask = F.dropout(torch.ones(9, 6, dtype=torch.float64), 0.5)
        seen = F.dropout(x, 0.5)
    before = net.weight + lora["B"] @ lora["A"]
    update = ((mask * before) @ leaf["phi"].T) @ leaf["psi"]
    same(y, x @ net.weight.T + (seen @ lora["A"].T) @ lora["B"].T + x @ update.T)


# --- counts, files, errors --------------------------------------------------------------------------------------------


def test_llama_7b_with_all_seven_projections_tied_over_depth_trains_4554752_numbers():
    """Six targets of width 4096 and one of 11008, each with two matrices of 64 rows."""
    with torch.device("meta"):
        model = pf.functionalize(transformers.LlamaForCausalLM(transformers.LlamaConfig()))
    projections = [f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")]
    adapter = pf.bind(pf.wegeft(projections, rank=64, alpha=128, dropout=0.1), model)
    assert len(adapter.parts[0].paths) == 32 * 7
    frozen, tree = adapter.init(0)
    assert set(tree["wegeft"]) == set(projections)
    assert sum(leaf.numel() for pair in tree["wegeft"].values() for leaf in pair.values()) == 4_554_752
    assert 2 * 64 * (6 * 4096 + 11008) == 4_554_752
    assert adapter.apply(frozen, tree)["model.layers.0.mlp.down_proj.weight"].shape == (4096, 11008)


FILES = {
    "input": lambda: pf.wegeft(["q_proj", "v_proj"], rank=2, alpha=3.5, dropout=0.1, init="random"),
    "output": lambda: pf.wegeft(["q_proj"], rank=2, side="output", share="none", name="out"),
    "groups": lambda: pf.wegeft(
        ["q_proj", "v_proj"], rank=2, share={"b": ["v_proj"], "a": ["q_proj"]}, rank_pattern={"v_proj": 3},
        alpha_pattern={r".*\.1\..*": 7},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_file_holds_every_option(case, tmp_path):
    model = pf.functionalize(ZOO["llama"].build())
    adapter = pf.bind(FILES[case](), model)
    frozen, start = adapter.init(0)
    tree = random_like(start)
    path, twin = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    pf.save(path, adapter, tree)
    again, _, loaded = pf.load(path, model)
    same(loaded, tree, 0.0)
    assert again.parts[0].options == adapter.parts[0].options
    pf.save(twin, again, loaded)
    assert path.read_bytes() == twin.read_bytes()
    args, _ = ZOO["llama"].inputs(0)
    same(model(again.apply(frozen, loaded), *args).logits, model(adapter.apply(frozen, tree), *args).logits, 0.0)


ERRORS = {
    "side": (lambda: pf.wegeft("0", side="left"), ["'left'", "'input'", "'output'"]),
    "init": (lambda: pf.wegeft("0", init=False), ["False", "'default'", "'random'"]),
    "share": (lambda: pf.wegeft("0", share="depth"), ["'depth'", "'target'"]),
    "dropout 1": (lambda: pf.wegeft("0", dropout=1.0), ["dropout=1.0"]),
    "dropout None": (lambda: pf.wegeft("0", dropout=None), ["dropout=None"]),
    "alpha": (lambda: pf.wegeft("0", alpha=float("nan")), ["alpha=nan"]),
    "rank 0": (lambda: pf.wegeft("0", rank=0), ["0.weight", "rank=0"]),
    "rank above": (lambda: pf.wegeft("0", rank=6), ["0.weight", "1 to 5"]),
    "inputs": (lambda: pf.wegeft(".*", rank=2, share="all"), ["0.weight has 5 inputs", "2.weight has 8", "'none'"]),
    "outputs": (
        lambda: pf.wegeft(".*", rank=2, share="all", side="output"),
        ["0.weight has 8 outputs", "4.weight has 3", "'all'"],
    ),
    "ranks": (
        lambda: pf.wegeft("2|4", rank=2, share="all", rank_pattern={"4": 3}),
        ["2.weight has 2", "4.weight has 3", "rank"],
    ),
    "no group": (lambda: pf.wegeft(".*", rank=2, share={"a": "0"}), ["2.weight", "'a'"]),
    "a group of nothing": (lambda: pf.wegeft("2", rank=2, share={"a": "2", "b": "nowhere"}), ["'b'", "nowhere"]),
    "pattern": (lambda: pf.wegeft("0", rank=2, alpha_pattern={"7": 1}), ["'7'", "0.weight"]),
    "name": (lambda: pf.wegeft("0", rank=2, name="a.b"), ["'a.b'"]),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_place_and_the_choices(case):
    make, words = ERRORS[case]
    with pytest.raises(pf.OptionError) as caught:
        pf.bind(make(), pf.functionalize(ZOO["mlp"].build()))
    for word in words:
        assert word in str(caught.value)

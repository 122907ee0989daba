"""Merging against exact sums through `pf.delta`, against HF PEFT, and the ways it must refuse."""

import copy
import math

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import peft_func as pf
from peft_func.ensemble.rules import HOWS
from tests.ensemble.merging import deltas, every, trees_of, weighted
from tests.transforms.plain import leaves_of, random_like, same

EXACT = ("cat", "svd", "delta")
MATRICES = ["linear", "conv", "up", "embed", "gpt", "experts"]
PRUNING = [how for how in HOWS if HOWS[how][1] not in ("linear", "slerp")]


def options_of(how):
    _, rule = HOWS[how]
    return ({"density": 0.5} if rule not in ("linear", "slerp") else {}) | ({"key": 7} if "dare" in rule else {})


def low_rank(**options):
    _, model = every()
    return pf.bind(pf.lora(MATRICES, **{"rank": 2, "alpha": 3, **options}), model)


def merge(adapter, trees, *args, **kwargs):
    """Merge, and check what holds whatever the options: nothing is written, and the results fit each other."""
    before = copy.deepcopy((adapter.model.params, trees))
    merged, frozen, tree = pf.merge_adapters(adapter, trees, *args, **kwargs)
    same(before[0], adapter.model.params, 0.0)
    same(before[1], list(trees), 0.0)
    fresh, _ = merged.init(0)
    assert all(frozen[name] is fresh[name] for name in fresh)
    assert frozen.keys() == fresh.keys()
    assert merged.model is adapter.model
    used = {leaf.data_ptr() for leaf in [*leaves_of(trees[0]), *adapter.model.params.values()]}
    assert all(leaf.data_ptr() not in used and not leaf.requires_grad for leaf in leaves_of(tree))
    return merged, tree


SCALES = [{}, {"rank_stabilized": True}, {"rank_pattern": {"conv": 4, "gpt": 1}, "alpha_pattern": {"conv": 5}}]


@pytest.mark.parametrize("how", EXACT)
@pytest.mark.parametrize("options", SCALES)
@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.0, -0.5, 0.25], [-1.0], None])
def test_exact_sums_are_exact_for_every_kind_of_weight(how, options, weights):
    adapter = low_rank(**options)
    trees = trees_of(adapter, 3 if weights is None else len(weights))
    merged, tree = merge(adapter, trees, weights, how)
    expected = weighted(adapter, trees, weights or [1 / 3] * 3)
    same(deltas(merged, tree), expected)
    assert set(expected) == set(tree["lora"])
    for path in tree["lora"]:
        assert all(bound <= min(adapter.model.layouts[path].matrix_shape[-2:]) for bound in [rank_of(tree, path)])


def rank_of(tree, path, name="lora"):
    return tree[name][path]["A"].shape[1 if path == "experts" else 0]


@given(st.integers(1, 4), st.integers(1, 4), st.floats(-3, 3), st.floats(-3, 3), st.sampled_from(EXACT))
def test_exact_sums_are_exact_for_any_rank_and_weights(rank, alpha, first, second, how):
    model = pf.functionalize(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double())
    adapter = pf.bind(pf.lora(".*", rank=rank, alpha=alpha), model)
    trees = trees_of(adapter, 2)
    merged, tree = merge(adapter, trees, [first, second], how)
    same(deltas(merged, tree), weighted(adapter, trees, [first, second]))


def test_cat_adds_ranks_up_to_what_a_matrix_can_have():
    adapter = low_rank()
    merged, tree = merge(adapter, trees_of(adapter, 2))
    assert {path: rank_of(tree, path) for path in tree["lora"]} == {
        "linear.weight": 4, "conv.weight": 4, "up.weight": 3, "embed.weight": 4, "gpt.weight": 4, "experts": 4,
    }  # fmt: skip
    assert merged.parts[0].options["alpha"] is None
    (one,) = trees_of(adapter, 1)
    for how, rank in (("cat", 4), ("svd", 2), ("delta", 2)):  # cat leaves the factors as they are
        assert rank_of(merge(adapter, [one, one], how=how)[1], "conv.weight") == rank


@pytest.mark.parametrize("how", [how for how in HOWS if how.startswith("knots") or how.endswith("_svd")])
def test_a_rank_is_the_highest_at_every_place(how):
    adapter = low_rank()
    trees = trees_of(adapter, 2)
    full = deltas(*merge(adapter, trees, how=how, **options_of(how)))
    merged, tree = merge(adapter, trees, how=how, rank=1, **options_of(how))
    for path, value in deltas(merged, tree).items():
        assert rank_of(tree, path) == 1
        U, S, Vh = torch.linalg.svd(adapter.model.layouts[path].to_matrix(full[path]), full_matrices=False)
        best = U[..., :1] * S[..., None, :1] @ Vh[..., :1, :]
        same(adapter.model.layouts[path].to_matrix(value), best)


@pytest.mark.parametrize("weight", [1.0, -1.0])
@pytest.mark.parametrize("how", [*EXACT, "linear"])
def test_one_tree_is_itself_or_its_negation(how, weight):
    adapter = low_rank(rank_stabilized=True)
    (tree,) = trees_of(adapter, 1)
    merged, result = merge(adapter, [tree], [weight], how)
    same(deltas(merged, result), {path: weight * value for path, value in deltas(adapter, tree).items()})


def test_a_truncated_svd_loses_the_tail():
    adapter = low_rank()
    trees = trees_of(adapter, 3)
    exact = weighted(adapter, trees, [0.5, 0.25, -1.0])
    merged, tree = merge(adapter, trees, [0.5, 0.25, -1.0], "svd", rank=2)
    changes = deltas(merged, tree)
    for path in tree["lora"]:
        assert rank_of(tree, path) == 2
        matrix = adapter.model.layouts[path].to_matrix(exact[path])
        tail = torch.linalg.svdvals(matrix)[..., 2:].norm()
        torch.testing.assert_close((changes[path] - exact[path]).norm(), tail, atol=1e-10, rtol=1e-10)
    full, tree = merge(adapter, trees, [0.5, 0.25, -1.0], "svd", rank=99)
    same(deltas(full, tree), exact)


def test_a_chain_with_trained_weights_and_biases():
    _, model = every()
    method = pf.chain(
        pf.lora(["linear", "gpt"], rank=2, alpha=5, bias=True),
        pf.chain(pf.train(["norm", "conv"]), pf.lora("conv", rank=3), name="inner"),
        pf.lora("linear", rank=1, name="again"),
    )
    adapter = pf.bind(method, model)
    trees = trees_of(adapter, 3)
    for how in EXACT:
        merged, tree = merge(adapter, trees, [2.0, -0.5, 0.1], how)
        same(deltas(merged, tree), weighted(adapter, trees, [2.0, -0.5, 0.1]))
        assert list(tree) == list(trees[0])
        assert merged.held == adapter.held
    for how in [*PRUNING, "linear"]:
        merged, tree = merge(adapter, trees, [2.0, -0.5, 0.1], how, **options_of(how))
        base = model.params["norm.weight"]
        changes = [tree["inner"]["train"]["norm.weight"] - base for tree in trees]
        if how in ("linear", "ties", "ties_svd", "magnitude_prune"):
            kept = [prune(change, 0.5) if how != "linear" else change for change in changes]
            expected = 2.0 * kept[0] - 0.5 * kept[1] + 0.1 * kept[2]
            if "ties" in how:
                agree = [change.sign() == torch.where(sum(kept) >= 0, 1.0, -1.0) for change in kept]
                pairs = zip([2.0, -0.5, 0.1], kept, agree, strict=True)
                expected = sum(w * k * a for w, k, a in pairs) / sum(a.double() for a in agree).clamp_min(1)
            same(tree["inner"]["train"]["norm.weight"] - base, expected)


def prune(tensor, density):
    order = tensor.abs().flatten().argsort(descending=True)[: int(density * tensor.numel())]
    return torch.zeros_like(tensor).flatten().index_copy(0, order, tensor.flatten()[order]).view_as(tensor)


class TestDelta:
    def test_any_method_becomes_the_exact_sum(self):
        _, model = every()
        shift = pf.Transform(
            init=lambda weights, key: {p: {"shift": torch.zeros_like(w)} for p, w in weights.items()},
            apply=lambda tree, weights: {p: w + tree[p]["shift"].sin() for p, w in weights.items()},
        )
        method = pf.chain(
            pf.lora(["linear", "gpt", "embed"], rank=2, bias=True),
            pf.gift("gpt", rank=2),
            pf.dora(["conv", "experts"], rank=2, dropout=0.5),
            pf.ia3("linear", scale_bias=True),
            pf.on("norm", shift, name="shift"),
            pf.train("up|norm"),
        )
        adapter = pf.bind(method, model)
        trees = trees_of(adapter, 3)
        merged, tree = merge(adapter, trees, [0.5, -2.0, 1.0], "delta")
        same(deltas(merged, tree), weighted(adapter, trees, [0.5, -2.0, 1.0]))
        assert set(tree) == {"lora", "train", "delta"}
        assert list(tree["lora"]) == ["embed.weight"]
        assert list(tree["train"]) == ["up.weight", "up.bias"]

    def test_a_name_that_is_taken_is_left_alone(self):
        _, model = every()
        adapter = pf.bind(pf.chain(pf.lora("linear", rank=2, name="delta"), pf.ia3("gpt")), model)
        merged, tree = merge(adapter, trees_of(adapter, 2), how="delta")
        assert set(tree) == {"delta", "delta_2"}
        assert set(merged.held) == {"gpt.weight"}

    def test_a_method_alone(self):
        _, model = every()
        adapter = pf.bind(pf.gift("gpt", rank=2), model)
        trees = trees_of(adapter, 2)
        merged, tree = merge(adapter, trees, [1.0, 1.0], "delta")
        same(deltas(merged, tree), weighted(adapter, trees, [1.0, 1.0]))


class TestLeaves:
    def test_ia3_keeps_the_identity(self):
        _, model = every()
        adapter = pf.bind(pf.chain(pf.ia3("linear"), pf.magnitude("gpt")), model)
        trees = trees_of(adapter, 2)
        _, tree = merge(adapter, trees, [0.5, -2.0], "linear")
        one, two = (t["ia3"]["linear.weight"]["scale"] for t in trees)
        same(tree["ia3"]["linear.weight"]["scale"], 1 + 0.5 * (one - 1) - 2.0 * (two - 1))
        norms = model.params["gpt.weight"].norm(dim=0)
        one, two = (t["magnitude"]["gpt.weight"]["magnitude"] for t in trees)
        same(tree["magnitude"]["gpt.weight"]["magnitude"], norms + 0.5 * (one - norms) - 2.0 * (two - norms))
        _, start = adapter.init(0)
        _, still = merge(adapter, [start, start], [0.3, -9.0], "linear")
        same(still, start)

    def test_random_leaves_are_averaged(self):
        _, model = every()
        adapter = pf.bind(pf.chain(pf.gift("gpt", rank=2), pf.dora("linear", rank=2)), model)
        trees = trees_of(adapter, 2)
        _, tree = merge(adapter, trees, [0.25, 0.75], "linear")
        same(tree, pf.map_leaves(lambda a, b: 0.25 * a + 0.75 * b, *trees))
        with pytest.raises(pf.OptionError, match=r"gift\.gpt\.phi.*sum to 1.*'delta'"):
            pf.merge_adapters(adapter, trees, [1.0, 1.0], "linear")

    @pytest.mark.parametrize("how", [how for how in HOWS if how not in ("linear", "delta")])
    def test_no_other_way_takes_them(self, how):
        _, model = every()
        adapter = pf.bind(pf.chain(pf.lora("gpt", rank=2), pf.ia3("linear")), model)
        with pytest.raises(pf.OptionError, match=r"'ia3' \(ia3\).*'delta'.*'linear'"):
            pf.merge_adapters(adapter, trees_of(adapter, 2), how=how, **options_of(how))


class TestGift:
    @pytest.mark.parametrize("share", ["target", "none", {"a": "0|1", "b": "3"}])
    @pytest.mark.parametrize("how", ["cat", "svd"])
    def test_generators_are_summed_exactly(self, share, how, tmp_path):
        layers = [nn.Linear(6, 6), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 7)]
        model = pf.functionalize(nn.Sequential(*layers).double())
        adapter = pf.bind(pf.chain(pf.gift("0|1|3", rank=2, share=share), pf.train(".*bias")), model)
        trees = trees_of(adapter, 2)
        merged, tree = merge(adapter, trees, [1.5, -0.5], how)
        same(deltas(merged, tree), weighted(adapter, trees, [1.5, -0.5]))
        assert set(tree["gift"]) == set(trees[0]["gift"])
        assert {leaf["phi"].shape[1] for leaf in tree["gift"].values()} == {4}
        pf.save(tmp_path / "a.safetensors", merged, tree)
        same(pf.load(tmp_path / "a.safetensors", model)[2], tree, 0.0)

    def test_groups_of_other_ranks_are_filled_up(self):
        model = pf.functionalize(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5)).double())
        adapter = pf.bind(pf.gift(".*", rank=2), model)
        trees = trees_of(adapter, 2)
        trees[1]["gift"]["0"] = trees[0]["gift"]["0"]
        merged, tree = merge(adapter, trees, [0.5, 2.0], "svd")
        assert tree["gift"]["0"]["phi"][:, 2:].count_nonzero() == 0
        same(deltas(merged, tree), weighted(adapter, trees, [0.5, 2.0]))

    def test_a_rank_that_no_place_can_have(self):
        model = pf.functionalize(nn.Sequential(nn.Linear(6, 3)).double())
        adapter = pf.bind(pf.gift(".*", rank=2), model)
        trees = trees_of(adapter, 2)
        with pytest.raises(pf.OptionError, match=r"rank 4, above the 3 of 0\.weight.*'delta'"):
            merge(adapter, trees)
        merged, tree = merge(adapter, trees, how="delta")
        same(deltas(merged, tree), weighted(adapter, trees, [0.5, 0.5]))
        _, tree = merge(adapter, trees, how="svd", rank=3)
        assert tree["gift"]["0"]["phi"].shape == (6, 3)

    def test_over_a_weight_that_changes_too(self):
        model = pf.functionalize(nn.Sequential(nn.Linear(6, 6)).double())
        for other in (pf.lora("0", rank=1), pf.train("0")):
            adapter = pf.bind(pf.chain(other, pf.gift("0", rank=1)), model)
            with pytest.raises(pf.OptionError, match=r"both change 0\.weight.*'delta'"):
                merge(adapter, trees_of(adapter, 2))


class TestSlerp:
    def both(self, weights, **kwargs):
        adapter = pf.bind(pf.chain(pf.lora(MATRICES, rank=2, alpha=3), pf.train("norm")), every()[1])
        trees = trees_of(adapter, 2)
        merged, tree = merge(adapter, trees, weights, "slerp", **kwargs)
        return [deltas(adapter, tree) for tree in trees], deltas(merged, tree)

    @pytest.mark.parametrize("weights", [None, [3.0, 1.0], [0.2, 0.8]])
    def test_every_place_is_on_its_arc(self, weights):
        (a, b), c = self.both(weights)
        t = 0.5 if weights is None else weights[1] / sum(weights)
        for path in a:
            x, y = a[path], b[path]
            angle = math.acos((x * y).sum() / (x.norm() * y.norm()))
            expected = math.sin((1 - t) * angle) / math.sin(angle) * x + math.sin(t * angle) / math.sin(angle) * y
            same(c[path], expected)

    def test_the_ends(self):
        (a, b), c = self.both([2.0, 0.0])
        same(c, a)
        (a, b), c = self.both([0.0, 2.0])
        same(c, b)

    def test_equal_norms_stay(self):
        adapter = low_rank()
        first, second = trees_of(adapter, 2)
        sizes = {
            path: (deltas(adapter, first)[path].norm(), deltas(adapter, second)[path].norm()) for path in MATRIX_PATHS
        }
        for path, (one, two) in sizes.items():
            second["lora"][path]["B"] = second["lora"][path]["B"] * one / two
        merged, tree = merge(adapter, [first, second], [0.7, 0.3], "slerp", rank=4)
        for path, value in deltas(merged, tree).items():
            torch.testing.assert_close(value.norm(), sizes[path][0], rtol=1e-9, atol=0)

    def test_an_untrained_tree_is_a_zero(self):
        adapter = low_rank()
        zero, (tree,) = adapter.init(0)[1], trees_of(adapter, 1)
        merged, result = merge(adapter, [zero, tree], [1.0, 3.0], "slerp")
        same(deltas(merged, result), {path: 0.75 * value for path, value in deltas(adapter, tree).items()})


MATRIX_PATHS = ["linear.weight", "conv.weight", "up.weight", "embed.weight", "gpt.weight", "experts"]


class TestPeft:
    """`add_weighted_adapter` on a small float64 network."""

    def build(self, **config):
        net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()
        settings = {"r": 2, "lora_alpha": 2, "target_modules": ["0", "1"], **config}
        wrapped = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(**settings), "a0")
        for name in ("a1", "a2"):
            wrapped.add_adapter(name, peft.LoraConfig(**settings))
        adapter = pf.bind(
            pf.lora(
                ["0", "1"], rank=settings["r"], alpha=settings["lora_alpha"],
                rank_stabilized=settings.get("use_rslora", False),
            ),
            pf.functionalize(net),
        )  # fmt: skip
        trees = trees_of(adapter, 3)
        for number, tree in enumerate(trees):
            for path, leaf in tree["lora"].items():
                layer = wrapped.base_model.model[int(path[0])]
                layer.lora_A[f"a{number}"].weight.data = leaf["A"].clone()
                layer.lora_B[f"a{number}"].weight.data = leaf["B"].clone()
        return wrapped, adapter, trees

    def theirs(self, wrapped, weights, how, **options):
        names = [f"a{number}" for number in range(len(weights))]
        wrapped.base_model.add_weighted_adapter(names, weights, "new", combination_type=how, **options)
        layers = wrapped.base_model.model
        return {f"{n}.weight": layers[n].get_delta_weight("new").detach() for n in range(2)}

    @pytest.mark.parametrize(
        ("how", "options"),
        [
            ("cat", {}),
            ("linear", {}),
            ("svd", {"rank": 3}),
            ("magnitude_prune", {"density": 0.5}),
            ("ties", {"density": 0.4}),
            ("ties", {"density": 0.7, "majority_sign_method": "frequency"}),
            ("magnitude_prune_svd", {"density": 0.5, "rank": 2}),
            ("ties_svd", {"density": 0.4, "rank": 3}),
            ("ties_svd", {"density": 0.4, "rank": 3, "majority_sign_method": "frequency"}),
        ],
    )
    @pytest.mark.parametrize("config", [{}, {"lora_alpha": 6}])
    def test_it_is_theirs_where_theirs_is_right(self, how, options, config):
        wrapped, adapter, trees = self.build(**config)
        weights = [0.7, 0.4, -0.3]
        merged, tree = merge(adapter, trees, weights, how, **options)
        given = {"svd_rank" if name == "rank" else name: value for name, value in options.items()}
        same(deltas(merged, tree), self.theirs(wrapped, weights, how, **given), 1e-6)  # float32 weights of theirs

    @pytest.mark.parametrize("how", ["cat", "svd"])
    def test_rank_stabilised_adapters_are_exact_here(self, how):
        wrapped, adapter, trees = self.build(use_rslora=True, lora_alpha=3)
        weights, rank = [0.7, 0.4], {} if how == "cat" else {"svd_rank": 4}
        exact = weighted(adapter, trees[:2], weights)
        merged, tree = merge(adapter, trees[:2], weights, how)
        same(deltas(merged, tree), exact)
        for path, wrong in self.theirs(wrapped, weights, how, **rank).items():
            torch.testing.assert_close(wrong, 2 * exact[path], rtol=1e-5, atol=1e-6)  # sqrt(4): the new rank

    def test_linear_has_cross_terms(self):
        _, adapter, trees = self.build()
        merged, tree = merge(adapter, trees[:2], [0.5, 0.5], "linear")
        exact = weighted(adapter, trees[:2], [0.5, 0.5])
        assert all(
            (value - exact[path]).norm() > 0.3 * exact[path].norm() for path, value in deltas(merged, tree).items()
        )


@pytest.mark.parametrize("how", [how for how in HOWS if "dare" in how])
def test_dare_depends_on_the_key_and_the_path_only(how):
    _, model = every()
    one, more = (pf.bind(pf.lora(where, rank=2), model) for where in (["linear"], ["gpt", "linear"]))
    trees = trees_of(one, 2)
    bigger = [{"lora": tree["lora"] | random_like(more.init(0)[1]["lora"]) | tree["lora"]} for tree in trees]
    before = torch.random.get_rng_state()
    _, first = merge(one, trees, how=how, density=0.5, key=3)
    _, again = merge(one, trees, how=how, density=0.5, key=3)
    _, other = merge(one, trees, how=how, density=0.5, key=4)
    _, among = merge(more, bigger, how=how, density=0.5, key=3)
    assert torch.equal(before, torch.random.get_rng_state())
    same(first, again, 0.0)
    leaf = first["lora"]["linear.weight"]["A"]
    assert torch.equal(leaf, among["lora"]["linear.weight"]["A"])
    changed = other["lora"]["linear.weight"]["A"]
    assert changed.shape != leaf.shape or not torch.equal(leaf, changed)


@pytest.mark.parametrize("how", [how for how in HOWS if how.endswith("_svd")])
def test_nothing_pruned_is_the_exact_sum_or_its_ties(how):
    adapter = low_rank()
    trees = trees_of(adapter, 2)
    merged, tree = merge(adapter, trees, [0.5, 2.0], how, **options_of(how) | {"density": 1.0})
    each = [deltas(adapter, tree) for tree in trees]
    for path, value in deltas(merged, tree).items():
        a, b = each[0][path], each[1][path]
        expected = 0.5 * a + 2.0 * b
        if "ties" in how:
            sign = torch.where(a + b >= 0, 1.0, -1.0)
            agree = (a.sign() == sign).double(), (b.sign() == sign).double()
            expected = (0.5 * a * agree[0] + 2.0 * b * agree[1]) / (agree[0] + agree[1]).clamp_min(1)
        same(value, expected)


@pytest.mark.parametrize("how", list(HOWS))
def test_every_way_can_be_saved_and_loaded(how, tmp_path):
    _, model = every()
    adapter = pf.bind(pf.chain(pf.lora(MATRICES, rank=2, bias=True, dropout=0.1), pf.train("norm")), model)
    merged, tree = merge(adapter, trees_of(adapter, 2), how=how, **options_of(how))
    assert merged.parts[0].options["dropout"] == 0.1
    pf.save(tmp_path / "a.safetensors", merged, tree)
    again, frozen, loaded = pf.load(tmp_path / "a.safetensors", model)
    same(loaded, tree, 0.0)
    same(pf.delta(again.apply(frozen, loaded)), deltas(merged, tree), 0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", ["cat", "svd", "delta", "linear", "ties_svd"])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype, how):
    model = pf.functionalize(nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5)).to(dtype))
    adapter = pf.bind(pf.chain(pf.lora("0", rank=2), pf.train("1")), model)
    trees = [pf.map_leaves(lambda leaf: leaf.to(dtype), tree) for tree in trees_of(adapter, 2)]
    wide = [pf.map_leaves(torch.Tensor.double, tree) for tree in trees]
    options = options_of(how)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, tree = merge(adapter, trees, [0.3, 0.7], how, **options)
    _, exact = merge(adapter, wide, [0.3, 0.7], how, **options)
    for a, b in zip(leaves_of(tree["train"]), leaves_of(exact["train"]), strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b.to(dtype))
    one, two = (tree["lora"]["0.weight"] for tree in (tree, exact))
    product = one["B"].double() @ one["A"].double()
    expected = two["B"] @ two["A"]
    assert one["A"].dtype == dtype
    assert (product - expected).norm() < 4 * torch.finfo(dtype).eps * expected.norm()


def test_an_overflow_is_refused():
    model = pf.functionalize(nn.Linear(6, 5).half())
    adapter = pf.bind(pf.train("weight"), model)
    tree = {"train": {"weight": torch.full((5, 6), 3e4, dtype=torch.float16)}}
    with pytest.raises(pf.OptionError, match=r"train\.weight overflows torch\.float16"):
        merge(adapter, [tree, tree], [3.0, 3.0])


def test_a_method_without_leaves():
    _, model = every()
    for method in (pf.chain(), pf.chain(pf.chain(name="empty"), pf.lora("linear", rank=2))):
        adapter = pf.bind(method, model)
        merged, _ = merge(adapter, trees_of(adapter, 2))
        assert merged.spec.keys() == adapter.spec.keys()


def test_gradients_of_the_trees_end_here():
    adapter = low_rank()
    trees = [pf.map_leaves(lambda leaf: leaf.requires_grad_(), tree) for tree in trees_of(adapter, 2)]
    merge(adapter, trees)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"how": "sum"}, "how='sum'"),
        ({"how": "knots_linear"}, "knots_linear"),
        ({"weights": [1.0]}, "2 numbers"),
        ({"weights": [1.0, float("nan")]}, "finite"),
        ({"weights": [1.0, "2"]}, "finite"),
        ({"weights": "ab"}, "2 numbers"),
        ({"weights": 0.5}, "2 numbers"),
        ({"rank": 2}, "no use for rank"),
        ({"how": "svd", "rank": 0}, "rank=0"),
        ({"how": "svd", "rank": 2.0}, "rank=2.0"),
        ({"how": "svd", "rank": True}, "rank=True"),
        ({"how": "ties"}, "density=0.2"),
        ({"how": "ties", "density": 0.0}, "density=0.0"),
        ({"how": "ties", "density": 1.5}, "density=1.5"),
        ({"how": "ties", "density": float("nan")}, "density"),
        ({"how": "cat", "density": 0.5}, "no use for density"),
        ({"how": "dare_ties", "density": 0.5}, "key=0"),
        ({"how": "ties", "density": 0.5, "key": 0}, "no use for key"),
        ({"how": "dare_ties", "density": 0.5, "key": "x"}, "key"),
        ({"how": "ties", "density": 0.5, "majority_sign_method": "vote"}, "vote"),
        ({"how": "cat", "majority_sign_method": "frequency"}, "elects no signs"),
        ({"how": "slerp", "weights": [-1.0, 2.0]}, "from 0 up"),
        ({"how": "slerp", "weights": [0.0, 0.0]}, "from 0 up"),
    ],
)
def test_options_that_cannot_work_are_refused(kwargs, message):
    adapter = low_rank()
    with pytest.raises(pf.OptionError, match=message):
        pf.merge_adapters(adapter, trees_of(adapter, 2), **kwargs)


def test_trees_that_cannot_be_merged_are_refused():
    adapter = low_rank()
    one, two, three = trees_of(adapter, 3)
    with pytest.raises(pf.OptionError, match="unstack"):
        pf.merge_adapters(adapter, pf.stack([one, two]))
    with pytest.raises(pf.OptionError, match="at least one"):
        pf.merge_adapters(adapter, [])
    with pytest.raises(pf.OptionError, match="bound adapter"):
        pf.merge_adapters(adapter.method, [one])
    with pytest.raises(pf.OptionError, match="two trees, not 3"):
        pf.merge_adapters(adapter, [one, two, three], how="slerp")
    with pytest.raises(pf.TreeError, match="lacks"):
        pf.merge_adapters(adapter, [one, {"lora": {}}])
    two["lora"]["experts"]["A"] = two["lora"]["experts"]["A"] / 0
    with pytest.raises(pf.TreeError, match=r"lora\.experts\.A' of tree 1.*finite"):
        pf.merge_adapters(adapter, [one, two])
    with pytest.raises(pf.OptionError, match="opposite"):
        pf.merge_adapters(adapter, [one, negated(one)], how="slerp")


def negated(tree):
    return {"lora": {path: {"A": leaf["A"], "B": -leaf["B"]} for path, leaf in tree["lora"].items()}}


@pytest.mark.parametrize(
    "options",
    [{"activation": "softmax"}, {"block": "mlp"}, {"in_projection_bias": True}, {"out_projection_bias": True}],
)
def test_generators_that_are_not_linear_merge_by_delta_only(options):
    model = pf.functionalize(torch.nn.Sequential(torch.nn.Linear(6, 6)).double())
    adapter = pf.bind(pf.gift("0", rank=2, **options), model)
    frozen, start = adapter.init(0)
    trees = [pf.map_leaves(lambda leaf, s=s: leaf + 0.3 * (s + 1), start) for s in range(2)]
    for how in ("cat", "svd"):
        with pytest.raises(pf.OptionError, match="how='delta'"):
            pf.merge_adapters(adapter, trees, how=how)
    merged, base, tree = pf.merge_adapters(adapter, trees, [0.5, 2.0], how="delta")
    deltas = [pf.delta(adapter.apply(frozen, each))["0.weight"] for each in trees]
    expected = model.params["0.weight"] + 0.5 * deltas[0] + 2.0 * deltas[1]
    assert torch.allclose(pf.merge(merged.apply(base, tree))["0.weight"], expected, atol=1e-10)

"""Soups, against sums in float64, closed forms, and an exhaustive greedy search."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peft_func as pf


def drawn(count, key=0, dtype=torch.float64):
    return [
        {
            "head": {
                "w": torch.randn(3, 2, generator=torch.Generator().manual_seed(pf.split(key, f"w{i}"))).to(dtype),
                "b": torch.randn(3, generator=torch.Generator().manual_seed(pf.split(key, f"b{i}"))).to(dtype),
            },
            "body": torch.randn(4, generator=torch.Generator().manual_seed(pf.split(key, f"c{i}"))).to(dtype),
        }
        for i in range(count)
    ]


@given(
    key=st.integers(0, 2**31),
    weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=5),
)
def test_weighted_soup_is_the_weighted_mean(key, weights):
    trees = drawn(len(weights), key)
    found = pf.soup(trees, weights)
    expected = sum(w * tree["head"]["w"] for w, tree in zip(weights, trees, strict=True)) / sum(weights)
    torch.testing.assert_close(found["head"]["w"], expected, rtol=1e-12, atol=1e-12)
    uniform = pf.soup(trees)["body"]
    torch.testing.assert_close(uniform, torch.stack([t["body"] for t in trees]).mean(0), rtol=1e-12, atol=1e-12)


def test_an_extrapolation_has_weights_below_zero():
    first, second = drawn(2)
    found = pf.soup([first, second], [1.5, -0.5])["body"]
    torch.testing.assert_close(found, first["body"] + 0.5 * (first["body"] - second["body"]))


def test_selection_takes_the_rest_from_the_first_tree_whatever_the_others_hold():
    first, second = drawn(2)
    second["head"] = {"other": torch.zeros(7)}
    found = pf.soup([first, second], where="body")
    assert found["head"]["w"] is first["head"]["w"]
    torch.testing.assert_close(found["body"], (first["body"] + second["body"]) / 2)
    assert list(found) == list(first)
    nested = pf.soup(drawn(2), where=r"head\.b")
    assert not torch.equal(nested["head"]["b"], first["head"]["b"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    trees = drawn(5, dtype=dtype)
    exact = torch.stack([tree["body"].double() for tree in trees]).mean(0)
    found = pf.soup(trees)["body"]
    assert found.dtype == dtype
    assert torch.equal(found, exact.to(dtype))


def test_nothing_is_mutated_and_one_tree_is_copied():
    trees = drawn(3)
    before = [pf.map_leaves(torch.clone, tree) for tree in trees]
    pf.soup(trees)
    pf.greedy_soup(trees, lambda tree: float(tree["body"].sum()))
    for tree, old in zip(trees, before, strict=True):
        pf.map_leaves(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0) or a, tree, old)
    alone = pf.soup(trees[:1])
    assert torch.equal(alone["body"], trees[0]["body"])
    assert alone["body"] is not trees[0]["body"]


def test_soups_are_differentiable_and_map():
    first, second = drawn(2)
    grad = torch.func.grad(lambda tree: pf.soup([tree, second], [1, 3])["body"].sum())(first)
    torch.testing.assert_close(grad["body"], torch.full((4,), 0.25).double())
    stacked = pf.stack(drawn(3, 5))
    found = torch.vmap(lambda tree: pf.soup([tree, first]))(stacked)
    torch.testing.assert_close(found["body"][1], pf.soup([pf.unstack(stacked)[1], first])["body"])


@given(key=st.integers(0, 1000), count=st.integers(1, 6))
def test_greedy_soup_equals_its_recipe(key, count):
    trees, goal = drawn(count, key), torch.tensor([0.3, -0.2, 0.1, 0.5]).double()
    calls = []

    def score(tree):
        calls.append(tree)
        return -(tree["body"] - goal).norm()

    found, members = pf.greedy_soup(trees, score)
    assert len(calls) == 2 * count - 1
    bodies = [tree["body"] for tree in trees]
    order = sorted(range(count), key=lambda i: (bodies[i] - goal).norm().item())
    chosen, best = [order[0]], (bodies[order[0]] - goal).norm()
    for i in order[1:]:
        distance = (torch.stack([bodies[j] for j in [*chosen, i]]).mean(0) - goal).norm()
        if distance <= best:
            chosen, best = [*chosen, i], distance
    assert members == chosen
    torch.testing.assert_close(found["body"], torch.stack([bodies[j] for j in chosen]).mean(0))
    assert score(found) >= max(score(tree) for tree in trees) - 1e-12


def test_greedy_soup_keeps_ties_and_drops_harm():
    trees = [{"a": torch.tensor(value)} for value in (0.0, 5.0, 0.0)]
    found, members = pf.greedy_soup(trees, lambda tree: -tree["a"].abs())
    assert members == [0, 2]
    assert found["a"] == 0


def test_fisher_soup_is_the_mode_of_the_product_of_gaussians():
    trees, fishers = drawn(3, 1), [pf.map_leaves(lambda t: t.square() + 0.1, tree) for tree in drawn(3, 2)]
    weights = [1.0, 2.0, 0.5]
    found = pf.fisher_soup(trees, fishers, weights)

    def log_product(body):
        return sum(
            -0.5 * w * (f["body"] * (body - t["body"]).square()).sum()
            for w, f, t in zip(weights, fishers, trees, strict=True)
        )

    gradient = torch.func.grad(log_product)(found["body"])
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


def test_fisher_soup_without_information_is_the_mean():
    trees = drawn(2)
    zeros = [pf.map_leaves(torch.zeros_like, tree) for tree in trees]
    torch.testing.assert_close(pf.fisher_soup(trees, zeros)["body"], pf.soup(trees)["body"])
    one_sided = pf.fisher_soup(trees, [pf.map_leaves(torch.ones_like, trees[0]), zeros[1]])["body"]
    torch.testing.assert_close(one_sided, trees[0]["body"], atol=1e-5, rtol=0)


def test_fishers_of_the_selected_leaves_are_enough():
    trees = drawn(2)
    fishers = [{"body": torch.ones(4)}, {"body": torch.full((4,), 3.0)}]
    found = pf.fisher_soup(trees, fishers, where="body")
    torch.testing.assert_close(found["body"], (trees[0]["body"] + 3 * trees[1]["body"]) / 4)
    assert found["head"]["w"] is trees[0]["head"]["w"]


def test_bad_trees():
    first, second = drawn(2)
    with pytest.raises(pf.TreeError, match="at least one"):
        pf.soup([])
    with pytest.raises(pf.TreeError, match="list"):
        pf.soup(first)
    with pytest.raises(pf.TreeError, match=r"head\.b"):
        pf.soup([first, {**second, "head": {"w": second["head"]["w"]}}])
    with pytest.raises(pf.TreeError, match=r"\(3,\).*tree 1"):
        pf.soup([first, {**second, "body": torch.zeros(3).double()}])
    with pytest.raises(pf.TreeError, match="float32"):
        pf.soup([first, {**second, "body": torch.zeros(4)}])
    counted = [{**tree, "steps": torch.tensor(3)} for tree in (first, second)]
    with pytest.raises(pf.TreeError, match=r"~pf.exact\(\['steps'\]\)"):
        pf.soup(counted)
    assert pf.soup(counted, where=~pf.exact(["steps"]))["steps"] == 3
    with pytest.raises(pf.SelectorError, match="soup"):
        pf.soup([first, second], where="nowhere")


def test_bad_options():
    trees = drawn(2)
    ones = [pf.map_leaves(torch.ones_like, tree) for tree in trees]
    for weights in (
        [1.0],
        [1.0, 2.0, 3.0],
        [0.0, 0.0],
        [-1.0, 0.5],
        [1.0, float("nan")],
        [1.0, float("inf")],
        ["a", 1],
    ):
        with pytest.raises(pf.OptionError, match=r"weight"):
            pf.soup(trees, weights)
    with pytest.raises(pf.OptionError, match="score"):
        pf.greedy_soup(trees, lambda tree: float("nan"))
    with pytest.raises(pf.OptionError, match="score"):
        pf.greedy_soup(trees, lambda tree: None)
    for eps in (0.0, -1.0, float("inf")):
        with pytest.raises(pf.OptionError, match="eps"):
            pf.fisher_soup(trees, ones, eps=eps)
    with pytest.raises(pf.OptionError, match="2 trees"):
        pf.fisher_soup(trees, ones[:1])
    with pytest.raises(pf.TreeError, match="below 0"):
        pf.fisher_soup(trees, [ones[0], pf.map_leaves(torch.neg, ones[1])])
    with pytest.raises(pf.TreeError, match=r"body.*absent"):
        pf.fisher_soup(trees, [ones[0], {"head": ones[1]["head"]}])

"""The error of a merge is that of the formed changes."""

import pytest
import torch

import peft_func as pf
from tests.ensemble.merging import deltas, every, trees_of, weighted

MATRICES = ["linear", "conv", "up", "embed", "gpt", "experts"]
WEIGHTS = [0.5, -1.0, 0.3]


def plain(merged, tree, adapter, trees, weights):
    exact, ours = weighted(adapter, trees, weights), deltas(merged, tree)
    return {path: float((ours[path] - exact[path]).norm() / exact[path].norm()) for path in exact}


@pytest.mark.parametrize("options", [{"how": "svd", "rank": 1}, {"how": "linear"}, {"how": "ties_svd", "density": 0.5}])
def test_it_is_that_of_the_formed_changes(options):
    _, model = every()
    adapter = pf.bind(pf.chain(pf.lora(MATRICES, rank=2, alpha=3), pf.train("norm|linear")), model)
    trees = trees_of(adapter, 3)
    merged, _, tree = pf.merge_adapters(adapter, trees, WEIGHTS, **options)
    errors = pf.merge_error(merged, tree, adapter, trees, WEIGHTS)
    assert errors == pytest.approx(plain(merged, tree, adapter, trees, WEIGHTS), rel=1e-9, abs=1e-12)
    assert errors["conv.weight"] > 0.05


@pytest.mark.parametrize("how", ["cat", "svd", "delta"])
def test_exact_merges_have_none(how):
    _, model = every()
    adapter = pf.bind(pf.chain(pf.lora(MATRICES, rank=2, bias=True), pf.train("norm")), model)
    trees = trees_of(adapter, 3)
    merged, _, tree = pf.merge_adapters(adapter, trees, WEIGHTS, how)
    errors = pf.merge_error(merged, tree, adapter, trees, WEIGHTS)
    assert set(errors) == set(weighted(adapter, trees, WEIGHTS))
    assert max(errors.values()) < 1e-14


def test_a_formed_merge_against_low_rank_trees():
    _, model = every()
    adapter = pf.bind(pf.chain(pf.lora("linear", rank=2), pf.ia3("linear|gpt")), model)
    trees = trees_of(adapter, 2)
    merged, _, tree = pf.merge_adapters(adapter, trees, [1.0, 2.0], "delta")
    assert max(pf.merge_error(merged, tree, adapter, trees, [1.0, 2.0]).values()) < 1e-12


def test_changes_that_cancel():
    _, model = every()
    adapter = pf.bind(pf.lora("linear", rank=2), model)
    zero, (tree,) = adapter.init(0)[1], trees_of(adapter, 1)
    assert pf.merge_error(adapter, zero, adapter, [zero, zero]) == {"linear.weight": 0.0}
    assert pf.merge_error(adapter, tree, adapter, [zero]) == {"linear.weight": float("inf")}


def test_nothing_of_the_size_of_the_weight_is_formed():
    net = torch.nn.Linear(1, 1, bias=False)  # as a dense float32 matrix, its change would be 64 GiB
    net.weight = torch.nn.Parameter(torch.zeros(1).expand(1 << 17, 1 << 17), requires_grad=False)
    adapter = pf.bind(pf.lora("weight", rank=2), pf.functionalize(net))
    trees = [pf.map_leaves(lambda leaf, key=key: leaf + key + 1.0, adapter.init(0)[1]) for key in range(2)]
    merged, _, tree = pf.merge_adapters(adapter, trees, how="svd", rank=1)
    assert tree["lora"]["weight"]["A"].shape == (1, 1 << 17)
    assert pf.merge_error(merged, tree, adapter, trees)["weight"] < 1


def test_what_cannot_be_compared():
    _, model = every()
    adapter = pf.bind(pf.lora("linear", rank=2), model)
    other = pf.bind(pf.lora("weight", rank=2), pf.functionalize(torch.nn.Linear(4, 3)))
    (tree,), (small,) = trees_of(adapter, 1), trees_of(other, 1)
    with pytest.raises(pf.OptionError, match="one model"):
        pf.merge_error(other, small, adapter, [tree])
    with pytest.raises(pf.OptionError, match="1 numbers"):
        pf.merge_error(adapter, tree, adapter, [tree], [1.0, 2.0])
    with pytest.raises(pf.TreeError):
        pf.merge_error(adapter, small, adapter, [tree])

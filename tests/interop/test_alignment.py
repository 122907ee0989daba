"""Weight matching: copies are found again, search finds no better, and the barrier between networks falls."""

import itertools
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import peft_func as pf
from tests.ensemble.nets import BasicBlock, Bottleneck, ResNet, digits, fit, shake


def mlp(width=48, hidden=4):
    widths = [64, *[width] * hidden]
    layers = [part for i, o in itertools.pairwise(widths) for part in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def trained(make, seed, **options):
    torch.manual_seed(seed)
    return fit(make(), seed, **options)


def distance(first, second):
    return sum(float((first[name] - second[name]).double().square().sum()) for name in first) ** 0.5


def shuffled(params, spec, seed):
    generator = torch.Generator().manual_seed(seed)
    units = {name: params[places[0][0]].shape[places[0][1]] for name, places in spec.items()}
    permutations = {name: torch.randperm(count, generator=generator) for name, count in units.items()}
    return pf.permute(params, spec, permutations), permutations


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "make",
    [mlp, lambda: shake(ResNet(BasicBlock)), lambda: shake(ResNet(Bottleneck))],
    ids=["mlp", "basic", "bottleneck"],
)
def test_a_permuted_copy_is_found_again(make, seed):
    torch.manual_seed(seed)
    net = make().double()
    spec, _ = pf.permutation_spec(net)
    params = pf.functionalize(net).params
    copy, permutations = shuffled(params, spec, seed)
    assert distance(copy, params) > 1
    found, orders = pf.align(copy, params, spec, seed)
    assert all(torch.equal(found[name], params[name]) for name in params)
    assert all(torch.equal(permutations[name][orders[name]], torch.arange(len(orders[name]))) for name in spec)


def test_between_a_trained_network_and_its_permuted_copy_is_no_barrier():
    model = trained(lambda: mlp(32, 2), 0)
    spec, _ = pf.permutation_spec(mlp(32, 2))
    _, _, images, labels = digits()
    copy, _ = shuffled(model.params, spec, 1)

    def loss(params):
        return F.cross_entropy(model(params, images), labels).item()

    aligned, _ = pf.align(copy, model.params, spec)
    assert loss(copy) == pytest.approx(loss(model.params), abs=1e-5)
    assert loss(pf.soup([model.params, copy])) > loss(model.params) + 0.3
    assert loss(pf.soup([model.params, aligned])) == pytest.approx(loss(model.params), abs=1e-6)


def test_one_permutation_is_the_best_of_all():
    torch.manual_seed(3)
    own, other = ({"a": torch.randn(5, 3), "b": torch.randn(2, 5), "c": torch.randn(5)} for _ in range(2))
    spec = {"p": [("a", 0), ("b", 1), ("c", 0)]}
    found, _ = pf.align(own, other, spec)
    everything = [pf.permute(own, spec, {"p": torch.tensor(order)}) for order in itertools.permutations(range(5))]
    assert distance(found, other) == pytest.approx(min(distance(tree, other) for tree in everything), abs=1e-6)


def test_several_permutations_are_a_local_optimum():
    torch.manual_seed(4)
    own, other = ({"a": torch.randn(4, 3), "b": torch.randn(4, 4), "c": torch.randn(2, 4)} for _ in range(2))
    spec = {"p": [("a", 0), ("b", 1)], "q": [("b", 0), ("c", 1)]}
    found, orders = pf.align(own, other, spec)
    assert distance(found, other) <= distance(own, other)
    for name, order in itertools.product(spec, itertools.permutations(range(4))):
        step = {**{n: torch.arange(4) for n in spec}, name: torch.tensor(order)}
        assert distance(pf.permute(found, spec, step), other) >= distance(found, other) - 1e-6
    again = pf.permute(own, spec, orders)
    assert all(torch.equal(again[name], found[name]) for name in found)


def test_one_permutation_at_two_axes_of_a_weight_ends_and_gets_nearer():
    for seed in range(10):
        torch.manual_seed(seed)
        own, other = ({"a": torch.randn(6, 6), "b": torch.randn(6, 2)} for _ in range(2))
        found, _ = pf.align(own, other, {"p": [("a", 0), ("a", 1), ("b", 0)]}, seed)
        assert distance(found, other) <= distance(own, other)


def test_blocks_are_matched_whole():
    torch.manual_seed(0)
    tree = {"conv": torch.randn(4, 2, 3), "linear": torch.randn(5, 12)}
    spec = {"p": [("conv", 0), ("linear", 1, 3)]}
    copy = pf.permute(tree, spec, {"p": torch.tensor([2, 0, 3, 1])})
    found, _ = pf.align(copy, tree, spec)
    assert all(torch.equal(found[name], tree[name]) for name in tree)


def test_the_barrier_between_two_trainings_falls_and_repair_lowers_it_further():
    first, second = trained(mlp, 1), trained(mlp, 2)
    spec, _ = pf.permutation_spec(mlp())
    images, labels, *_ = digits()

    def loss(params):
        return F.cross_entropy(first(params, images), labels).item()

    def barrier(params):
        return loss(params) - (loss(first.params) + loss(second.params)) / 2

    aligned, _ = pf.align(second.params, first.params, spec)
    assert loss(aligned) == pytest.approx(loss(second.params), abs=1e-5)
    plain = pf.soup([first.params, second.params])
    mean = pf.soup([first.params, aligned])
    repaired = pf.repair(first, mean, [first.params, aligned], [images])
    # Measured: 1.48 nats, 0.28 aligned, 0.16 aligned and repaired.
    assert barrier(plain) > 1.0
    assert barrier(mean) < 0.4 * barrier(plain)
    assert barrier(repaired) < 0.75 * barrier(mean)


def test_it_is_pure_and_a_matter_of_the_key():
    torch.manual_seed(0)
    own, other = pf.functionalize(mlp(16, 3)).params, pf.functionalize(mlp(16, 3)).params
    before = {name: tensor.clone() for name, tensor in own.items()}
    spec, _ = pf.permutation_spec(mlp(16, 3))
    state = torch.get_rng_state()
    first, second = pf.align(own, other, spec, 5), pf.align(own, other, spec, 5)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[1][name], second[1][name]) for name in spec)
    assert all(torch.equal(own[name], before[name]) for name in own)
    different = [pf.align(own, other, spec, key)[0] for key in range(6)]
    assert len({round(distance(tree, other), 6) for tree in different}) > 1


def test_without_scipy_the_error_says_how_to_get_it(monkeypatch):
    tree = {"a": torch.randn(3, 2)}
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(pf.MissingExtraError, match=r"pip install 'peft_func\[fusion\]'"):
        pf.align(tree, tree, {"p": [("a", 0)]})


def test_bad_trees():
    tree = {"a": torch.randn(3, 2), "b": torch.randn(2)}
    spec = {"p": [("a", 0)]}
    with pytest.raises(pf.TreeError, match="'b' is in one"):
        pf.align(tree, {"a": tree["a"]}, spec)
    with pytest.raises(pf.TreeError, match=r"\(3, 2\).*\(3, 3\)"):
        pf.align(tree, {**tree, "a": torch.randn(3, 3)}, spec)
    with pytest.raises(pf.TreeError, match="'c'"):
        pf.align(tree, tree, {"p": [("c", 0)]})
    with pytest.raises(pf.TreeError, match="NaN"):
        pf.align({**tree, "a": torch.full((3, 2), torch.nan)}, tree, spec)
    with pytest.raises(pf.OptionError, match="key"):
        pf.align(tree, tree, spec, "0")
    found, orders = pf.align(tree, tree, {})
    assert orders == {}
    assert found["a"] is tree["a"]

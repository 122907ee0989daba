"""A mixture is the weighted sum, structured, and its weights train."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import peft_func as pf
from tests.ensemble.merging import every, trees_of
from tests.transforms.plain import leaves_of, same
from tests.zoo import ZOO

MATRICES = ["linear", "conv", "up", "embed", "gpt", "experts"]
WEIGHTS = [0.4, -0.7, 1.5]


def sums(adapter, trees, weights):
    each = [pf.delta(adapter.apply(adapter.init(0)[0], tree)) for tree in trees]
    return {path: sum(w * d[path] for w, d in zip(weights, each, strict=True)) for path in each[0]}


def methods():
    return {
        "low_rank": pf.chain(pf.lora(MATRICES, rank=2, alpha=3), pf.lora("linear|conv", rank=1, name="more")),
        "formed": pf.chain(
            pf.lora(["linear", "gpt"], rank=2), pf.ia3("linear|conv|up"), pf.gift("gpt", rank=2), pf.train("norm|gpt")
        ),
    }


@pytest.mark.parametrize("kind", ["low_rank", "formed"])
@pytest.mark.parametrize("per", ["adapter", "place"])
@pytest.mark.parametrize("normalize", [None, "softmax"])
def test_it_adds_the_weighted_sum(kind, per, normalize):
    _, model = every()
    adapter = pf.bind(methods()[kind], model)
    trees = trees_of(adapter, 3)
    mixed = pf.bind(pf.mixture(adapter, trees, per=per, init=WEIGHTS, normalize=normalize), model)
    frozen, tree = mixed.init(0)
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    weights = weights.softmax(0) if normalize else weights
    same(pf.delta(mixed.apply(frozen, tree)), sums(adapter, trees, weights))
    assert set(tree["mixture"]) == ({"all"} if per == "adapter" else set(sums(adapter, trees, weights)))
    assert all(leaf.shape == (3,) for leaf in leaves_of(tree))
    assert frozen.keys() == model.params.keys()  # the trees are constants


@pytest.mark.parametrize("normalize", [None, "softmax"])
def test_where_it_starts(normalize):
    _, model = every()
    adapter = pf.bind(pf.lora(MATRICES, rank=2), model)
    trees = trees_of(adapter, 2)
    mixed = pf.bind(pf.mixture(adapter, trees, normalize=normalize), model)
    share = 0.5 if normalize else 0.0
    same(pf.delta(mixed.apply(*mixed.init(0))), sums(adapter, trees, [share, share]))


def test_places_have_weights_of_their_own():
    _, model = every()
    adapter = pf.bind(pf.lora(["linear", "gpt"], rank=2), model)
    trees = trees_of(adapter, 2)
    mixed = pf.bind(pf.mixture(adapter, trees, per="place"), model)
    frozen, tree = mixed.init(0)
    tree = {"mixture": {path: {"weights": torch.tensor(w)} for path, w in PER_PLACE.items()}}
    changes = pf.delta(mixed.apply(frozen, tree))
    for path, weights in PER_PLACE.items():
        same(changes[path], sums(adapter, trees, weights)[path], 1e-6)


PER_PLACE = {"linear.weight": [1.0, 0.0], "gpt.weight": [-0.5, 2.0]}


@pytest.fixture
def net():
    return ZOO["mlp"].build()


def low_rank_mixture(net, **options):
    model = pf.functionalize(net)
    adapter = pf.bind(pf.lora(["0", "2", "4"], rank=2, alpha=3), model)
    mixed = pf.bind(pf.mixture(adapter, trees_of(adapter, 3), init=WEIGHTS, **options), model)
    (x,), _ = ZOO["mlp"].inputs(0)
    frozen, tree = mixed.init(0)

    def loss(tree, x=x):
        return model(mixed.apply(frozen, tree), x).square().sum()

    return mixed, frozen, tree, loss


@pytest.mark.parametrize("per", ["adapter", "place"])
@pytest.mark.parametrize("normalize", [None, "softmax"])
def test_gradients_are_those_of_finite_differences(net, per, normalize):
    _, _, tree, loss = low_rank_mixture(net, per=per, normalize=normalize)
    with pf.densify("error"):  # low-rank adapters stay so
        grads = torch.func.grad(loss)(tree)
    for group, leaf in tree["mixture"].items():
        for k in range(3):
            step = torch.zeros(3, dtype=torch.float64).index_fill(0, torch.tensor(k), 1e-6)
            shifted = [
                {"mixture": {**tree["mixture"], group: {"weights": leaf["weights"] + sign * step}}} for sign in (1, -1)
            ]
            numeric = (loss(shifted[0]) - loss(shifted[1])) / 2e-6
            torch.testing.assert_close(grads["mixture"][group]["weights"][k], numeric, rtol=1e-6, atol=1e-6)


def test_gradients_of_formed_changes(net):
    model = pf.functionalize(net)
    adapter = pf.bind(pf.chain(pf.ia3("0"), pf.train("2")), model)
    mixed = pf.bind(pf.chain(pf.lora("2", rank=2), pf.mixture(adapter, trees_of(adapter, 2))), model)
    (x,), _ = ZOO["mlp"].inputs(0)
    frozen, tree = mixed.init(0)

    def loss(weights):
        both = {**tree, "mixture": {"all": {"weights": weights}}}
        return model(mixed.apply(frozen, both), x).square().sum()

    weights = torch.tensor([0.3, -0.4], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, weights)
    assert torch.autograd.gradgradcheck(loss, weights)


def test_it_runs_under_the_transforms_of_torch(net):
    _, _, tree, loss = low_rank_mixture(net)
    stacked = pf.map_leaves(lambda leaf: torch.stack([leaf, leaf * 2, leaf - 1]), tree)
    values = torch.vmap(torch.func.grad(loss))(stacked)["mixture"]["all"]["weights"]
    for n, one in enumerate(pf.unstack(stacked)):
        same(values[n], torch.func.grad(loss)(one)["mixture"]["all"]["weights"])
    jacobian = torch.func.jacrev(loss)(tree)["mixture"]["all"]["weights"]
    same(jacobian, torch.func.jacfwd(loss)(tree)["mixture"]["all"]["weights"])
    assert torch.func.hessian(loss)(tree)["mixture"]["all"]["weights"]["mixture"]["all"]["weights"].shape == (3, 3)


def test_it_compiles_and_does_not_recompile(net):
    _, _, tree, loss = low_rank_mixture(net, normalize="softmax")
    counter = CompileCounter()
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    same(compiled(tree), loss(tree))
    other = pf.map_leaves(lambda leaf: leaf + 1.0, tree)
    same(compiled(other), loss(other))
    assert counter.frame_count == 1


def test_it_composes_in_a_chain(net):
    model = pf.functionalize(net)
    adapter = pf.bind(pf.lora(["0", "2"], rank=2), model)
    trees = trees_of(adapter, 2)
    method = pf.chain(pf.mixture(adapter, trees, init=[1.0, -1.0]), pf.ia3("2"), pf.train("4"))
    mixed = pf.bind(method, model)
    frozen, tree = mixed.init(0)
    tree = {**tree, "ia3": {"2.weight": {"scale": torch.full((8,), 2.0, dtype=torch.float64)}}}
    exact = sums(adapter, trees, [1.0, -1.0])["2.weight"]
    same(pf.merge(mixed.apply(frozen, tree))["2.weight"], 2 * (model.params["2.weight"] + exact))


def test_the_trees_are_copied(net):
    model = pf.functionalize(net)
    adapter = pf.bind(pf.chain(pf.lora("0", rank=2), pf.train("2")), model)
    trees = trees_of(adapter, 1)
    mixed = pf.bind(pf.mixture(adapter, trees, init=[1.0]), model)
    before = pf.delta(mixed.apply(*mixed.init(0)))
    for leaf in leaves_of(trees[0]):
        leaf.zero_()
    same(pf.delta(mixed.apply(*mixed.init(0))), before, 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = pf.functionalize(nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5)).to(dtype))
    adapter = pf.bind(pf.chain(pf.lora("0", rank=2), pf.ia3("0"), pf.train("1")), model)
    trees = trees_of(adapter, 2)
    method = pf.chain(pf.lora("0", rank=1), pf.mixture(adapter, trees, init=[0.5, 0.25]))
    mixed = pf.bind(method, model)
    frozen, tree = mixed.init(0)
    assert model(mixed.apply(frozen, tree), torch.ones(2, 6, dtype=dtype)).dtype == dtype
    exact = sums(adapter, trees, [0.5, 0.25])
    merged = pf.merge(mixed.apply(frozen, tree))
    for path, value in exact.items():
        expected = model.params[path].double() + value.double()
        assert merged[path].dtype == dtype
        torch.testing.assert_close(merged[path].double(), expected, rtol=2e-2, atol=2e-2)


def test_a_file_needs_the_method_again(net, tmp_path):
    mixed, _, tree, _ = low_rank_mixture(net)
    pf.save(tmp_path / "m.safetensors", mixed, tree)
    with pytest.raises(pf.OptionError, match="method="):
        pf.load(tmp_path / "m.safetensors", mixed.model)
    _, _, loaded = pf.load(tmp_path / "m.safetensors", mixed.model, method=mixed.method)
    same(loaded, tree, 0.0)


def test_bad_options_are_refused(net):
    model = pf.functionalize(net)
    adapter = pf.bind(pf.lora("0", rank=2), model)
    trees = trees_of(adapter, 2)
    for wrong in ({"per": "layer"}, {"normalize": "sum"}, {"init": [1.0]}, {"init": "ab"}, {"name": "a.b"}):
        with pytest.raises(pf.OptionError):
            pf.mixture(adapter, trees, **wrong)
    with pytest.raises(pf.OptionError):
        pf.mixture(adapter, [])
    with pytest.raises(pf.TreeError):
        pf.mixture(adapter, [{}])
    part = pf.mixture(adapter, trees)
    with pytest.raises(pf.OptionError, match=r"0\.weight \(8, 5\)"):
        pf.bind(part, pf.functionalize(nn.Sequential(nn.Linear(5, 7))))

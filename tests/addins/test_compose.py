"""Averages, gates and AdapterFusion against plain PyTorch; stacks and parallel adapters; bad input."""

import copy
import functools
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import peft_func as pf
from tests.laws.conformance import close, perturbed
from tests.zoo import ZOO, randn

NAMES = ["a", "b", "c"]


def plain_change(own, h):
    return F.linear(torch.tanh(F.linear(h, own["down"], own["down_bias"])), own["up"], own["up_bias"])


class BertFusion(nn.Module):
    """Attention over stacked adapter outputs, in batches of matrix products as in the authors' code."""

    def __init__(self, own):
        super().__init__()
        self.own = own

    def forward(self, query, stacked):
        own = self.own
        query_layer = F.linear(query, own["query"], own["query_bias"])
        key_layer = F.linear(stacked, own["key"], own["key_bias"])
        value_layer = F.linear(stacked, own["value"])
        scores = torch.matmul(query_layer.unsqueeze(2), key_layer.transpose(-2, -1)).squeeze(2)
        return torch.matmul(torch.softmax(scores, -1).unsqueeze(2), value_layer).squeeze(2)


def mixed(kind, tree, place, h):
    stacked = torch.stack([plain_change(tree[name][place], h) for name in NAMES]).permute(1, 2, 0, 3)
    if kind == "fusion":
        return BertFusion(tree["fusion"][place])(h, stacked)
    if kind == "average":
        return 0.5 * stacked[:, :, 0] + 0.2 * stacked[:, :, 1] + 0.3 * stacked[:, :, 2]
    gates = torch.softmax(h @ tree["gated"][place]["gate"].mT, -1)
    return torch.einsum("bsn,bsnd->bsd", gates, stacked)


class Block(nn.Module):
    def __init__(self, block, change):
        super().__init__()
        self.block, self.change = block, change

    def forward(self, *args, **kwargs):
        h = self.block(*args, **kwargs)
        return h + self.change(h)


class PostNormOutput(nn.Module):
    """BERT's `output` as the authors run it: query and inputs from behind the norm, the skip from before it."""

    def __init__(self, module, change):
        super().__init__()
        self.module, self.change = module, change

    def forward(self, hidden, skip):
        hidden = self.module.dropout(self.module.dense(hidden))
        query = self.module.LayerNorm(hidden + skip)
        return self.module.LayerNorm(self.change(query) + hidden + skip)


MIXTURES = {
    "fusion": lambda parts: pf.fusion(parts, name="mix"),
    "average": lambda parts: pf.average(parts, weights=[0.5, 0.2, 0.3], name="mix"),
    "gated": lambda parts: pf.gated(parts, name="mix"),
}


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("animal", ["bert", "gpt2", "llama", "vit"])
def test_values_and_gradients_are_those_of_the_authors(animal, kind):
    net = ZOO[animal].build()
    parts = [pf.pfeiffer(rank=2 + i, activation="tanh", name=name) for i, name in enumerate(NAMES)]
    adapter = pf.bind(MIXTURES[kind](parts), pf.functionalize(net))
    frozen, tree = adapter.init(0)
    args, kwargs = ZOO[animal].inputs(3)
    results = []
    for ours in (True, False):
        leaves = pf.map_leaves(lambda t: t.requires_grad_(), perturbed(tree, 1, 0.5))
        if ours:
            out = adapter.model(adapter.apply(frozen, leaves), *args, **kwargs)
        else:
            plain = copy.deepcopy(net)
            for place in adapter.parts[0].modules:
                at = place.removesuffix(".LayerNorm")
                holder, _, name = at.rpartition(".")
                change = functools.partial(mixed, kind, leaves["mix"], place)
                wrap = Block if at == place else PostNormOutput
                setattr(plain.get_submodule(holder), name, wrap(plain.get_submodule(at), change))
            out = plain(*args, **kwargs)
        y = ZOO[animal].output(out)
        (y * y.cos()).sum().backward()
        results.append((y.detach(), pf.map_leaves(lambda t: t.grad, leaves)))
    assert close(results[0], results[1], 1e-10)
    assert not close(results[0][0], ZOO[animal].output(net(*args, **kwargs)), 1e-3)


def small():
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6)).double()
    return net, pf.functionalize(net)


def two(**options):
    return [pf.bottleneck(["0", "2"], rank=2, activation="tanh", name=name, **options) for name in "ab"]


def alone(method, model, seed):
    adapter = pf.bind(method, model)
    return perturbed(adapter.init(seed)[1], seed, 0.5)


def test_fused_adapters_were_trained_alone_and_stay_as_they_are():
    _, model = small()
    a, b = two()
    trained = alone(a, model, 1) | alone(b, model, 2)
    adapter = pf.bind(pf.fusion([a, b]), model)
    frozen, tree = adapter.init(0)
    tree = {"fusion": {**tree["fusion"], **trained}}
    fused, training = pf.partition(tree, r"fusion\.(a|b)\..*")
    assert list(training["fusion"]) == ["fusion"]
    assert set(training["fusion"]["fusion"]["0"]) == {"query", "query_bias", "key", "key_bias", "value"}
    x = randn(4, 5)
    loss = lambda t: model(adapter.apply(frozen, pf.combine(fused, t)), x).square().sum()
    grads = torch.func.grad(loss)(training)
    assert all(leaf.any() for _, leaf in pf.leaves(grads))
    assert [keys for keys, _ in pf.leaves(grads)] == [keys for keys, _ in pf.leaves(training)]


def test_first_values_of_the_attention():
    model = pf.functionalize(nn.Linear(4, 64).double())
    parts = [pf.bottleneck("", rank=2, name=name) for name in "ab"]
    tree = pf.bind(pf.fusion(parts), model).init(0)[1]["fusion"]
    assert not torch.equal(tree["a"][""]["down"], tree["b"][""]["down"])
    own = tree["fusion"][""]
    assert torch.equal(own["value"], torch.full((64, 64), 1e-6, dtype=torch.float64).fill_diagonal_(1.0))
    for leaf in ("query", "key"):
        assert own[leaf].std().item() == pytest.approx(0.02, rel=0.05)
        assert not own[f"{leaf}_bias"].any()
    assert not torch.equal(own["query"], own["key"])


def test_an_average_of_outputs():
    """Each adapter's own output, averaged, where there is one place."""
    _, model = small()
    parts = [pf.bottleneck("2", rank=2, activation="tanh", name=name) for name in "ab"]
    trees = [alone(part, model, seed) for seed, part in enumerate(parts)]
    x = randn(4, 5)
    outputs = [
        model(pf.bind(part, model).apply(model.params, tree), x) for part, tree in zip(parts, trees, strict=True)
    ]
    for weights in ([0.25, 0.75], None):
        adapter = pf.bind(pf.average(parts, weights=weights), model)
        y = model(adapter.apply(model.params, {"average": trees[0] | trees[1]}), x)
        p, q = weights or (0.5, 0.5)
        assert close(y, p * outputs[0] + q * outputs[1], 1e-12)


def test_gates_start_equal():
    _, model = small()
    parts = two()
    trained = alone(parts[0], model, 1) | alone(parts[1], model, 2)
    adapter, mean = pf.bind(pf.gated(parts), model), pf.bind(pf.average(parts), model)
    x, gates = randn(4, 5), adapter.init(0)[1]["gated"]
    ours = model(adapter.apply(model.params, {"gated": {**gates, **trained}}), x)
    assert close(ours, model(mean.apply(model.params, {"average": trained}), x), 1e-12)


def test_a_stack_is_a_chain():
    """What AdapterHub calls Stack: the second adapter gets what the first one made."""
    net, model = small()
    a, b = (pf.bottleneck("2", rank=2, activation="tanh", name=name) for name in "ab")
    adapter = pf.bind(pf.chain(a, b), model)
    tree, x = perturbed(adapter.init(0)[1], 1, 0.5), randn(4, 5)
    y = net(x)
    y = y + plain_change(tree["a"]["2"], y)
    assert close(model(adapter.apply(model.params, tree), x), y + plain_change(tree["b"]["2"], y), 1e-12)


def test_parallel_and_split_are_ensemble_and_route():
    """What AdapterHub calls Parallel: all adapters on one batch; BatchSplit: each on its samples."""
    net, model = small()
    adapter = pf.bind(pf.bottleneck("2", rank=2, activation="tanh"), model)
    members = [perturbed(adapter.init(i)[1], i, 0.5) for i in range(2)]
    x = randn(4, 5)
    each = [net(x) + plain_change(tree["bottleneck"]["2"], net(x)) for tree in members]
    assert close(pf.ensemble(adapter)(model.params, pf.stack(members), x), torch.stack(each), 1e-12)
    y = model(pf.route(adapter, model.params, pf.stack(members), torch.tensor([1, 0, -1, 1])), x)
    assert close(y, torch.stack([each[1][0], each[0][1], net(x)[2], each[1][3]]), 1e-12)


def test_dropout_of_scores_is_for_training_only():
    _, model = small()
    adapter = pf.bind(pf.fusion(two(), dropout=0.5), model)
    tree, x = perturbed(adapter.init(0)[1], 1, 0.5), randn(64, 5)
    weights = adapter.apply(model.params, tree)
    same = pf.bind(pf.fusion(two()), model).apply(model.params, tree)
    assert torch.equal(model.eval()(weights, x), model.eval()(same, x))
    with torch.random.fork_rng():
        assert not torch.equal(model.train()(weights, x), model.train()(same, x))


def test_mixtures_of_mixtures_are_saved(tmp_path):
    _, model = small()
    inner = pf.fusion([*two(), pf.compacter(["0", "2"], n=1, rank=2, name="c")], name="inner")
    adapter = pf.bind(pf.chain(pf.average([inner, *two()], weights=[2, 0.5, 0.5]), pf.lora("0", rank=1)), model)
    tree, x = perturbed(adapter.init(0)[1], 1, 0.5), randn(4, 5)
    pf.save(tmp_path / "a.safetensors", adapter, tree)
    again, frozen, loaded = pf.load(tmp_path / "a.safetensors", model)
    expected = model(adapter.apply(model.params, tree), x)
    assert torch.equal(model(again.apply(frozen, loaded), x), expected)
    module = pf.export_module(adapter, adapter.frozen, tree)
    assert close(module(x), expected, 1e-12)


def test_bad_input():
    _, model = small()
    a, b = two()
    for mixture in (pf.average, pf.gated, pf.fusion):
        with pytest.raises(pf.OptionError, match="takes a list"):
            mixture([])
        with pytest.raises(pf.OptionError, match="takes a list"):
            mixture(a)
        with pytest.raises(pf.OptionError, match="'lora' is none of them"):
            mixture([a, pf.lora("0")])
        with pytest.raises(pf.OptionError, match="'str' is none of them"):
            mixture([a, "b"])
        with pytest.raises(pf.OptionError, match="none of them"):
            mixture([a, pf.chain(b, pf.lora("0"))])
        with pytest.raises(pf.OptionError, match="'group' is none of them"):
            mixture([a, pf.chain(b, name="group")])
        with pytest.raises(pf.OptionError, match="another name than 'a'"):
            pf.bind(mixture([a, a]), model)
        with pytest.raises(pf.OptionError, match=r"'a' and 'b' are at different places.* at 2;"):
            pf.bind(mixture([a, pf.bottleneck("0", rank=2, name="b")]), model)
        with pytest.raises(pf.OptionError, match="the forms parallel, sequential"):
            pf.bind(mixture([a, *two(form="parallel")[1:]]), model)
        with pytest.raises(pf.OptionError, match="without dots"):
            mixture([a, b], name="a.b")
    with pytest.raises(pf.OptionError, match="another name than 'fusion'"):
        pf.bind(pf.fusion([a, pf.bottleneck(["0", "2"], name="fusion")]), model)
    with pytest.raises(pf.OptionError, match="1 weights for 2"):
        pf.average([a, b], weights=[1.0])
    with pytest.raises(pf.OptionError, match="finite"):
        pf.average([a, b], weights=[1.0, float("inf")])
    with pytest.raises(pf.OptionError, match="probability"):
        pf.fusion([a, b], dropout=-0.1)


@pytest.mark.parametrize(
    "change",
    [
        {"methods": []},
        {"methods": 3},
        {"methods": ["bottleneck"]},
        {"methods": [{"kind": "lora", "name": "a", "options": {}}]},
        {"methods": [{"kind": "fusion", "name": "a", "options": {"methods": []}}]},
        {"methods": [{"kind": "bottleneck", "name": "a", "options": {"where": ".*"}}]},
        {"weights": ["1", "2"]},
        {"weights": [1.0]},
        {"weights": None},
        {"extra": 1},
    ],
)
def test_files_of_strangers(change, tmp_path):
    _, model = small()
    adapter = pf.bind(pf.average(two()), model)
    pf.save(tmp_path / "a.safetensors", adapter, adapter.init(0)[1])
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        meta = json.loads(file.metadata()["peft_func"])
        names = list(file.keys())
        tensors = {name: file.get_tensor(name) for name in names}
    (part,) = meta["method"]["chain"]
    part["options"] |= change
    save_file(tensors, tmp_path / "b.safetensors", {"peft_func": json.dumps(meta)})
    with pytest.raises(pf.FileFormatError):
        pf.load(tmp_path / "b.safetensors", model)

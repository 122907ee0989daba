"""Binding: what it takes, what apply checks, and how errors name what they found."""

import pytest
import torch
from torch import nn

import peft_func as pf
from tests.transforms.plain import random_like, same
from tests.zoo import ZOO, randn, seeded


def mlp(method=None):
    model = pf.functionalize(ZOO["mlp"].build())
    adapter = pf.bind(method or pf.chain(pf.lora("0|2", rank=2), pf.train("4")), model)
    return (model, adapter, *adapter.init(0))


def fails(kind, words, function):
    with pytest.raises(pf.PeftFuncError) as caught:
        function()
    assert isinstance(caught.value, kind)
    for word in words:
        assert word in str(caught.value)


NOT_BINDABLE = {
    "a module": (lambda net, model: pf.bind(pf.lora("0"), net), ["Sequential", "pf.functionalize"]),
    "a dict": (lambda net, model: pf.bind(pf.lora("0"), model.params), ["dict", "pf.functionalize"]),
    "arguments swapped": (lambda net, model: pf.bind(model, pf.lora("0")), ["Part"]),
    "a transform": (lambda net, model: pf.bind(pf.Transform(dict, dict), model), ["Transform", "pf.on"]),
    "a constructor": (lambda net, model: pf.bind(pf.lora, model), ["function", "pf.lora"]),
    "a list": (lambda net, model: pf.bind([pf.lora("0")], model), ["list"]),
}


@pytest.mark.parametrize("case", NOT_BINDABLE)
def test_bind_names_what_it_got_and_what_it_takes(case):
    function, words = NOT_BINDABLE[case]
    net = ZOO["mlp"].build()
    fails(ValueError, words, lambda: function(net, pf.functionalize(net)))


SELECT = {
    "nothing": (pf.lora("q_proj"), ["lora", "q_proj"]),
    "near": (pf.lora(["clasifier"], rank=1), ["clasifier", "classifier"]),
    "only biases": (pf.lora(r".*bias"), ["bias", "pf.train"]),
    "only norms": (pf.gift(r".*LayerNorm"), ["gift", "LayerNorm", "pf.train"]),
    "in a chain": (pf.chain(pf.lora("classifier", rank=1), pf.ia3("nope", name="third")), ["third", "nope"]),
    "by type": (pf.lora(pf.of_type(nn.Conv2d)), ["lora", "Conv2d"]),
}


@pytest.mark.parametrize("case", SELECT)
def test_selecting_nothing_names_part_selector_and_neighbours(case):
    method, words = SELECT[case]
    model = pf.functionalize(ZOO["bert"].build())
    fails(ValueError, words, lambda: pf.bind(method, model))


def edit(tree, path, value):
    """A copy of a tree with one leaf replaced, added, or (None) removed."""
    keys = path.split("/")
    copied = {key: dict(node) if isinstance(node, dict) else node for key, node in tree.items()}
    node = copied
    for key in keys[:-1]:
        node[key] = dict(node.get(key, {}))
        node = node[key]
    if value is None:
        del node[keys[-1]]
    else:
        node[keys[-1]] = value
    return copied


META = torch.device("meta")
TREES = {
    "missing leaf": (lambda t: edit(t, "lora/0.weight/A", None), ["lora.0.weight.A"]),
    "missing place": (lambda t: edit(t, "lora/2.weight", None), ["lora.2.weight.A", "lora.2.weight.B"]),
    "missing part": (lambda t: edit(t, "lora", None), ["lora.0.weight.A", "4 leaves"]),
    "missing trained": (lambda t: edit(t, "train/4.bias", None), ["train.4.bias"]),
    "extra leaf": (lambda t: edit(t, "lora/0.weight/C", randn(2)), ["lora.0.weight.C"]),
    "extra part": (lambda t: edit(t, "gift/0/phi", randn(2)), ["gift.0.phi"]),
    "other shape": (lambda t: edit(t, "lora/0.weight/A", randn(3, 5)), ["lora.0.weight.A", "(3, 5)", "(2, 5)"]),
    "stacked": (lambda t: pf.stack([t, t]), ["lora.0.weight.A", "(2, 2, 5)", "(2, 5)"]),
    "integers": (
        lambda t: edit(t, "lora/0.weight/A", torch.ones(2, 5, dtype=torch.int64)),
        ["lora.0.weight.A", "int64"],
    ),
    "booleans": (lambda t: edit(t, "train/4.bias", torch.ones(3, dtype=torch.bool)), ["train.4.bias", "bool"]),
    "complex": (lambda t: edit(t, "lora/0.weight/A", randn(2, 5).to(torch.complex128)), ["lora.0.weight.A", "complex"]),
    "number": (lambda t: edit(t, "lora/0.weight/A", 1.0), ["lora.0.weight.A", "float"]),
    "array": (lambda t: edit(t, "lora/0.weight/A", randn(2, 5).numpy()), ["lora.0.weight.A", "ndarray"]),
    "part's own tree": (lambda t: t["lora"], ["0.weight.A"]),
    "leaf for a place": (lambda t: edit(t, "lora/0.weight", randn(2, 5)), ["lora.0.weight"]),
    "None": (lambda t: None, ["NoneType"]),
    "both trees in a tuple": (lambda t: ({}, t), ["tuple"]),
}


@pytest.mark.parametrize("case", TREES)
def test_apply_refuses_a_tree_of_another_form_and_names_the_leaf(case):
    change, words = TREES[case]
    _, adapter, frozen, tree = mlp()
    fails(ValueError, words, lambda: adapter.apply(frozen, change(tree)))


FROZEN = {
    "missing": (lambda f, t: edit(f, "0.bias", None), KeyError, ["0.bias"]),
    "trained too": (lambda f, t: f | {"4.bias": randn(3)}, KeyError, ["4.bias"]),
    "unknown": (lambda f, t: f | {"5.weight": randn(3)}, KeyError, ["5.weight"]),
    "trees swapped": (lambda f, t: t, KeyError, ["0.weight"]),
    "other shape, adapted": (lambda f, t: f | {"0.weight": randn(5, 8)}, ValueError, ["0.weight", "(5, 8)", "(8, 5)"]),
    "other shape, plain": (lambda f, t: f | {"0.bias": randn(5)}, ValueError, ["0.bias", "(5,)", "(8,)"]),
    "other dtype": (lambda f, t: f | {"0.bias": randn(8).float()}, ValueError, ["0.bias", "float32", "float64"]),
    "on meta, plain": (lambda f, t: f | {"0.bias": randn(8).to(META)}, ValueError, ["0.bias", "meta"]),
    "on meta, adapted": (lambda f, t: f | {"0.weight": randn(8, 5).to(META)}, ValueError, ["0.weight", "meta"]),
    "a number": (lambda f, t: f | {"0.weight": 1.0}, ValueError, ["0.weight", "float"]),
    "None": (lambda f, t: None, ValueError, ["NoneType"]),
}


@pytest.mark.parametrize("case", FROZEN)
def test_apply_or_the_call_refuses_other_base_weights_and_names_them(case):
    change, kind, words = FROZEN[case]
    model, adapter, frozen, tree = mlp()
    fails(kind, words, lambda: model(adapter.apply(change(frozen, tree), tree), randn(2, 5)))


METHODS = {
    "lora": pf.lora("0", rank=2),
    "lora_bias": pf.lora("0", rank=2, bias=True),
    "gift": pf.gift("0", rank=2),
    "ia3": pf.ia3("0"),
    "ia3_input": pf.ia3("0", side="input"),
    "ia3_bias": pf.ia3("0", scale_bias=True),
    "magnitude": pf.magnitude("0"),
    "dora": pf.dora("0", rank=2),
    "chain": pf.chain(pf.lora("0", rank=2), pf.gift("0", rank=2), pf.magnitude("0")),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_tree_on_another_device_is_an_error_that_says_how_to_move_it(method):
    model, adapter, frozen, tree = mlp(METHODS[method])
    away = pf.map_leaves(lambda t: t.to(META), tree)
    with pytest.raises(pf.TreeError) as caught:
        model(adapter.apply(frozen, away), randn(2, 5))
    for word in ("0.", "adapter is on meta", "map_leaves", "to('cpu')"):
        assert word in str(caught.value)


def test_a_trained_weight_on_another_device_is_named():
    model, adapter, frozen, tree = mlp()
    away = edit(tree, "train/4.bias", randn(3).to(META))
    fails(ValueError, ["4.bias", "meta", "cpu"], lambda: model(adapter.apply(frozen, away), randn(2, 5)))


def test_every_leaf_that_differs_is_found_whatever_the_order_of_the_dicts():
    model, adapter, frozen, tree = mlp()
    shuffled = {part: dict(reversed(list(places.items()))) for part, places in reversed(list(tree.items()))}
    backwards = dict(reversed(list(frozen.items())))
    x = randn(2, 5)
    same(model(adapter.apply(backwards, shuffled), x), model(adapter.apply(frozen, tree), x), 0.0)
    assert list(adapter.apply(backwards, shuffled)) == list(model.params)


def test_apply_writes_to_neither_tree():
    _, adapter, frozen, tree = mlp()
    before = ({n: id(t) for n, t in frozen.items()}, {n: list(t) for n, t in tree.items()})
    adapter.apply(frozen, random_like(tree))
    assert before == ({n: id(t) for n, t in frozen.items()}, {n: list(t) for n, t in tree.items()})


@pytest.mark.parametrize("key", [True, 1.0, "0", None])
def test_a_key_is_an_int_or_a_generator(key):
    _, adapter, *_ = mlp()
    fails(ValueError, [repr(key), "adapter.init(0)"], lambda: adapter.init(key))


def test_the_chain_of_nothing_is_the_base():
    model = pf.functionalize(ZOO["mlp"].build())
    adapter = pf.bind(pf.chain(), model)
    frozen, tree = adapter.init(0)
    assert tree == {}
    x = randn(2, 5)
    same(model(adapter.apply(frozen, tree), x), model(model.params, x), 0.0)


def test_an_adapter_bound_to_a_model_serves_the_model_in_other_modes_and_methods():
    net = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)))()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.lora("0", rank=2), model)
    frozen, start = adapter.init(0)
    weights = adapter.apply(frozen, random_like(start))
    x = randn(5, 4)
    hidden = x @ pf.merge(weights)["0.weight"].T + net[0].bias.detach()
    same(model.train()(weights, x), net[1].train()(hidden).detach())


def test_selectors_are_asked_when_a_method_is_bound_and_never_in_a_call():
    asked = []

    def weights(path, info):
        asked.append(path)
        return path.endswith("weight")

    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model = pf.functionalize(net)
    method = pf.chain(pf.lora(weights, rank=2), pf.gift(weights, rank=1, share="none"), pf.around(
        lambda path, info: asked.append(path) or path == "1", lambda tree, inner, x: inner(x)
    ))  # fmt: skip
    adapter = pf.bind(method, model)
    assert asked
    asked.clear()
    frozen, tree = adapter.init(0)
    leaves = pf.map_leaves(lambda leaf: leaf.requires_grad_(), tree)
    for _ in range(2):
        model(adapter.apply(frozen, leaves), torch.ones(2, 4)).sum().backward()
    adapter.model.eval()(adapter.apply(frozen, tree), torch.ones(2, 4))
    pf.ensemble(adapter)(frozen, pf.stack([tree, tree]), torch.ones(2, 4))
    assert asked == []

"""`pf.around`, `pf.before`, `pf.after`: against hooks on the plain module, and what they refuse."""

import copy

import pytest
import torch
from torch import nn

import peft_func as pf
from tests.addins.small import bound, ones, scaled
from tests.zoo import ZOO, randn

F = nn.functional


class Several(nn.Module):
    """Modules that take several arguments and keywords, and return tuples and dicts."""

    def __init__(self):
        super().__init__()
        self.two, self.pair, self.named = Two(), Pair(), Named()

    def forward(self, x, y):
        a = self.two(x, y, factor=3.0)
        b, extra = self.pair(value=a)
        return self.named(b)["value"] + extra


class Two(nn.Module):
    def forward(self, x, y, factor=1.0):
        return x + factor * y


class Pair(nn.Module):
    def forward(self, value):
        return value * 2, value.sum()


class Named(nn.Module):
    def forward(self, x):
        return {"count": 3, "value": x + 1, "other": x}


def test_a_place_knows_its_module_and_where_it_computes():
    seen = []

    def init(place, key):
        seen.append((place.path, type(place.module), place.like.dtype, key))
        return {"a": torch.zeros(place.module.out_features)}

    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).double()
    *_, tree = bound(net, pf.after("0|1", lambda tree, y: y + tree["a"], init, name="bias"), key=5)
    assert {keys: leaf.shape[0] for keys, leaf in pf.leaves(tree)} == {("bias", "0", "a"): 8, ("bias", "1", "a"): 2}
    assert {path for path, *_ in seen} == {"0", "1"}
    assert {dtype for *_, dtype, _ in seen} == {torch.float64}
    assert seen[-2][-1] != seen[-1][-1]  # each place draws from a key of its own


def test_modules_with_several_arguments_keywords_and_outputs():
    net = Several().double()
    x, y = randn(3, 4), randn(3, 4, seed=1)
    method = pf.chain(
        pf.before("two", lambda tree, x, y, factor: ((y, x), {"factor": 2 * factor}), name="swap"),
        pf.before("pair", lambda tree, *, value: value + 10, name="more"),
        pf.after("pair", lambda tree, output: (output[0] - 5, output[1]), name="less"),
        pf.after("named", lambda tree, output: {**output, "value": output["value"] * 7}, name="times"),
    )
    model, adapter, frozen, tree = bound(net, method)
    a = y + 6.0 * x + 10
    assert torch.allclose(model(adapter.apply(frozen, tree), x, y), (a * 2 - 5 + 1) * 7 + a.sum())
    assert torch.equal(model(model.params, x, y), net(x, y))


@pytest.mark.parametrize("animal", ["bert", "llama", "gpt2", "vit"])
def test_against_hooks_on_the_plain_module(animal):
    animal = ZOO[animal]
    net, (args, kwargs) = animal.build(), animal.inputs(0)
    model, adapter, frozen, tree = bound(
        net, pf.around(pf.of_type(nn.LayerNorm) | ["norm", "mlp", "q_proj"], scaled, ones)
    )
    plain = copy.deepcopy(net)
    for path in tree["around"]:
        plain.get_submodule(path).register_forward_hook(lambda module, args, output: output * 1.5)
    assert tree["around"]
    expected = animal.output(plain(*args, **kwargs))
    assert torch.allclose(animal.output(model(adapter.apply(frozen, tree), *args, **kwargs)), expected, atol=1e-12)


def test_one_tree_for_all_places_and_a_named_chain():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    method = pf.chain(pf.around("0|1", scaled, ones, share=True), name="outer")
    model, adapter, frozen, tree = bound(net, method)
    assert [keys for keys, _ in pf.leaves(tree)] == [("outer", "around", "shared", "scale")]
    x = randn(2, 4)
    assert torch.allclose(model(adapter.apply(frozen, tree), x), 1.5 * net[1](1.5 * net[0](x)))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x):
        return x + self.drop(self.mix(x))


@pytest.mark.parametrize("how", ["class", "instance", "built"])
def test_a_module_is_functionalised_itself(how):
    torch.manual_seed(3)
    instance = Residual().double()
    thing = {"class": Residual, "instance": instance, "built": pf.built(lambda place: Residual())}[how]
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double().eval()
    state = torch.get_rng_state()
    model, adapter, frozen, tree = bound(net, pf.after("0|1", thing, name="own"))
    assert torch.equal(state, torch.get_rng_state())
    assert {keys[1:] for keys, _ in pf.leaves(tree)} == {(p, n) for p in "01" for n in ("mix.weight", "mix.bias")}
    first, second = tree["own"]["0"], tree["own"]["1"]
    assert torch.equal(first["mix.weight"], second["mix.weight"]) == (how == "instance")
    x = randn(5, 4)
    hidden = net[0](x)
    hidden = hidden + F.linear(hidden, first["mix.weight"], first["mix.bias"])
    hidden = net[1](hidden)
    expected = hidden + F.linear(hidden, second["mix.weight"], second["mix.bias"])
    weights = adapter.apply(frozen, tree)
    assert torch.allclose(model(weights, x), expected)
    assert not torch.allclose(model.train()(weights, x), expected)  # its dropout follows the model's mode
    if how == "instance":
        assert torch.equal(instance.mix.weight, first["mix.weight"])
        assert instance.mix.weight.grad is None


def test_an_addin_in_bfloat16_computes_as_its_place_does():
    net = nn.Linear(4, 4).bfloat16()
    model, adapter, frozen, tree = bound(net, pf.after("", Residual, name="own"))
    assert {leaf.dtype for _, leaf in pf.leaves(tree)} == {torch.bfloat16}
    assert model(adapter.apply(frozen, tree), torch.ones(2, 4).bfloat16()).dtype is torch.bfloat16


def test_merge_and_state_dict_name_what_cannot_be_merged():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model, adapter, frozen, tree = bound(net, pf.chain(pf.lora("0", rank=1), pf.around("1", scaled, ones, name="ssf")))
    weights = adapter.apply(frozen, tree)
    for call in (pf.merge, model.state_dict):
        with pytest.raises(pf.AddinError, match=r"'ssf' at 1.*export_module"):
            call(weights)
    assert list(pf.delta(weights)) == ["0.weight"]


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: pf.around("nowhere", scaled), pf.SelectorError, "none of 3 modules"),
        (lambda: pf.around("0", 3), pf.OptionError, "no add-in"),
        (lambda: pf.after("0", Residual, ones), pf.OptionError, "leave out init"),
        (lambda: pf.after("0", pf.built(lambda place: 3)), pf.OptionError, "must be an nn.Module"),
        (lambda: pf.around("0", scaled, ones, name="a.b"), pf.OptionError, "without dots"),
        (lambda: pf.around("0", scaled, lambda place, key: {"a": 3}), pf.TreeError, "tensors only"),
    ],
)
def test_what_cannot_be_is_refused(make, error, text):
    with pytest.raises(error, match=text):
        bound(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), make())


def test_an_addin_that_finds_no_tensor_says_so():
    class Numbers(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Count()

        def forward(self, x):
            return self.inner(3) + x

    model, adapter, frozen, tree = bound(Numbers(), pf.before("inner", lambda tree, n: torch.ones(1), name="x"))
    with pytest.raises(pf.AddinError, match="needs a tensor"):
        model(adapter.apply(frozen, tree), torch.ones(1))


class Count(nn.Module):
    def forward(self, n):
        return n

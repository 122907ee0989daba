"""Add-ins of routed batches: each sample with its own adapter, or with none, against a loop over the samples."""

import pytest
import torch
from torch import nn

import peft_func as pf
from tests.addins.small import added, gate, ones, scaled
from tests.zoo import randn

INDEX = [1, -1, 0, 0, -1]


class Net(nn.Module):
    """Its parts give a tensor, a tuple and a dict."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.pair, self.named = nn.Linear(4, 4), nn.Linear(4, 4), Pair(), Named()

    def forward(self, x):
        y, label = self.pair(self.two(torch.tanh(self.one(x))))
        found = self.named(y)
        assert (label, found["kind"]) == ("a label", "a kind")
        return found["y"]


class Pair(nn.Module):
    def forward(self, x):
        return 2 * x, "a label"


class Named(nn.Module):
    def forward(self, x):
        return {"kind": "a kind", "y": x.tanh()}


def grow(tree, output):
    return (output[0] * tree["scale"], *output[1:])


def named(tree, output):
    return {**output, "y": output["y"] * tree["scale"]}


METHODS = {
    "a tensor": pf.around("two", scaled, ones),
    "a tuple": pf.after("pair", grow, ones),
    "a dict": pf.after("named", named, ones),
    # The input of `one` is changed outside of where its output is taken: what the plain run takes there must be gone.
    "across": pf.chain(
        pf.across("one", "two", added, gate, given="output"),
        pf.before("one", lambda tree, x: x * tree["scale"], ones),
    ),
    "with weights": pf.chain(pf.around("two", scaled, ones), pf.lora("one", rank=2), pf.after("pair", grow, ones)),
}


def routed(method, index):
    model = pf.functionalize(Net().double())
    adapter = pf.bind(method, model)
    frozen, tree = adapter.init(0)
    trees = [pf.map_leaves(lambda leaf, k=k: leaf + 0.1 * k + 0.2, tree) for k in (1, 2)]
    weights = pf.route(adapter, frozen, pf.stack(trees), torch.tensor(index))
    alone = {-1: model.params} | {k: adapter.apply(frozen, own) for k, own in enumerate(trees)}
    return model, weights, alone


@pytest.mark.parametrize("index", [INDEX, [0, 1, 1, 0, 1], [-1, -1, 1, -1, -1]], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_sample_has_its_own(method, index):
    model, weights, alone = routed(METHODS[method], index)
    x = randn(5, 4)
    expected = torch.cat([model(alone[k], x[i : i + 1]) for i, k in enumerate(index)])
    assert torch.allclose(model(weights, x), expected, atol=1e-12)
    far = (model(alone[0], x) - model(alone[1], x)).abs().amin(-1)
    assert (far > 1e-6).all()
    assert ((model(alone[1], x) - model(alone[-1], x)).abs().amin(-1) > 1e-6).all()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (pf.after("named", lambda tree, o: {**o, "y": o["y"][..., :2] * tree["scale"]}, ones), r"\(1, 2\) of \(1, 4\)"),
        (pf.after("pair", lambda tree, o: (*grow(tree, o), "more"), ones), "another structure"),
    ],
)
def test_what_has_no_place_for_the_plain_base_is_refused(method, message):
    x = randn(5, 4)
    model, weights, _ = routed(method, INDEX)
    with pytest.raises(pf.RouteError, match=rf"(?s)at '(named|pair)' an add-in .*{message}"):
        model(weights, x)


def test_another_shape_is_no_error_where_every_sample_has_an_adapter():
    method = pf.after("named", lambda tree, o: {**o, "y": o["y"][..., :2] * tree["scale"]}, ones)
    model, weights, alone = routed(method, [0, 1, 1])
    x = randn(3, 4)
    expected = torch.cat([model(alone[k], x[i : i + 1]) for i, k in enumerate([0, 1, 1])])
    assert torch.allclose(model(weights, x), expected, atol=1e-12)

"""Small add-ins, a net that is bound in one line, and sequences with padding."""

import torch

import peft_func as pf
from tests.zoo import ids

X = ids(2, 5, high=32)
MASKS = {
    "none": None,
    "left": torch.tensor([[0, 0, 1, 1, 1], [1] * 5]),
    "right": torch.tensor([[1, 1, 1, 0, 0], [1] * 5]),
}


def ones(place, key):
    return {"scale": 1.5 * torch.ones((), dtype=place.like.dtype)}


def scaled(tree, inner, *args, **kwargs):
    return inner(*args, **kwargs) * tree["scale"]


def bound(net, method, key=0):
    model = pf.functionalize(net)
    adapter = pf.bind(method, model)
    frozen, tree = adapter.init(key)
    return model, adapter, frozen, tree


def gate(place, key):
    return {"gate": 0.5 * torch.ones((), dtype=place.like.dtype)}


def added(tree, taken, here):
    return here + tree["gate"] * taken

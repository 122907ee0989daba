"""Tensors under their paths in a module, whatever the paths are called."""

import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.stateless import _reparametrize_module

import peft_func as pf
from peft_func.functional.containers import Container, NormContainer, hold_buffer, hold_parameter


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.note = "mine"

    def forward(self, x):
        return x


# What every module has as methods or attributes may stand anywhere but at the top, where only `train` may.
PATHS = ["lora.encoder.0.weight.A", "lora.encoder.0.weight.B", "train.0.bias", "part.forward.eval", "part._modules.x"]


def test_a_leaf_is_a_parameter_under_its_path():
    root = Net()
    places = {path: hold_parameter(root, path, torch.full((2,), float(i))) for i, path in enumerate(PATHS)}
    assert [name for name, _ in root.named_parameters()] == list(root.state_dict()) == PATHS
    for i, (path, place) in enumerate(places.items()):
        assert place.get() is dict(root.named_parameters())[path]
        assert isinstance(place.get(), nn.Parameter)
        assert torch.equal(place.get(), torch.full((2,), float(i)))
    again = Net()
    for path in PATHS:
        hold_parameter(again, path, torch.zeros(2))
    again.load_state_dict(root.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), root.parameters(), strict=True))
    twin = pickle.loads(pickle.dumps(root))
    assert [name for name, _ in twin.named_parameters()] == PATHS


def test_a_place_sees_what_is_put_there_later():
    root = Net()
    place = hold_parameter(root, "part.a", torch.ones(2))
    first = place.get()
    other = torch.zeros(2)
    with _reparametrize_module(root, {"part.a": other}):
        assert place.get() is other
    assert place.get() is first
    root.double()
    assert place.get().dtype is torch.float64


def test_buffers_are_saved_or_not():
    root = Net()
    kept = hold_buffer(root, "net.norm.running_mean", torch.ones(3), persistent=True)
    lost = hold_buffer(root, "net.rope.inv_freq", torch.ones(2), persistent=False)
    assert list(root.state_dict()) == ["net.norm.running_mean"]
    assert [name for name, _ in root.named_buffers()] == ["net.norm.running_mean", "net.rope.inv_freq"]
    root.double()
    assert kept.get().dtype is lost.get().dtype is torch.float64
    assert list(root.parameters()) == []


@pytest.mark.parametrize("part", ["forward", "parameters", "note", "_modules"])
def test_a_part_that_would_hide_something_is_refused(part):
    root = Net()
    with pytest.raises(pf.OptionError, match=rf"'{part}' would hide Net\.{part}.*name='my_{part}'"):
        hold_parameter(root, f"{part}.weight.A", torch.ones(1))
    assert list(root.parameters()) == []


def test_weights_of_norms_are_held_where_trainer_looks_for_norms():
    from transformers.trainer_pt_utils import get_parameter_names

    root = Net()
    hold_parameter(root, "train.norm.weight", torch.ones(2), NormContainer)
    hold_parameter(root, "train.linear.weight", torch.ones(2))
    assert get_parameter_names(root, [nn.LayerNorm]) == ["train.linear.weight"]
    kinds = {name: type(module) for name, module in root.named_modules()}
    assert kinds["train.norm"] is NormContainer
    assert kinds["train"] is kinds["train.linear"] is Container
    assert "NormContainer()" in repr(root)

"""A tour of the modules: order, names, classes, own values, children; as records and as text."""

import pytest
import torch
from torch import nn

import peft_func as pf
from tests.zoo import ZOO, Shared, Tied, seeded


class Small(nn.Module):
    """The module tree of GIFt's notebook."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.nn_seq = nn.Sequential(nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10))


def recursion(module, name="", prefix=""):
    """GIFt's iterator, written down: the module, then its children with all below them."""
    yield name, prefix, type(module).__name__, bool(list(module.children()))
    for child, inner in module.named_children():
        yield from recursion(inner, child, f"{prefix}.{child}" if prefix else child)


def test_it_tells_what_the_notebook_tells():
    stops = [(s.name, s.path, s.class_name, s.has_children) for s in pf.tour(Small())]
    assert stops[1:] == [
        ("conv1", "conv1", "Conv2d", False),
        ("pool", "pool", "MaxPool2d", False),
        ("fc1", "fc1", "Linear", False),
        ("nn_seq", "nn_seq", "Sequential", True),
        ("0", "nn_seq.0", "Linear", False),
        ("1", "nn_seq.1", "ReLU", False),
        ("2", "nn_seq.2", "Linear", False),
    ]
    assert stops[0] == ("", "", "Small", True)


@pytest.mark.parametrize("name", ["mlp", "gpt2", "vit"])
def test_order_and_counts_are_those_of_the_modules(name):
    net = ZOO[name].build()
    tour = pf.tour(net)
    assert [(s.name, s.path, s.class_name, s.has_children) for s in tour] == list(recursion(net))
    for stop in tour:
        own = dict(net.get_submodule(stop.path).named_parameters(recurse=False))
        assert stop.count == sum(p.numel() for p in own.values())
        assert len(stop.parameters) == len(own)
    assert tour.total == sum(p.numel() for p in net.parameters())
    assert len(tour) == len(list(net.modules()))


def test_a_functional_model_has_the_tour_of_its_module():
    net = Small()
    assert pf.tour(pf.functionalize(net)) == pf.tour(net)


def test_what_is_tied_or_shared_counts_once_in_the_total():
    for build in (Tied, Shared):
        net = seeded(build)()
        tour = pf.tour(net)
        assert tour.total == sum(p.numel() for p in net.parameters())
        assert len({s.path for s in tour}) == len(tour) == len(list(net.modules()))
    assert any(s.aliases for s in pf.tour(seeded(Shared)()))


def test_the_text_has_one_aligned_line_a_module():
    lines = str(pf.tour(Small())).splitlines()
    assert lines[0].split("  ")[0] == "path"
    assert lines[2].split() == ["(the", "net)", "Small", "yes", "0"]
    assert lines[5].split() == ["fc1", "fc1", "Linear", "48,120"]
    assert lines[-1] == "8 modules, 59,590 values"
    assert len({len(line) for line in lines[:-1]}) == 1


def test_stops_are_frozen_records():
    tour = pf.tour(Small())
    with pytest.raises(AttributeError):
        next(iter(tour)).name = "x"
    with pytest.raises(AttributeError):
        tour.total = 0


def test_a_net_on_meta_can_be_toured():
    with torch.device("meta"):
        net = Small()
    assert pf.tour(net).total == 59_590


@pytest.mark.parametrize("thing", [None, {}, "net", nn.Linear])
def test_other_things_are_refused(thing):
    with pytest.raises(pf.OptionError, match="tour takes"):
        pf.tour(thing)

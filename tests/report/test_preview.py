"""What a method would get, shown before it is bound: the rows, their order, what would be refused."""

import functools

import pytest
import torch
from torch import nn

import peft_func as pf


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.fc = nn.Linear(6, 6)
        self.gamma = nn.Parameter(torch.ones(6))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(3, 6)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(6, 4)


LORA = functools.partial(pf.lora, rank=2)


@pytest.fixture(scope="module")
def model():
    return pf.functionalize(Net())


def rows(method, model):
    return [(row.path, row.class_name, row.cap, row.method, row.parameters) for row in pf.preview(method, model)]


def test_rows_are_in_the_order_of_the_walk_with_the_pair_that_takes_each(model):
    method = pf.first_match(
        (["head"], pf.train),
        (["norm"], None),
        (pf.class_named("Linear"), LORA),
        (pf.parameter(["gamma"]), pf.train, {"name": "gammas"}),
    )
    assert rows(method, model) == [
        ("stem", "Linear", "2", "lora", ("stem.weight",)),
        ("blocks.0.gamma", "Block", "3", "gammas", ("blocks.0.gamma",)),
        ("blocks.0.norm", "LayerNorm", "1", "frozen", ()),
        ("blocks.0.fc", "Linear", "2", "lora", ("blocks.0.fc.weight",)),
        ("blocks.1.gamma", "Block", "3", "gammas", ("blocks.1.gamma",)),
        ("blocks.1.norm", "LayerNorm", "1", "frozen", ()),
        ("blocks.1.fc", "Linear", "2", "lora", ("blocks.1.fc.weight",)),
        ("head", "Linear", "0", "train", ("head.weight", "head.bias")),
    ]


def test_what_it_shows_is_what_bind_does(model):
    inner = pf.first_match((["norm"], None), (["fc"], LORA), (pf.parameter(["gamma"]), pf.train))
    method = pf.chain(
        pf.first_match((["blocks.1"], inner), (["stem"], pf.gift(".*", rank=1))), pf.train("head", name="t")
    )
    shown = {}
    for row in pf.preview(method, model):
        for name in row.parameters:
            shown.setdefault(row.method, []).append(name)
    bound = {part.keys[-1]: part.paths for part in pf.bind(method, model).parts}
    assert {name: set(paths) for name, paths in shown.items()} == {name: set(paths) for name, paths in bound.items()}


def test_nested_pairs_are_numbered_below_theirs(model):
    inner = pf.first_match((["norm"], None), (["fc"], LORA))
    assert rows(pf.first_match((["stem"], pf.train), (["1"], inner)), model) == [
        ("stem", "Linear", "0", "train", ("stem.weight", "stem.bias")),
        ("blocks.1", "Block", "1", "first_match", ()),
        ("blocks.1.norm", "LayerNorm", "1.0", "frozen", ()),
        ("blocks.1.fc", "Linear", "1.1", "lora", ("blocks.1.fc.weight",)),
    ]


def test_a_plain_method_has_a_row_for_each_of_its_parameters(model):
    assert rows(pf.chain(pf.lora(["fc"], rank=1), pf.train("head")), model) == [
        ("blocks.0.fc.weight", "Linear", "", "lora", ("blocks.0.fc.weight",)),
        ("blocks.1.fc.weight", "Linear", "", "lora", ("blocks.1.fc.weight",)),
        ("head.weight", "Linear", "", "train", ("head.weight",)),
        ("head.bias", "Linear", "", "train", ("head.bias",)),
    ]
    assert rows(pf.chain(), model) == []


def test_what_bind_would_refuse_is_shown_and_not_refused(model):
    method = pf.first_match((["norm"], LORA), (["haed"], pf.train), (["1"], pf.first_match((["nope"], pf.train))))
    found = pf.preview(method, model)
    assert [row.method for row in found] == ["nothing", "first_match"]
    assert found.idle == (("1", "['haed']"), ("2.0", "['nope']"))
    text = str(found)
    assert "pair 1, ['haed'], gets nothing" in text
    assert "pair 2.0, ['nope'], gets nothing" in text
    assert "0 of 14 parameters; the others stay frozen" in text
    with pytest.raises(pf.SelectorError):
        pf.bind(method, model)


def test_a_nested_pair_is_idle_only_if_it_gets_nothing_anywhere(model):
    inner = pf.first_match((pf.path(r"blocks\.0\.fc"), LORA), (pf.path(r"blocks\.1\.fc"), pf.train))
    method = pf.first_match((pf.class_named("Block"), inner))
    assert pf.preview(method, model).idle == ()
    assert [part.paths[0] for part in pf.bind(method, model).parts] == ["blocks.0.fc.weight", "blocks.1.fc.weight"]


def test_the_text_has_a_row_for_each_place(model):
    found = pf.preview(pf.first_match((["blocks"], pf.train), (["head"], LORA)), model)
    lines = str(found).splitlines()
    assert lines[0].split() == ["place", "class", "pair", "check", "method", "parameters"]
    assert set(lines[1]) == {"-"}
    assert lines[2].split("  ")[-1].strip() == "0.gamma, 0.norm.weight, 0.norm.bias, 0.fc.weight, and 6 more"
    assert lines[3].split() == ["head", "Linear", "1", "['head']", "lora", "weight"]
    assert lines[4] == "11 of 14 parameters; the others stay frozen"
    assert not any(line != line.rstrip() for line in lines)
    whole = str(pf.preview(pf.first_match(("", pf.train)), model))
    assert "(the net)" in whole


def test_nothing_happens(model):
    before = {name: tensor.clone() for name, tensor in model.params.items()}
    state = torch.random.get_rng_state()
    called = []
    method = pf.first_match((["head"], lambda where: called.append(where) or pf.train(where)))
    first = pf.preview(method, model)
    assert first == pf.preview(method, model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.params.items())
    assert torch.equal(state, torch.random.get_rng_state())


def test_other_things_are_refused(model):
    with pytest.raises(pf.OptionError, match="preview takes a method"):
        pf.preview(pf.train, model)
    with pytest.raises(pf.OptionError, match=r"pf\.functionalize"):
        pf.preview(pf.train("head"), Net())
    with pytest.raises(pf.SelectorError, match="nope"):
        pf.preview(pf.train("nope"), model)

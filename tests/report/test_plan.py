"""The plan tells, place by place, what a training step would really do."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import peft_func as pf
from tests.weights.test_graph import in_place


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.wide, self.deep = nn.Linear(64, 256), nn.Linear(256, 64)
        self.conv = nn.Conv1d(64, 64, 3, padding=1)

    def forward(self, tokens):
        h = self.embed(tokens)
        h = h + self.deep(self.wide(h).relu())
        return self.conv(self.deep(self.wide(h).relu()).mT)


def bound(method):
    return pf.bind(method, pf.functionalize(Net()))


def test_every_adapted_place_has_its_rows_in_the_order_of_the_calls():
    adapter = bound(pf.lora(".*", rank=4))
    plan = pf.plan(adapter, torch.zeros(40, 64, dtype=torch.int64))
    names = [row.path for row in plan.rows]
    assert names[:4] == ["wide.weight", "deep.weight"] * 2
    assert sorted(names[4:]) == ["conv.weight", "embed.weight"]
    assert plan.rows[0].shape[:4] == (2560, 64, 256, 4)
    assert {row.graph for row in plan.rows[:4]} == {"formed"}
    assert [row.reason for row in plan.rows if row.path == "conv.weight"] == ["a convolution: plain operators"]
    text = str(plan).splitlines()
    assert text[0].split() == ["weight", "tokens", "in", "out", "rank", "graph", "factored", "formed", "because"]
    assert len(text) == 2 + len(names) + 1
    assert all(line == line.rstrip() for line in text)


@pytest.mark.parametrize("graph", ["auto", "composed", "factored", "formed"])
@pytest.mark.parametrize("method", [pf.lora("wide", rank=4), pf.gift("wide", rank=4)], ids=["lora", "gift"])
def test_the_counts_are_those_of_a_step(graph, method):
    adapter = bound(method)
    frozen, trainable = adapter.init(0)
    leaves = pf.map_leaves(lambda leaf: leaf.requires_grad_(), trainable)
    x = torch.zeros(40, 64, dtype=torch.int64)
    with pf.graph(graph):
        rows = pf.plan(adapter, x).rows

    def count(weights):
        with pf.graph(graph), FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as flops:
            adapter.model(weights, x).sum().backward()
        return flops.get_total_flops()

    # The base's own products: those of a step that needs the same gradients of activations, without the low-rank part.
    shift = dict(adapter.model.params)
    embedded = shift["embed.weight"].clone().requires_grad_()
    total = count(adapter.apply(frozen, leaves))
    base = count({**shift, "embed.weight": embedded})
    told = sum(row.formed if row.graph == "formed" else row.factored for row in rows)
    first = rows[0]
    # The first call reads embeddings, which need no gradient here: its base product has no backward in our step.
    T, i, o = first.shape[:3]
    skipped = 0 if first.shape.needs_input else T * i * o
    assert total == base - 2 * skipped + 2 * told


def test_nothing_is_kept_and_dropout_is_seen():
    adapter = bound(pf.lora("wide", rank=4, dropout=0.5))
    state = torch.get_rng_state()
    with torch.no_grad():
        rows = pf.plan(pf.bind(adapter.method, adapter.model.eval()), torch.zeros(40, 64, dtype=torch.int64)).rows
    assert [row.graph for row in rows] == ["formed"] * 2
    train = pf.plan(pf.bind(adapter.method, adapter.model.train()), torch.zeros(40, 64, dtype=torch.int64)).rows
    assert [row.graph for row in train] == ["factored"] * 2
    assert train[0].formed is None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(value.grad is None for value in adapter.model.params.values())


def test_the_page_on_speed_shows_what_is_printed(capsys):
    text = (Path(__file__).parents[2] / "docs" / "speed.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    exec(code, {})
    assert capsys.readouterr().out.strip() == re.findall(r"```text\n(.*?)```", text, re.DOTALL)[0].strip()

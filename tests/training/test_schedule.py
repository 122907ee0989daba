"""Schedules are data; selectors reach into adapters' trees by what is known of the base weights."""

import bisect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import peft_func as pf

HEAD, LAST = pf.path(r".*head\..*"), pf.path(r".*blocks\.1\..*")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(2)])
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@given(st.dictionaries(st.integers(1, 30), st.sampled_from([".*", "a", "b", None]), max_size=5), st.integers(0, 40))
def test_the_entry_with_the_largest_boundary_counts(later, step):
    entries = {0: "first", **later}
    schedule = pf.schedule(entries)
    ordered = sorted(entries)
    assert schedule.boundaries == tuple(ordered)
    wanted = entries[ordered[bisect.bisect_right(ordered, step) - 1]]
    chosen = pf.partition({name: torch.zeros(1) for name in ("a", "b", "first")}, schedule(step))[0]
    assert set(chosen) == ({"a", "b", "first"} if wanted == ".*" else {wanted} - {None})


def test_it_changes_where_an_entry_begins_that_is_another():
    schedule = pf.schedule({10: ".*", 0: HEAD, 5: HEAD | LAST, 7: HEAD | LAST})
    assert [step for step in range(20) if schedule.changes_at(step)] == [0, 5, 10]
    assert not schedule.changes_at(5.5)
    assert schedule(9.99) == HEAD | LAST
    assert schedule(10.0) == pf.path(".*")


def test_it_is_compared_and_shown_by_its_entries():
    entry = (HEAD | LAST) & ~pf.ndim(1) | ["bias"]
    one, other = (pf.schedule({5: entry, 0: None}) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert one != pf.schedule({0: None})
    head, last = (repr(selector.pattern.pattern) for selector in (HEAD, LAST))
    assert repr(one) == f"schedule({{0: None, 5: ({head} | {last}) & ~NDim(ndim=1) | Suffix(name='bias')}})"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({5: ".*"}, r"nothing about step 0; it begins at 5: add \{0"),
        ({}, "nothing about step 0"),
        ({0: ".*", -1: ".*"}, "not at -1"),
        ({0: ".*", 1.5: ".*"}, "not at 1.5"),
        ({0: ".*", True: ".*"}, "not at True"),
        ([".*"], "takes a dict"),
    ],
)
def test_bad_schedules_are_refused(entries, message):
    with pytest.raises(pf.OptionError, match=message):
        pf.schedule(entries)


def test_entries_must_be_selectors():
    with pytest.raises(pf.SelectorError, match="regular expression"):
        pf.schedule({0: "("})
    with pytest.raises(pf.SelectorError, match="does not select"):
        pf.schedule({0: 3})


@pytest.mark.parametrize("step", [-1, "0", True, None, float("nan")])
def test_steps_are_numbers_from_0_on(step):
    with pytest.raises(pf.OptionError, match="from 0 on"):
        pf.schedule({0: ".*"})(step)


METHOD = pf.chain(
    pf.lora(r"blocks\.\d\.0\.weight", rank=2),
    pf.chain(pf.train(r"head\..*|blocks\.\d\.1\..*"), name="mine"),
    pf.gift(r"blocks\.\d\.0\.weight", rank=2),
)


def paths(tree):
    return [".".join(keys) for keys, _ in pf.leaves(tree)]


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        (r"head", ["mine.train.head.weight", "mine.train.head.bias"]),
        (["0.weight"], [f"lora.blocks.{i}.0.weight.{leaf}" for i in range(2) for leaf in "AB"]),
        (pf.of_type(nn.LayerNorm) & pf.index(1), ["mine.train.blocks.1.1.weight", "mine.train.blocks.1.1.bias"]),
        (pf.ndim(2) & pf.index(0), ["lora.blocks.0.0.weight.A", "lora.blocks.0.0.weight.B"]),
    ],
)
def test_leaves_are_selected_by_the_weights_that_they_are_for(where, wanted):
    adapter = pf.bind(METHOD, pf.functionalize(Net()))
    chosen, rest = pf.partition(adapter.init(0)[1], pf.leaves_for(adapter, where))
    assert sorted(paths(chosen)) == sorted(wanted)
    assert len(paths(rest)) + len(wanted) == len(adapter.spec)


def test_a_regex_over_whole_paths_fits_base_weights_and_adapters():
    model = pf.functionalize(Net())
    assert paths(pf.partition(model.params, HEAD)[0]) == ["head.weight", "head.bias"]
    tree = pf.bind(METHOD, model).init(0)[1]
    assert paths(pf.partition(tree, HEAD)[0]) == ["mine.train.head.weight", "mine.train.head.bias"]


def test_leaves_of_add_ins_are_for_their_modules():
    def init(place, key):
        return {"scale": torch.ones(4)}

    around = pf.after(r"blocks\.\d", lambda tree, output: output * tree["scale"], init)
    adapter = pf.bind(pf.chain(around, pf.train("head")), pf.functionalize(Net()))
    chosen = pf.partition(adapter.init(0)[1], pf.leaves_for(adapter, r"blocks\.1"))[0]
    assert [path.endswith("blocks.1.scale") for path in paths(chosen)] == [True]


def test_leaves_for_says_what_is_near():
    adapter = pf.bind(METHOD, pf.functionalize(Net()))
    with pytest.raises(pf.SelectorError, match=r"none of \d+ weights of the adapter.*head\.weight"):
        pf.leaves_for(adapter, "heads")
    with pytest.raises(pf.OptionError, match=r"bound adapter.*pf\.bind"):
        pf.leaves_for(METHOD, "head")

"""Partition and combine: the same leaves, absent keys, and conflicts that are named."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import peft_func as pf

KEYS = st.sampled_from(["a", "b", "a.b", "lora", "layers.2.q", "layers.10.q", "0", "A", "B", "é", " ", ""])
TREES = st.recursive(
    st.builds(lambda n: torch.arange(float(n)), st.integers(0, 3)),
    lambda inner: st.dictionaries(KEYS, inner, min_size=1, max_size=4),
    max_leaves=12,
).filter(lambda tree: isinstance(tree, dict))
WHERE = st.sampled_from(
    [".*", "nothing", r".*\.A", "a", ["a"], ["A", "q"], pf.ndim(1), ~pf.suffix("b"), pf.index(2), pf.glob("lora*")]
) | st.integers(0, 3).map(lambda n: lambda path, info: info.shape == (n,))


def flatten(tree, prefix=()):
    found = {}
    for key, value in tree.items():
        found.update(flatten(value, (*prefix, key)) if isinstance(value, dict) else {(*prefix, key): value})
    return found


def same(left, right) -> bool:
    left, right = flatten(left), flatten(right)
    return left.keys() == right.keys() and all(left[keys] is right[keys] for keys in left)


def shape_of(tree):
    return [(key, shape_of(value) if isinstance(value, dict) else id(value)) for key, value in tree.items()]


@settings(max_examples=150)
@given(TREES, WHERE)
def test_combine_undoes_partition_by_identity_and_nothing_is_mutated(tree, where):
    before = shape_of(tree)
    chosen, rest = pf.partition(tree, where)
    assert same(pf.combine(chosen, rest), tree)
    assert same(pf.combine(rest, chosen), tree)
    halves = shape_of(chosen), shape_of(rest)
    whole = pf.combine(chosen, rest)
    assert whole == tree
    assert (shape_of(chosen), shape_of(rest)) == halves
    assert shape_of(tree) == before


@settings(max_examples=100)
@given(TREES, WHERE)
def test_a_partition_is_disjoint_and_keys_are_absent_not_none(tree, where):
    def check(half):
        for value in half.values():
            assert value is not None
            if isinstance(value, dict):
                assert value
                check(value)

    chosen, rest = pf.partition(tree, where)
    check(chosen)
    check(rest)
    assert not flatten(chosen).keys() & flatten(rest).keys()
    again, none = pf.partition(chosen, where)
    assert same(again, chosen)
    assert none == {}


@settings(max_examples=60)
@given(TREES, WHERE)
def test_each_half_keeps_the_order_of_the_tree(tree, where):
    order = list(flatten(tree))
    for half in pf.partition(tree, where):
        found = list(flatten(half))
        assert found == sorted(found, key=order.index)


@settings(max_examples=60)
@given(TREES, WHERE, WHERE)
def test_combine_takes_any_number_of_trees(tree, first, second):
    one, rest = pf.partition(tree, first)
    two, three = pf.partition(rest, second)
    assert same(pf.combine(three, one, two), tree)
    assert same(pf.combine(pf.combine(three, one), two), pf.combine(three, pf.combine(one, two)))


def test_combine_of_nothing_is_the_empty_tree():
    assert pf.combine() == {}
    assert pf.combine({}, {}) == {}
    assert pf.partition({}, ".*") == ({}, {})


def test_combine_makes_new_dicts():
    tree = {"a": {"b": torch.ones(1)}}
    whole = pf.combine(tree)
    whole["a"]["c"] = torch.ones(1)
    half, _ = pf.partition(tree, ".*")
    half["a"]["d"] = torch.ones(1)
    assert list(tree["a"]) == ["b"]


@pytest.mark.parametrize(
    ("left", "right", "name"),
    [
        ({"a": {"b.c": 1}}, {"a": {"b.c": 1}}, r"'a\.b\.c'"),
        ({"x": 1, "a": 1}, {"y": 1, "a": 1}, "'a'"),
        ({"a": 1}, {"a": {"b": 1}}, r"'a\.b'"),
        ({"a": {"b": 1}}, {"a": 1}, "'a"),
        ({"a": 1}, {"a": {"b": {"c": 1}}}, r"'a\.b\.c'"),
        ({"a": {"b": {"c": 1}}}, {"a": {"b": 1}}, r"'a\.b"),
    ],
)
def test_a_conflict_names_the_path_and_mutates_nothing(left, right, name):
    fill = lambda tree: {k: fill(v) if isinstance(v, dict) else torch.ones(1) for k, v in tree.items()}
    left, right = fill(left), fill(right)
    before = shape_of(left), shape_of(right)
    with pytest.raises(pf.TreeError, match=name) as caught:
        pf.combine(left, right)
    assert isinstance(caught.value, ValueError)
    assert (shape_of(left), shape_of(right)) == before


def test_the_same_tensor_at_the_same_path_is_a_conflict_too():
    tree = {"a": torch.ones(1)}
    with pytest.raises(pf.TreeError, match="'a'"):
        pf.combine(tree, tree)


def test_a_leaf_below_a_tree_is_not_said_to_be_in_both():
    with pytest.raises(pf.TreeError) as caught:
        pf.combine({"a": {"b": torch.ones(1)}}, {"a": torch.ones(1)})
    assert "both trees hold" not in str(caught.value)


def test_a_dotted_key_and_a_nested_one_are_two_leaves():
    tree = {"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1)}
    chosen, rest = pf.partition(tree, lambda path, info: path == "a.b")
    assert same(chosen, tree)
    assert rest == {}
    assert same(pf.combine({"a": tree["a"]}, {"a.b": tree["a.b"]}), tree)


def test_selectors_see_paths_shapes_and_dtypes_of_leaves():
    tree = {"lora": {"0.weight": {"A": torch.ones(2, 4, dtype=torch.float16), "B": torch.zeros(4, 2)}}}
    seen = []
    pf.partition(tree, lambda path, info: seen.append((path, info)))
    (a, a_info), (b, b_info) = seen
    assert (a, a_info.path, a_info.shape, a_info.dtype) == ("lora.0.weight.A",) * 2 + ((2, 4), torch.float16)
    assert (b, b_info.shape, b_info.ndim, b_info.modules, b_info.aliases) == ("lora.0.weight.B", (4, 2), 2, (), ())


@pytest.mark.parametrize("where", [r".*\.A", ["A"], pf.suffix("A"), pf.glob("*.A"), pf.exact(["lora.0.weight.A"])])
def test_every_selector_works_inside_an_adapter(where):
    model = pf.functionalize(nn.Sequential(nn.Linear(4, 4, device="meta").to_empty(device="cpu")))
    _, trainable = pf.bind(pf.lora("0", rank=2), model).init(0)
    chosen, rest = pf.partition(trainable, where)
    assert list(flatten(chosen)) == [("lora", "0.weight", "A")]
    assert list(flatten(rest)) == [("lora", "0.weight", "B")]
    assert chosen["lora"]["0.weight"]["A"] is trainable["lora"]["0.weight"]["A"]


def test_a_part_without_leaves_survives_partition_and_combine():
    model = pf.functionalize(nn.Linear(4, 4, device="meta").to_empty(device="cpu"))
    halve = pf.Transform(
        init=lambda weights, key: {}, apply=lambda tree, weights: {p: w / 2 for p, w in weights.items()}
    )
    adapter = pf.bind(pf.chain(pf.lora("weight", rank=2), pf.on("weight", halve, name="halve")), model)
    frozen, trainable = adapter.init(0)
    weights = adapter.apply(frozen, pf.combine(*pf.partition(trainable, r".*\.A")))
    assert list(weights) == ["weight", "bias"]
    assert list(adapter.apply(frozen, pf.map_leaves(torch.clone, trainable))) == ["weight", "bias"]


def test_gradients_flow_through_partition_and_combine():
    tree = {"a": torch.ones(2, requires_grad=True), "b": torch.ones(2)}
    whole = pf.combine(*pf.partition(tree, "b"))
    whole["a"].sum().backward()
    assert tree["a"].grad.tolist() == [1.0, 1.0]

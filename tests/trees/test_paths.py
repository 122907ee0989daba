"""Paths: leaves of nested dicts, in the order of the dicts, and trees built back from them."""

from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import nn

import peft_func as pf
from peft_func.trees.paths import from_leaves, insert, join, leaves


def test_leaves_come_in_the_order_of_the_dicts_with_all_their_keys():
    tree = {"b": {"layers.10": torch.zeros(1), "layers.2": torch.zeros(2)}, "a": torch.zeros(3)}
    assert [keys for keys, _ in leaves(tree)] == [("b", "layers.10"), ("b", "layers.2"), ("a",)]
    assert [join(keys) for keys, _ in leaves(tree)] == ["b.layers.10", "b.layers.2", "a"]
    assert all(a is b for (_, a), b in zip(leaves(tree), [*tree["b"].values(), tree["a"]], strict=True))


def test_any_mapping_is_a_tree_and_the_results_are_plain_dicts():
    tree = MappingProxyType({"a": MappingProxyType({"b": torch.ones(2)})})
    doubled = pf.map_leaves(lambda t: 2 * t, tree)
    assert type(doubled) is dict
    assert type(doubled["a"]) is dict
    assert doubled["a"]["b"].tolist() == [2.0, 2.0]


def test_parameters_and_scalars_are_leaves():
    param = nn.Parameter(torch.tensor(1.0))
    ((keys, leaf),) = leaves({"a": {"b": param}})
    assert keys == ("a", "b")
    assert leaf is param


@pytest.mark.parametrize("leaf", [None, 1, 1.0, "x", [torch.ones(1)], (torch.ones(1),), np.ones(1), torch.float32])
def test_a_leaf_that_is_no_tensor_is_named(leaf):
    tree = {"lora": {"q.weight": {"A": torch.ones(1), "B": leaf}}}
    for function in (
        lambda: list(leaves(tree)),
        lambda: pf.map_leaves(torch.clone, tree),
        lambda: pf.partition(tree, ".*"),
        lambda: pf.combine(tree),
        lambda: pf.stack([tree]),
        lambda: pf.unstack(tree),
    ):
        with pytest.raises(pf.TreeError, match=r"'lora\.q\.weight\.B'.*" + type(leaf).__name__):
            function()


def test_effective_weights_are_not_leaves():
    model = pf.functionalize(nn.utils.skip_init(nn.Linear, 4, 3))
    adapter = pf.bind(pf.lora("weight", rank=2), model)
    with pytest.raises(pf.TreeError, match="'weight' is a Operator"):
        pf.map_leaves(torch.clone, adapter.apply(*adapter.init(0)))


@pytest.mark.parametrize("key", [0, None, ("a",), b"a", 1.5])
def test_a_key_that_is_no_string_is_named(key):
    with pytest.raises(pf.TreeError, match=r"below 'lora' is not a string"):
        list(leaves({"lora": {key: torch.ones(1)}}))


@pytest.mark.parametrize(
    "call",
    [
        lambda: pf.partition(torch.ones(2), ".*"),
        lambda: pf.combine(None),
        lambda: pf.combine({}, [torch.ones(1)]),
        lambda: pf.map_leaves(torch.clone, [torch.ones(1)]),
        lambda: pf.stack({"a": torch.ones(2)}),  # one tree where a list of them is due
        lambda: pf.stack([torch.ones(2)]),
        lambda: pf.unstack([{"a": torch.ones(2)}]),
    ],
    ids=["partition", "combine", "combine second", "map_leaves", "stack a tree", "stack tensors", "unstack a list"],
)
def test_what_is_no_tree_is_refused(call):
    with pytest.raises(pf.TreeError):
        call()


def test_map_leaves_keeps_keys_and_order_and_leaves_its_input_alone():
    inner = {"z": torch.ones(1), "a": torch.ones(1)}
    tree = {"y": inner, "b": torch.ones(1)}
    tensors = [*inner.values(), tree["b"]]
    result = pf.map_leaves(lambda t: t + 1, tree)
    assert list(result) == ["y", "b"]
    assert list(result["y"]) == ["z", "a"]
    assert tree == {"y": inner, "b": tensors[2]}
    assert all(t.item() == 1.0 for t in tensors)


def test_from_leaves_undoes_leaves():
    tree = {"a": {"b": torch.ones(1), "c": {"d": torch.ones(2)}}, "e": torch.ones(3)}
    again = from_leaves(leaves(tree))
    assert again == tree
    assert again["a"] is not tree["a"]


def test_insert_refuses_what_is_there_and_what_lies_below_a_leaf():
    tree = {"a": torch.ones(1)}
    with pytest.raises(pf.TreeError, match="'a'"):
        insert(tree, ("a",), torch.ones(1))
    with pytest.raises(pf.TreeError, match=r"'a\.b\.c' lies below the leaf 'a'"):
        insert(tree, ("a", "b", "c"), torch.ones(1))


def test_map_leaves_takes_several_trees_by_path_and_not_by_order():
    left = {"a": {"x": torch.tensor(1.0)}, "b": torch.tensor(2.0)}
    right = {"b": torch.tensor(20.0), "a": {"x": torch.tensor(10.0)}}
    total = pf.map_leaves(torch.add, left, right)
    assert list(total) == ["a", "b"]
    assert (float(total["a"]["x"]), float(total["b"])) == (11.0, 22.0)
    with pytest.raises(pf.TreeError, match=r"'a\.x' is in one tree only"):
        pf.map_leaves(torch.add, left, {"b": torch.tensor(1.0)})

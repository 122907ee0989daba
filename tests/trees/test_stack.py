"""Stack and unstack: many trees as one, and back; errors name the leaf."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import peft_func as pf
from tests.trees.test_partition import KEYS, flatten

SHAPES = st.recursive(
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    lambda inner: st.dictionaries(KEYS, inner, min_size=1, max_size=4),
    max_leaves=8,
).filter(lambda tree: isinstance(tree, dict))
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])


def filled(shapes, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda tree: {
        key: draw(value) if isinstance(value, dict) else torch.randn(value, generator=generator).to(dtype)
        for key, value in tree.items()
    }
    return draw(shapes)


def order(tree):
    return list(flatten(tree))


@settings(max_examples=80)
@given(SHAPES, st.integers(1, 4), DTYPES)
def test_unstack_undoes_stack(shapes, count, dtype):
    trees = [filled(shapes, seed, dtype) for seed in range(count)]
    stacked = pf.stack(trees)
    assert order(stacked) == order(trees[0])
    assert all(leaf.shape == (count, *flatten(trees[0])[keys].shape) for keys, leaf in flatten(stacked).items())
    again = pf.unstack(stacked)
    assert len(again) == count
    for tree, back in zip(trees, again, strict=True):
        assert order(back) == order(tree)
        for keys, leaf in flatten(tree).items():
            assert flatten(back)[keys].dtype == dtype
            assert torch.equal(flatten(back)[keys], leaf)
    assert all(torch.equal(flatten(pf.stack(again))[keys], leaf) for keys, leaf in flatten(stacked).items())


def test_stack_copies_and_unstack_gives_views():
    one = {"a": torch.zeros(2)}
    stacked = pf.stack([one, one])
    stacked["a"][0] = 5
    assert one["a"].tolist() == [0.0, 0.0]
    pf.unstack(stacked)[1]["a"].fill_(3)
    assert stacked["a"].tolist() == [[5.0, 5.0], [3.0, 3.0]]


def test_leaves_are_matched_by_path_whatever_the_order_of_the_dicts():
    names = [f"layers.{i}.q" for i in range(12)]
    one = {"lora": {name: {"A": torch.full((1,), float(i))} for i, name in enumerate(names)}}
    two = {"lora": dict(reversed(one["lora"].items()))}
    stacked = pf.stack([one, two])
    assert list(stacked["lora"]) == names
    for i, name in enumerate(names):
        assert stacked["lora"][name]["A"].tolist() == [[float(i)], [float(i)]]


def test_vmap_over_a_stack_of_more_than_ten_layers_is_the_loop():
    trees = [filled({f"layers.{i}": {"A": (3, 3)} for i in range(12)}, seed, torch.float64) for seed in range(4)]

    def through(tree, x):
        for i in range(12):
            x = torch.tanh(x @ tree[f"layers.{i}"]["A"])
        return x

    x = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)
    together = torch.vmap(through, in_dims=(0, None))(pf.stack(trees), x)
    assert torch.allclose(together, torch.stack([through(tree, x) for tree in trees]), atol=1e-12)


def test_what_vmap_returns_can_be_unstacked():
    trees = [filled({"b": {"layers.10": (2,), "layers.2": (3,)}, "a": ()}, seed) for seed in range(3)]
    doubled = torch.vmap(lambda tree: pf.map_leaves(lambda t: 2 * t, tree))(pf.stack(trees))
    for tree, back in zip(trees, pf.unstack(doubled), strict=True):
        assert all(torch.equal(2 * leaf, flatten(back)[keys]) for keys, leaf in flatten(tree).items())


def test_gradients_flow_through_stack_and_unstack():
    leaf = torch.ones(2, requires_grad=True)
    (2 * pf.unstack(pf.stack([{"a": leaf}, {"a": leaf}]))[1]["a"]).sum().backward()
    assert leaf.grad.tolist() == [2.0, 2.0]


def test_inputs_are_not_mutated():
    one, two = {"a": {"b": torch.zeros(2)}}, {"a": {"b": torch.ones(2)}}
    trees, leaf = [one, two], one["a"]["b"]
    pf.unstack(pf.stack(trees))
    assert trees == [one, two]
    assert one["a"]["b"] is leaf
    assert leaf.shape == (2,)


def test_any_sequence_of_trees_can_be_stacked():
    assert pf.stack(({"a": torch.ones(1)},))["a"].shape == (1, 1)


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({"lora": {"q": {"A": torch.ones(2)}}}, [r"lora.q.B", "tree 1"]),
        ({"lora": {"q": {"A": torch.ones(2), "B": torch.ones(2), "C": torch.ones(2)}}}, ["lora.q.C", "tree 1"]),
        ({"lora": {"q": {"A": torch.ones(2), "B": torch.ones(3)}}}, ["lora.q.B", "(3,)", "(2,)", "tree 1"]),
        ({"lora": {"q": {"A": torch.ones(2), "B": {"x": torch.ones(2)}}}}, ["lora.q.B"]),
        ({"lora": {"q": {"A": torch.ones(2), "B": None}}}, ["lora.q.B", "NoneType"]),
        ({"lora": {"q": {"A": torch.ones(2), "B": torch.ones(2).half()}}}, ["lora.q.B", "float16", "float32"]),
        ({"lora": {"q": {"A": torch.ones(2), "B": torch.ones(2, device="meta")}}}, ["lora.q.B", "meta", "cpu"]),
        ({}, ["lora.q."]),
    ],
    ids=["missing", "too many", "shape", "tree for leaf", "no tensor", "dtype", "device", "empty"],
)
def test_an_error_of_stack_names_the_leaf(second, words):
    with pytest.raises(pf.TreeError) as caught:
        pf.stack([{"lora": {"q": {"A": torch.ones(2), "B": torch.ones(2)}}}, second])
    assert isinstance(caught.value, ValueError)
    assert all(word in str(caught.value) for word in words)


def test_the_odd_tree_is_numbered():
    tree = {"a": torch.ones(1)}
    with pytest.raises(pf.TreeError, match="tree 2"):
        pf.stack([tree, tree, {"b": torch.ones(1)}])


def test_stack_needs_a_tree():
    with pytest.raises(pf.TreeError, match="at least one"):
        pf.stack([])


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"a": torch.ones(2), "b": {"c": torch.ones(3)}}, ["most leaves have 2", "'b.c' has 3"]),
        ({"a": torch.ones(2), "b": torch.tensor(1.0)}, ["'b' has None"]),
        ({"b": torch.tensor(1.0)}, ["'b'"]),
        ({}, []),
    ],
    ids=["lengths", "scalar", "only a scalar", "empty"],
)
def test_an_error_of_unstack_names_the_leaves(tree, words):
    with pytest.raises(pf.TreeError, match="one common leading length") as caught:
        pf.unstack(tree)
    assert all(word in str(caught.value) for word in words)


def test_an_error_of_unstack_is_short_for_a_large_tree():
    with pytest.raises(pf.TreeError) as caught:
        pf.unstack({f"layers.{i}.self_attn.q_proj.weight": torch.ones(1 + (i == 999)) for i in range(1000)})
    assert "layers.999.self_attn.q_proj.weight" in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_a_stack_of_none_is_no_trees():
    assert pf.unstack({"a": torch.ones(0, 3)}) == []


def test_an_adapter_takes_what_unstack_gives():
    with torch.device("meta"):
        net = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(12)])
    model = pf.functionalize(net.to_empty(device="cpu"))
    adapter = pf.bind(pf.chain(pf.lora(".*", rank=1), pf.ia3(".*")), model)
    frozen, _ = adapter.init(0)
    for tree in pf.unstack(pf.stack([adapter.init(key)[1] for key in range(3)])):
        assert len(adapter.apply(frozen, tree)) == 24

"""Every leaf is in one group, with the options of the first selector that matches it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import peft_func as pf
from tests.zoo import randn


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()


def named(parts):
    return [(part["param_names"], {k: v for k, v in part.items() if not k.startswith("param")}) for part in parts]


RULES = [("2", {"lr": 0.1}), (r".*bias", {"weight_decay": 0.0, "lr": 0.2})]
EXPECTED = [
    (["2.weight", "2.bias"], {"lr": 0.1, "weight_decay": 0.3}),
    (["0.bias", "1.bias"], {"lr": 0.2, "weight_decay": 0.0}),
    (["0.weight", "1.weight"], {"lr": 1.0, "weight_decay": 0.3}),
]


@pytest.mark.parametrize("rules", [RULES, dict(RULES), tuple(RULES)])
@pytest.mark.parametrize("form", [lambda n: n, lambda n: n.named_parameters(), lambda n: dict(n.named_parameters())])
def test_the_first_that_matches(rules, form):
    module = net()
    parts = pf.groups(form(module), rules, lr=1.0, weight_decay=0.3)
    assert named(parts) == EXPECTED
    for part in parts:
        for name, tensor in zip(part["param_names"], part["params"], strict=True):
            assert tensor is module.get_parameter(name)


def test_a_nested_tree_and_no_rules():
    tree = {"lora": {"q.weight": {"A": torch.ones(1), "B": torch.ones(2)}}, "train": {"bias": torch.ones(3)}}
    assert named(pf.groups(tree, [(["B"], {"lr": 2.0})])) == [
        (["lora.q.weight.B"], {"lr": 2.0}),
        (["lora.q.weight.A", "train.bias"], {}),
    ]
    assert named(pf.groups(tree, [], lr=1)) == [(["lora.q.weight.A", "lora.q.weight.B", "train.bias"], {"lr": 1})]
    assert len(pf.groups(tree, [(".*", {"lr": 1})])) == 1  # no empty group is left


def test_what_needs_no_gradient_is_not_there_and_ties_are_once():
    module = net()
    module[0].requires_grad_(False)
    module.append(module[2])
    names = [name for part in pf.groups(module, RULES) for name in part["param_names"]]
    assert sorted(names) == ["1.bias", "1.weight", "2.bias", "2.weight"]


@given(st.lists(st.sampled_from([r"lora.*", r".*\.A", r".*\.B", r".*1.*", "train.*"]), max_size=5, unique=True))
def test_every_leaf_is_in_exactly_one_group(wheres):
    tree = {
        "lora": {f"{i}.w": {"A": torch.ones(i + 1), "B": torch.ones(1)} for i in range(3)},
        "train": {"1": randn(2)},
    }
    rules = [(where, {"mark": where}) for where in wheres]
    paths = [*(f"lora.{i}.w.{leaf}" for i in range(3) for leaf in "AB"), "train.1"]
    first = {path: next((w for w in wheres if pf.path(w)(path, _info(path))), None) for path in paths}
    reached = set(first.values())
    if not {*wheres} <= reached:
        with pytest.raises(pf.SelectorError, match="taken by earlier selectors"):
            pf.groups(tree, rules)
        return
    parts = pf.groups(tree, rules)
    assert {name: part.get("mark") for part in parts for name in part["param_names"]} == first
    assert sum(len(part["params"]) for part in parts) == len(paths)


def _info(path):
    from peft_func.trees.select import Info

    return Info(path, (1,), torch.float32)


def test_torch_takes_the_groups_and_their_names():
    module = net()
    optimizer = torch.optim.AdamW(pf.groups(module, RULES, lr=1.0))
    assert [group["param_names"] for group in optimizer.param_groups] == [names for names, _ in EXPECTED]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2, 1.0]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["2.weight", "2.bias"]


def test_a_function_changes_the_value_so_far_and_presets_combine():
    tree = {"layers": {"0": torch.ones(1), "1": torch.ones(1)}, "head": torch.ones(1)}
    halved = lambda infos: [(lambda path, info: path != "layers.1", {"lr": lambda lr: lr / 2})]
    parts = pf.groups(tree, [("head", {"lr": 8.0}), pf.layer_decay(0.1), halved], lr=1.0)
    rates = {name: part["lr"] for part in parts for name in part["param_names"]}
    assert rates == pytest.approx({"head": 4.0, "layers.0": 0.005, "layers.1": 0.1})
    with pytest.raises(pf.OptionError, match="scales 'lr', which has no value yet; give lr="):
        pf.groups(tree, halved)


def test_training_with_groups_is_training_with_hand_written_ones():
    x = randn(8, 4)
    module, peer = net(), net()
    peer.load_state_dict(module.state_dict())
    ours = torch.optim.AdamW(pf.groups(module, RULES, lr=0.05, weight_decay=0.3))
    theirs = torch.optim.AdamW(
        [
            {"params": [peer[0].weight, peer[1].weight]},
            {"params": [peer[0].bias, peer[1].bias], "weight_decay": 0.0, "lr": 0.2},
            {"params": peer[2].parameters(), "lr": 0.1},
        ],
        lr=0.05, weight_decay=0.3,
    )  # fmt: skip
    for _ in range(5):
        for each, optimizer in ((module, ours), (peer, theirs)):
            optimizer.zero_grad()
            each(x).square().sum().backward()
            optimizer.step()
    for a, b in zip(module.parameters(), peer.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pf.groups(net(), [("3", {})]), pf.SelectorError, "matches none of 6 leaves. The nearest names"),
        (lambda: pf.groups(net(), [("2.wieght", {})]), pf.SelectorError, r"2\.weight"),
        (
            lambda: pf.groups(net(), [(".*", {}), ("2", {})]),
            pf.SelectorError,
            "'2' matches, such as '2.weight', is tak",
        ),
        (lambda: pf.groups(net(), ["2"]), pf.OptionError, "neither a pair"),
        (lambda: pf.groups(net(), "2"), pf.OptionError, "neither a pair"),
        (lambda: pf.groups(net(), [("2", 0.1)]), pf.OptionError, "neither a pair"),
        (lambda: pf.groups(net(), None), pf.OptionError, "neither a pair"),
        (lambda: pf.groups(net(), [("2", {"params": []})]), pf.OptionError, "'params' is no option"),
        (lambda: pf.groups({}, []), pf.TreeError, "nothing that trains"),
        (lambda: pf.groups(net().requires_grad_(False), []), pf.TreeError, "nothing that trains"),
        (lambda: pf.groups([torch.ones(1)], []), pf.TreeError, "there is a Tensor"),
        (lambda: pf.groups(3, []), pf.TreeError, "there is a int"),
        (lambda: pf.groups([("a", randn(1)), ("a", randn(1))], []), pf.TreeError, "two tensors have the name 'a'"),
        (lambda: pf.groups({"a": 1}, []), pf.TreeError, "tensors only"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()

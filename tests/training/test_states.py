"""States of functional optimizers are told apart, leaf by leaf, wherever the leaves are in them."""

import pytest
import torch
import torchopt

import peft_func as pf
from peft_func.training.states import Zip

TREE = {"b": {"z": torch.ones(3), "a.b": torch.ones(2)}, "a": torch.ones(4), "B": torch.ones(5)}
PATHS = [keys for keys, _ in pf.leaves(TREE)]
OPTIMIZERS = {
    "adam": torchopt.adam(1e-2),
    "adamw": torchopt.adamw(torchopt.schedule.polynomial_schedule(1.0, 0.1, 1.0, 10), weight_decay=0.1),
    "sgd": torchopt.sgd(1e-2, momentum=0.9, nesterov=True),
    "plain sgd": torchopt.sgd(1e-2),
    "chain": torchopt.chain(torchopt.clip.clip_grad_norm(1.0), torchopt.adagrad(1e-2)),
    "rmsprop": torchopt.rmsprop(1e-2, centered=True, momentum=0.5),
    "torch's": pf.optimizer(torch.optim.AdamW, lr=1e-2, amsgrad=True),
    "torch's sgd": pf.optimizer(torch.optim.SGD, lr=1e-2, momentum=0.9),
}


def tensors(state):
    if isinstance(state, torch.Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else []
    return [tensor for value in values for tensor in tensors(value)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_tensor_of_a_state_is_met_under_the_path_of_its_leaf(name):
    state = OPTIMIZERS[name].init(TREE)
    shapes = {keys: leaf.shape for keys, leaf in pf.leaves(TREE)}
    met = []

    def by_leaf(keys, one, other):
        assert one is other
        assert one.dim() == 0 or one.shape == shapes[keys]
        met.append(one)
        return one

    again = Zip(by_leaf, lambda one, other: one, PATHS, PATHS)(state, state)
    assert {id(tensor) for tensor in met} == {id(tensor) for tensor in tensors(state)}
    assert [id(tensor) for tensor in tensors(again)] == [id(tensor) for tensor in tensors(state)]
    assert type(again) is type(state)


def test_a_count_for_all_and_other_values_are_shared():
    state = {"moments": {"a": torch.ones(2)}, "count": torch.tensor(3), "name": "adam", "none": None}
    other = {"moments": {"a": torch.zeros(2)}, "count": torch.tensor(5), "name": "adam", "none": None}
    made = Zip(lambda keys, one, two: one, lambda one, two: two, [("a",)], [("a",)])(state, other)
    assert made == {"moments": {"a": state["moments"]["a"]}, "count": other["count"], "name": "adam", "none": None}


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ({"m": {"a": torch.ones(2)}}, {"m": {"x": torch.ones(2)}}, r"m\.(a|x)"),
        ({"m": {"a": torch.ones(2)}}, {"m": {"a": torch.ones(3)}}, r"'a' is \(2,\) in one place and \(3,\)"),
        ((torch.ones(2),), (torch.ones(2),), r"tensor \(2,\) of no known leaf"),
        ((1, 2), (1, 2, 3), "2 entries in one place and 3"),
        ([1], (1,), "a list in one place and a tuple"),
        ({"m": {1, 2}}, {"m": {1, 2}}, "is a set"),
        ({"a": 3}, {"a": 3}, "not a tensor"),
    ],
    ids=range(7),
)
def test_what_cannot_be_told_apart_is_refused(one, other, message):
    with pytest.raises(pf.TreeError, match=message):
        Zip(lambda keys, one, two: one, lambda one, two: two, [("a",)], [("a",)])(one, other)

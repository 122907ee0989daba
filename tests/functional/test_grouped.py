"""Calls with weights that differ along the batch: through vmap where one pass cannot do."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import peft_func as pf
from peft_func.functional.grouped import call_by_group, call_routed, groups_among, vmapped
from tests.ensemble.side_by_side import SMALL, Many
from tests.zoo import ZOO, randn

INDEX = [2, 0, -1, 2]


def by_group(many, index, *args, call=call_by_group, **kwargs):
    weights = pf.route(many.adapter, many.frozen, many.stacked, torch.tensor(index))
    return many.output(call(many.model, weights, groups_among(weights), args, kwargs))


class Flat(nn.Module):
    """Positions joined to the batch before the module, and sequence first elsewhere."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 5)

    def forward(self, x):
        y = torch.tanh(self.a(x.reshape(-1, 5))).view(*x.shape[:-1], 6)
        return self.b(y.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("name", ["mlp", "conv", "tied", "experts", "bert", "gpt2", "llama", "vit", "attention"])
def test_vmap_over_the_groups_is_one_pass(name):
    animal = ZOO[name]
    many = Many(animal.build(), pf.lora(animal.where[0], rank=1), output=animal.output)
    batches = [animal.inputs(seed)[0] for seed in range(3)]
    args = [torch.cat(parts)[:4] for parts in zip(*batches, strict=True)]
    expected = many.looped(many.members, INDEX, *args)
    torch.testing.assert_close(by_group(many, INDEX, *args), expected, atol=SMALL, rtol=SMALL)
    torch.testing.assert_close(by_group(many, INDEX, *args, call=call_routed), expected, atol=SMALL, rtol=SMALL)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("index", [INDEX, [1, 1, 1, 1], [0, 0, 2, 2], [-1] * 4])
def test_a_model_that_moves_the_batch(length, index):
    many = Many(Flat(), pf.lora(".*", rank=2))
    many.check_route(index, randn(4, length, 5))
    many.check_ensemble(randn(4, length, 5))


@dataclass
class Pair:
    first: object
    second: object


RETURNS = {
    "tuple": lambda y: (y, y.sum(-1)),
    "dict": lambda y: {"y": y, "more": [y * 2, None, "text", 3, True]},
    "nothing": lambda y: None,
    "values": lambda y: (y, None, 1.5),
}


class Returns(nn.Module):
    def __init__(self, function, flat=False):
        super().__init__()
        self.lin, self.bag, self.flat = nn.Linear(5, 3), [function], flat

    def forward(self, x):
        return self.bag[0](self.lin(x.reshape(-1, 5)).view(*x.shape[:-1], 3) if self.flat else self.lin(x))


@pytest.mark.parametrize("name", list(RETURNS))
@pytest.mark.parametrize("flat", [False, True])
def test_what_a_model_returns(name, flat):
    many, x = Many(Returns(RETURNS[name], flat), pf.lora("lin", rank=1)), randn(4, 2, 5)
    found = many.routed(many.stacked, INDEX, x)
    rows = [many.one(None if k < 0 else many.members[k], x[i : i + 1]) for i, k in enumerate(INDEX)]
    flat_found, spec = torch.utils._pytree.tree_flatten(found)
    for i, row in enumerate(rows):
        values, own = torch.utils._pytree.tree_flatten(row)
        assert own == spec
        for a, b in zip(flat_found, values, strict=True):
            assert torch.allclose(a[i : i + 1], b) if isinstance(b, torch.Tensor) else a == b


REFUSED = {
    "a number": lambda y: y.mean(),
    "no batch": lambda y: y.mean((0, 1)).expand(7, -1),
    "an object": lambda y: Pair(y, y),
    "sequence first": lambda y: y.transpose(0, 1),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_outputs_that_cannot_be_put_together(name):
    many = Many(Returns(REFUSED[name], flat=True), pf.lora("lin", rank=1))
    with pytest.raises(pf.RouteError):
        many.routed(many.stacked, INDEX, randn(4, 2, 5))


@pytest.mark.parametrize(("batch", "index"), [(2, [0, 0, 1, 1]), (4, [0, 1]), (3, [0, 1, 2, 0])])
@pytest.mark.parametrize("flat", [False, True])
def test_an_index_of_another_length(batch, index, flat):
    many = Many(Returns(lambda y: y, flat), pf.lora("lin", rank=1))
    with pytest.raises(pf.RouteError):
        many.routed(many.stacked, index, randn(batch, 5))


def test_an_index_of_another_length_is_seen_before_positions_are_joined_to_the_batch():
    animal = ZOO["gpt2"]
    many = Many(animal.build(), pf.lora(["c_attn"], rank=2), output=animal.output)
    ids = torch.arange(24).view(4, 6) % 32
    for index in ([0, 1], [0, 1, 2, 0, 0, 1, 1, 2]):
        with pytest.raises(pf.RouteError, match="no argument has as many rows"):
            by_group(many, index, ids, call=call_routed)


def test_an_index_of_another_length_in_a_call():
    animal = ZOO["gpt2"]
    many = Many(animal.build(), pf.lora(["c_attn"], rank=2), output=animal.output)
    with pytest.raises(pf.RouteError):
        many.routed(many.stacked, [0, 1], torch.arange(24).view(4, 6) % 32)


def test_arguments_by_name_nested_and_of_other_kinds():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(5, 5)

        def forward(self, data, *, scale, words=None, power=1):
            x = self.lin(data["x"].flatten(0, 1)).view(data["x"].shape) ** power
            return x * scale + data["bias"][0] + (0 if words is None else len(words[0]))

    many = Many(Net(), pf.lora("lin", rank=1))
    x, scale, bias = randn(4, 2, 5), randn(4, 1, 1), randn(5)
    found = many.routed(many.stacked, INDEX, {"x": x, "bias": [bias]}, scale=scale, words=["ab"], power=2)
    for i, k in enumerate(INDEX):
        tree = None if k < 0 else many.members[k]
        own = {"x": x[i : i + 1], "bias": [bias]}
        assert torch.allclose(found[i : i + 1], many.one(tree, own, scale=scale[i : i + 1], words=["ab"], power=2))


def test_a_norm_over_the_batch_is_refused():
    many = Many(nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)), pf.lora("0", rank=1), train=True)
    with pytest.raises(pf.RouteError, match=r"'1' normalises over the batch"):
        many.routed(many.stacked, INDEX, randn(4, 5))
    frozen = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3, track_running_stats=False))
    many = Many(frozen, pf.lora("0", rank=1))
    with pytest.raises(pf.RouteError, match="normalises"):
        many.routed(many.stacked, INDEX, randn(4, 5))


def test_the_loop_is_vmap():
    def function(tree, x, tensors, note):
        return {"y": tree["a"] * x + tensors[0] - tensors[1], "note": note, "all": (x.sum(), 2)}

    args = ({"a": randn(3, 2)}, randn(2), [randn(3, 2), randn(2)], "hm")
    dims = (0, None, [0, None], None)
    expected = vmapped(function, dims)(*args)

    def stubborn(*some):
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise RuntimeError("Batching rule not implemented for aten::this")
        return function(*some)

    found = vmapped(stubborn, dims)(*args)
    assert torch.allclose(found["y"], expected["y"])
    assert torch.equal(found["all"][0], expected["all"][0])
    assert (found["note"], found["all"][1]) == ("hm", 2)


def test_a_mistake_of_the_model_is_raised():
    with pytest.raises(RuntimeError, match=r"inconsistent|must match"):
        vmapped(lambda x: x + torch.zeros(7), (0,))(randn(3, 2))


def test_a_batch_as_long_as_the_sequence_is_known_once_another_was_seen():
    animal = ZOO["bert"]
    many = Many(animal.build(), pf.lora(["query", "value"], rank=2), output=animal.output)
    lengths = []
    own = many.model.with_state
    many.model.with_state = lambda w, state, ids, **kwargs: lengths.append(len(ids)) or own(w, state, ids, **kwargs)
    ids = torch.arange(25).view(5, 5) % 32
    index = [0, 1, -1, 1, 0]
    first = many.routed(many.stacked, index, ids)
    second = many.routed(many.stacked, index, ids)
    assert lengths == [6, 5]  # a spare sample tells the batch from the sequence; after that it is known
    assert torch.allclose(first, second, atol=1e-12)
    assert torch.allclose(first, many.looped(many.members, index, ids), atol=1e-10)

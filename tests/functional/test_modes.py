"""Modes of some modules only: BatchNorms frozen the four ways, against loops of plain PyTorch."""

import copy

import pytest
import torch
from torch import nn

import peft_func as pf
from tests.loops import fit

F = nn.functional


def net_of():
    return nn.Sequential(
        nn.Linear(4, 6),
        nn.BatchNorm1d(6),
        nn.Tanh(),
        nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)),
        nn.Linear(6, 3),
    ).double()


def batches_of(count=5):
    return [(torch.randn(8, 4, dtype=torch.float64) + 1, torch.randint(3, (8,))) for _ in range(count)]


def norms_in(net):
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm1d)]


def plain(net, batches, affine, statistics):
    net.train()
    for norm in norms_in(net):
        norm.requires_grad_(affine)
        norm.train(statistics == "updated")
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    return fit(net, optimizer, batches)


@pytest.mark.parametrize("statistics", ["updated", "kept"])
@pytest.mark.parametrize("affine", [True, False])
def test_norms_in_and_out_with_statistics_kept_or_not(affine, statistics):
    net, batches = net_of(), batches_of()
    for norm in norms_in(net):  # statistics of some data before
        nn.init.uniform_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    model = pf.functionalize(copy.deepcopy(net)).train()
    if statistics == "kept":
        model = pf.with_modes(model, pf.norms())
    trainable, frozen = model.params, {}
    if not affine:
        trainable, frozen = pf.partition(model.params, ~pf.norms(model))
    sgd = pf.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
    state, buffers, ours = sgd.init(trainable), model.state, []
    for x, y in batches:

        def loss(tree, x, y, buffers):
            output, new = model.with_state(pf.combine(frozen, tree), buffers, x)
            return F.cross_entropy(output, y), new

        trainable, state, (value, buffers) = pf.step(loss, sgd, has_aux=True)(trainable, state, x, y, buffers)
        ours.append(float(value))
    start = copy.deepcopy(net.state_dict())
    theirs = plain(net, batches, affine, statistics)
    assert ours == pytest.approx(theirs, rel=0, abs=1e-12)
    mine = model.state_dict(pf.combine(frozen, trainable), buffers)
    for name, value in net.state_dict().items():
        assert torch.allclose(mine[name], value, rtol=0, atol=1e-12), name
    assert torch.equal(mine["1.weight"], start["1.weight"]) is not affine
    assert torch.equal(mine["3.1.running_var"], start["3.1.running_var"]) is (statistics == "kept")
    assert not torch.equal(mine["0.weight"], start["0.weight"])


def test_a_block_is_chosen_with_all_in_it_and_the_others_keep_their_modes():
    net = nn.Sequential(nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5))), nn.Dropout(0.5))
    model, x = pf.functionalize(net).train(), torch.ones(400)
    inner = pf.with_modes(model, "0")
    assert int((inner({}, x) == 0).sum()) > 100
    assert torch.equal(pf.with_modes(inner, ["1"])({}, x), x)
    assert int((pf.with_modes(model.eval(), "1", training=True)({}, x) == 0).sum()) > 100
    assert int((model({}, x) == 0).sum()) > 300  # as it was
    assert not pf.with_modes(model, "").trains  # the net itself


def test_tensors_method_and_places_of_add_ins_are_those_of_the_model():
    net = net_of()
    model = pf.functionalize(net).method("forward")
    other = pf.with_modes(model, pf.norms())
    assert all(other.params[name] is model.params[name] for name in model.params)
    assert all(other.state[name] is model.state[name] for name in model.state)
    assert other.hosts is model.hosts
    assert other.mixing_norm is None
    assert all(norm.training for norm in norms_in(net))


def test_nothing_chosen_is_an_error():
    with pytest.raises(pf.SelectorError, match=r"with_modes: 'norm' matches none of 8 modules"):
        pf.with_modes(pf.functionalize(net_of()), "norm")

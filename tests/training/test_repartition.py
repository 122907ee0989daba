"""Scheduled runs against loops of plain PyTorch, and what is carried when what trains changes."""

import copy

import pytest
import torch
import torchopt
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import peft_func as pf
from tests.loops import fit

HEAD, LAST = pf.path(r"head\..*"), pf.path(r"blocks\.1\..*")
RATE, GAMMA, DECAY = 0.05, 0.7, 0.1
F = nn.functional


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(5, 5) for _ in range(2)])
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


def net_and_data():
    net = Net().double()
    x, y = torch.randn(12, 5, dtype=torch.float64), torch.randint(3, (12,))
    return net, list(zip(x.split(4), y.split(4), strict=True))


def rate_of(epoch):
    """StepLR(step_size=2), by its definition."""
    return RATE * GAMMA ** (epoch // 2)


def plain(net, batches, phases, epochs):
    """Train with one torch.optim.AdamW, whose groups come and go; `phases`: epoch -> modules that train."""
    optimizer = torch.optim.AdamW([*phases[0][0].parameters()], lr=RATE, weight_decay=DECAY)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, GAMMA)
    losses, trained = [], set(phases[0])
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    for epoch in range(epochs):
        for module in phases.get(epoch, ()):
            for parameter in module.parameters():
                parameter.requires_grad_(True)
            if module not in trained:
                rate = optimizer.param_groups[0]["lr"]
                optimizer.add_param_group({"params": [*module.parameters()], "lr": rate})
                trained.add(module)
        losses += fit(net, optimizer, batches)
        scheduler.step()
    return losses


def scheduled(loss, frozen, schedule, batches, epochs, optimizer_of):
    trainable, state, losses = {}, None, []
    for epoch in range(epochs):
        optimizer = optimizer_of(rate_of(epoch))
        if schedule.changes_at(epoch):
            frozen, trainable, state = pf.repartition(frozen, trainable, schedule(epoch), state, optimizer=optimizer)
        step = pf.step(lambda tree, *batch: loss(pf.combine(frozen, tree), *batch), optimizer)  # noqa: B023
        for batch in batches:
            trainable, state, value = step(trainable, state, *batch)
            losses.append(float(value))
    return losses, pf.combine(frozen, trainable)


OPTIMIZERS = {
    "torchopt": lambda rate: torchopt.adamw(rate, weight_decay=DECAY),
    "torch": lambda rate: pf.optimizer(torch.optim.AdamW, lr=rate, weight_decay=DECAY),
}


@pytest.fixture
def _float64():  # torchopt corrects the bias in the default dtype
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_head_then_last_block_then_everything_is_the_run_of_plain_torch(kind):
    net, batches = net_and_data()
    model = pf.functionalize(copy.deepcopy(net))
    ours, params = scheduled(
        lambda params, x, y: F.cross_entropy(model(params, x), y),
        model.params,
        pf.schedule({0: HEAD, 3: HEAD | LAST, 5: ".*"}),
        batches,
        8,
        OPTIMIZERS[kind],
    )
    theirs = plain(net, batches, {0: [net.head], 3: [net.blocks[1]], 5: [net.blocks[0]]}, 8)
    assert ours == pytest.approx(theirs, rel=0, abs=1e-12)
    assert ours[-1] < ours[0]
    for name, value in net.named_parameters():
        assert torch.allclose(params[name], value, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("_float64")
def test_leaves_of_an_adapter_are_scheduled_as_well():
    net, batches = net_and_data()
    model = pf.functionalize(net)
    method = pf.chain(pf.lora(r"blocks\.\d", rank=2), pf.train("head"))
    adapter = pf.bind(method, model)
    base, tree = adapter.init(0)
    ours, tree = scheduled(
        lambda tree, x, y: F.cross_entropy(model(adapter.apply(base, tree), x), y),
        tree,
        pf.schedule({0: pf.leaves_for(adapter, "head"), 2: pf.path(r".*head\..*|.*blocks\.1\..*"), 3: ".*"}),
        batches,
        5,
        OPTIMIZERS["torchopt"],
    )

    class Lora(nn.Module):  # by its formula
        def __init__(self, linear, a, b):
            super().__init__()
            self.linear, self.a, self.b = linear, nn.Parameter(a.clone()), nn.Parameter(b.clone())

        def parameters(self, recurse=True):
            return iter([self.a, self.b])

        def forward(self, x):
            return self.linear(x) + x @ self.a.T @ self.b.T

    twin, start = copy.deepcopy(net), adapter.init(0)[1]["lora"]
    for i in range(2):
        twin.blocks[i] = Lora(twin.blocks[i], *start[f"blocks.{i}.weight"].values())
    theirs = plain(twin, batches, {0: [twin.head], 2: [twin.blocks[1]], 3: [twin.blocks[0]]}, 5)
    assert ours == pytest.approx(theirs, rel=0, abs=1e-12)
    assert torch.allclose(tree["lora"]["blocks.0.weight"]["B"], twin.blocks[0].b, rtol=0, atol=1e-12)
    assert twin.blocks[0].b.abs().max() > 1e-3


def filled(state):
    """The same structure with random values, so that none is what `init` gives."""
    if isinstance(state, torch.Tensor):
        return torch.rand(state.shape).add(1).to(state.dtype)
    if isinstance(state, dict):
        return {key: filled(value) for key, value in state.items()}
    made = [filled(value) for value in state]
    return type(state)(*made) if hasattr(state, "_fields") else type(state)(made)


TREE = {"d": torch.ones(2), "a": {"y": torch.ones(3), "x.z": torch.ones(4)}, "c": {"k": torch.ones(5)}}
ALL = [".".join(keys) for keys, _ in pf.leaves(TREE)]


def moments(optimizer, state, tree):
    """`{path: its moment}`, found by its unique shape."""
    by_shape = {leaf.shape: ".".join(keys) for keys, leaf in pf.leaves(tree)}
    first = state["exp_avg"] if isinstance(state, dict) else state[0].mu
    found = [leaf for _, leaf in pf.leaves(first)] if isinstance(first, dict) else first
    return {by_shape[tensor.shape]: tensor for tensor in found}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@given(st.sets(st.sampled_from(ALL), min_size=1), st.sets(st.sampled_from(ALL), min_size=1))
def test_moments_are_carried_for_what_stays_and_fresh_for_what_is_new(kind, before, after):
    optimizer = OPTIMIZERS[kind](1e-2)
    frozen, trainable, state = pf.repartition(TREE, {}, pf.exact(before), optimizer=optimizer)
    state = filled(state)
    old = moments(optimizer, state, TREE)
    assert set(old) == before
    frozen, trainable, new = pf.repartition(frozen, trainable, pf.exact(after), state, optimizer=optimizer)
    assert {".".join(keys) for keys, _ in pf.leaves(trainable)} == after
    now = moments(optimizer, new, TREE)
    assert set(now) == after
    for path, tensor in now.items():
        assert tensor is old[path] if path in before else not tensor.any()
    same = dict(pf.leaves(TREE))
    assert all(leaf is same[keys] for tree in (frozen, trainable) for keys, leaf in pf.leaves(tree))
    assert {keys for keys, _ in pf.leaves(pf.combine(frozen, trainable))} == set(same)


def test_steps_are_carried_for_each_leaf():
    adam, grads = pf.optimizer(torch.optim.Adam), {"a": torch.ones(2)}
    frozen, trainable, state = pf.repartition({"a": torch.ones(2), "b": torch.ones(3)}, {}, "a", optimizer=adam)
    for _ in range(4):
        trainable, state = adam.step(grads, state, trainable)
    state = pf.repartition(frozen, trainable, ".*", state, optimizer=adam)[2]
    assert {path: float(step) for path, step in state["step"].items()} == {"b": 0.0, "a": 4.0}


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_momentum_that_is_made_in_the_first_step_is_carried(dampening):
    sgd = pf.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=dampening)
    params = {"a": torch.randn(2), "b": torch.randn(3)}
    frozen, trainable, state = pf.repartition(params, {}, "a", optimizer=sgd)
    frozen, trainable, state = pf.repartition(frozen, trainable, "a", state, optimizer=sgd)  # before any step
    plain = {name: nn.Parameter(value.clone()) for name, value in params.items()}
    theirs = torch.optim.SGD([plain["a"]], lr=0.1, momentum=0.9, dampening=dampening)
    for step in range(6):
        if step == 3:
            frozen, trainable, state = pf.repartition(frozen, trainable, ".*", state, optimizer=sgd)
            theirs.add_param_group({"params": [plain["b"]]})
        for name, leaf in plain.items():
            leaf.grad = leaf.detach() + step if name in trainable else None
        grads = {name: leaf + step for name, leaf in trainable.items()}
        trainable, state = sgd.step(grads, state, trainable)
        theirs.step()
    assert all(torch.equal(pf.combine(frozen, trainable)[name], leaf) for name, leaf in plain.items())
    state = pf.repartition(frozen, trainable, "b", state, optimizer=sgd)[2]
    assert list(state["momentum_buffer"]) == ["b"]


def test_what_froze_comes_back_with_fresh_moments():
    adam = OPTIMIZERS["torch"](1e-2)
    frozen, trainable, state = pf.repartition(TREE, {}, ".*", optimizer=adam)
    trainable, state = adam.step(TREE, state, trainable)
    frozen, trainable, state = pf.repartition(frozen, trainable, "d", state, optimizer=adam)
    assert list(state["exp_avg"]) == ["d"]
    state = pf.repartition(frozen, trainable, ".*", state, optimizer=adam)[2]
    assert state["exp_avg"]["d"].any()
    assert not state["exp_avg"]["c"]["k"].any()


def test_nothing_may_train_if_that_is_meant():
    adam = OPTIMIZERS["torch"](1e-2)
    for nothing in (None, pf.schedule({0: None})(3)):
        frozen, trainable, state = pf.repartition({}, TREE, nothing, adam.init(TREE), optimizer=adam)
        assert (trainable, state) == ({}, None)
        assert len(list(pf.leaves(frozen))) == len(ALL)
    assert set(pf.repartition(frozen, trainable, "d", state, optimizer=adam)[2]) == {"step", "exp_avg", "exp_avg_sq"}


def test_without_an_optimizer_there_is_no_state():
    assert pf.repartition(TREE, {}, "d")[2] is None
    with pytest.raises(pf.OptionError, match=r"repartition\(\.\.\., state, optimizer=\.\.\.\)"):
        pf.repartition({}, TREE, "d", {"exp_avg": TREE})
    live = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(pf.OptionError, match=r"not a SGD; write pf\.optimizer"):
        pf.repartition({}, TREE, "d", {}, optimizer=live)


def test_bad_trees_and_selections_are_refused():
    with pytest.raises(pf.TreeError, match="share no leaf"):
        pf.repartition({"d": torch.ones(2)}, TREE, ".*")
    with pytest.raises(pf.SelectorError, match=r"repartition: 'e' matches none of 4 leaves.*nearest"):
        pf.repartition({}, TREE, "e")


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_state_of_another_tree_is_refused(kind):
    optimizer = OPTIMIZERS[kind](1e-2)
    state = optimizer.init({"d": torch.ones(2), "c": {"k": torch.ones(5)}})
    with pytest.raises(pf.TreeError):  # it is of a part of what trained
        pf.repartition({}, TREE, ".*", state, optimizer=optimizer)
    with pytest.raises(pf.TreeError):  # it is of more
        pf.repartition(
            {"c": {"k": torch.ones(5)}}, {"d": torch.ones(2)}, ".*", optimizer.init(TREE), optimizer=optimizer
        )
    with pytest.raises(pf.TreeError):  # another optimizer's
        pf.repartition({}, TREE, "d", torchopt.sgd(0.1, momentum=0.9).init(TREE), optimizer=optimizer)
    with pytest.raises(pf.TreeError):  # other shapes
        pf.repartition({}, TREE, "d", optimizer.init({**TREE, "d": torch.ones(7)}), optimizer=optimizer)


class Counting:
    """Momentum in a tree, and one count for all leaves."""

    def init(self, params):
        return {"m": pf.map_leaves(torch.zeros_like, params), "count": torch.tensor(0)}

    def update(self, updates, state, *, params):
        raise NotImplementedError


def test_what_all_leaves_share_goes_on():
    counting = Counting()
    state = {**counting.init(TREE), "count": torch.tensor(7)}
    frozen, trainable, new = pf.repartition({}, TREE, "d|a.y", state, optimizer=counting)
    assert new["count"] is state["count"]
    again = pf.repartition(frozen, trainable, ".*", new, optimizer=counting)[2]
    assert again["count"] is state["count"]
    assert again["m"]["d"] is state["m"]["d"]
    assert again["m"]["c"]["k"] is not state["m"]["c"]["k"]


def test_each_phase_may_have_groups_of_its_own():
    def adam(*groups):
        return pf.optimizer(torch.optim.Adam, lr=0.1, groups=list(groups))

    first, then = adam(("a.*", {"lr": 1.0})), adam(("a.*", {"lr": 1.0}), ("d", {"lr": 2.0}))
    frozen, trainable, state = pf.repartition(TREE, {}, "a.*", optimizer=first)
    trainable, state = first.step(trainable, state, trainable)
    frozen, trainable, new = pf.repartition(frozen, trainable, ".*", state, optimizer=then)
    assert new["exp_avg"]["a"]["y"] is state["exp_avg"]["a"]["y"]
    moved = then.step(trainable, new, trainable)[0]
    assert float((trainable["d"] - moved["d"])[0]) == pytest.approx(2.0, rel=1e-5)
    with pytest.raises(pf.SelectorError):  # a group of what does not train yet
        pf.repartition(TREE, {}, "a.*", optimizer=then)

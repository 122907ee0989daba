"""Masks: exact freezing in a compiled step of one shape, where zero gradients are not enough."""

import warnings

import pytest
import torch
import torchopt
from torch import nn

import peft_func as pf

TREE = {"body": {"w": torch.randn(4, 4).double(), "b": torch.randn(4).double()}, "head": torch.randn(3).double()}
ONLY_HEAD = "head"


def grads_of(tree):
    return pf.map_leaves(lambda leaf: (leaf + 0.5).sin(), tree)


def test_it_says_what_trains():
    mask = pf.mask(TREE, r"body\..*")
    assert {".".join(keys): bool(flag) for keys, flag in pf.leaves(mask)} == {
        "body.w": True,
        "body.b": True,
        "head": False,
    }
    assert all(flag.dtype == torch.bool and flag.shape == () for _, flag in pf.leaves(mask))
    assert not any(flag for _, flag in pf.leaves(pf.mask(TREE, None)))
    with pytest.raises(pf.SelectorError, match="mask: 'heads' matches none of 3 leaves"):
        pf.mask(TREE, "heads")


OPTIMIZERS = {
    "torch adamw": pf.optimizer(torch.optim.AdamW, lr=0.1, weight_decay=0.2),
    "torch sgd": pf.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.2),
    "torchopt adamw": torchopt.adamw(0.1, weight_decay=0.2),
}


def stepped(optimizer, grads, state, tree):
    updates, state = optimizer.update(grads, state, params=tree, inplace=False)
    return pf.map_leaves(torch.add, tree, updates), state


def run(optimizer, tree, steps, mask_at, freeze):
    state = optimizer.init(tree)
    for step in range(steps):
        mask = mask_at(step)
        if freeze == "gradients":
            tree, state = stepped(optimizer, pf.mask_gradients(grads_of(tree), mask), state, tree)
        else:
            new, new_state = stepped(optimizer, grads_of(tree), state, tree)
            tree, state = pf.hold(mask, new, tree), pf.hold(mask, new_state, state)
    return tree, state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_hold_freezes_to_the_bit_and_zero_gradients_do_not(name):
    optimizer, everything, head = OPTIMIZERS[name], pf.mask(TREE, ".*"), pf.mask(TREE, ONLY_HEAD)

    def mask_at(step):
        return everything if step < 3 else head

    before = run(optimizer, TREE, 3, mask_at, "hold")
    held, state = run(optimizer, TREE, 8, mask_at, "hold")
    zeroed, _ = run(optimizer, TREE, 8, mask_at, "gradients")
    assert torch.equal(held["body"]["w"], before[0]["body"]["w"])
    assert not torch.equal(zeroed["body"]["w"], before[0]["body"]["w"])
    assert (zeroed["body"]["w"] - before[0]["body"]["w"]).abs().max() > 1e-2
    assert not torch.equal(held["head"], before[0]["head"])
    # Moments and counts, as well: the next step is the one that would have come.
    again = stepped(optimizer, grads_of(held), state, held)[0]
    wanted = stepped(optimizer, grads_of(before[0]), before[1], before[0])[0]
    assert torch.equal(again["body"]["w"], wanted["body"]["w"])
    # What trains does not notice.
    alone = {"head": TREE["head"]}
    trained, _ = run(optimizer, alone, 8, lambda step: pf.mask(alone, ".*"), "hold")
    assert torch.equal(held["head"], trained["head"])


def adamw(tree, moments, grads, rate=0.1, decay=0.2):
    """AdamW by its formula."""
    step = pf.map_leaves(lambda count: count + 1, moments["step"])
    first = pf.map_leaves(lambda m, g: 0.9 * m + 0.1 * g, moments["m"], grads)
    second = pf.map_leaves(lambda v, g: 0.999 * v + 0.001 * g * g, moments["v"], grads)

    def move(p, m, v, t):
        return p - rate * (decay * p + m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8))

    return pf.map_leaves(move, tree, first, second, step), {"m": first, "v": second, "step": step}


@pytest.mark.parametrize("kind", ["formula", "torchopt"])
def test_one_compiled_step_for_whatever_trains(kind):
    update = adamw
    if kind == "torchopt":
        optimizer = torchopt.rmsprop(0.1, weight_decay=0.1, centered=True)  # its Adam does not compile

        def update(tree, state, grads):
            return stepped(optimizer, grads, state, tree)

        start = optimizer.init(TREE)
    else:
        zeros = [pf.map_leaves(torch.zeros_like, TREE) for _ in range(2)]
        start = {"m": zeros[0], "v": zeros[1], "step": pf.map_leaves(lambda leaf: leaf.new_zeros(()), TREE)}

    def step(mask, tree, state):
        new, new_state = update(tree, state, pf.mask_gradients(grads_of(tree), mask))
        return pf.hold(mask, new, tree), pf.hold(mask, new_state, state)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    tree, state = TREE, start
    twin, twin_state = TREE, start
    tree, state = compiled(pf.mask(TREE, ".*"), tree, state)
    twin, twin_state = step(pf.mask(TREE, ".*"), twin, twin_state)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for where in (ONLY_HEAD, ONLY_HEAD, r"body\..*", None, ".*"):
            tree, state = compiled(pf.mask(TREE, where), tree, state)
            twin, twin_state = step(pf.mask(TREE, where), twin, twin_state)
    for keys, leaf in pf.leaves(tree):
        assert torch.allclose(leaf, dict(pf.leaves(twin))[keys], rtol=0, atol=1e-12)
        assert not torch.equal(leaf, dict(pf.leaves(TREE))[keys])


def test_a_frozen_leaf_stays_whatever_the_step_made_of_it():
    new = pf.map_leaves(lambda leaf: leaf * float("nan"), TREE)
    held = pf.hold(pf.mask(TREE, ONLY_HEAD), new, TREE)
    assert torch.equal(held["body"]["w"], TREE["body"]["w"])
    assert held["head"].isnan().all()
    zeroed = pf.mask_gradients(new, pf.mask(TREE, ONLY_HEAD))
    assert not zeroed["body"]["w"].any()
    assert zeroed["body"]["w"].dtype == torch.float64


def made(kind, **options):
    """An optimizer over one 2-D weight, after a step with a gradient; and by how much one with zeros then moves it."""
    weight = nn.Parameter(torch.full((3, 3), 2.0))
    optimizer = kind([weight], **options)
    for scale in (1.0, 1.0, 0.0):
        before = weight.detach().clone()
        weight.grad = scale * torch.eye(3)
        optimizer.step()
    return optimizer, bool((weight.detach() != before).any())


O = torch.optim  # noqa: E741
EVERY = [
    *[(kind, {}) for kind in (O.Adam, O.AdamW, O.NAdam, O.RAdam, O.Adamax, O.Adagrad, O.Adadelta, O.RMSprop)],
    *[(kind, {}) for kind in (O.ASGD, O.Rprop, O.Adafactor, O.SGD, O.Muon)],
    (O.SGD, {"momentum": 0.9}),
    (O.SGD, {"weight_decay": 0.1}),
    (O.RMSprop, {"momentum": 0.5}),
    (O.Adam, {"betas": (0.0, 0.99)}),
    (O.Adagrad, {"weight_decay": 0.1}),
    (O.ASGD, {"lambd": 0.0}),
    (O.Muon, {"weight_decay": 0.0, "momentum": 0.0}),
]


@pytest.mark.parametrize(("kind", "options"), EVERY, ids=str)
def test_it_warns_where_the_optimizer_moves_what_has_no_gradient(kind, options):
    optimizer, moves = made(kind, **{"lr": 0.1, **options})
    mask = pf.mask(TREE, ONLY_HEAD)
    if moves:
        with pytest.warns(pf.ZeroGradientWarning, match=rf"{kind.__name__} moves .*pf\.hold"):
            pf.mask_gradients(TREE, mask, optimizer)
    else:
        pf.mask_gradients(TREE, mask, optimizer)


def test_it_does_not_warn_where_all_trains():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pf.mask_gradients(TREE, pf.mask(TREE, ".*"), made(torch.optim.AdamW)[0])


def test_only_optimizers_of_torch_are_asked():
    with pytest.raises(pf.OptionError, match=r"torch\.optim.*pf\.hold"):
        pf.mask_gradients(TREE, pf.mask(TREE, ONLY_HEAD), torchopt.adam(0.1))


MASK = pf.mask(TREE, ONLY_HEAD)


@pytest.mark.parametrize(
    ("mask", "new", "old"),
    [
        ({"head": MASK["head"]}, TREE, TREE),  # a mask of less
        (MASK, {**TREE, "more": torch.ones(2)}, {**TREE, "more": torch.ones(2)}),
        (MASK, TREE, {"head": TREE["head"]}),  # a tree that grew in the step
        (MASK, TREE, pf.map_leaves(lambda leaf: leaf.float(), TREE)),
        (MASK, {**TREE, "head": torch.ones(4)}, TREE),
        (pf.map_leaves(lambda leaf: leaf > 0, TREE), TREE, TREE),
        (pf.map_leaves(lambda leaf: torch.tensor(1.0), TREE), TREE, TREE),
        (MASK, {"x": torch.tensor(1.0)}, {"x": torch.tensor(2.0)}),
        (MASK, torch.ones(3), torch.ones(3)),
    ],
    ids=range(9),
)
def test_what_does_not_fit_the_mask_is_refused(mask, new, old):
    with pytest.raises(pf.TreeError):
        pf.hold(mask, new, old)


def test_gradients_must_have_the_paths_of_the_mask():
    with pytest.raises(pf.TreeError, match="one tree only"):
        pf.mask_gradients({"head": TREE["head"]}, MASK)


def test_a_state_without_values_for_leaves_passes():
    optimizer = torchopt.sgd(0.1)
    state = optimizer.init(TREE)
    assert pf.hold(MASK, state, state) == state

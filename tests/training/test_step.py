"""A step is what a hand-written loop does: loss, backward, clip_grad_norm_, step; for stacked members too."""

import optree
import pytest
import torch
import torch.nn.functional as F
import torchopt
from torch import nn

import peft_func as pf
from peft_func.trees.paths import leaves
from tests.ensemble.side_by_side import Many
from tests.zoo import ZOO, ids, randn

X, Y = randn(6, 5), torch.tensor([0, 2, 1, 1, 0, 2])
METHODS = {
    "lora": pf.lora(".*", rank=2),
    "gift": pf.gift("0", rank=2),
    "chain": pf.chain(pf.lora(".*", rank=2), pf.gift("0", rank=2), pf.train("1")),
}
TORCHOPT = {
    "adamw": (lambda: torchopt.adamw(0.05, weight_decay=0.1), torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.1}),
    "sgd": (lambda: torchopt.sgd(0.3, momentum=0.9), torch.optim.SGD, {"lr": 0.3, "momentum": 0.9}),
    "chain": (
        lambda: torchopt.chain(torchopt.clip.clip_grad_norm(0.3), torchopt.adam(0.05)),
        torch.optim.Adam,
        {"lr": 0.05},
    ),
}


def mlp():
    return nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))


def many(name="chain"):
    return Many(mlp(), METHODS[name])


def loss_of(group):
    return lambda tree, x, y: F.cross_entropy(group.one(tree, x), y)


def by_hand(tree, loss, cls, options, count, clip=None, args=(X, Y)):
    """Train as everyone does, in place; return the trees and the losses."""
    own = pf.map_leaves(lambda leaf: nn.Parameter(leaf.detach().clone()), tree)
    parameters, trees, losses, clipped = [leaf for _, leaf in leaves(own)], [], [], 0
    optimizer = cls(parameters, **options)
    for _ in range(count):
        optimizer.zero_grad()
        value = loss(own, *args)
        value.backward()
        if clip is not None:
            clipped += bool(nn.utils.clip_grad_norm_(parameters, clip) > clip)
        optimizer.step()
        trees.append(pf.map_leaves(lambda leaf: leaf.detach().clone(), own))
        losses.append(value.detach())
    assert clip is None or clipped
    return trees, losses


def close(a, b, small=1e-12):
    optree.tree_map(lambda p, q: torch.testing.assert_close(p, q, rtol=small, atol=small), a, b)


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("name", list(METHODS))
def test_a_step_is_a_hand_written_one(name, clip):
    group = many(name)
    loss, tree, options = loss_of(group), group.members[0], {"lr": 0.05, "weight_decay": 0.1}
    trees, losses = by_hand(tree, loss, torch.optim.AdamW, options, 5, clip)
    adamw = pf.optimizer(torch.optim.AdamW, **options)
    run, state = pf.step(loss, adamw, clip_norm=clip), adamw.init(tree)
    for wanted, value in zip(trees, losses, strict=True):
        before = [(leaf, leaf._version, leaf.clone()) for leaf in optree.tree_leaves((tree, state))]
        stepped = run(tree, state, X, Y)
        assert all(leaf._version == version and torch.equal(leaf, old) for leaf, version, old in before)
        tree, state, found = stepped
        close(tree, wanted)
        torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12)
        assert stepped.tree is tree
        assert stepped.value is found


@pytest.mark.parametrize("name", list(TORCHOPT))
def test_torchopts_optimizers_are_torchs(name):
    make, cls, options = TORCHOPT[name]
    group = many()
    loss, tree = loss_of(group), group.members[0]
    trees, _ = by_hand(tree, loss, cls, options, 5, 0.3 if name == "chain" else None)
    run, state = pf.step(loss, make()), make().init(tree)
    first = optree.tree_map(torch.clone, (tree, state))
    start, kept = tree, state
    for wanted in trees:
        tree, state, _ = run(tree, state, X, Y)
        # torchopt corrects Adam's bias in float32, whatever the leaves are, and its clipping has no 1e-6 in it.
        close(tree, wanted, 1e-10 if name == "sgd" else 1e-5)
    close((start, kept), first, 0)


def test_torchopt_by_default_writes_into_the_state_that_the_caller_holds():
    """Why a step says inplace=False: told nothing, the old state is no longer the old one."""
    adam, tree = torchopt.adam(0.05), {"a": randn(3)}
    state = adam.init(tree)
    before = optree.tree_map(torch.clone, state)
    grads = {"a": torch.ones(3, dtype=torch.float64)}
    adam.update(grads, state, params=tree)
    same = optree.tree_map(torch.equal, optree.tree_leaves(before), optree.tree_leaves(state))
    assert not all(same)
    sgd = torchopt.sgd(0.05)
    sgd.update(grads, sgd.init(tree), params=tree)
    assert not torch.equal(grads["a"], torch.ones(3, dtype=torch.float64))  # the gradients, too
    state = optree.tree_map(torch.clone, before)
    pf.step(lambda tree: tree["a"].sum(), adam)(tree, state)
    assert all(map(torch.equal, optree.tree_leaves(before), optree.tree_leaves(state)))


def test_ours_stands_where_torchopts_does():
    tree = {"a": randn(3), "b": {"c": randn(2)}}
    grads = pf.map_leaves(torch.cos, tree)
    for ours, theirs, small in (
        (pf.optimizer(torch.optim.AdamW, lr=0.1), torchopt.adamw(0.1), 1e-5),
        (pf.optimizer(torch.optim.SGD, lr=0.1), torchopt.sgd(0.1), 1e-10),
    ):
        results = []
        for each in (ours, theirs):
            own, state = tree, each.init(tree)
            for _ in range(3):
                updates, state = each.update(grads, state, params=own, inplace=False)
                own = torchopt.apply_updates(own, updates, inplace=False)
            results.append(own)
        close(*results, small)


def test_a_functional_optimizer_need_not_know_inplace():
    class Plain:
        def init(self, params):
            return 0

        def update(self, updates, state, params):
            return pf.map_leaves(lambda grad, leaf: -0.5 * grad * leaf, updates, params), state + 1

    tree, state, _ = pf.step(lambda tree: tree["a"].sum(), Plain())({"a": torch.tensor([2.0, 4.0])}, 0)
    assert tree["a"].tolist() == [1.0, 2.0]
    assert state == 1


def one_by_one(tree, run, optimizer, count):
    state, trees, losses = optimizer.init(tree), [], []
    for _ in range(count):
        tree, state, value = run(tree, state, X, Y)
        trees.append(tree)
        losses.append(value)
    return trees, losses


CLIP = 0.15


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD, torchopt.adamw])
@pytest.mark.parametrize("name", list(METHODS))
def test_stacked_members_are_members_trained_alone(name, cls):
    group = many(name)
    run_all, loss = pf.ensemble(group.adapter), loss_of(group)

    def losses(stacked, x, y):
        logits = run_all(group.frozen, stacked, x)
        return torch.stack([F.cross_entropy(each, y) for each in logits])

    options = {"lr": 0.05} if cls is not torch.optim.SGD else {"lr": 0.5, "momentum": 0.9}
    optimizer = torchopt.adamw(0.05) if cls is torchopt.adamw else pf.optimizer(cls, **options)
    grads_of = pf.member_grads(group.adapter, F.cross_entropy)
    both = (
        pf.step(losses, optimizer, clip_norm=CLIP, members=True),
        pf.step(
            None, optimizer, clip_norm=CLIP, members=True,
            grads=lambda stacked, x, y: grads_of(group.frozen, stacked, (x,), (y,)),
        ),
    )  # fmt: skip
    if cls is torchopt.adamw:
        alone = [one_by_one(tree, pf.step(loss, optimizer, clip_norm=CLIP), optimizer, 4) for tree in group.members]
    else:
        alone = [by_hand(tree, loss, cls, options, 4, CLIP) for tree in group.members]
    for run in both:
        stacked, state = group.stacked, optimizer.init(group.stacked)
        for number in range(4):
            stacked, state, values = run(stacked, state, X, Y)
            close(pf.unstack(stacked), [trees[number] for trees, _ in alone], 1e-9)
            close(list(values), [own[number] for _, own in alone], 1e-9)


def test_stacked_members_of_bert_with_groups():
    animal = ZOO["bert"]
    method = pf.chain(pf.lora(["query", "value"], rank=2), pf.gift(["key"], rank=2), pf.train("classifier"))
    group = Many(animal.build(), method, count=2, output=animal.output)
    words, labels = ids(4, 5, high=32), torch.tensor([0, 1, 1, 0])
    adapter = group.adapter
    rules = [(r"train\..*", {"lr": 0.01}), pf.lora_plus(4, adapter), pf.no_decay(adapter)]
    adamw = pf.optimizer(torch.optim.AdamW, lr=0.02, weight_decay=0.3, groups=rules)
    grads_of = pf.member_grads(adapter, lambda out, y: F.cross_entropy(out.logits, y))
    run = pf.step(
        None, adamw, clip_norm=CLIP, members=True, grads=lambda tree, x, y: grads_of(group.frozen, tree, (x,), (y,))
    )
    stacked, state = group.stacked, adamw.init(group.stacked)
    for _ in range(3):
        stacked, state, _ = run(stacked, state, words, labels)
    for found, start in zip(pf.unstack(stacked), group.members, strict=True):
        own = pf.map_leaves(lambda leaf: nn.Parameter(leaf.clone()), start)
        optimizer = torch.optim.AdamW(pf.groups(own, rules, lr=0.02, weight_decay=0.3))
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(group.one(own, words), labels).backward()
            assert nn.utils.clip_grad_norm_([leaf for _, leaf in leaves(own)], CLIP) > CLIP
            optimizer.step()
        close(found, pf.map_leaves(torch.detach, own), 1e-9)


def test_each_member_has_its_own_largest_norm():
    tree = {"a": randn(3, 4), "b": randn(3, 2, 2)}
    limits, sgd = torch.tensor([0.1, 100.0, 0.5]), pf.optimizer(torch.optim.SGD, lr=1.0)
    run = pf.step(lambda t: (t["a"] ** 2).sum(1) + (t["b"] ** 2).sum((1, 2)), sgd, clip_norm=limits, members=True)
    new = run(tree, sgd.init(tree)).tree
    moved = torch.cat([(new[name] - tree[name]).reshape(3, -1) for name in tree], 1).norm(dim=1)
    free = 2 * torch.cat([tree[name].reshape(3, -1) for name in tree], 1).norm(dim=1)
    torch.testing.assert_close(moved, torch.minimum(free, limits.double()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_clipping_is_torchs(scale):
    tree = {"a": randn(3, 4), "b": {"c": randn(2), "d": randn(1)[0]}}
    own = pf.map_leaves(lambda leaf: nn.Parameter(leaf.clone()), tree)
    for _, leaf in leaves(own):
        leaf.grad = scale * torch.sin(leaf.detach())
    nn.utils.clip_grad_norm_([leaf for _, leaf in leaves(own)], 0.7)
    sgd = pf.optimizer(torch.optim.SGD, lr=1.0)
    loss = lambda tree: -scale * sum(leaf.cos().sum() for _, leaf in leaves(tree))
    new = pf.step(loss, sgd, clip_norm=0.7)(tree, sgd.init(tree)).tree
    for (_, leaf), (_, before), (_, peer) in zip(leaves(new), leaves(tree), leaves(own), strict=True):
        torch.testing.assert_close(before - leaf, peer.grad, rtol=1e-12, atol=1e-13)


def test_accumulation_is_the_whole_batch():
    group = many()
    loss, adamw = loss_of(group), pf.optimizer(torch.optim.AdamW, lr=0.05)
    tree = group.members[0]
    state = adamw.init(tree)
    seen = []

    def watched(tree, x, y, note):
        seen.append(len(x))
        return loss(tree, x, y), (len(x), note)

    whole = pf.step(loss, adamw, clip_norm=0.3)(tree, state, X, Y)
    for count in (2, 3, 6):
        parts = pf.step(watched, adamw, clip_norm=0.3, has_aux=True, accumulate=count)(tree, state, X, Y, "n")
        close(parts[:2], whole[:2], 1e-9)
        torch.testing.assert_close(parts.value[0], whole.value)
        assert parts.value[1] == [(6 // count, "n")] * count
    assert seen == [3, 3, 2, 2, 2, 1, 1, 1, 1, 1, 1]
    with pytest.raises(pf.TreeError, match=r"accumulate=4 cuts .*\[\[6\], \[6\]\]"):
        pf.step(loss, adamw, accumulate=4)(tree, state, X, Y)
    with pytest.raises(pf.TreeError, match="accumulate=2"):
        pf.step(lambda tree: loss(tree, X, Y), adamw, accumulate=2)(tree, state)


def test_aux_comes_back():
    sgd, tree = pf.optimizer(torch.optim.SGD, lr=0.5), {"a": torch.ones(2)}
    result = pf.step(lambda tree, x: ((tree["a"] * x).sum(), {"x": x}), sgd, has_aux=True)(tree, {}, 3.0)
    assert result.value[0] == 6.0
    assert result.value[1] == {"x": 3.0}
    assert result.tree["a"].tolist() == [-0.5, -0.5]


def test_vmap_over_whole_steps_is_training_alone():
    group = many()
    loss, sgd = loss_of(group), pf.optimizer(torch.optim.SGD, lr=0.5, momentum=0.9)
    run = pf.step(loss, sgd, clip_norm=CLIP)
    many_steps = torch.vmap(lambda tree, state: run(tree, state, X, Y)[:2])
    stacked, state = many_steps(group.stacked, sgd.init(group.stacked))
    stacked, _ = many_steps(stacked, state)
    alone = [
        by_hand(tree, loss, torch.optim.SGD, {"lr": 0.5, "momentum": 0.9}, 2, CLIP)[0][-1] for tree in group.members
    ]
    close(pf.unstack(stacked), alone, 1e-10)


@pytest.mark.parametrize("make", [lambda: torchopt.adamw(0.1), lambda: pf.optimizer(torch.optim.AdamW, lr=0.1)])
def test_no_graph_goes_from_step_to_step(make):
    tree, optimizer = {"a": nn.Parameter(randn(3))}, make()
    state = optimizer.init(tree)
    tree, state, value = pf.step(lambda tree: tree["a"].square().sum(), optimizer)(tree, state)
    assert not tree["a"].requires_grad
    assert not value.requires_grad
    assert not any(leaf.requires_grad for leaf in optree.tree_leaves(state))


def test_a_gradient_goes_through_a_step_of_torchopt_inside_torch_func():
    """One inner step, and the derivative of the loss after it by what scaled the inner loss."""
    tree, sgd = {"a": randn(3)}, torchopt.sgd(0.1)
    inner = pf.step(lambda tree, scale: scale * tree["a"].cos().sum(), sgd, clip_norm=100.0)
    outer = lambda scale: inner(tree, sgd.init(tree), scale).tree["a"].pow(3).sum()
    one = torch.tensor(1.3, dtype=torch.float64)
    slope = (outer(one + 1e-6) - outer(one - 1e-6)) / 2e-6
    torch.testing.assert_close(torch.func.grad(outer)(one), slope, rtol=1e-7, atol=1e-9)


def test_compile_with_aux():
    group = many("lora")
    loss, sgd = loss_of(group), torchopt.sgd(0.3)
    run = pf.step(lambda tree, x, y: (loss(tree, x, y), {"x": x * 2, "n": 3}), sgd, has_aux=True)
    torch._dynamo.reset()
    compiled = torch.compile(run, backend="eager", fullgraph=True)(group.members[0], sgd.init(group.members[0]), X, Y)
    plain = run(group.members[0], sgd.init(group.members[0]), X, Y)
    close([*compiled.tree.values()], [*plain.tree.values()], 1e-10)
    close(compiled.value, plain.value)


def test_compile():
    group = many("lora")
    loss, tree = loss_of(group), group.members[0]
    plain = torchopt.sgd(0.3)
    adamw = pf.optimizer(torch.optim.AdamW, lr=0.05)
    for optimizer, fullgraph in ((adamw, False), (plain, True)):
        torch._dynamo.reset()
        run = pf.step(loss, optimizer, clip_norm=0.2)
        state = optimizer.init(tree)
        compiled = torch.compile(run, backend="eager", fullgraph=fullgraph)
        close(compiled(tree, state, X, Y).tree, run(tree, state, X, Y).tree, 1e-10)


def test_steps_do_not_share_anything():
    """The same step from the same place is the same, whatever was stepped in between."""
    group = many()
    adamw = pf.optimizer(torch.optim.AdamW, lr=0.05)
    run, state = pf.step(loss_of(group), adamw), adamw.init(group.members[0])
    first = run(group.members[0], state, X, Y)
    run(group.members[1], run(group.members[1], state, X, Y).state, X, Y)
    close(run(group.members[0], state, X, Y)[:2], first[:2], 0)


SGD = pf.optimizer(torch.optim.SGD)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda loss: pf.step(loss, torch.optim.SGD), "not the class SGD; write pf.optimizer"),
        (lambda loss: pf.step(loss, torch.optim.SGD([torch.ones(1)])), "not a SGD"),
        (lambda loss: pf.step(None, SGD), "takes a loss, or grads="),
        (lambda loss: pf.step(loss, SGD, grads=loss), "takes a loss, or grads="),
        (lambda loss: pf.step(None, SGD, grads=loss, has_aux=True), "takes a loss, or grads="),
        (lambda loss: pf.step(loss, SGD, accumulate=0), "accumulate=0"),
        (lambda loss: pf.step(loss, SGD, accumulate=True), "accumulate=True"),
        (lambda loss: pf.step(loss, SGD, clip_norm=0), "clip_norm=0"),
        (lambda loss: pf.step(loss, SGD, clip_norm=float("nan")), "clip_norm=nan"),
        (lambda loss: pf.step(loss, SGD, clip_norm="1"), "clip_norm='1'"),
        (lambda loss: pf.step(loss, SGD, clip_norm=torch.ones(3)), r"clip_norm is a tensor \[3\]; only members"),
        (lambda loss: pf.step(loss, pf.optimizer(torch.optim.Adafactor), members=True), "would mix members"),
    ],
)
def test_options_that_cannot_work(make, message):
    with pytest.raises(pf.OptionError, match=message):
        make(lambda tree: tree["a"].sum())


def test_losses_and_trees_that_cannot_work():
    tree = {"a": torch.ones(2), "b": torch.ones(3)}
    with pytest.raises(pf.TreeError, match="sum or average"):
        pf.step(lambda tree: tree["a"], SGD)(tree, {})
    with pytest.raises(pf.TreeError, match="one common leading length"):
        pf.step(None, SGD, members=True, grads=lambda tree: (tree, torch.ones(2)))(tree, {})
    with pytest.raises(pf.TreeError, match="no gradient for the leaf 'b'"):
        pf.step(None, SGD, grads=lambda tree: ({"a": tree["a"]}, 0))(tree, {})

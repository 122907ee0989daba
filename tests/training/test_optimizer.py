"""A torch.optim class as pure functions computes what it computes in place."""

import dataclasses

import optree
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peft_func as pf
from peft_func.trees.paths import join, leaves
from tests.zoo import randn

OPTIM = torch.optim
CLASSES = {
    "sgd": (OPTIM.SGD, {"lr": 0.1}),
    "momentum": (OPTIM.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "nesterov": (OPTIM.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    "nesterov foreach": (OPTIM.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "foreach": True}),
    "dampening": (OPTIM.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "adam": (OPTIM.Adam, {"lr": 0.1, "weight_decay": 0.1}),
    "amsgrad": (OPTIM.Adam, {"lr": 0.1, "amsgrad": True, "betas": (0.5, 0.6)}),
    "adamw": (OPTIM.AdamW, {"lr": 0.1, "weight_decay": 0.3}),
    "adamw foreach": (OPTIM.AdamW, {"lr": 0.1, "foreach": True}),
    "adamw fused": (OPTIM.AdamW, {"lr": 0.1, "fused": True}),
    "adagrad": (OPTIM.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.2, "lr_decay": 0.1}),
    "rmsprop": (OPTIM.RMSprop, {"lr": 0.1, "momentum": 0.5, "centered": True}),
    "nadam": (OPTIM.NAdam, {"lr": 0.1}),
    "radam": (OPTIM.RAdam, {"lr": 0.1}),
    "adamax": (OPTIM.Adamax, {"lr": 0.1}),
    "adadelta": (OPTIM.Adadelta, {"lr": 0.5}),
    "asgd": (OPTIM.ASGD, {"lr": 0.1, "t0": 2}),
    "rprop": (OPTIM.Rprop, {"lr": 0.1}),
    "adafactor": (OPTIM.Adafactor, {"lr": 0.1}),
    "muon": (OPTIM.Muon, {"lr": 0.1}),
}
WHOLE = {"adafactor", "muon"}
EVERY = pytest.mark.parametrize("name", list(CLASSES))
GROUPS = [(r".*\.b|last", {"lr": 0.03, "weight_decay": 0.0})]
RATES = [(r".*\.b|last", {"lr": 0.03})]


def a_tree(name="adam"):
    last = randn(5, 2, seed=2) if name == "muon" else randn(1, seed=2)[0]
    flat = {"lora": {"q.weight": {"b": randn(4, 3), "A": randn(3, 4, seed=1)}}, "last": last}
    return flat if name == "muon" else {**flat, "bias": randn(4, seed=3)}


def the_loss(tree):
    return sum((leaf * (leaf - 0.3).cos()).sum() for _, leaf in leaves(tree))


def the_grads(tree):
    return torch.func.grad(the_loss)(tree)


def in_place(cls, options, tree, count, groups=()):
    """Train clones of the leaves with the class itself; return every tree and the last optimizer's state by path."""
    own = pf.map_leaves(lambda leaf: nn.Parameter(leaf.clone()), tree)
    parts = {join(keys): leaf for keys, leaf in leaves(own)}
    special = [path for path in parts if groups and (path.endswith(".b") or path == "last")]
    lists = [{"params": [leaf for path, leaf in parts.items() if path not in special]}]
    if special:
        lists.append({"params": [parts[path] for path in special], **groups[0][1]})
    optimizer, trees = cls(lists, **options), []
    for _ in range(count):
        optimizer.zero_grad()
        the_loss(own).backward()
        optimizer.step()
        trees.append(pf.map_leaves(lambda leaf: leaf.detach().clone(), own))
    return trees, {path: optimizer.state[leaf] for path, leaf in parts.items()}


def equal(a, b):
    left, right = {join(k): v for k, v in leaves(a)}, {join(k): v for k, v in leaves(b)}
    assert list(left) == list(right)
    for path in left:
        assert torch.equal(left[path], right[path]), path


def held(tree):
    return {keys: (leaf, leaf._version, leaf.clone()) for keys, leaf in leaves(tree)}


def unchanged(tree, before):
    for keys, leaf in leaves(tree):
        same, version, value = before[keys]
        assert leaf is same
        assert leaf._version == version
        assert torch.equal(leaf, value)
        assert leaf.grad is None


@EVERY
@pytest.mark.parametrize("grouped", [False, True], ids=["plain", "groups"])
def test_the_values_of_the_class_itself_bit_for_bit(name, grouped):
    cls, options = CLASSES[name]
    groups = (RATES if name == "rprop" else GROUPS) if grouped else ()
    options = {**options, "foreach": False} if name in {"adamw", "momentum"} else options
    tree = a_tree(name)
    expected, expected_state = in_place(cls, options, tree, 5, groups)
    opt = pf.optimizer(cls, groups=groups, **options)
    state = opt.init(tree)
    for wanted in expected:
        grads = the_grads(tree)
        before = [(each, held(each)) for each in (tree, grads, state)]
        new, new_state = opt.step(grads, state, tree)
        for each, seen in before:
            unchanged(each, seen)
        updates, other = opt.update(grads, state, params=tree, inplace=False)
        equal(new_state, other)
        optree.tree_map(lambda p, u, n: torch.testing.assert_close(p + u, n), tree, updates, new)
        equal(new, wanted)
        tree, state = new, new_state
    for path, parts in expected_state.items():
        found = {n: v for n, part in state.items() for k, v in leaves(part) if join(k) == path}
        assert found.keys() == {n for n, v in parts.items() if v is not None}
        assert all(torch.equal(found[n], parts[n]) for n in found)


@EVERY
def test_the_state_is_a_tree_of_one_structure_from_the_start(name):
    cls, options = CLASSES[name]
    tree, opt = a_tree(name), pf.optimizer(cls, **options)
    state = opt.init(tree)
    after = opt.step(the_grads(tree), state, tree)[1]
    assert all(isinstance(leaf, torch.Tensor) and not leaf.requires_grad for _, leaf in leaves(after))
    shapes = lambda state: {keys: (leaf.shape, leaf.dtype) for keys, leaf in leaves(state)}
    if name == "dampening":
        assert state == {}
    else:
        assert shapes(state) == shapes(after)
    if "exp_avg" in state:
        assert not any(leaf.any() for _, leaf in leaves(state["exp_avg"]))


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in WHOLE])
def test_members_of_a_stacked_tree_train_as_if_alone(name):
    cls, options = CLASSES[name]
    opt = pf.optimizer(cls, groups=RATES if name == "rprop" else GROUPS, **options)
    members = [pf.map_leaves(lambda leaf, k=k: leaf + 0.3 * k, a_tree()) for k in range(3)]
    stacked = pf.stack(members)
    state, alone = opt.init(stacked), [opt.init(member) for member in members]
    for _ in range(4):
        stacked, state = opt.step(torch.vmap(the_grads)(stacked), state, stacked)
        pairs = [opt.step(the_grads(m), s, m) for m, s in zip(members, alone, strict=True)]
        members, alone = [m for m, _ in pairs], [s for _, s in pairs]
    for found, expected in zip(pf.unstack(stacked), members, strict=True):
        optree.tree_map(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12), found, expected)


def test_adafactor_over_a_stacked_tree_mixes_members_and_says_so():
    opt = pf.optimizer(OPTIM.Adafactor, lr=0.1)
    members = [{"a": randn(4, 3, seed=k) * 10.0 ** (2 * k)} for k in range(2)]
    stacked = pf.stack(members)
    together = pf.unstack(opt.step(stacked, opt.init(stacked), stacked)[0])
    alone = opt.step(members[0], opt.init(members[0]), members[0])[0]
    assert (together[0]["a"] - alone["a"]).abs().max() > 1e-3
    assert not opt.elementwise
    assert not pf.optimizer(OPTIM.Muon).elementwise
    assert pf.optimizer(OPTIM.AdamW).elementwise


def test_the_state_saves_splits_and_goes_on(tmp_path):
    opt, tree = pf.optimizer(OPTIM.AdamW, lr=0.1), a_tree()
    tree, state = opt.step(the_grads(tree), opt.init(tree), tree)
    flat = {"/".join(keys): leaf for keys, leaf in leaves(state)}
    save_file(flat, tmp_path / "state.safetensors")
    back = {}
    for name, value in load_file(tmp_path / "state.safetensors").items():
        *outer, last = name.split("/")
        place = back
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = value
    expected = opt.step(the_grads(tree), state, tree)
    for found, wanted in zip(opt.step(the_grads(tree), back, tree), expected, strict=True):
        optree.tree_map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), found, wanted)
    # What trains changes: the state goes with its leaves.
    kept, _ = pf.partition(tree, r"lora\..*")
    part, _ = pf.partition(state, r"\w+\.lora\..*")
    new, _ = opt.step(the_grads(kept), part, kept)
    equal(new["lora"], expected[0]["lora"])


def test_bfloat16_is_stepped_as_in_place():
    tree = {"a": randn(50).bfloat16()}
    opt, own = pf.optimizer(OPTIM.SGD, lr=0.7), nn.Parameter(tree["a"].clone())
    own.grad = randn(50, seed=1).bfloat16()
    found, _ = opt.step({"a": own.grad}, opt.init(tree), tree)
    OPTIM.SGD([own], lr=0.7).step()
    assert torch.equal(found["a"], own)


def test_a_rate_is_scaled_in_every_group():
    tree, grads = a_tree(), the_grads(a_tree())
    opt = pf.optimizer(OPTIM.SGD, lr=0.1, groups=GROUPS)
    half = opt.scaled(0.25).scaled(2.0)
    assert half._plans is opt._plans
    expected = pf.optimizer(OPTIM.SGD, lr=0.05, groups=[(GROUPS[0][0], {"lr": 0.015})])
    optree.tree_map(torch.testing.assert_close, half.step(grads, {}, tree)[0], expected.step(grads, {}, tree)[0])
    with pytest.raises(pf.OptionError, match="finite number"):
        opt.scaled(float("nan"))


def test_an_optimizer_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        pf.optimizer(OPTIM.SGD).rate = 2.0


def test_parameters_may_require_gradients():
    tree = {"a": nn.Parameter(randn(3))}
    opt = pf.optimizer(OPTIM.AdamW)
    new, _ = opt.step({"a": randn(3)}, opt.init(tree), tree)
    updates, _ = opt.update({"a": randn(3)}, opt.init(tree), params=tree)
    assert not new["a"].requires_grad
    assert not updates["a"].requires_grad
    assert tree["a"].grad is None


def test_sgd_runs_under_vmap():
    opt, tree = pf.optimizer(OPTIM.SGD, lr=0.1, momentum=0.9), pf.stack([a_tree(), a_tree()])
    run = lambda tree: opt.step(the_grads(tree), opt.init(tree), tree)[0]
    equal(torch.vmap(run)(tree), run(tree))


class Counting(torch.optim.Optimizer):
    """An optimizer of somebody else, whose state is a number or, if told, is made late."""

    def __init__(self, params, lr=0.1, number=True):
        super().__init__(params, {"lr": lr, "number": number})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["seen"] = state.get("seen", 0 if group["number"] else torch.zeros_like(p)) + 1
                p.data.sub_(group["lr"] * p.grad * state["seen"])


def test_classes_of_others():
    tree = {"a": torch.ones(2)}
    opt = pf.optimizer(Counting, number=False)
    state = opt.init(tree)
    assert state == {}
    for _ in range(2):
        tree, state = opt.step({"a": torch.ones(2)}, state, tree)
    torch.testing.assert_close(tree["a"], torch.full((2,), 0.7))
    with pytest.raises(pf.OptionError, match="keeps 'seen' as a int; only optimizers whose state is tensors"):
        pf.optimizer(Counting).step({"a": torch.ones(2)}, {}, tree)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pf.optimizer(OPTIM.AdamW, learning_rate=1.0), "AdamW refuses this: .*'learning_rate'"),
        (lambda: pf.optimizer(OPTIM.AdamW, lr=-1.0), "Invalid learning rate: -1.0"),
        (lambda: pf.optimizer(OPTIM.LBFGS), "LBFGS cannot be .* calls the loss several times"),
        (lambda: pf.optimizer(OPTIM.SparseAdam), "SparseAdam cannot be .* sparse gradients"),
        (lambda: pf.optimizer(OPTIM.AdamW, differentiable=True), "not differentiable; torchopt"),
        (lambda: pf.optimizer(OPTIM.AdamW([torch.ones(1)])), "takes a class of torch.optim"),
        (lambda: pf.optimizer("adamw"), "takes a class of torch.optim"),
        (lambda: pf.optimizer(OPTIM.Muon).init({"a": torch.ones(3)}), "Muon only supports 2D"),
        (
            lambda: pf.optimizer(OPTIM.AdamW, groups=[("a", {"weigth_decay": 0.0})]).init({"a": torch.ones(3)}),
            "AdamW has no option 'weigth_decay', .* 'a' has; it has weight_decay",
        ),
        (
            lambda: pf.optimizer(OPTIM.AdamW, groups=[("a", {"lr": -3.0})]).init({"a": torch.ones(3)}),
            "Invalid learning rate: -3.0",
        ),
        (lambda: pf.optimizer(OPTIM.SGD).update({}, {}, params={}, inplace=True), "writes nothing in place"),
    ],
)
def test_options_that_cannot_work(call, message):
    with pytest.raises(pf.OptionError, match=message):
        call()


def test_trees_that_do_not_fit():
    tree, adam = {"a": torch.ones(2), "b": torch.ones(3)}, pf.optimizer(OPTIM.Adam)
    state = adam.init(tree)
    bad = lambda message: pytest.raises(pf.TreeError, match=message)
    with bad("no gradient for the leaf 'b'"):
        adam.step({"a": torch.ones(2)}, state, tree)
    with bad("gradient for 'c', which the tree does not have"):
        adam.step({**tree, "c": torch.ones(1)}, state, tree)
    with bad(r"gradient of 'b' is \(1,\)"):
        adam.step({"a": torch.ones(2), "b": torch.ones(1)}, state, tree)
    with bad("gradient of 'b' is .* torch.float64"):
        adam.step({"a": torch.ones(2), "b": torch.ones(3).double()}, state, tree)
    with bad("the state lacks '(exp_avg|exp_avg_sq|step)'"):
        adam.step(tree, {}, tree)
    with bad("Adam has no 'momentum_buffer' in its state"):
        adam.step(tree, pf.optimizer(OPTIM.SGD, momentum=0.9).init(tree), tree)
    with bad("SGD has no 'step' in its state, only nothing"):
        pf.optimizer(OPTIM.SGD).step(tree, state, tree)
    with bad("'step' for 'b', which the tree does not have"):
        adam.step({"a": torch.ones(2)}, state, {"a": torch.ones(2)})
    with bad("of 'b' is None"):
        adam.step(tree, adam.init({"a": torch.ones(2)}), tree)
    with bad(r"'exp_avg' of 'a' is \(2,\), Adam's is \(4, 2\)"):
        stacked = pf.stack([tree] * 4)
        adam.step(stacked, state, stacked)
    with bad("the state of Adam is a tuple"):
        adam.step(tree, (), tree)
    with bad("no leaves"):
        adam.init({})
    with bad("'a' is torch.int64"):
        adam.init({"a": torch.ones(2, dtype=torch.long)})
    with bad("two leaves of the tree have the path 'a.b'"):
        adam.init({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)})
    with pytest.raises(pf.SelectorError, match=r"matches none of 2 leaves.*nearest"):
        pf.optimizer(OPTIM.Adam, groups=[("aa", {"lr": 0.1})]).init(tree)


def test_a_gradient_with_a_graph_is_refused():
    tree = {"a": torch.ones(2)}
    sgd = pf.optimizer(OPTIM.SGD)
    with pytest.raises(pf.LeakError, match="the gradient of 'a' has a graph"):
        sgd.step({"a": torch.ones(2, requires_grad=True)}, sgd.init(tree), tree)
    rate = torch.tensor(2.0)
    with pytest.raises(pf.LeakError, match="torchopt"):
        torch.func.grad(lambda rate: sgd.step({"a": rate * torch.ones(2)}, {}, tree)[0]["a"].sum())(rate)

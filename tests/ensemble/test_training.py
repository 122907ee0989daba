"""Members trained side by side are trained as if each were alone."""

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import peft_func as pf
from tests.ensemble.side_by_side import SMALL, Many, perturbed
from tests.zoo import ZOO, ids, randn


def mlp():
    return nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))


METHODS = {
    "lora": pf.lora(".*", rank=2, bias=True),
    "gift": pf.gift(".*", rank=2, share="none"),
    "ia3": pf.ia3(".*", scale_bias=True),
    "dora": pf.dora(".*", rank=1),
    "train": pf.train(".*"),
    "chain": pf.chain(pf.lora("0", rank=2), pf.magnitude(".*"), pf.train("1|3")),
}
LABELS = torch.tensor([0, 2, 1, 1])


def alone(many, loss, inputs, targets=(), own=False, train=False):
    model, results = many.model.train(train), []
    for k, tree in enumerate(many.members):
        pick = lambda value, k=k: value[k] if own else value

        def total(tree, pick=pick):
            output = model(many.adapter.apply(many.frozen, tree), *map(pick, inputs))
            return loss(output, *map(pick, targets))

        results.append(torch.func.grad_and_value(total)(tree))
    return pf.stack([grads for grads, _ in results]), torch.stack([value for _, value in results])


def close(a, b):
    left, right = optree.tree_leaves(a), optree.tree_leaves(b)
    for p, q in zip(left, right, strict=True):
        torch.testing.assert_close(p, q, atol=SMALL, rtol=SMALL)


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("options", [{}, {"how": "vmap"}, {"how": "fold"}, {"chunk_size": 2}, {"chunk_size": 7}])
def test_gradients_are_those_of_each_alone(name, options):
    many, x = Many(mlp(), METHODS[name]), randn(4, 5)
    found = pf.member_grads(many.adapter, F.cross_entropy, **options)(many.frozen, many.stacked, (x,), (LABELS,))
    close(found, alone(many, F.cross_entropy, (x,), (LABELS,)))
    own, labels = randn(3, 4, 5), torch.stack([LABELS, LABELS.flip(0), LABELS.roll(1)])
    grads_of = pf.member_grads(many.adapter, F.cross_entropy, in_dims=0, **options)
    expected = alone(many, F.cross_entropy, (own,), (labels,), own=True)
    close(grads_of(many.frozen, many.stacked, (own,), (labels,)), expected)
    close(grads_of(many.frozen, many.stacked, {"input": own}, [labels]), expected)


@pytest.mark.parametrize("name", ["conv", "bert", "gpt2", "llama", "vit", "attention", "tied", "experts"])
def test_the_zoo(name):
    animal = ZOO[name]
    many = Many(animal.build(), pf.lora(animal.where[0], rank=1))
    loss = lambda out: animal.output(out).square().mean()
    args, _ = animal.inputs(0)
    close(pf.member_grads(many.adapter, loss)(many.frozen, many.stacked, args), alone(many, loss, args))


def test_a_norm_in_train_mode():
    many = Many(nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)), pf.chain(pf.lora("0", rank=1), pf.train("1")))
    loss = lambda y: (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()
    found = pf.member_grads(many.adapter, loss, model=many.model.train())(many.frozen, many.stacked, (randn(4, 5),))
    close(found, alone(many, loss, (randn(4, 5),), train=True))


def test_the_loss_may_be_the_models_own():
    many = Many(ZOO["bert"].build(), pf.lora(["query"], rank=1))
    words, labels = ids(4, 5, high=32), torch.tensor([0, 1, 1, 0])
    inputs = {"input_ids": words, "labels": labels}
    grads, losses = pf.member_grads(many.adapter, lambda out: out.loss)(many.frozen, many.stacked, inputs)
    loss = lambda out: F.cross_entropy(out.logits, labels)
    close((grads, losses), alone(many, loss, (words,)))


def test_targets_of_any_kind():
    many, x = Many(mlp(), pf.lora("0", rank=1)), randn(4, 5)
    loss = lambda y, target, scale: scale * (y - target["y"]).square().sum() + (0 if target["none"] is None else 1)
    target = {"y": randn(4, 3), "none": None}
    found = pf.member_grads(many.adapter, loss)(many.frozen, many.stacked, (x,), (target, 2.0))
    close(found, alone(many, loss, (x,), (target, 2.0)))
    own = {"y": randn(3, 4, 3), "none": None}
    found = pf.member_grads(many.adapter, loss, in_dims=0)(many.frozen, many.stacked, (randn(3, 4, 5),), (own, 2.0))
    for k, tree in enumerate(many.members):
        value = loss(many.one(tree, randn(3, 4, 5)[k]), {"y": own["y"][k], "none": None}, 2.0)
        assert torch.allclose(found[1][k], value)


def test_a_tree_that_the_output_does_not_use():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x):
            return self.a(x)

    many = Many(Net(), pf.lora("b", rank=1))
    for how in ("auto", "vmap"):
        grads, losses = pf.member_grads(many.adapter, F.cross_entropy, how=how)(
            many.frozen, many.stacked, (randn(4, 5),), (LABELS,)
        )
        assert losses.shape == (3,)
        assert not any(leaf.any() for leaf in optree.tree_leaves(grads))
    half = Many(Net(), pf.lora("a|b", rank=1))
    grads, _ = pf.member_grads(half.adapter, F.cross_entropy)(half.frozen, half.stacked, (randn(4, 5),), (LABELS,))
    assert grads["lora"]["a.weight"]["A"].any()
    assert not grads["lora"]["b.weight"]["A"].any()


def test_inside_transforms_no_grad_and_compile():
    many, x = Many(mlp(), METHODS["chain"]), randn(4, 5)
    grads_of = pf.member_grads(many.adapter, F.cross_entropy)
    expected = grads_of(many.frozen, many.stacked, (x,), (LABELS,))
    with torch.no_grad():
        close(grads_of(many.frozen, many.stacked, (x,), (LABELS,)), expected)
    other = perturbed(many.stacked, 5)
    mapped = torch.vmap(lambda tree: grads_of(many.frozen, tree, (x,), (LABELS,)))(pf.stack([many.stacked, other]))
    close(pf.unstack(mapped[0])[0], expected[0])
    close(pf.unstack(mapped[0])[1], grads_of(many.frozen, other, (x,), (LABELS,))[0])
    leaves = optree.tree_leaves(many.stacked)
    assert not any(leaf.requires_grad for leaf in leaves)


@pytest.mark.slow
def test_inside_compile():
    many, x = Many(mlp(), METHODS["lora"]), randn(4, 5)
    grads_of = pf.member_grads(many.adapter, F.cross_entropy)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda tree: grads_of(many.frozen, tree, (x,), (LABELS,)), fullgraph=True, backend="aot_eager"
    )
    for tree in (many.stacked, perturbed(many.stacked, 5)):
        close(compiled(tree), grads_of(many.frozen, tree, (x,), (LABELS,)))


def test_what_is_refused():
    many, x = Many(mlp(), pf.lora("0", rank=1)), randn(3, 4, 5)
    labels = LABELS.expand(3, 4)
    for options in ({"chunk_size": 0}, {"chunk_size": -1}, {"in_dims": (0,)}, {"in_dims": 1}, {"how": "best"}):
        with pytest.raises(pf.OptionError):
            pf.member_grads(many.adapter, F.cross_entropy, **options)
    grads_of = pf.member_grads(many.adapter, F.cross_entropy)
    for inputs, targets in ((x[0], (LABELS,)), (x[0, :1], (LABELS[:1],)), ((x[0],), LABELS), ((x[0, :1],), LABELS[:1])):
        with pytest.raises(pf.TreeError, match="tuple"):
            grads_of(many.frozen, many.stacked, inputs, targets)
    with pytest.raises(pf.TreeError, match="scalar"):
        pf.member_grads(many.adapter, lambda y: y.sum(-1))(many.frozen, many.stacked, (x[0],))
    longer = torch.cat([x, x])
    for chunk_size in (None, 1, 2):
        grads_of = pf.member_grads(many.adapter, F.cross_entropy, in_dims=0, chunk_size=chunk_size)
        for inputs, targets in ((longer, labels), (x, torch.cat([labels, labels])), (x, torch.tensor(1))):
            with pytest.raises(pf.TreeError, match="3 members"):
                grads_of(many.frozen, many.stacked, (inputs,), (targets,))


def train(tree, grads_of, *, steps=20, clip=None, stop=None):
    """AdamW over a stacked tree (or one), with clipping by the norm of each."""
    leaves = pf.map_leaves(lambda t: t.clone().requires_grad_(), tree)
    optimizer = torch.optim.AdamW(optree.tree_leaves(leaves), lr=0.05, weight_decay=0.1)
    for step in range(steps):
        grads = grads_of(pf.map_leaves(lambda t: t.detach(), leaves), step)
        for leaf, grad in zip(optree.tree_leaves(leaves), optree.tree_leaves(grads), strict=True):
            leaf.grad = grad
        if clip:
            torch.nn.utils.clip_grad_norm_(optree.tree_leaves(leaves), clip)
        optimizer.step()
    return pf.map_leaves(lambda t: t.detach(), leaves)


@pytest.mark.parametrize("name", ["lora", "chain"])
@pytest.mark.parametrize("clip", [None, 0.3])
def test_adamw_over_the_stack_is_adamw_over_each(name, clip):
    many = Many(mlp(), METHODS[name])
    data = [randn(3, 4, 5, seed=step) for step in range(20)]
    member_grads = pf.member_grads(many.adapter, F.cross_entropy, in_dims=0)
    labels = LABELS.expand(3, 4)

    def together(stacked, step):
        grads, _ = member_grads(many.frozen, stacked, (data[step],), (labels,))
        return pf.clip_members(grads, clip)[0] if clip else grads

    trained = train(many.stacked, together)
    for k, tree in enumerate(many.members):

        def one(tree, step, k=k):
            def loss(tree):
                return F.cross_entropy(many.one(tree, data[step][k]), LABELS)

            return torch.func.grad(loss)(tree)

        close(pf.unstack(trained)[k], train(tree, one, clip=clip))


def test_a_learning_rate_for_each_and_stopping_early():
    many, x = Many(mlp(), METHODS["chain"]), randn(4, 5)
    rates, stops = torch.tensor([0.1, 0.02, 0.3]).double(), torch.tensor([9, 3, 0])
    grads_of = pf.member_grads(many.adapter, F.cross_entropy)
    stacked = many.stacked
    for step in range(9):
        grads, _ = grads_of(many.frozen, stacked, (x,), (LABELS,))
        new = pf.map_leaves(torch.sub, stacked, pf.scale_members(grads, rates))
        held = pf.hold_members(new, stacked, step < stops)
        for before, after in zip(pf.unstack(stacked), pf.unstack(held), strict=True):
            same = [torch.equal(a, b) for a, b in zip(*map(optree.tree_leaves, (before, after)), strict=True)]
            assert all(same) or not any(same)
        stacked = held
    for k, tree in enumerate(many.members):
        for _ in range(int(stops[k])):
            grads = torch.func.grad(lambda t: F.cross_entropy(many.one(t, x), LABELS))(tree)
            tree = pf.map_leaves(lambda value, grad, k=k: value - rates[k] * grad, tree, grads)
        close(pf.unstack(stacked)[k], tree)
    last, start = (optree.tree_leaves(tree) for tree in (pf.unstack(stacked)[2], many.members[2]))
    assert all(torch.equal(a, b) for a, b in zip(last, start, strict=True))


def test_clipping_is_that_of_torch():
    tree = {"a": randn(3, 2, 4), "b": {"c": randn(3, seed=1)}, "d": randn(3, 5, seed=2)}
    limits = torch.tensor([0.5, 100.0, 1.0]).double()
    clipped, norms = pf.clip_members(tree, limits)
    for k, one in enumerate(pf.unstack(tree)):
        leaves = [torch.zeros_like(leaf, requires_grad=True) for leaf in optree.tree_leaves(one)]
        for leaf, grad in zip(leaves, optree.tree_leaves(one), strict=True):
            leaf.grad = grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(leaves, float(limits[k]))
        assert torch.allclose(norms[k], norm)
        close(pf.unstack(clipped)[k], optree.tree_unflatten(optree.tree_structure(one), [t.grad for t in leaves]))
    spoilt = {**tree, "d": tree["d"].clone()}
    spoilt["d"][1] = torch.inf
    close([t[[0, 2]] for t in optree.tree_leaves(pf.clip_members(spoilt, limits)[0])],
          [t[[0, 2]] for t in optree.tree_leaves(clipped)])  # fmt: skip
    with pytest.raises(pf.TreeError):
        pf.clip_members({}, 1.0)


def test_holding_keeps_bits():
    old = {"a": torch.tensor([[float("nan")], [-0.0], [1e-320]], dtype=torch.float64)}
    new = {"a": torch.full((3, 1), torch.inf, dtype=torch.float64)}
    held = pf.hold_members(new, old, torch.tensor([False, False, False]))
    assert torch.equal(held["a"].view(torch.int64), old["a"].view(torch.int64))
    for factors in (torch.ones(2), 3.0, torch.ones(3, 1), torch.tensor(1.0)):
        with pytest.raises(pf.TreeError):
            pf.scale_members(old, factors)
    with pytest.raises(pf.TreeError, match="bool"):
        pf.hold_members(new, old, torch.tensor([1, 0, 1]))
    assert pf.scale_members({"a": torch.ones(2, 3)}, torch.tensor([2, 0]))["a"].tolist() == [[2.0] * 3, [0.0] * 3]

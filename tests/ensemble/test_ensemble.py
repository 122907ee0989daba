"""K adapters in one pass are the loop over the members."""

from dataclasses import dataclass

import optree
import pytest
import torch
from torch import nn

import peft_func as pf
from tests.ensemble.side_by_side import SMALL, Many, perturbed
from tests.zoo import ZOO, ids, randn


def mlp():
    return nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3))


METHOD = pf.chain(pf.lora(".*", rank=2), pf.ia3("0", side="input"), pf.train("1|.*bias"))


def run_of(many, **options):
    return lambda *args, **kwargs: pf.ensemble(many.adapter, **options)(many.frozen, many.stacked, *args, **kwargs)


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=SMALL, rtol=SMALL)


@pytest.mark.parametrize("how", ["auto", "fold", "vmap"])
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3, 9])
@pytest.mark.parametrize("batch", [1, 2, 3, 6])
def test_every_way_in_chunks_of_any_size(how, chunk_size, batch):
    many = Many(mlp(), METHOD, 3)
    many.check_ensemble(randn(batch, 5), options={"how": how, "chunk_size": chunk_size})
    own = randn(3, batch, 5)
    close(
        run_of(many, how=how, chunk_size=chunk_size, in_dims=0)(own),
        torch.stack([many.one(tree, x) for tree, x in zip(many.members, own, strict=True)]),
    )


@pytest.mark.parametrize("name", list(ZOO))
def test_the_fold_is_vmap(name):
    animal = ZOO[name]
    many = Many(animal.build(), pf.lora(animal.where[0], rank=1), output=animal.output)
    for seed in range(2):
        args, kwargs = animal.inputs(seed)
        many.check_ensemble(*args, **kwargs)
        many.check_ensemble(*args, options={"how": "vmap"}, **kwargs)
        first = many.output(run_of(many, in_dims=0)(*(torch.stack([x, x.flip(-1), x]) for x in args)))
        close(first[1], many.one(many.members[1], *(x.flip(-1) for x in args)))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, mask, x, *, scale=1.0, other=None):
        y = self.a(x) * scale
        if mask is not None:
            y = torch.einsum("st,...td->...sd", mask, y)
        return self.b(y) + (0 if other is None else other["bias"])


@pytest.mark.parametrize("batch", [1, 2, 4, 6, 12])
@pytest.mark.parametrize("length", [2, 3, 4, 12])
def test_the_first_tensor_need_not_be_the_batch(batch, length):
    many = Many(Two(), pf.lora(".*", rank=1))
    many.check_ensemble(randn(length, length), randn(batch, length, 4), scale=2.0)
    many.check_ensemble(None, randn(batch, length, 4), scale=randn(batch, 1, 1))
    many.check_ensemble(None, randn(batch, length, 4), scale=randn(4), other={"bias": randn(3)})


def test_which_arguments_have_members():
    many = Many(Two(), pf.lora(".*", rank=1))
    mask, x, scale = randn(3, 2, 2), randn(3, 5, 2, 4), randn(3, 4)
    found = run_of(many, in_dims=(0, 0))(mask, x, scale=2.0)
    close(found, torch.stack([many.one(tree, mask[k], x[k], scale=2.0) for k, tree in enumerate(many.members)]))
    found = run_of(many, in_dims=(None, 0))(mask[0], x)
    close(found, torch.stack([many.one(tree, mask[0], x[k]) for k, tree in enumerate(many.members)]))
    found = run_of(many, in_dims=0)(None, x, scale=scale)
    close(found, torch.stack([many.one(tree, None, x[k], scale=scale[k]) for k, tree in enumerate(many.members)]))
    one = run_of(many, in_dims=0)(None, x[:, :1], scale=randn(3, 1))  # a number for each member, a batch of one
    expected = [many.one(tree, None, x[k, :1], scale=randn(3, 1)[k]) for k, tree in enumerate(many.members)]
    close(one, torch.stack(expected))


class Returns(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.lin, self.bag = nn.Linear(5, 3), [function]
        self.table = nn.Parameter(torch.randn(12, 3))

    def forward(self, x):
        return self.bag[0](self, self.lin(x))


RETURNS = {
    "loss": lambda m, y: y.mean(),
    "loss and y": lambda m, y: {"loss": y.square().sum(), "y": y, "none": None, "word": "w"},
    "sum over the batch": lambda m, y: y.sum(0),
    "similarities": lambda m, y: y @ y.T,
    "a table": lambda m, y: (y, m.table),
    "a table of the members": lambda m, y: (y, m.table + m.lin.bias),
    "integers": lambda m, y: y.argmax(-1),
    "its length": lambda m, y: (y, len(y)),
    "booleans": lambda m, y: (y > 0, True, 2.5),
    "nothing": lambda m, y: (None,),
    "sequence first": lambda m, y: y.T,
}


@pytest.mark.parametrize("name", list(RETURNS))
@pytest.mark.parametrize("batch", [1, 4, 5])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_what_a_model_returns(name, batch, chunk_size):
    many, x = Many(Returns(RETURNS[name]), pf.lora("lin", rank=1)), randn(batch, 5)
    found = run_of(many, chunk_size=chunk_size)(x)
    rows = [many.one(tree, x) for tree in many.members]
    values, spec = torch.utils._pytree.tree_flatten(found)
    for k, row in enumerate(rows):
        own, same = torch.utils._pytree.tree_flatten(row)
        assert spec == same
        for a, b in zip(values, own, strict=True):
            if isinstance(b, torch.Tensor):
                close(a[k], b)
            else:
                assert a == b


@dataclass
class Output:
    y: torch.Tensor


@pytest.mark.parametrize("how", ["auto", "fold", "vmap"])
def test_an_object_that_nobody_can_take_apart(how):
    many = Many(Returns(lambda m, y: Output(y)), pf.lora("lin", rank=1))
    with pytest.raises(pf.RouteError, match="returns a Output"):
        run_of(many, how=how)(randn(4, 5))


def test_a_fold_that_would_be_wrong_is_refused():
    class Later(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(4, 1)

        def forward(self, x):
            return self.attn(x, x, x)[0]

    norm = Many(nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)), pf.lora("0", rank=1), train=True)
    for many, x, said in (
        (Many(Returns(lambda m, y: y.mean()), pf.lora("lin", rank=1)), randn(4, 5), "not one row"),
        (Many(Later(), pf.lora(".*", rank=1)), randn(4, 2, 4), "second axis"),
        (norm, randn(4, 5), "normalises over the batch"),
        (Many(Returns(lambda m, y: y), pf.lora("lin", rank=1)), (), "no argument"),
    ):
        with pytest.raises(pf.RouteError, match=said):
            run_of(many, how="fold")(*([x] if isinstance(x, torch.Tensor) else x))


@pytest.mark.parametrize("how", ["auto", "vmap"])
def test_norms_in_train_mode_have_a_batch_for_each_member(how):
    net = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    for train in (True, False):
        many = Many(net, pf.chain(pf.lora("0|2", rank=1), pf.train("1")), train=train)
        many.check_ensemble(randn(6, 5), options={"how": how})


def test_dropout_has_masks_of_its_own_for_each_member():
    net = nn.Sequential(nn.Linear(5, 64), nn.Dropout(0.5))
    many = Many(net, pf.lora("0", rank=1, dropout=0.5), 3)
    alike = pf.stack([many.members[0]] * 3)
    for how, randomness, same in (
        ("auto", "different", False), ("vmap", "different", False), ("auto", "same", True), ("vmap", "same", True),
    ):  # fmt: skip
        run = pf.ensemble(many.adapter, model=many.model.train(), how=how, randomness=randomness)
        y = run(many.frozen, alike, randn(1, 5))
        assert torch.equal(y[0], y[1]) is same
        assert (y == 0).double().mean() == pytest.approx(0.5, abs=0.2)
    assert torch.equal(*pf.ensemble(many.adapter, randomness="same")(many.frozen, alike, randn(2, 5))[:2])
    with pytest.raises(pf.RouteError, match="masks"):
        pf.ensemble(many.adapter, model=many.model.train(), how="fold", randomness="same")(
            many.frozen, alike, randn(1, 5)
        )


def test_a_member_that_is_not_finite_spoils_no_other():
    for name in ("mlp", "conv", "bert", "gpt2", "attention"):
        animal = ZOO[name]
        many = Many(animal.build(), pf.dora(animal.where[0], rank=1), output=animal.output)
        spoilt = pf.map_leaves(lambda t: torch.full_like(t, torch.inf), many.members[1])
        args, _ = animal.inputs(0)
        stacked = pf.stack([many.members[0], spoilt, many.members[2]])
        y = animal.output(pf.ensemble(many.adapter)(many.frozen, stacked, *args))
        for k in (0, 2):
            close(y[k], many.one(many.members[k], *args))
        assert not y[1].isfinite().any()


def test_bad_options_and_arguments():
    many = Many(mlp(), pf.lora("0", rank=2))
    for options in (
        {"how": "fast"}, {"randomness": "none"}, {"chunk_size": 0}, {"chunk_size": -1}, {"chunk_size": 1.5},
        {"in_dims": 1}, {"in_dims": (0, 1)}, {"in_dims": [0]}, {"in_dims": -1}, {"model": many.net},
    ):  # fmt: skip
        with pytest.raises(pf.OptionError):
            pf.ensemble(many.adapter, **options)
    with pytest.raises(pf.OptionError, match="bound adapter"):
        pf.ensemble(pf.lora("0"))
    with pytest.raises(pf.OptionError, match="2 arguments"):
        run_of(many, in_dims=(0, None))(randn(3, 4, 5))
    for bad in (randn(4, 5), torch.tensor(1.0)):
        with pytest.raises(pf.TreeError, match="3 members"):
            run_of(many, in_dims=0)(bad)
    broken = many.stacked
    broken["lora"]["0.weight"]["A"] = broken["lora"]["0.weight"]["A"][:2]
    with pytest.raises(pf.TreeError, match="leading length"):
        pf.ensemble(many.adapter)(many.frozen, broken, randn(4, 5))


def test_transforms_over_an_ensemble():
    many, x = Many(mlp(), pf.chain(pf.lora("0", rank=1), pf.train("3.bias"))), randn(4, 5)

    def together(stacked):
        return pf.ensemble(many.adapter)(many.frozen, stacked, x)

    def loop(stacked):
        return torch.stack([many.one(tree, x) for tree in pf.unstack(stacked)])

    stacked, tangent = many.stacked, perturbed(many.stacked, 9)
    found, expected = (
        optree.tree_leaves([
            torch.vmap(torch.func.grad(lambda s, f=f: f(s).square().sum()))(pf.stack([stacked, tangent])),
            torch.func.jvp(f, (stacked,), (tangent,)),
            torch.func.jacrev(f)(stacked),
        ])
        for f in (together, loop)
    )  # fmt: skip
    for a, b in zip(found, expected, strict=True):
        close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "bert", "gpt2", "conv"])
def test_compile(name):
    animal = ZOO[name]
    many = Many(animal.build(), pf.lora(animal.where[0], rank=1), output=animal.output)
    args, _ = animal.inputs(0)
    trees = [many.stacked, perturbed(many.stacked, 3)]
    call = lambda stacked: animal.output(pf.ensemble(many.adapter)(many.frozen, stacked, *args))
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    close(compiled(trees[0]), call(trees[0]))
    with torch._dynamo.config.patch(error_on_recompile=True):
        close(compiled(trees[1]), call(trees[1]))


def test_models_of_transformers_with_masks_as_long_as_anything():
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1] * 6])
    for name in ("bert", "gpt2", "llama"):
        many = Many(ZOO[name].build(), pf.lora(ZOO[name].where[1], rank=1), output=ZOO[name].output)
        for length in (2, 5, 6):  # 6 is two samples of three members
            many.check_ensemble(ids(2, length, high=32), attention_mask=mask[:, :length])


@pytest.mark.parametrize("how", ["fold", "vmap"])
def test_the_row_of_the_padding_gets_no_gradient(how):
    net = nn.Sequential(nn.Embedding(6, 3, padding_idx=0), nn.Linear(3, 2)).double()
    adapter = pf.bind(pf.train("0"), pf.functionalize(net))
    frozen, tree = adapter.init(0)
    ids = torch.tensor([[[0, 1, 2, 2]], [[3, 0, 0, 5]]])
    stacked = pf.stack([tree, tree])
    grads_of = pf.member_grads(adapter, lambda output: output.square().sum(), in_dims=0, how=how)
    grads = grads_of(frozen, stacked, (ids,))[0]["train"]["0.weight"]
    for k in range(2):
        alone = nn.functional.embedding(ids[k], weight := net[0].weight.detach().clone().requires_grad_(), 0)
        nn.functional.linear(alone, net[1].weight, net[1].bias).square().sum().backward()
        assert torch.allclose(grads[k], weight.grad, atol=1e-12)
        assert not grads[k][0].any()

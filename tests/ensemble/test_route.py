"""Every sample through an adapter of its own is the loop over the samples."""

import functools

import optree
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import peft_func as pf
from tests.ensemble.side_by_side import SMALL, Many, perturbed
from tests.threads import wrong_answers
from tests.zoo import ZOO, ids, randn, seeded

INDEX = [2, 0, -1, 2]
INDICES = [INDEX, [0, 0, 1, 1], [1, 1, 1, 1], [-1, -1, -1, -1], [-1, 2, 2, 2], [0, 1, 0, 1]]


def mlp():
    return nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3))


def shift(kind):
    """Methods of a user's own."""

    def init(weights, key):
        return {path: {"a": torch.ones(w.shape, dtype=w.dtype)} for path, w in weights.items()}

    def change(path, w, a, weights):
        if kind == "tensor":
            return w * a
        if kind == "constant":
            return torch.full(w.shape, 0.3, dtype=w.dtype)
        if w.dim() < 2:
            return a
        if kind == "matrix first":
            return pf.LowRank(a[:, :1], a[:1]) + weights.matrix(path)
        if kind == "constant matrix":
            return weights.matrix(path) + pf.LowRank(torch.ones_like(a[:, :1]), torch.ones_like(a[:1]))
        return weights.matrix(path) + pf.LowRank(a[:, :1], a[:1])

    def apply(tree, weights):
        return {path: change(path, w, tree[path]["a"], weights) for path, w in weights.items()}

    return pf.Transform(init, apply)


METHODS = {
    "lora": pf.lora(".*", rank=3, alpha=5, rank_pattern={"3": 2}, alpha_pattern={"0": 2}, bias=True),
    "rank stabilized": pf.lora("0", rank=2, alpha=3, rank_stabilized=True, dropout=0.4),
    "gift": pf.gift(".*", rank=2, share="none"),
    "gift by group": pf.gift(".*", rank=2, share={"a": "0", "b": "3"}),
    "ia3": pf.ia3(".*", scale_bias=True),
    "ia3 in": pf.ia3(".*", side="input"),
    "dora": pf.dora(".*", rank=2, bias=True),
    "magnitude": pf.magnitude(".*"),
    "train": pf.train(".*"),
    "biases": pf.train(".*bias"),
    "chain": pf.chain(
        pf.lora(".*", rank=1), pf.gift("0", rank=2), pf.ia3("0", side="input"), pf.magnitude(".*"), pf.train("1|3")
    ),
    "own and lora": pf.chain(pf.on(".*", shift("constant"), name="own"), pf.lora("0", rank=2)),
    **{
        f"own: {kind}": pf.on(".*", shift(kind), name="own")
        for kind in ("tensor", "constant", "matrix", "matrix first", "constant matrix")
    },
    "own: biases": pf.on(".*bias", shift("tensor"), name="own"),
    "own: constant biases": pf.on(".*bias", shift("constant"), name="own"),
}


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method(name):
    many = Many(mlp(), METHODS[name])
    for index in INDICES:
        many.check_route(index, randn(4, 5))
    many.check_route([1, -1], randn(2, 3, 5))
    many.check_route([2], randn(1, 5))
    many.check_route([-1], randn(1, 5))
    Many(mlp(), METHODS[name], 1).check_route([0, -1, 0], randn(3, 5))
    many.check_ensemble(randn(4, 5))


@pytest.mark.parametrize("share", ["target", "all"])
def test_gift_shared_over_depth(share):
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(5, 5)}) for _ in range(3)])

        def forward(self, x):
            for block in self.blocks:
                x = torch.tanh(block["fc"](x))
            return x

    Many(Deep(), pf.gift(".*fc", rank=2, share=share)).check_route(INDEX, randn(4, 5))


@given(st.data())
def test_any_index(data):
    count = data.draw(st.integers(1, 6))
    index = data.draw(st.lists(st.integers(-1, 2), min_size=count, max_size=count))
    many = Many(seeded(mlp)(), pf.chain(pf.lora("0", rank=2), pf.train("1|3")))
    many.check_route(index, randn(count, 5))
    order = sorted(range(count), key=index.__getitem__)
    x = randn(count, 5)
    one, other = many.routed(many.stacked, index, x), many.routed(many.stacked, [index[i] for i in order], x[order])
    assert torch.allclose(one[order], other, atol=SMALL)


@pytest.mark.filterwarnings("ignore:the effective weight .*(cls_token|position_embeddings)")  # as matrices
@pytest.mark.parametrize("name", list(ZOO))
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_the_base_is_not_spoilt_by_what_is_not_chosen(name, bad):
    animal = ZOO[name]
    for method in (pf.dora(".*", rank=1), pf.chain(pf.lora(".*", rank=1), pf.ia3(".*"), pf.train(".*bias|.*norm.*"))):
        try:
            many = Many(animal.build(), method, 2, output=animal.output)
        except pf.SelectorError:
            many = Many(animal.build(), pf.lora(".*", rank=1), 2, output=animal.output)
        spoilt = pf.map_leaves(lambda t: torch.full_like(t, bad), many.members[0])
        batches = [animal.inputs(seed)[0] for seed in range(3)]
        args = [torch.cat(parts)[:4] for parts in zip(*batches, strict=True)]
        base = animal.output(many.model(many.model.params, *args))
        rows = len(base)
        whole = many.routed(pf.stack([spoilt, spoilt]), [-1] * rows, *args)
        assert torch.allclose(whole, base, atol=1e-12, rtol=1e-12)
        index = [0, -1, 1, 1][:rows]
        mixed = many.routed(pf.stack([spoilt, many.members[1]]), index, *args)
        expected = many.looped([many.members[0], many.members[1]], index, *args)
        assert not mixed[0].isfinite().all()
        assert torch.allclose(mixed[1:], expected[1:], atol=1e-12, rtol=1e-12)


def test_gradients_land_where_an_adapter_is_used():
    many = Many(mlp(), pf.lora(".*", rank=2, bias=True), 4)
    spoilt = pf.map_leaves(lambda t: torch.full_like(t, torch.inf), many.members[0])
    stacked = pf.map_leaves(lambda t: t.requires_grad_(), pf.stack([spoilt, *many.members[1:]]))
    many.routed(stacked, [2, -1, 1, 2], randn(4, 5)).square().sum().backward()
    for leaf in optree.tree_leaves(stacked):
        assert leaf.grad[1:3].any()
        assert not leaf.grad[[0, 3]].any()


@pytest.mark.parametrize(
    "index",
    [
        [0, 1, 2, 0], torch.tensor([0, 1, 2, 0], dtype=torch.int32), torch.tensor([0.0, 1.0]), torch.tensor([True]),
        torch.tensor([0, 1, 3, 0]), torch.tensor([0, -2, 1, 0]), torch.tensor([], dtype=torch.int64),
        torch.tensor([[0], [1]]), torch.tensor(1), None,
    ],
)  # fmt: skip
def test_what_is_no_index(index):
    many = Many(mlp(), pf.lora("0", rank=2))
    with pytest.raises(pf.OptionError, match="index"):
        pf.route(many.adapter, many.frozen, many.stacked, index)


def test_an_index_is_checked_inside_transforms_too():
    many = Many(mlp(), pf.lora("0", rank=2))
    for index in (torch.tensor([0, 3]), torch.tensor([0, -2])):
        weights = lambda tree, index=index: pf.route(many.adapter, many.frozen, tree, index)
        with pytest.raises(pf.OptionError, match="there are 3 adapters"):
            torch.func.grad(lambda tree, w=weights: many.model(w(tree), randn(2, 5)).sum())(many.stacked)


def test_what_is_no_stack():
    many = Many(mlp(), pf.lora("0", rank=2))
    index = torch.tensor([0, 1])
    ragged = pf.stack(many.members)
    ragged["lora"]["0.weight"]["A"] = ragged["lora"]["0.weight"]["A"][:2]
    empty = pf.map_leaves(lambda t: t[:0], many.stacked)
    for bad in (many.members[0], {}, ragged, empty, {"lora": {}}, pf.map_leaves(lambda t: t.long(), many.stacked)):
        with pytest.raises(pf.TreeError):
            pf.route(many.adapter, many.frozen, bad, index)


def test_there_is_no_one_weight():
    many = Many(mlp(), pf.lora("0", rank=2))
    weights = pf.route(many.adapter, many.frozen, many.stacked, torch.tensor([0, 1]))
    for wrong in (pf.merge, pf.delta, many.model.state_dict):
        with pytest.raises(pf.RouteError, match=r"pf\.merge"):
            wrong(weights)
    assert weights["3.weight"] is many.model.params["3.weight"]


# Transformers: masks that differ by sample, and what else they take.
MASK = torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6, [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "mask"), [("bert", True), ("bert", False), ("gpt2", True), ("llama", True)])
@pytest.mark.parametrize("length", [6, 4])
def test_language_models(name, mask, attention, length):
    animal = ZOO[name]
    net = animal.build()
    net.set_attn_implementation(attention)
    words = ids(4, length, high=32)
    given = {"attention_mask": MASK[:, :length]} if mask else {}
    if name == "bert":
        given["token_type_ids"] = ids(4, length, high=2, seed=1)
    chain = pf.chain(pf.lora(animal.where[0], rank=1), pf.train(".*(norm|Norm|ln_).*"))
    for method in (chain, pf.lora(".*embed.*|.*wte|.*wpe", rank=1)):
        many = Many(net, method, output=animal.output)
        many.check_route(INDEX, words, **given)
        many.check_ensemble(words, **given)


@pytest.mark.filterwarnings("ignore:the effective weight .*(cls_token|position_embeddings)")
def test_images_with_a_class_token():
    for method in (pf.train(".*cls_token|.*position_embeddings|.*layernorm.*"), pf.lora(".*", rank=1), pf.train(".*")):
        many = Many(ZOO["vit"].build(), method, output=ZOO["vit"].output)
        many.check_route(INDEX, randn(4, 1, 8, 8))


def test_a_cache_and_labels():
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    many, words = Many(transformers.GPT2LMHeadModel(config), pf.lora(["c_attn"], rank=1)), ids(4, 6, high=32)
    weights = pf.route(many.adapter, many.frozen, many.stacked, torch.tensor(INDEX))
    whole = many.model(weights, words).logits
    first = many.model(weights, words[:, :5], use_cache=True)
    second = many.model(weights, words[:, 5:], past_key_values=first.past_key_values)
    assert torch.allclose(second.logits[:, 0], whole[:, 5], atol=SMALL)
    loss = many.model(weights, words, labels=words).loss
    own = [many.one(None if k < 0 else many.members[k], words[i : i + 1], labels=words[i : i + 1]).loss
           for i, k in enumerate(INDEX)]  # fmt: skip
    assert torch.allclose(loss, torch.stack(own).mean())  # the loss of the mixed batch: its samples are as long
    run = pf.ensemble(many.adapter)
    losses = run(many.frozen, many.stacked, words, labels=words, use_cache=False)
    expected = [many.one(tree, words, labels=words) for tree in many.members]
    assert torch.allclose(losses.loss, torch.stack([out.loss for out in expected]))
    assert torch.allclose(losses.logits, torch.stack([out.logits for out in expected]))


# Transforms.
def loss_of(many, index, x):
    def loss(stacked, index=index):
        return many.routed(stacked, index, x).square().sum()

    return loss


def test_transforms_over_route():
    many, x = Many(mlp(), pf.chain(pf.lora("0", rank=1), pf.train("3.bias"))), randn(4, 5)

    def loop(stacked):
        return many.looped(pf.unstack(stacked), INDEX, x)

    def together(stacked):
        return many.routed(stacked, INDEX, x)

    stacked, tangent = many.stacked, perturbed(many.stacked, 9)
    for function in (together, loop):
        value = function(stacked)
        grad = torch.func.grad(lambda tree: function(tree).square().sum())(stacked)  # noqa: B023
        many_grads = torch.vmap(torch.func.grad(lambda tree: function(tree).square().sum()))(  # noqa: B023
            pf.stack([stacked, tangent])
        )
        slope = torch.func.jvp(function, (stacked,), (tangent,))[1]
        jacobian = torch.func.jacrev(function)(stacked)
        found = optree.tree_leaves([value, grad, many_grads, slope, jacobian])
        if function is together:
            kept = found
    for a, b in zip(kept, found, strict=True):
        assert torch.allclose(a, b, atol=SMALL)


def test_an_index_that_is_mapped():
    many, x = Many(mlp(), pf.chain(pf.lora("0", rank=1), pf.train("3"))), randn(4, 5)
    indices = torch.tensor([INDEX, [0, 1, 2, -1]])

    def call(index):
        return many.model(pf.route(many.adapter, many.frozen, many.stacked, index), x)

    expected = torch.stack([many.looped(many.members, index.tolist(), x) for index in indices])
    assert torch.allclose(torch.vmap(call)(indices), expected, atol=SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "conv", "bert", "gpt2", "llama", "vit"])
def test_compile_does_not_care_which_index(name):
    animal = ZOO[name]
    many = Many(animal.build(), pf.lora(animal.where[0], rank=1), 3, output=animal.output)
    batches = [animal.inputs(seed)[0] for seed in range(3)]
    args = [torch.cat(parts)[:4] for parts in zip(*batches, strict=True)]
    trees = [many.stacked, pf.stack([perturbed(tree, 7) for tree in many.members])]

    def call(stacked, index):
        return many.output(many.model(pf.route(many.adapter, many.frozen, stacked, index), *args))

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    compiled(trees[0], torch.tensor([0, 1, 2, -1]))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tree, index in ((trees[0], INDEX), (trees[1], [0, 0, 0, 1])):
            expected = many.looped(pf.unstack(tree), index, *args)
            assert torch.allclose(compiled(tree, torch.tensor(index)), expected, atol=1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_inside_the_model(reentrant):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 5)])

        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x.tanh(), use_reentrant=reentrant)
            return x

    many = Many(Net(), pf.chain(pf.lora(".*", rank=2), pf.train(".*bias|.*1.weight")))

    def grads(call):
        stacked = pf.map_leaves(lambda t: t.requires_grad_(), many.stacked)
        y = call(stacked)
        many.routed(many.stacked, [0, 1, 0, 1], x)  # another call before the recomputation
        y.square().sum().backward()
        return [leaf.grad for leaf in optree.tree_leaves(stacked)]

    x = randn(4, 5).requires_grad_()
    found = grads(lambda stacked: many.routed(stacked, INDEX, x))
    expected = grads(lambda stacked: many.looped(pf.unstack(stacked), INDEX, x))
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=SMALL)


def test_threads_with_different_batches():
    many, x = Many(mlp(), pf.lora(".*", rank=2)), randn(4, 5)
    expected = [many.looped(many.members, index, x) for index in INDICES[:4]]
    near = functools.partial(torch.allclose, atol=SMALL)
    assert not wrong_answers(lambda i: many.routed(many.stacked, INDICES[i], x), expected, 100, near)


def test_a_base_that_was_cast():
    many = Many(mlp(), pf.chain(pf.lora("0", rank=2), pf.train("3")))
    frozen = {name: tensor.bfloat16() for name, tensor in many.frozen.items()}
    x = randn(4, 5).bfloat16()
    y = many.model(pf.route(many.adapter, frozen, many.stacked, torch.tensor([2, 0, 1, 2])), x)
    rows = [many.model(many.adapter.apply(frozen, many.members[k]), x[i : i + 1]) for i, k in enumerate([2, 0, 1, 2])]
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y, torch.cat(rows), atol=0.1)


def test_everything_trains_and_nothing_is_frozen():
    many = Many(mlp(), pf.train(".*"))
    assert not many.frozen
    many.check_route(INDEX, randn(4, 5))


def test_route_writes_nothing():
    many = Many(mlp(), pf.chain(pf.lora(".*", rank=2), pf.train("1")))
    stacked, index = many.stacked, torch.tensor(INDEX)
    before = [t.clone() for t in (*optree.tree_leaves(stacked), *many.model.params.values())]
    many.model(pf.route(many.adapter, many.frozen, stacked, index), randn(4, 5))
    after = [*optree.tree_leaves(stacked), *many.model.params.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert index.tolist() == INDEX

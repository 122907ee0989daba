"""Methods that users write: two functions, with tensors or with matrices, anywhere in a chain."""

import pytest
import torch
from torch import nn

import peft_func as pf
from tests.transforms.plain import GRADS, VALUES, call, grads_of, learnable, random_like, same
from tests.zoo import ZOO, randn, seeded


def each(function):
    return lambda tree, weights: {path: function(weights[path], tree.get(path, {})) for path in weights}


def zeros(*names):
    return lambda weights, key: {p: {n: torch.zeros_like(w) for n in names} for p, w in weights.items()}


def bound(method, net=None):
    net = net or seeded(lambda: nn.Linear(4, 3))()
    return net, pf.functionalize(net), pf.bind(method, pf.functionalize(net))


@pytest.mark.parametrize("name", ["mlp", "conv", "tied", "shared", "attention", "experts", "gpt2"])
def test_a_transform_of_tensors_equals_plain_torch(name):
    animal = ZOO[name]
    transform = pf.Transform(zeros("gate", "shift"), each(lambda w, t: w * torch.exp(t["gate"]) + t["shift"]))
    net, model, adapter = bound(pf.on(".*", transform, name="own"), animal.build())
    frozen, start = adapter.init(0)
    ours, theirs = learnable(random_like(start)), learnable(random_like(start))
    args, kwargs = animal.inputs(0)
    out = animal.output(model(adapter.apply(frozen, ours), *args, **kwargs))
    plain = {p: net.get_parameter(p).detach() * t["gate"].exp() + t["shift"] for p, t in theirs["own"].items()}
    expected = call(net, plain, animal, 0)
    same(out, expected, VALUES)
    same(grads_of(out, ours), grads_of(expected, theirs), GRADS)


def rank_one(weights, key):
    return {
        p: {"u": w.new_zeros(weights.matrix(p).shape[-2], 1), "v": w.new_ones(1, weights.matrix(p).shape[-1])}
        for p, w in weights.items()
    }


def add_rank_one(tree, weights):
    return {p: weights.matrix(p) + pf.LowRank(t["u"], t["v"], 2.0) for p, t in tree.items()}


@pytest.mark.parametrize("name", ["mlp", "conv", "tied", "gpt2"])
def test_a_transform_of_matrices_keeps_the_structure(name):
    animal = ZOO[name]
    transform = pf.Transform(rank_one, add_rank_one)
    _, model, adapter = bound(pf.chain(pf.lora(".*", rank=2), pf.on(pf.ndim(2), transform, name="own")), animal.build())
    frozen, start = adapter.init(0)
    tree = random_like(start)
    args, kwargs = animal.inputs(0)
    with pf.densify("error"):
        weights = adapter.apply(frozen, tree)
        out = animal.output(model(weights, *args, **kwargs))
    same(out, animal.output(model(pf.merge(weights), *args, **kwargs)), VALUES)


def test_the_example_of_weights_matrix_binds():
    """The init of the docstring makes plain CPU tensors, as users do."""

    def init(weights, key):
        return {p: {"u": torch.zeros(len(w), 1), "v": torch.ones(1, len(w.T))} for p, w in weights.items()}

    def apply(tree, weights):
        return {p: weights.matrix(p) + pf.LowRank(leaf["u"], leaf["v"]) for p, leaf in tree.items()}

    _, model, adapter = bound(pf.on(r".*weight", pf.Transform(init, apply), name="rank_one"))
    assert adapter.spec == {("rank_one", "weight", "u"): (3, 1), ("rank_one", "weight", "v"): (1, 4)}
    model(adapter.apply(*adapter.init(0)), randn(2, 4))


def test_the_example_of_weights_matrix_binds_behind_lora():
    def init(weights, key):
        return {
            p: {"u": torch.zeros(len(w), 1).double(), "v": torch.ones(1, len(w.T)).double()} for p, w in weights.items()
        }

    transform = pf.Transform(init, add_rank_one_plain)
    _, model, adapter = bound(pf.chain(pf.lora("weight", rank=2), pf.on("weight", transform, name="rank_one")))
    model(adapter.apply(*adapter.init(0)), randn(2, 4))


def add_rank_one_plain(tree, weights):
    return {p: weights.matrix(p) + pf.LowRank(leaf["u"], leaf["v"]) for p, leaf in tree.items()}


# After LoRA, `w` is an operator. It must do what a tensor does.
W0, X = randn(3, 4, seed=8), randn(2, 4, seed=9)
EXPRESSIONS = {
    "w + x": lambda w: w + W0, "x + w": lambda w: W0 + w, "w + 1": lambda w: w + 1, "1 + w": lambda w: 1 + w,
    "w - x": lambda w: w - W0, "x - w": lambda w: W0 - w, "1 - w": lambda w: 1 - w, "w - 1": lambda w: w - 1,
    "w * x": lambda w: w * W0, "x * w": lambda w: W0 * w, "2 * w": lambda w: 2 * w,
    "w / x": lambda w: w / W0, "x / w": lambda w: W0 / w, "1 / w": lambda w: 1 / w,
    "w ** 2": lambda w: w**2, "2 ** w": lambda w: 2**w, "-w": lambda w: -w, "+w": lambda w: +w, "abs(w)": abs,
    "w @ x": lambda w: w @ X.T, "x @ w": lambda w: X @ w.T, "x @ w itself": lambda w: randn(2, 3) @ w,
    "w @ w": lambda w: w @ w.T, "w + w": lambda w: w + w,
    "w % 1": lambda w: w % 0.5, "w // 1": lambda w: (w // 0.5).detach() + w,
    "w < 0": lambda w: torch.where(w < 0, w * 2, w * 3), "w > 0": lambda w: torch.where(w > 0, w * 2, w * 3),
    "w >= x": lambda w: torch.where(w >= W0, w * 2, w * 3), "w <= x": lambda w: torch.where(w <= W0, w * 2, w * 3),
    "w == 0": lambda w: torch.where(w == 0, torch.ones_like(W0), w * 3),
    "w != 0": lambda w: torch.where(w != 0, w * 2, torch.ones_like(W0)),
    "len(w)": lambda w: w * len(w), "rows": lambda w: torch.stack([row * i for i, row in enumerate(w)]),
    "w[1]": lambda w: w[1], "w[:, 2:]": lambda w: w[:, 2:], "w[None]": lambda w: w[None],
    "w.T": lambda w: w.T, "w.mT": lambda w: w.mT, "w.t()": lambda w: w.t(), "w.norm": lambda w: w.norm(dim=1),
    "w.sum": lambda w: w.sum(), "w.view": lambda w: w.view(-1), "w.reshape": lambda w: w.reshape(2, 6),
    "w.size": lambda w: w * w.size(0) * w.dim() * w.numel(), "w.clone": lambda w: w.clone(),
    "w.new_ones": lambda w: w.new_ones(3, 4) * w, "w.flatten": lambda w: w.flatten(), "w.double": lambda w: w.double(),
    "w.add": lambda w: w.add(W0, alpha=3), "x.add(w)": lambda w: W0.add(w, alpha=3), "lerp": lambda w: W0.lerp(w, 0.3),
    "torch.cat": lambda w: torch.cat([w, W0, w]), "torch.stack": lambda w: torch.stack((W0, w)),
    "torch.einsum": lambda w: torch.einsum("oi,bi->bo", w, X), "torch.norm": lambda w: torch.linalg.norm(w, dim=1),
    "torch.where": lambda w: torch.where(W0 > 0, w, W0), "torch.zeros_like": lambda w: torch.zeros_like(w) + w,
    "F.linear": lambda w: nn.functional.linear(X, w), "F.normalize": lambda w: nn.functional.normalize(w, dim=1),
    "F.dropout": lambda w: nn.functional.dropout(w, 0.5, training=False), "svdvals": torch.linalg.svdvals,
    "torch.addmm": lambda w: torch.addmm(randn(2, 3), X, w.T), "out of place": lambda w: torch.tanh(w),
}  # fmt: skip


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_an_operator_does_what_a_tensor_does_and_is_differentiable(text):
    *_, adapter = bound(pf.lora("weight", rank=2))
    frozen, start = adapter.init(0)
    ours, theirs = learnable(random_like(start)), learnable(random_like(start))
    operator = adapter.apply(frozen, ours)["weight"]
    assert isinstance(operator, pf.Operator)
    tensor = pf.merge(adapter.apply(frozen, theirs))["weight"]
    value, expected = EXPRESSIONS[text](operator), EXPRESSIONS[text](tensor)
    assert isinstance(value, torch.Tensor)
    same(value, expected, VALUES)
    same(grads_of(value, ours), grads_of(expected, theirs), GRADS)


def test_a_comparison_of_operators_is_of_their_values():
    _, _, adapter = bound(pf.lora("weight", rank=2))
    frozen, tree = adapter.init(0)
    one, two = (adapter.apply(frozen, tree)["weight"] for _ in range(2))
    assert (one == two).all()


@pytest.mark.filterwarnings("ignore::peft_func.DensifyWarning")
def test_tensors_of_an_operator_train_through_the_chain():
    transform = pf.Transform(zeros("shift"), each(lambda w, t: w.tanh() + t["shift"]))
    net, model, adapter = bound(pf.chain(pf.lora("weight", rank=2), pf.on("weight", transform, name="own")))
    frozen, start = adapter.init(0)
    ours, theirs = learnable(random_like(start)), learnable(random_like(start))
    out = model(adapter.apply(frozen, ours), X)
    leaf = theirs["lora"]["weight"]
    weight = (net.weight.detach() + leaf["B"] @ leaf["A"]).tanh() + theirs["own"]["weight"]["shift"]
    expected = X @ weight.T + net.bias.detach()
    same(out, expected, VALUES)
    same(grads_of(out, ours), grads_of(expected, theirs), GRADS)


# Inits that cannot run on tensors without values.
def svd(w):
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    return {"u": u[:, :2] * s[:2], "v": v[:2]}


INITS = {
    "svd": svd,
    "item": lambda w: {"u": w.new_full((3,), w.norm().item())},
    "float": lambda w: {"u": w.new_full((3,), float(w.abs().max()))},
    "tolist": lambda w: {"u": torch.tensor(w.tolist()).sum(1)},
    "numpy": lambda w: {"u": torch.from_numpy(w.numpy().copy())},
    "if": lambda w: {"u": w.sum(1) if (w > 0).any() else w.mean(1)},
    "rows that are large": lambda w: {"u": w[w.norm(dim=1) > 0.1].clone()},
    "nonzero": lambda w: {"u": torch.ones(len(w.nonzero()), dtype=w.dtype)},
    "cpu": lambda w: {"u": torch.zeros(3, 4, dtype=torch.float64)},
    "generator": lambda w: {"u": torch.randn(w.shape, dtype=w.dtype, generator=torch.Generator().manual_seed(1))},
    "bfloat16": lambda w: {"u": w.bfloat16()},
}


@pytest.mark.parametrize("behind_lora", [False, True])
@pytest.mark.parametrize("case", INITS)
def test_an_init_that_needs_values_binds_and_gives_the_shapes_that_it_gives(case, behind_lora):
    def apply(tree, weights):
        return {p: weights[p] + sum(leaf.sum() for leaf in tree[p].values()) for p in weights}

    transform = pf.Transform(lambda weights, key: {p: INITS[case](w) for p, w in weights.items()}, apply)
    method = pf.on("weight", transform, name="own")
    net, model, adapter = bound(pf.chain(pf.lora("weight", rank=2), method) if behind_lora else method)
    frozen, tree = adapter.init(0)
    same(tree["own"]["weight"], INITS[case](net.weight.detach()), 0.0)
    model(adapter.apply(frozen, tree), X)


def test_the_first_values_of_a_transform_are_no_views_of_the_base():
    net, _, adapter = bound(pf.on("weight", pf.Transform(lambda w, k: {p: {"w": t} for p, t in w.items()},
                                                         each(lambda w, t: t["w"])), name="own"))  # fmt: skip
    before = net.weight.detach().clone()
    adapter.init(0)[1]["own"]["weight"]["w"].zero_()
    assert torch.equal(net.weight, before)


def test_a_transform_without_leaves_survives_what_trees_go_through():
    double = pf.Transform(lambda weights, key: {}, each(lambda w, t: 2 * w))
    net, model, adapter = bound(pf.chain(pf.on("weight", double, name="double"), pf.lora("weight", rank=2)))
    frozen, tree = adapter.init(0)
    expected = model(adapter.apply(frozen, tree), X)
    same(expected, X @ (2 * net.weight.detach()).T + net.bias.detach())
    for again in (
        pf.combine(*pf.partition(tree, r".*\.A")),
        pf.map_leaves(torch.clone, tree),
        pf.unstack(pf.stack([tree, tree]))[0],
    ):
        same(model(adapter.apply(frozen, again), X), expected, 0.0)


def no_change(tree, weights):
    return {}


def only(value):
    return pf.Transform(lambda weights, key: {"weight": {"a": weights.base["weight"].new_zeros(1)}}, value)


BAD = {
    "init gives a number": (pf.Transform(lambda w, k: {"weight": {"a": 1.0}}, no_change), ["weight.a", "float"]),
    "init gives an operator": (
        pf.Transform(lambda w, k: {p: {"a": t} for p, t in w.items()}, no_change), ["weight.a", "Operator"],
    ),
    "init gives None": (pf.Transform(lambda w, k: None, no_change), ["own", "NoneType"]),
    "init gives a tensor": (pf.Transform(lambda w, k: w.base["weight"], no_change), ["own", "Tensor"]),
    "init gives a list": (pf.Transform(lambda w, k: {"weight": [torch.zeros(1)]}, no_change), ["weight", "list"]),
    "init has a key that is no string": (pf.Transform(lambda w, k: {0: torch.zeros(1)}, no_change), ["0", "string"]),
    "apply gives None": (only(lambda t, w: None), ["own", "NoneType"]),
    "apply gives a tensor": (only(lambda t, w: w.base["weight"]), ["own", "Tensor"]),
    "apply gives a weight None": (only(lambda t, w: {"weight": None}), ["weight", "NoneType"]),
    "apply gives a number": (only(lambda t, w: {"weight": 1.0}), ["weight", "float"]),
    "apply gives a transposed one": (only(lambda t, w: {"weight": w["weight"].T}), ["weight", "(4, 3)", "(3, 4)"]),
    "apply gives a reduced one": (only(lambda t, w: {"weight": w["weight"].sum()}), ["weight", "()", "(3, 4)"]),
    "apply changes what it does not see": (
        only(lambda t, w: {"bias": torch.zeros(3)}), ["'bias'", "did not select", "weight"],
    ),
    "apply makes a name up": (only(lambda t, w: {"wieght": w["weight"]}), ["'wieght'", "weight"]),
    "a matrix of another shape": (
        only(lambda t, w: {"weight": pf.Dense(w.base["weight"].T)}), ["weight", "(4, 3)", "(3, 4)"],
    ),
    "a product of another shape": (
        only(lambda t, w: {"weight": pf.Product(pf.Dense(w.base["weight"].new_ones(2, 3)), w.matrix("weight"))}),
        ["weight", "(2, 4)", "(3, 4)"],
    ),
    "a sum with another shape": (
        only(lambda t, w: {"weight": w.matrix("weight") + pf.Dense(w.base["weight"].new_ones(3, 5))}), ["4", "5"],
    ),
    "a sum that would broadcast": (
        only(lambda t, w: {"weight": w.matrix("weight") + pf.LowRank(w.base["weight"].new_ones(1, 2),
                                                                    w.base["weight"].new_ones(2, 4))}), ["1", "3"],
    ),
    "a product that does not chain": (
        only(lambda t, w: {"weight": pf.Product(w.matrix("weight"), pf.Dense(w.base["weight"].new_ones(3, 4)))}),
        ["4", "3"],
    ),
    "factors that do not chain": (
        only(lambda t, w: {"weight": w.matrix("weight") + pf.LowRank(w.base["weight"].new_ones(3, 2),
                                                                    w.base["weight"].new_ones(1, 4))}), ["2", "1"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_a_transform_must_not_do_is_an_error_that_names_it(case):
    transform, words = BAD[case]
    model = pf.functionalize(seeded(lambda: nn.Linear(4, 3))())
    with pytest.raises(pf.PeftFuncError) as caught:
        pf.bind(pf.chain(pf.lora("weight", rank=2), pf.on("weight", transform, name="own")), model)
    assert isinstance(caught.value, ValueError)
    for word in words:
        assert word in str(caught.value)


NOT_METHODS = {
    "a transform in a chain": (lambda: pf.chain(pf.Transform(zeros("a"), no_change)), ["Transform", "pf.on"]),
    "a function in a chain": (lambda: pf.chain(pf.lora), ["function"]),
    "None in a chain": (lambda: pf.chain(None), ["NoneType"]),
    "a list in a chain": (lambda: pf.chain([pf.lora("0")]), ["list"]),
    "one name twice": (lambda: pf.chain(pf.lora("0"), pf.lora("2")), ["'lora'", "name='lora_2'"]),
    "one name twice, nested": (lambda: pf.chain(pf.lora("0"), pf.chain(pf.chain(pf.lora("2")))), ["'lora'"]),
    "a chain named as a part": (lambda: pf.chain(pf.lora("0"), pf.chain(pf.lora("2"), name="lora")), ["'lora'"]),
    "a dot in a name": (lambda: pf.lora("0", name="lora.a"), ["'lora.a'", "dots"]),
    "a dot in a chain's name": (lambda: pf.chain(pf.lora("0"), name="a.b"), ["'a.b'"]),
    "an empty name": (lambda: pf.train("0", name=""), ["''"]),
    "a name that is no string": (lambda: pf.gift("0", name=3), ["3"]),
    "no name for an own method": (lambda: pf.on("0", only(no_change), name=None), ["None"]),
    "on without a transform": (lambda: pf.on("0", lambda tree, weights: {}, name="own"), ["function", "Transform"]),
    "on with a method": (lambda: pf.on("0", pf.lora("0"), name="own"), ["Part", "Transform"]),
}


@pytest.mark.parametrize("case", NOT_METHODS)
def test_what_is_no_method_is_an_error_that_names_it(case):
    make, words = NOT_METHODS[case]
    with pytest.raises(pf.PeftFuncError) as caught:
        make()
    assert isinstance(caught.value, ValueError)
    for word in words:
        assert word in str(caught.value)


def test_names_may_repeat_in_chains_of_other_names():
    model = pf.functionalize(ZOO["mlp"].build())
    method = pf.chain(
        pf.chain(pf.lora("0", rank=2), name="a"), pf.chain(pf.lora("0", rank=3), name="b"), pf.lora("2", rank=1)
    )
    adapter = pf.bind(method, model)
    frozen, tree = adapter.init(0)
    assert {k: list(v) for k, v in tree.items()} == {"a": ["lora"], "b": ["lora"], "lora": ["2.weight"]}
    adapter.apply(frozen, tree)

"""Magnitude against the plain formula, over whatever came before it in a chain, and its rows of zeros."""

import pytest
import torch
from torch import nn

import peft_func as pf
from tests.transforms.plain import GRADS, VALUES, as_matrix, as_stored, call, grads_of, learnable, low_rank, random_like
from tests.transforms.plain import same as same_values
from tests.zoo import ZOO, randn, seeded

MATRICES = ~pf.suffix("bias_k") & ~pf.suffix("bias_v")


def lora(net, path, V, leaf):
    return V + low_rank(net, path, leaf, 1.0)


def gift(net, path, V, leaf):
    matrix = as_matrix(net, path, V)
    return as_stored(net, path, matrix + matrix @ leaf["phi"] @ leaf["psi"])


def ia3(net, path, V, leaf):
    return as_stored(net, path, as_matrix(net, path, V) * leaf["scale"].unsqueeze(-1))


def magnitude(net, path, V, leaf):
    matrix = as_matrix(net, path, V)
    norm = matrix.detach().norm(dim=-1)
    return as_stored(net, path, (leaf["magnitude"] / norm.where(norm != 0, 1.0)).unsqueeze(-1) * matrix)


STEPS = {
    "lora": (lambda name: pf.lora(MATRICES, rank=2, name=name), lora),
    "gift": (lambda name: pf.gift(MATRICES, rank=2, share="none", name=name), gift),
    "ia3": (lambda name: pf.ia3(MATRICES, name=name), ia3),
    "magnitude": (lambda name: pf.magnitude(MATRICES, name=name), magnitude),
}
CHAINS = [
    ["magnitude"], ["lora", "magnitude"], ["gift", "magnitude"], ["ia3", "magnitude"], ["magnitude", "lora"],
    ["lora", "gift", "magnitude"], ["gift", "lora", "magnitude"], ["lora", "lora", "magnitude"],
    ["gift", "gift", "magnitude"], ["lora", "magnitude", "gift", "magnitude"], ["lora", "magnitude", "lora", "ia3"],
]  # fmt: skip


@pytest.mark.parametrize("steps", CHAINS, ids="-".join)
@pytest.mark.parametrize("name", ["mlp", "conv", "experts", "tied"])
def test_a_chain_equals_the_formulas_one_after_the_other(name, steps):
    animal = ZOO[name]
    net = animal.build()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.chain(*(STEPS[step][0](f"{i}_{step}") for i, step in enumerate(steps))), model)
    frozen, start = adapter.init(0)
    ours, theirs = learnable(random_like(start)), learnable(random_like(start))
    plain = {path: net.get_parameter(path).detach() for path in adapter.parts[0].paths}
    for i, step in enumerate(steps):
        for path in plain:
            plain[path] = STEPS[step][1](net, path, plain[path], theirs[f"{i}_{step}"][path])
    args, kwargs = animal.inputs(1)
    weights = adapter.apply(frozen, ours)
    out = animal.output(model(weights, *args, **kwargs))
    expected = call(net, plain, animal, 1)
    same_values(out, expected, VALUES)
    same_values(grads_of(out, ours), grads_of(expected, theirs), GRADS)
    same_values({p: t for p, t in pf.merge(weights).items() if p in plain}, plain, VALUES)


def test_the_first_magnitude_is_the_norm_of_the_weight_that_it_receives():
    model = pf.functionalize(ZOO["mlp"].build())
    double = pf.Transform(
        init=lambda weights, key: {}, apply=lambda tree, weights: {p: 2 * w for p, w in weights.items()}
    )
    adapter = pf.bind(pf.chain(pf.on(r".*weight", double, name="double"), pf.magnitude(".*")), model)
    tree = adapter.init(0)[1]["magnitude"]
    same_values(
        {path: leaf["magnitude"] for path, leaf in tree.items()},
        {path: 2 * model.params[path].norm(dim=1) for path in tree},
    )


@pytest.mark.parametrize("method", [pf.magnitude("0"), pf.dora("0", rank=2)], ids=["magnitude", "dora"])
def test_a_row_of_zeros_stays_a_row_of_zeros_and_gives_finite_gradients(method):
    net = seeded(lambda: nn.Sequential(nn.Embedding(7, 4, padding_idx=1), nn.Linear(4, 3)))()
    net[0].weight.data[1] = 0.0
    model = pf.functionalize(net)
    adapter = pf.bind(method, model)
    frozen, start = adapter.init(0)
    x = torch.tensor([[1, 2, 1], [0, 1, 6]])
    tree = learnable(start)
    weights = adapter.apply(frozen, tree)
    same_values(model(weights, x), net(x).detach(), 1e-12)
    assert not pf.merge(weights)["0.weight"][1].any()
    assert all(grad.isfinite().all() for grad in grads_of(model(weights, x), tree))

    trained = learnable(pf.map_leaves(lambda t: t + 0.1, start))
    weights = adapter.apply(frozen, trained)
    out = model(weights, x)
    assert out.isfinite().all()
    same_values(out, model(pf.merge(weights), x))
    assert all(grad.isfinite().all() for grad in grads_of(out, trained))


@pytest.mark.parametrize("layer", [lambda: nn.Linear(4, 3), lambda: nn.Conv2d(4, 3, 2)], ids=["linear", "conv2d"])
def test_a_layer_of_zeros_is_finite_in_both_directions(layer):
    net = seeded(layer)()
    net.weight.data.zero_()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.dora("weight", rank=2), model)
    frozen, start = adapter.init(0)
    tree = learnable(start)
    x = randn(2, 4) if isinstance(net, nn.Linear) else randn(2, 4, 3, 3)
    out = model(adapter.apply(frozen, tree), x)
    same_values(out, net(x).detach())
    assert all(grad.isfinite().all() for grad in grads_of(out, tree))


def test_norms_of_rows_that_cancel_are_finite_and_not_negative_under_the_root():
    net = seeded(lambda: nn.Linear(6, 5))()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.dora("weight", rank=5), model)
    frozen, start = adapter.init(0)
    W = net.weight.detach()
    tree = {"dora": {"weight": start["dora"]["weight"] | {"A": W.clone(), "B": -torch.eye(5, dtype=W.dtype)}}}
    assert pf.merge(adapter.apply(frozen, tree))["weight"].isfinite().all()

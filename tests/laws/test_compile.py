"""`torch.compile(fullgraph=True)` of calls and of training: the values of eager mode, and one graph for all trees.

Law 11 compiles every method on small nets; here the four transformers are compiled, and what changes between calls.
"""

import shutil
import warnings

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import peft_func as pf
from tests.zoo import ZOO, randn

COMPILER = shutil.which("g++") or shutil.which("clang++")
VALUES, GRADS = 1e-10, 1e-9
LINEAR = pf.of_type(nn.Linear) & ~pf.head()
PLACES = {"bert": LINEAR, "gpt2": ["c_attn", "c_fc", "c_proj"], "llama": LINEAR, "vit": LINEAR}
NETS = list(PLACES)
METHODS = {
    "lora": lambda where: pf.lora(where, rank=2, alpha=4),
    "gift": lambda where: pf.gift(where, rank=2, share="none"),
    "dora": lambda where: pf.dora(where, rank=2),
    "ia3": lambda where: pf.ia3(where),
    "chain": lambda where: pf.chain(pf.lora(where, rank=2), pf.train(pf.head())),
    "bottleneck": lambda where: pf.pfeiffer(reduction=4),
}


class Place:
    """A method bound to a model, with trees, and batches of one shape."""

    def __init__(self, name, method, *, train=False, model=None):
        animal = ZOO[name]
        self.model = (model or pf.functionalize(animal.build())).train(train)
        self.adapter = pf.bind(method, self.model)
        self.frozen, start = self.adapter.init(0)
        self.trees = [away(start, seed) for seed in range(4)]
        self.batches = [animal.inputs(seed)[0] for seed in range(3)]
        self.output = animal.output

    def call(self, tree, *x):
        return self.output(self.model(self.adapter.apply(self.frozen, tree), *x))

    def loss(self, tree, *x):
        return self.call(tree, *x).tanh().square().mean()


def away(tree, seed):
    numbers = torch.Generator().manual_seed(seed)
    return pf.map_leaves(lambda t: t + 0.1 * torch.randn(t.shape, dtype=t.dtype, generator=numbers), tree)


def compiled(function, backend="aot_eager"):
    """Compile afresh; every call after the first fails where it would compile again."""
    torch._dynamo.reset()
    run, calls = torch.compile(function, fullgraph=True, backend=backend), []

    def call(*args):
        with torch._dynamo.config.patch(error_on_recompile=bool(calls)):
            calls.append(1)
            return run(*args)

    return call


def same(got, wanted, tolerance=VALUES):
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def check(function, *inputs, tolerance=VALUES, backend="aot_eager"):
    run = compiled(function, backend)
    for args in inputs:
        same(run(*args), function(*args), tolerance)


def gradients(function):
    """Give the gradients of a (compiled) loss by autograd, outside of what is compiled."""

    def run(tree, *x):
        leaves = pf.map_leaves(lambda leaf: leaf.detach().clone().requires_grad_(), tree)
        return torch.autograd.grad(function(leaves, *x), optree.tree_leaves(leaves))

    return run


@pytest.fixture(autouse=True)
def _reset():
    yield
    torch._dynamo.reset()


class TestCalls:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("name", NETS)
    def test_other_trees_batches_and_scalings(self, name, method):
        place = Place(name, METHODS[method](PLACES[name]))
        scaled = pf.map_leaves(lambda leaf: -3 * leaf, place.trees[0])
        mean = optree.tree_map(lambda a, b: 0.7 * a + 0.3 * b, *place.trees[:2])
        trees = [place.trees[0], place.trees[1], scaled, mean]
        check(place.call, *((tree, *place.batches[i % 2]) for i, tree in enumerate(trees)))

    @pytest.mark.parametrize(
        ("name", "method"), [*(("bert", method) for method in METHODS), *((name, "lora") for name in NETS[1:])]
    )
    def test_stacks_of_one_size(self, name, method):
        place = Place(name, METHODS[method](PLACES[name]))
        (x,) = place.batches[0]
        run = compiled(torch.func.vmap(place.call, in_dims=(0, None)))
        for members in (place.trees[:2], place.trees[2:]):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop")  # attention: see docs/traps.md
                ys = run(pf.stack(members), x)
            same(ys, torch.stack([place.call(tree, x) for tree in members]))

    def test_an_adapter_or_a_model_made_anew(self):
        method = pf.chain(pf.lora("0|2", rank=2), pf.gift("4", rank=1))
        places = [Place("mlp", method)]
        places += [Place("mlp", method, model=places[0].model), Place("mlp", method), Place("mlp", method)]

        def call(adapter, frozen, tree, x):
            return adapter.model(adapter.apply(frozen, tree), x)

        check(call, *((p.adapter, p.frozen, p.trees[i], *p.batches[0]) for i, p in enumerate(places)))

    def test_other_base_weights(self):
        place = Place("mlp", pf.lora(".*", rank=2))
        bases = [{path: tensor + i for path, tensor in place.frozen.items()} for i in range(3)]

        def call(frozen, tree, x):
            return place.model(place.adapter.apply(frozen, tree), x)

        check(call, *((frozen, place.trees[0], *place.batches[0]) for frozen in bases))

    def test_weights_that_were_made_outside(self):
        place = Place("mlp", pf.chain(pf.lora("0|2", rank=2), pf.ia3("4")))
        weights = [place.adapter.apply(place.frozen, tree) for tree in place.trees]
        check(place.model, *((each, *place.batches[0]) for each in weights))

    def test_a_factor_that_is_a_tensor(self):
        place = Place("mlp", pf.lora(".*", rank=2))

        def call(tree, factor, x):
            lora = {path: {"A": leaf["A"], "B": factor * leaf["B"]} for path, leaf in tree["lora"].items()}
            return place.call({"lora": lora}, x)

        factors = [torch.tensor(s, dtype=torch.float64) for s in (1.0, 0.0, -2.0, 0.5)]
        check(call, *((place.trees[0], factor, *place.batches[0]) for factor in factors))

    def test_merged_adapters_of_the_same_rank(self):
        place = Place("mlp", pf.lora(".*", rank=2))  # the scale is 1, as it is of what is merged
        merged = [
            pf.merge_adapters(place.adapter, place.trees[:2], weights=[0.7, share], how="svd", rank=2)
            for share in (0.3, -1.0)
        ]

        def call(adapter, frozen, tree, x):
            return adapter.model(adapter.apply(frozen, tree), x)

        given = [(place.adapter, place.frozen, place.trees[0]), *merged]
        check(call, *((*each, *place.batches[0]) for each in given))

    @pytest.mark.parametrize("method", [pf.lora, pf.dora])
    def test_alpha_is_compiled_once_as_a_constant_and_once_as_a_symbol(self, method):
        places = [Place("mlp", method(".*", rank=2, alpha=alpha)) for alpha in (4, 8, 3, 5.5)]

        def call(adapter, frozen, tree, x):
            return adapter.model(adapter.apply(frozen, tree), x)

        run = torch.compile(call, fullgraph=True, backend="aot_eager")
        for i, place in enumerate(places):
            args = (place.adapter, place.frozen, place.trees[i], *place.batches[0])
            with torch._dynamo.config.patch(error_on_recompile=i != 1):
                same(run(*args), call(*args))


class TestTraining:
    @pytest.mark.parametrize(("name", "method"), [("bert", "dora"), *((name, "chain") for name in NETS)])
    def test_gradients_inside(self, name, method):
        place = Place(name, METHODS[method](PLACES[name]), train=True)
        given = zip(place.trees, place.batches, strict=False)
        check(torch.func.grad_and_value(place.loss), *((tree, *x) for tree, x in given), tolerance=GRADS)

    @pytest.mark.parametrize(
        ("name", "method"), [("bert", "bottleneck"), ("gpt2", "gift"), ("llama", "chain"), ("vit", "lora")]
    )
    def test_backward_outside(self, name, method):
        place = Place(name, METHODS[method](PLACES[name]), train=True)
        run = gradients(compiled(place.loss))
        for tree, x in zip(place.trees, place.batches, strict=False):
            same(run(tree, *x), gradients(place.loss)(tree, *x), GRADS)

    @pytest.mark.parametrize("inside", [True, False])
    def test_with_dropout(self, inside):
        place = Place("bert", pf.lora(LINEAR, rank=2, dropout=0.5), train=True)
        way = torch.func.grad if inside else lambda loss: loss
        run = compiled(way(place.loss))
        run = run if inside else gradients(run)
        (x,) = place.batches[0]
        first, second = (optree.tree_leaves(run(place.trees[0], x)) for _ in range(2))
        assert all(leaf.isfinite().all() for leaf in first)
        assert not torch.equal(first[0], second[0])

    def test_a_whole_step(self):
        place = Place("bert", METHODS["chain"](LINEAR), train=True)

        def step(tree, momentum, rate, x):
            grads, value = torch.func.grad_and_value(place.loss)(tree, x)
            momentum = optree.tree_map(lambda m, g: 0.9 * m + g, momentum, grads)
            return optree.tree_map(lambda leaf, m: leaf - rate * m, tree, momentum), momentum, value

        run = compiled(step)
        got = wanted = (place.trees[0], pf.map_leaves(torch.zeros_like, place.trees[0]))
        for i, (x,) in enumerate(place.batches):
            rate = torch.tensor(0.5 / (i + 1), dtype=torch.float64)
            got, wanted = run(*got[:2], rate, x), step(*wanted[:2], rate, x)
            same(got, wanted, GRADS)
        assert not torch.equal(got[0]["train"]["classifier.weight"], place.trees[0]["train"]["classifier.weight"])

    def test_statistics_of_batch_norm(self):
        place = Place("conv", pf.lora("stem|up|head", rank=1), train=True)

        def loss(tree, state, x):
            y, state = place.model.with_state(place.adapter.apply(place.frozen, tree), state, x)
            return y.square().sum(), state

        run, state = compiled(torch.func.grad_and_value(loss, has_aux=True)), place.model.state
        for tree, (x,) in zip(place.trees, place.batches, strict=False):
            wanted = torch.func.grad_and_value(loss, has_aux=True)(tree, state, x)
            got = run(tree, state, x)
            same(got, wanted, GRADS)
            state = got[1][1]
        assert int(state["norm.num_batches_tracked"]) == 3
        assert int(place.model.state["norm.num_batches_tracked"]) == 0

    @pytest.mark.parametrize("gradient", [False, True])
    def test_statistics_of_batch_norm_for_each_member(self, gradient):
        net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).double()
        model, x = pf.functionalize(net).train(), randn(5, 4)
        adapter = pf.bind(pf.lora(".*", rank=1), model)
        frozen, start = adapter.init(0)
        trees = [away(start, seed) for seed in range(4)]

        def call(tree, state):
            y, state = model.with_state(adapter.apply(frozen, tree), state, x)
            return y.square().sum(), (y, state)

        function = torch.func.grad(call, has_aux=True) if gradient else call
        run = compiled(torch.func.vmap(function, in_dims=(0, None)))
        for members in (trees[:2], trees[2:]):
            alone = [function(tree, model.state) for tree in members]
            same(run(pf.stack(members), model.state), optree.tree_map(lambda *leaves: torch.stack(leaves), *alone))

    def test_no_statistics_of_members_without_vmap(self):
        """What makes buffers of each member's own is no part of other graphs."""
        model = pf.functionalize(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)).double()).train()
        adapter = pf.bind(pf.lora("0", rank=1), model)
        frozen, tree = adapter.init(0)
        graphs = []

        def keep(graph, _):
            graphs.append(str(graph.code))
            return graph.forward

        torch.compile(lambda t, x: model(adapter.apply(frozen, t), x), fullgraph=True, backend=keep)(tree, randn(5, 4))
        assert "new_zeros" not in graphs[0]


def cast(place, dtype):
    place.model = place.model.to(dtype)
    place.frozen = {path: tensor.to(dtype) for path, tensor in place.frozen.items()}
    place.trees = [pf.map_leaves(lambda leaf: leaf.float(), tree) for tree in place.trees]
    return place


class TestLowPrecision:
    @pytest.mark.parametrize("name", ["bert", "llama"])
    @pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, False), (torch.float32, True)])
    def test_float32_leaves_train(self, name, dtype, autocast):
        place = cast(Place(name, METHODS["lora"](PLACES[name]), train=True), dtype)

        def loss(tree, x):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return place.call(tree, x).float().tanh().square().mean()

        run, (x,) = compiled(torch.func.grad_and_value(loss)), place.batches[0]
        for tree in place.trees[:2]:
            (grads, value), (wanted, expected) = run(tree, x), torch.func.grad_and_value(loss)(tree, x)
            assert {leaf.dtype for leaf in optree.tree_leaves(grads)} == {torch.float32}
            same(value, expected, 2e-2)
            flat, true = (torch.cat([leaf.flatten() for leaf in optree.tree_leaves(t)]) for t in (grads, wanted))
            assert F.cosine_similarity(flat, true, dim=0) > 0.999
            assert (flat - true).norm() < 0.03 * true.norm()


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="Inductor needs a C++ compiler on the CPU")
class TestInductor:
    def test_gradients_inside(self):
        place = Place("bert", METHODS["lora"](["query", "value"]), train=True)
        given = zip(place.trees, place.batches, strict=False)
        inputs = [(tree, *x) for tree, x in given]
        check(torch.func.grad_and_value(place.loss), *inputs, tolerance=GRADS, backend="inductor")

    def test_backward_outside(self):
        place = Place("llama", METHODS["lora"](["q_proj", "v_proj"]), train=True)
        run = gradients(compiled(place.loss, "inductor"))
        for tree, x in zip(place.trees, place.batches, strict=False):
            same(run(tree, *x), gradients(place.loss)(tree, *x), 1e-6)  # the model's own angles are in float32

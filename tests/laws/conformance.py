"""The laws that every method obeys: a method's test class inherits them, and says only how to draw the method."""

import contextlib
import copy
import tempfile
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peft_func as pf
from tests.threads import wrong_answers
from tests.zoo import ZOO, Animal, randn

VALUES, GRADS = 1e-10, 1e-8
KEYS = st.integers(0, 2**32)

SHIFT = pf.Transform(
    init=lambda weights, key: {path: {"shift": torch.zeros_like(w)} for path, w in weights.items()},
    apply=lambda tree, weights: {path: w + tree[path]["shift"] for path, w in weights.items()},
)


@cache
def built(name: str) -> tuple[nn.Module, pf.FunctionalModel]:
    net = ZOO[name].build()
    return net, pf.functionalize(net)


def fingerprint(net: nn.Module) -> list[tuple[Any, ...]]:
    """Everything about a module's tensors that a call could change."""
    tensors = [*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False)]
    return [(n, t.data_ptr(), t._version, t.requires_grad, t.detach().clone()) for n, t in tensors]


def unchanged(before: list[tuple[Any, ...]], after: list[tuple[Any, ...]]) -> bool:
    return all(a[:4] == b[:4] and torch.equal(a[4], b[4]) for a, b in zip(before, after, strict=True))


def perturbed(tree: dict[str, Any], key: int, scale: float = 0.1) -> dict[str, Any]:
    """A tree away from its init, where identities hide nothing."""
    generator = torch.Generator().manual_seed(key)
    noise = lambda t: t + scale * torch.randn(t.shape, dtype=torch.float64, generator=generator).to(t.dtype)
    return pf.map_leaves(noise, tree)


def close(a: Any, b: Any, tolerance: float) -> bool:
    left, right = optree.tree_leaves(a), optree.tree_leaves(b)
    assert len(left) == len(right)
    return all(torch.allclose(p, q, atol=tolerance, rtol=tolerance) for p, q in zip(left, right, strict=True))


class Case:
    """A method bound to an animal, with its trees, drawn."""

    def __init__(self, name: str, method: Any, key: int) -> None:
        self.name, self.method, self.key = name, method, key
        self.animal: Animal = ZOO[name]
        self.net, self.model = built(name)
        self.adapter = pf.bind(method, self.model)
        self.frozen, self.start = self.adapter.init(key)
        self.tree = perturbed(self.start, key)
        self.args, self.kwargs = self.animal.inputs(key % 1000)

    def run(self, weights: Any, model: pf.FunctionalModel | None = None) -> Tensor:
        return self.animal.output((model or self.model)(weights, *self.args, **self.kwargs))

    def call(self, tree: Any) -> Tensor:
        return self.run(self.adapter.apply(self.frozen, tree))

    def loss(self, tree: Any) -> Tensor:
        y = self.call(tree)
        return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum() + y.square().sum()

    def members(self, count: int = 3) -> list[Any]:
        return [perturbed(self.start, self.key + i) for i in range(count)]

    def __repr__(self) -> str:
        return f"Case({self.name!r}, {self.method.name}, {[p.paths for p in self.adapter.parts]}, key={self.key})"


@st.composite
def listed(draw: Any, methods: dict[str, list[Any]], names: list[str] | None = None) -> Case:
    """A case of methods that are listed for animals, of some of these animals where the list has any of them."""
    name = draw(st.sampled_from([name for name in methods if names is None or name in names] or list(methods)))
    return Case(name, draw(st.sampled_from(methods[name])), draw(KEYS))


class Laws:
    """The laws, numbered as in the design.

    A subclass gives `methods(animal, where)`, a strategy of methods for a selection of an animal.
    """

    identity_at_init = True

    @staticmethod
    def methods(animal: Animal, where: Any) -> st.SearchStrategy[Any]:
        raise NotImplementedError

    @classmethod
    def method_on(cls, name: str, which: int = 0) -> Any:
        """One method for a named animal, for laws that are too slow to be drawn."""
        animal = ZOO[name]
        found = []

        @settings(max_examples=1, derandomize=True, database=None)
        @given(cls.methods(animal, animal.where[which]))
        def take(method: Any) -> None:
            found.append(method)

        take()
        return found[0]

    @classmethod
    def cases(cls, names: list[str] | None = None) -> st.SearchStrategy[Case]:
        @st.composite
        def draw_case(draw: Any) -> Case:
            name = draw(st.sampled_from(names or list(ZOO)))
            animal = ZOO[name]
            where = draw(st.sampled_from(animal.where))
            return Case(name, draw(cls.methods(animal, where)), draw(KEYS))

        return draw_case()

    @given(st.data())
    def test_01_identity_at_init(self, data):
        if not self.identity_at_init:
            pytest.fail("this method makes no promise at init; say so in its class and override this law")
        case = data.draw(self.cases())
        expected = case.animal.output(case.net(*case.args, **case.kwargs))
        assert close(case.call(case.start), expected, VALUES)

    @given(st.data())
    def test_02_unselected_weights_are_the_same_objects(self, data):
        case = data.draw(self.cases())
        weights = case.adapter.apply(case.frozen, case.tree)
        touched = {path for part in case.adapter.parts for path in part.seen}
        merged = pf.merge(weights)
        assert list(weights) == list(case.model.params)
        for name, tensor in case.model.params.items():
            if name not in touched:
                assert weights[name] is tensor
                assert case.frozen[name] is tensor
                assert merged[name] is tensor
        assert touched >= set(pf.delta(weights))
        assert pf.delta(weights)

    @given(st.data())
    def test_03_merge_is_the_call(self, data):
        case = data.draw(self.cases())
        weights = case.adapter.apply(case.frozen, case.tree)
        assert close(case.run(weights), case.run(pf.merge(weights)), VALUES)
        plain = copy.deepcopy(case.net)
        plain.load_state_dict(case.model.state_dict(weights), strict=True)
        assert close(case.run(weights), case.animal.output(plain(*case.args, **case.kwargs)), VALUES)
        for name, change in pf.delta(weights).items():
            assert close(pf.merge(weights)[name], case.model.params[name] + change, VALUES)

    @given(st.data())
    def test_04_structured_is_dense(self, data):
        case = data.draw(self.cases())
        floats = [x.requires_grad_() for x in case.args if x.is_floating_point()]

        def value_and_grads(merge: bool) -> tuple[Tensor, Any]:
            leaves = pf.map_leaves(lambda t: t.clone().requires_grad_(), case.tree)
            weights = case.adapter.apply(case.frozen, leaves)
            y = case.run(pf.merge(weights) if merge else weights)
            flat = [*optree.tree_leaves(leaves), *floats]
            return y.detach(), torch.autograd.grad((y * y.cos()).sum(), flat, materialize_grads=True)

        (y, grads), (dense_y, dense_grads) = value_and_grads(False), value_and_grads(True)
        assert close(y, dense_y, VALUES)
        assert close(grads, dense_grads, GRADS)

    @given(st.data())
    def test_05_vmap_is_the_loop(self, data):
        case = data.draw(self.cases())
        members = case.members()
        stacked = pf.stack(members)
        assert close(torch.vmap(case.call)(stacked), torch.stack([case.call(t) for t in members]), VALUES)
        grads = torch.vmap(torch.func.grad(case.loss))(stacked)
        assert close(pf.unstack(grads), [torch.func.grad(case.loss)(t) for t in members], GRADS)
        assert close(pf.unstack(stacked), members, 0.0)

    @given(st.data())
    def test_06_purity(self, data):
        case = data.draw(self.cases())
        before, rng = fingerprint(case.net), torch.get_rng_state()
        params = {name: (t, t._version, t.clone()) for name, t in case.model.params.items()}
        state = {name: (t, t._version, t.clone()) for name, t in case.model.state.items()}
        for model in (case.model, case.model.train()):
            leaves = pf.map_leaves(lambda t: t.clone().requires_grad_(), case.tree)
            weights = case.adapter.apply(case.frozen, leaves)
            case.run(weights, model).sum().backward()
            model.state_dict(weights)
        assert unchanged(before, fingerprint(case.net))
        assert case.net.training is False
        assert torch.equal(rng, torch.get_rng_state())
        for table, kept in ((case.model.params, params), (case.model.state, state)):
            for name, (tensor, version, value) in kept.items():
                assert table[name] is tensor
                assert tensor._version == version
                assert torch.equal(tensor, value)

    @given(st.data())
    def test_07_chain_is_associative_with_a_unit(self, data):
        case = data.draw(self.cases())
        a = case.method
        b, c = pf.on(".*", SHIFT, name="b"), pf.ia3(case.animal.where[0], name="c")
        ways = [
            pf.chain(a, b, c),
            pf.chain(pf.chain(a, b), c),
            pf.chain(a, pf.chain(b, c), pf.chain()),
            pf.chain(a, b, c),
        ]
        results = []
        for way in ways:
            adapter = pf.bind(way, case.model)
            frozen, tree = adapter.init(case.key)
            tree = perturbed(tree, case.key)
            results.append((list(frozen), tree, case.run(adapter.apply(frozen, tree))))
        for frozen, tree, y in results[1:]:
            assert frozen == results[0][0]
            assert close(tree, results[0][1], 0.0)
            assert torch.equal(y, results[0][2])
        alone, unit = pf.bind(a, case.model), pf.bind(pf.chain(pf.chain(), a), case.model)
        assert close(alone.init(case.key)[1], unit.init(case.key)[1], 0.0)

    @given(st.data())
    def test_08_combine_undoes_partition(self, data):
        case = data.draw(self.cases())
        where = data.draw(st.sampled_from([r".*\.(A|phi|scale)", ".*", "nothing", pf.ndim(1), ["B", "psi"]]))
        chosen, rest = pf.partition(case.tree, where)
        whole = pf.combine(chosen, rest)
        originals = {id(leaf) for leaf in optree.tree_leaves(case.tree)}
        assert {id(leaf) for leaf in optree.tree_leaves(whole)} == originals
        assert close(case.call(whole), case.call(case.tree), 0.0)

    @given(st.data())
    def test_09_init_depends_on_key_and_path_only(self, data):
        case = data.draw(self.cases())
        more = pf.chain(pf.on(".*", SHIFT, name="first"), case.method, pf.ia3(case.animal.where[0], name="last"))
        torch_state = torch.get_rng_state()
        _, again = pf.bind(more, case.model).init(case.key)
        assert torch.equal(torch_state, torch.get_rng_state())
        for name in case.start:
            assert close(again[name], case.start[name], 0.0)
        as_generator = case.adapter.init(torch.Generator().manual_seed(3))[1]
        assert close(as_generator, case.adapter.init(torch.Generator().manual_seed(3))[1], 0.0)

    @given(st.data())
    def test_10_save_and_load(self, data):
        case = data.draw(self.cases())
        with tempfile.TemporaryDirectory() as folder:
            path, twin = Path(folder, "a.safetensors"), Path(folder, "b.safetensors")
            pf.save(path, case.adapter, case.tree)
            adapter, frozen, tree = pf.load(path, case.model)
            pf.save(twin, adapter, tree)
            assert path.read_bytes() == twin.read_bytes()
            assert sorted(Path(folder).iterdir()) == [path, twin]
        assert close(tree, case.tree, 0.0)
        assert list(frozen) == list(case.frozen)
        assert close(case.run(adapter.apply(frozen, tree)), case.call(case.tree), VALUES)

    compiled: ClassVar[list[str]] = ["mlp", "conv", "attention"]

    @pytest.mark.slow
    def test_11_compile_without_recompiling(self, subtests):
        for name in self.compiled:
            with subtests.test(name):
                self.check_compile(Case(name, self.method_on(name), 7))

    def check_compile(self, case: Case) -> None:
        members = case.members(4)
        ways = {
            "call": (case.call, members),
            "vmap": (torch.vmap(case.call), [pf.stack(members[:2]), pf.stack(members[2:])]),
            "vmap(grad)": (torch.vmap(torch.func.grad(case.loss)), [pf.stack(members[:2]), pf.stack(members[2:])]),
        }
        for way, (function, trees) in ways.items():
            torch._dynamo.reset()
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
            with _slow_attention():
                first = compiled(trees[0])
                with torch._dynamo.config.patch(error_on_recompile=True):
                    others = [compiled(tree) for tree in trees[1:]]
                assert close([first, *others], [function(tree) for tree in trees], GRADS), way

    @given(st.data())
    def test_12_nothing_is_formed(self, data):
        case = data.draw(self.cases([name for name, animal in ZOO.items() if not animal.densifies]))
        leaves = pf.map_leaves(lambda t: t.clone().requires_grad_(), case.tree)
        with pf.densify("error"):
            for model in (case.model, case.model.train()):
                case.run(case.adapter.apply(case.frozen, leaves), model).sum().backward()

    @settings(max_examples=6)
    @given(st.data())
    def test_13_transforms_of_torch_func(self, data):
        case = data.draw(self.cases(["mlp", "conv", "shared", "experts", "attention", "bert"]))
        part, rest = _one_leaf(case.tree)
        loss = lambda part: case.loss(pf.combine(part, rest))
        tangent = pf.map_leaves(torch.ones_like, part)
        grad = torch.func.grad(loss)(part)
        value, slope = torch.func.jvp(loss, (part,), (tangent,))
        assert close(value, loss(part), VALUES)
        assert close(slope, sum(leaf.sum() for leaf in optree.tree_leaves(grad)), GRADS)
        with _slow_attention():  # jacrev maps the backward of a forward that was not mapped
            jacobian = torch.func.jacrev(lambda p: case.call(pf.combine(p, rest)))(part)
        forward = torch.func.jacfwd(lambda p: case.call(pf.combine(p, rest)))(part)
        assert close(jacobian, forward, GRADS)
        hessian = optree.tree_leaves(torch.func.hessian(loss)(part))
        for block in hessian:
            n = block[(0,) * (block.dim() // 2)].numel()
            assert close(block.reshape(n, n), block.reshape(n, n).T, GRADS)

    @settings(max_examples=10)
    @given(st.data(), st.sampled_from([torch.float16, torch.bfloat16]), st.booleans())
    def test_14_half_precision_merge_is_rounded_once(self, data, dtype, half_tree):
        case = data.draw(self.cases())
        half = pf.functionalize(copy.deepcopy(case.net).to(dtype))
        adapter = pf.bind(case.method, half)
        frozen, tree = adapter.init(case.key)
        tree = perturbed(tree, case.key)
        if half_tree:
            tree = pf.map_leaves(lambda t: t.to(dtype), tree)
        merged = pf.merge(adapter.apply(frozen, tree))
        full = {name: t.float() for name, t in half.params.items()}
        wide = pf.bind(case.method, pf.functionalize(copy.deepcopy(case.net).to(dtype).float()))
        exact = pf.merge(wide.apply({name: full[name] for name in frozen}, pf.map_leaves(lambda t: t.float(), tree)))
        for name, tensor in merged.items():
            assert tensor.dtype is dtype
            assert torch.equal(tensor, exact[name].to(dtype)), name

    @pytest.mark.parametrize("name", ["mlp", "shared", "bert"])
    def test_15_threads(self, name):
        self.check_threads(Case(name, self.method_on(name), 11), times=200 if name == "mlp" else 50)

    def check_threads(self, case: Case, times: int) -> None:
        members = case.members(4)
        assert not wrong_answers(lambda i: case.call(members[i]), [case.call(tree) for tree in members], times)

    @pytest.mark.parametrize("reentrant", [False, True])
    @given(st.data())
    @settings(max_examples=5)
    def test_16_checkpointing_inside_the_model(self, reentrant, data):
        method = data.draw(self.methods(ZOO["mlp"], ".*"))
        key = data.draw(KEYS)
        grads = []
        for segments in (False, True):
            model = pf.functionalize(_Checkpointed(segments, reentrant))
            adapter = pf.bind(method, model)
            frozen, tree = adapter.init(key)
            leaves = pf.map_leaves(lambda t: t.requires_grad_(), perturbed(tree, key))
            x = randn(4, 5, seed=1).requires_grad_()
            model(adapter.apply(frozen, leaves), x).square().sum().backward()
            grads.append([x.grad, *(leaf.grad for leaf in optree.tree_leaves(leaves))])
        assert close(grads[0], grads[1], GRADS)

    @given(st.data())
    def test_17_ensemble_is_the_loop(self, data):
        case = data.draw(self.cases())
        members, how = case.members(), data.draw(st.sampled_from(["auto", "vmap"]))
        run = pf.ensemble(case.adapter, how=how, chunk_size=data.draw(st.sampled_from([None, 2])))

        def together(stacked: Any) -> Tensor:
            return case.animal.output(run(case.frozen, stacked, *case.args, **case.kwargs))

        _same_with_gradients(together, lambda trees: torch.stack([case.call(tree) for tree in trees]), members)

    @given(st.data())
    def test_18_route_is_the_loop(self, data):
        case = data.draw(self.cases())
        members = case.members()
        batches = [case.animal.inputs(case.key % 1000 + i) for i in range(3)]
        args = [torch.cat(parts) for parts in zip(*(args for args, _ in batches), strict=True)]
        count = len(args[0])
        index = data.draw(st.lists(st.integers(-1, 2), min_size=count, max_size=count))
        used = set(index) - {-1}

        def one(tree: Any, i: int) -> Tensor:
            weights = case.model.params if tree is None else case.adapter.apply(case.frozen, tree)
            return case.animal.output(case.model(weights, *(x[i : i + 1] for x in args)))

        def together(stacked: Any) -> Tensor:
            weights = pf.route(case.adapter, case.frozen, stacked, torch.tensor(index))
            return case.animal.output(case.model(weights, *args))

        def loop(trees: list[Any]) -> Tensor:
            return torch.cat([one(None if k < 0 else trees[k], i) for i, k in enumerate(index)])

        grads = _same_with_gradients(together, loop, members)
        for k in set(range(3)) - used:
            assert all(not leaf[k].any() for leaf in grads)


def _same_with_gradients(together: Any, loop: Any, members: list[Any]) -> list[Tensor]:
    """Compare values and gradients of a function of a stacked tree and of one of a list of trees."""
    stacked = pf.map_leaves(lambda t: t.requires_grad_(), pf.stack(members))
    leaves = optree.tree_leaves(stacked)
    results = []
    for value in (together(stacked), loop(pf.unstack(stacked))):
        loss = (value * value.cos()).sum()
        zeros = [torch.zeros_like(leaf) for leaf in leaves]
        grads = torch.autograd.grad(loss, leaves, materialize_grads=True) if loss.requires_grad else zeros
        results.append((value.detach(), grads))
    assert close(results[0][0], results[1][0], VALUES)
    assert close(results[0][1], results[1][1], GRADS)
    return list(results[0][1])


class _Checkpointed(nn.Module):
    def __init__(self, segments: bool, reentrant: bool) -> None:
        super().__init__()
        self.blocks = ZOO["mlp"].build()
        self.segments, self.reentrant = segments, reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant) if self.segments else block(x)
        return x


def _one_leaf(tree: dict[str, Any]) -> tuple[Any, Any]:
    """Split off the smallest leaf: a hessian over all of them is too large."""
    names = {id(leaf): leaf.numel() for leaf in optree.tree_leaves(tree)}
    smallest = min(names, key=names.__getitem__)
    paths = [path for path, leaf in _paths(tree) if id(leaf) == smallest]
    return pf.partition(tree, pf.exact(paths[:1]))


def _paths(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Tensor]]:
    found = []
    for key, value in tree.items():
        found += _paths(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return found


@contextlib.contextmanager
def _slow_attention() -> Iterator[None]:
    """Scaled-dot-product attention has no batching rule on the CPU, and torch says so in a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop because we have not yet implemented")
        yield

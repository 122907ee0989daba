"""A base weight is decomposed once for a tensor, and never is a decomposition of another tensor or value used."""

import gc
import threading
import time
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import peft_func as pf
from tests.transforms.plain import GRADS, same
from tests.zoo import randn, seeded

PATHS = ("0.weight", "2.weight")


class Svds(TorchDispatchMode):
    """Counts decompositions of real tensors."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "svd" in str(func) and not args[0].is_meta
        return func(*args, **(kwargs or {}))


class Place:
    """A bound method, a tree away from init, and the formula as a plain module call."""

    def __init__(self, init=True):
        self.net = seeded(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)))()
        self.model = pf.functionalize(self.net)
        self.adapter = pf.bind(pf.svdiff(".*weight"), self.model)
        self.frozen = dict(self.model.params)
        if init:
            self.adapter.init(0)
        self.tree = {"svdiff": {path: {"shift": randn(n, seed=n)} for path, n in zip(PATHS, (5, 4), strict=True)}}
        self.x = randn(3, 6)

    def call(self, frozen, tree=None):
        return self.model(self.adapter.apply(frozen, tree or self.tree), self.x)

    def plain(self, frozen, tree=None):
        weights = dict(frozen)
        for path, leaf in (tree or self.tree)["svdiff"].items():
            U, sigma, Vt = torch.linalg.svd(frozen[path], full_matrices=False)
            weights[path] = U @ torch.diag_embed(torch.relu(sigma + leaf["shift"])) @ Vt
        return torch.func.functional_call(self.net, weights, (self.x,))

    def other(self, by=1.3):
        return {name: tensor * by + 0.1 for name, tensor in self.frozen.items()}


def test_binding_decomposes_nothing_init_does_once_and_later_calls_do_not():
    with Svds() as svds:
        place = Place(init=False)
        assert svds.count == 0
        place.adapter.init(0)
        assert svds.count == 2
        place.adapter.init(1)
        for _ in range(3):
            same(place.call(place.frozen), place.call(dict(place.frozen)), 0.0)
        torch.vmap(torch.func.grad(lambda t: place.call(place.frozen, t).sum()))(pf.stack([place.tree] * 2))
        assert svds.count == 2


def test_each_tensor_has_a_decomposition_of_its_own():
    place = Place()
    other = place.other()
    single = {name: tensor.float() for name, tensor in place.frozen.items()}
    for frozen in (place.frozen, other, place.frozen, other):
        same(place.call(frozen), place.plain(frozen))
    assert pf.merge(place.adapter.apply(single, place.tree))["0.weight"].dtype is torch.float32
    with Svds() as svds:
        place.call(other)
        place.call(place.frozen)
        pf.merge(place.adapter.apply(single, place.tree))
        assert svds.count == 0
        place.call({**other, "2.weight": other["2.weight"].clone()})
        assert svds.count == 1


def test_a_tensor_that_was_written_to_is_decomposed_anew():
    place = Place()
    mine = {name: tensor.clone() for name, tensor in place.frozen.items()}
    before = place.call(mine)
    with torch.no_grad():
        mine["0.weight"].mul_(-2)
    same(place.call(mine), place.plain(mine))
    assert (place.call(mine) - before).abs().max() > 1e-3
    place.net.load_state_dict(place.other(0.7))  # the model shares its storage
    same(place.call(place.frozen), place.plain({n: t.detach() for n, t in place.net.named_parameters()}))


def test_what_was_kept_goes_with_its_tensor():
    place = Place()
    other = place.other()
    U = weakref.ref(place.adapter.apply(other, place.tree)["0.weight"].tensors()[1])
    gc.collect()
    assert U() is not None
    del other
    place.call(place.other(0.5))  # what is dead is dropped when another tensor comes
    gc.collect()
    assert U() is None


def test_a_mapped_base_is_the_loop():
    place = Place()
    both = [place.frozen, place.other()]
    stacked = {name: torch.stack([tree[name] for tree in both]) for name in place.frozen}
    same(torch.vmap(place.call)(stacked), torch.stack([place.plain(tree) for tree in both]))


def test_gradients_in_the_base_are_those_of_the_formula():
    place = Place()
    theirs = torch.func.grad(lambda f: place.plain(f).square().sum())(place.frozen)
    same(torch.func.grad(lambda f: place.call(f).square().sum())(place.frozen), theirs, GRADS)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in place.frozen.items()}
    with torch.no_grad():
        place.call(leaves)  # kept, but of no use where a gradient is wanted
    ours = torch.autograd.grad(place.call(leaves).square().sum(), list(leaves.values()))
    same(dict(zip(leaves, ours, strict=True)), theirs, GRADS)


@pytest.mark.parametrize("first", ["vmap", "grad", "inference", "no_grad", "autocast"])
def test_what_is_kept_does_not_depend_on_where_it_was_computed(first):
    place = Place(init=False)
    with Svds() as svds:
        if first == "vmap":
            torch.vmap(lambda t: place.call(place.frozen, t))(pf.stack([place.tree] * 2))
        elif first == "grad":
            torch.func.grad(lambda t: place.call(place.frozen, t).sum())(place.tree)
        elif first == "inference":
            with torch.inference_mode():
                place.call(place.frozen)
        elif first == "no_grad":
            with torch.no_grad():
                place.call(place.frozen)
        else:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                place.adapter.apply(place.frozen, place.tree)
        assert svds.count == 2
        leaves = pf.map_leaves(lambda t: t.clone().requires_grad_(), place.tree)
        y = place.call(place.frozen, leaves)
        y.sum().backward()
        assert svds.count == 2
    same(y, place.plain(place.frozen))
    kept = place.adapter.apply(place.frozen, place.tree)["0.weight"].tensors()
    assert not any(torch._C._functorch.is_functorch_wrapped_tensor(t) or t.is_inference() for t in kept)
    assert all(leaves["svdiff"][path]["shift"].grad.any() for path in PATHS)


def test_inference_tensors_have_decompositions_too():
    place = Place()
    with torch.inference_mode():
        inside = place.other()
        same(place.call(inside), place.plain(inside))
        with Svds() as svds:
            place.call(inside)
            assert svds.count == 0


def test_threads_that_come_at_once_decompose_once():
    place = Place(init=False)
    expected, results, barrier = place.plain(place.frozen), [], threading.Barrier(6)
    seen = []
    real = torch.linalg.svd

    def work():
        barrier.wait()
        results.extend(place.call(place.frozen) for _ in range(20))

    def counted(*args, **kwargs):
        seen.append(args[0].shape)
        time.sleep(0.05)  # let the others come
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "svd", counted)
        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(seen) == 2
    assert len(results) == 120
    assert all(torch.equal(result, results[0]) for result in results)
    same(results[0], expected)


_HERE = {}


def _called_through_a_global(frozen):
    """Dynamo guards two names of one tensor, but not where one is an argument and the other comes by a global."""
    return _HERE["place"].call(frozen)


@pytest.mark.parametrize("warm", [[], ["own"], ["own", "other"]])
def test_a_compiled_call_is_right_for_whatever_base_it_is_given(warm):
    """`is` between tensors is settled when the graph is traced, and guards nothing: another base must be noticed."""
    place = Place(init=False)
    bases = {"own": place.frozen, "other": place.other(), "third": place.other(0.4)}
    for name in warm:
        place.call(bases[name])
    torch._dynamo.reset()
    _HERE["place"] = place
    compiled = torch.compile(_called_through_a_global, fullgraph=True, backend="aot_eager")
    for name in ("own", "other", "own", "third", "other"):
        same(compiled(bases[name]), place.plain(bases[name]))
    place.call(bases["third"])
    for name in ("third", "own", "other"):
        same(compiled(bases[name]), place.plain(bases[name]))


def test_a_compiled_graph_decomposes_no_base_that_was_seen():
    place = Place()
    graphs = []

    def backend(graph, inputs):
        graphs.append("\n".join(str(node.target) for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(place.call, fullgraph=True, backend=backend)
    same(compiled(place.frozen), place.plain(place.frozen))
    compiled(place.other())
    assert ["linalg_svd" in graph for graph in graphs] == [False, True]


def test_compiled_calls_whose_base_is_made_inside_or_wants_a_gradient():
    place = Place()
    torch._dynamo.reset()
    inside = lambda f: place.call({name: 2 * tensor for name, tensor in f.items()})
    same(torch.compile(inside, fullgraph=True, backend="aot_eager")(place.frozen), inside(place.frozen))
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in place.frozen.items()}
    with torch.no_grad():
        place.call(leaves)
    compiled = torch.compile(place.call, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(leaves).square().sum(), list(leaves.values()))
    same(list(ours), list(torch.autograd.grad(place.plain(leaves).square().sum(), list(leaves.values()))), GRADS)

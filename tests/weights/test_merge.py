"""Merging in chunks is merging as a whole; buffers are written only when all of them may be."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import peft_func as pf
from peft_func.errors import AddinError, OptionError, RouteError
from peft_func.weights import rows
from peft_func.weights.layout import Layout, Storage
from peft_func.weights.matrix import Dense, Diagonal, IdentityPlus, LowRank, Product, Sum
from peft_func.weights.operator import Operator
from peft_func.weights.reshaped import Reshaped
from peft_func.weights.sampled import Sampled
from peft_func.weights.spectral import Spectral
from tests.weights.test_matrix import drawn
from tests.zoo import randn

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(params=[1, 10**6], ids=["rows", "whole"])
def _chunks(request, monkeypatch):
    monkeypatch.setattr(rows, "CHUNK_BYTES", request.param)
    monkeypatch.setattr(rows, "LEAST_ROWS", 2)


def operator(matrix, storage=Storage.MATRIX, shape=None, dtype=torch.float64):
    return Operator(matrix, Layout(storage, shape or matrix.shape), dtype, "w")


def merged(op):
    (value,) = pf.merge({"w": op}).values()
    return value


def same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, atol=1e-10, rtol=1e-9)


def expressions():
    """Kinds that random ones lack: each `[6, 4]` or `[3, 6, 4]`."""
    W, low = Dense(randn(6, 4)), LowRank(randn(6, 2, seed=1), randn(2, 4, seed=2), 0.7, dropout=0.5)
    square = LowRank(randn(4, 2, seed=3), randn(2, 4, seed=4), 0.3)
    tall = LowRank(randn(6, 2, seed=3), randn(2, 6, seed=4), 0.3)
    experts = Dense(randn(3, 6, 4, seed=5))
    yield Sum(W, low)
    yield Sum(W, Spectral(randn(6, 2), randn(2), randn(2, 4)))
    yield Sum(W, Reshaped(LowRank(randn(8, 2), randn(2, 3)), (6, 4)))
    yield Sum(W, Reshaped(LowRank(randn(3, 1), randn(1, 8)), (6, 4)))
    yield Product(Diagonal(randn(6)), Sum(W, low))
    yield Sum(low, Product(Diagonal(randn(3), repeat=2), W))
    yield Sum(W, Product(W, Diagonal(randn(4))))
    yield Product(W, IdentityPlus(square))
    yield Sum(low, Product(W, IdentityPlus(square)))
    yield Product(IdentityPlus(tall), W)
    yield Product(IdentityPlus(Diagonal(randn(6))), W)
    yield Product(Product(IdentityPlus(tall), W), IdentityPlus(square))
    yield Product(Sum(tall, Diagonal(randn(6))), W)
    yield Product(Spectral(randn(6, 2), randn(2), randn(2, 6)), W)
    yield Sum(W, Sampled(lambda base, parts, train: LowRank(parts[0], parts[1] * (2 if train else 1)), W,
                         (randn(6, 1), randn(1, 4))))  # fmt: skip
    yield Sum(experts, LowRank(randn(3, 6, 2), randn(3, 2, 4)))
    yield Sum(experts, LowRank(randn(6, 2), randn(2, 4)))
    yield Sum(experts, LowRank(randn(1, 6, 2), randn(1, 2, 4)))
    yield Product(Diagonal(randn(3, 6)), Sum(experts, low))
    yield Product(experts, IdentityPlus(square))


EXPRESSIONS = list(expressions())


@pytest.mark.usefixtures("_chunks")
class TestValues:
    @given(drawn())
    def test_chunked_is_whole(self, matrix):
        op = operator(matrix)
        assert same(merged(op), op.materialise())
        assert merged(op).is_contiguous()

    @given(drawn(batch=(3,)))
    def test_a_batch(self, matrix):
        op = operator(matrix)
        assert same(merged(op), op.materialise())

    @pytest.mark.parametrize("matrix", EXPRESSIONS)
    def test_every_kind(self, matrix):
        op = operator(matrix)
        assert same(merged(op), op.materialise())

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize("factors", [None, torch.float32, torch.float64])
    @pytest.mark.parametrize("matrix", EXPRESSIONS)
    def test_half_precision_is_rounded_once(self, matrix, dtype, factors):
        half = matrix.map(lambda t, n: t.to(dtype if factors is None or t.numel() in (24, 72) else factors))
        wide = half.compute_dtype
        exact = merged(operator(half.map(lambda t, n: t.to(wide)), dtype=wide))
        assert exact.dtype is wide
        assert torch.equal(merged(operator(half, dtype=dtype)), exact.to(dtype))

    @given(st.integers(1, 70), st.integers(1, 90), st.integers(1, 20), st.booleans())
    def test_half_precision_at_any_size(self, out, inn, rank, transposed):
        W, B, A = randn(out, inn).bfloat16(), randn(out, rank, seed=1).float(), randn(rank, inn, seed=2).float()
        storage, shape = (Storage.TRANSPOSED, (inn, out)) if transposed else (Storage.MATRIX, (out, inn))
        half = merged(operator(Sum(Dense(W), LowRank(B, A, 0.3)), storage, shape, torch.bfloat16))
        full = merged(operator(Sum(Dense(W.float()), LowRank(B, A, 0.3)), storage, shape, torch.float32))
        assert torch.equal(half, full.bfloat16())
        right = W.double() + 0.3 * B.double() @ A.double()
        assert torch.allclose(full.double(), right.T if transposed else right, atol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        ("storage", "shape"),
        [
            (Storage.TRANSPOSED, (10, 7)),
            (Storage.CONV, (7, 3, 2, 2)),
            (Storage.CONV_TRANSPOSED, (3, 7, 2, 2)),
            (Storage.CONV_TRANSPOSED, (3, 7, 5)),
            (Storage.MATRIX, (3, 5, 4)),
        ],
    )
    def test_layouts(self, storage, shape, dtype):
        layout, stored = Layout(storage, shape), randn(*shape).to(dtype)
        *_, out, inn = layout.matrix_shape
        low = LowRank(randn(out, 2), randn(2, inn))
        op = operator(Sum(Dense(layout.to_matrix(stored)), low), storage, shape, dtype)
        value, whole = merged(op), op.materialise()
        assert value.is_contiguous()
        assert same(value, whole) if dtype is torch.float64 else torch.equal(value, whole)
        buffers = [torch.empty(shape, dtype=dtype), torch.empty(*shape, 2, dtype=dtype)[..., 0]]
        buffers.append(torch.empty(*shape[:-2], shape[-1], shape[-2], dtype=dtype).mT)
        if len(shape) == 4:
            buffers.append(torch.empty(shape, dtype=dtype).to(memory_format=torch.channels_last))
        for buffer in buffers:
            assert pf.merge({"w": op}, into={"w": buffer})["w"] is buffer
            assert torch.equal(buffer, value)

    def test_autocast_does_not_reach_the_products(self):
        op = operator(Sum(Dense(randn(6, 4).float()), LowRank(randn(6, 2).float(), randn(2, 4).float())),
                      dtype=torch.float32)  # fmt: skip
        expected = merged(op)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(merged(op), expected)

    def test_a_class_of_the_users_own_is_formed_by_its_own_dense(self):
        class Doubled(LowRank):
            def dense(self, dtype):
                return 2 * super().dense(dtype)

            def map(self, function):
                return Doubled(function(self.B, 2), function(self.A, 2))

        W, low = Dense(randn(6, 6)), Doubled(randn(6, 2), randn(2, 6))
        for matrix in (Sum(W, low), Product(low, W), Sum(W, Product(Diagonal(randn(6)), low))):
            assert same(merged(operator(matrix)), matrix.dense(torch.float64))


def served(rank=2, dtype=torch.float64):
    """Two linear layers and a norm, the first with LoRA."""
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)).to(dtype)
    adapter = pf.bind(pf.lora("0", rank=rank), pf.functionalize(net))
    frozen, tree = adapter.init(0)
    tree = pf.map_leaves(lambda leaf: leaf + 0.1, tree)
    return net, adapter, frozen, tree


class TestInto:
    def test_parameters_of_another_model(self):
        net, adapter, frozen, tree = served()
        before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        tree = pf.map_leaves(lambda leaf: leaf.requires_grad_(), tree)
        weights = adapter.apply(frozen, tree)
        other = copy.deepcopy(net)
        for parameter in other.parameters():
            parameter.data.fill_(7.0)
        into = dict(other.named_parameters())
        result = pf.merge(weights, into=into)
        assert list(result) == list(weights)
        assert all(result[name] is into[name] for name in into)
        for name, value in pf.merge(weights).items():
            assert same(into[name].detach(), value.detach())
            assert into[name].requires_grad
            assert into[name].is_leaf
        for name, tensor in net.state_dict().items():
            assert torch.equal(tensor, before[name])

    def test_only_what_changed(self):
        _, adapter, frozen, tree = served()
        weights = adapter.apply(frozen, tree)
        buffer = torch.zeros(6, 4, dtype=torch.float64)
        result = pf.merge(weights, into={"0.weight": buffer})
        assert result["0.weight"] is buffer
        assert all(result[name] is weights[name] for name in weights if name != "0.weight")
        assert same(buffer, merged(weights["0.weight"]).detach())

    def test_tied_weights_have_one_buffer(self):
        net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)).double()
        net[1].weight = net[0].weight
        adapter = pf.bind(pf.lora("0", rank=2), pf.functionalize(net))
        frozen, tree = adapter.init(0)
        weights = adapter.apply(frozen, pf.map_leaves(lambda leaf: leaf + 0.1, tree))
        other = copy.deepcopy(net)
        pf.merge(weights, into=dict(other.named_parameters()))
        assert other[1].weight is other[0].weight
        assert same(other[1].weight.detach(), merged(weights["0.weight"]).detach())

    def test_trained_tensors_are_changes_too(self):
        net = nn.Linear(4, 3).double()
        adapter = pf.bind(pf.train("bias"), pf.functionalize(net))
        weights = adapter.apply(*adapter.init(0))
        with pytest.raises(OptionError, match="lacks 'bias'"):
            pf.merge(weights, into={})
        buffer = torch.empty(3, dtype=torch.float64)
        assert torch.equal(pf.merge(weights, into={"bias": buffer})["bias"], net.bias)

    def test_views_side_by_side_in_one_storage(self):
        _, adapter, frozen, tree = served()
        flat = torch.zeros(30, dtype=torch.float64)
        weights = adapter.apply(frozen, tree)
        pf.merge(weights, into={"0.weight": flat[:24].view(6, 4), "0.bias": flat[24:]})
        assert same(flat[:24].view(6, 4), merged(weights["0.weight"]).detach())
        assert torch.equal(flat[24:], weights["0.bias"])

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (lambda net, tree: {"nothing": torch.zeros(1)}, "'nothing', which the weights have not"),
            (lambda net, tree: {"0.weight": None}, "a NoneType"),
            (lambda net, tree: {"0.weight": torch.zeros(4, 6).double()}, r"shape \(4, 6\)"),
            (lambda net, tree: {"0.weight": torch.zeros(6, 4)}, "dtype torch.float32"),
            (lambda net, tree: {"0.weight": torch.zeros(6, 4, device="meta").double()}, "on meta"),
            (lambda net, tree: {"0.weight": torch.zeros(6, 4).double().to_sparse()}, "sparse"),
            (lambda net, tree: {"0.weight": net[0].weight}, "shares memory"),
            (lambda net, tree: {"0.weight": net[0].weight.detach().view(4, 6).t()}, "shares memory"),
            (lambda net, tree: {"2.weight": net[2].weight}, "shares memory"),
            (lambda net, tree: {"0.bias": tree_leaves(tree)[0].flatten()[:6]}, "shares memory"),
            (lambda net, tree: {"1.bias": ONE[:6], "1.weight": ONE[5:11]}, "a buffer of its own"),
            (lambda net, tree: {"1.bias": ONE[:6], "1.weight": ONE[:6]}, "a buffer of its own"),
            (lambda net, tree: {"1.bias": ONE[:1].expand(6)}, "entries that share memory"),
            (lambda net, tree: {"2.weight": ONE.as_strided((3, 6), (2, 1))}, "entries that share memory"),
            (lambda net, tree: {"1.bias": torch.zeros(6).double().requires_grad_() * 2}, "result of a graph"),
            (lambda net, tree: {"1.bias": made_in_inference(6)}, "inference mode"),
        ],
    )
    def test_nothing_is_written_before_all_is_checked(self, wrong, message):
        net, adapter, frozen, tree = served()
        before = copy.deepcopy(net.state_dict())
        good = {name: torch.zeros_like(tensor) for name, tensor in frozen.items()}
        with pytest.raises(OptionError, match=message):
            pf.merge(adapter.apply(frozen, tree), into={**good, **wrong(net, tree)})
        assert not any(tensor.any() for tensor in good.values())
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())

    def test_no_mapping_and_no_transform(self):
        _, adapter, frozen, tree = served()
        with pytest.raises(OptionError, match="mapping of names"):
            pf.merge(adapter.apply(frozen, tree), into=[torch.zeros(3)])
        into = {name: torch.zeros_like(tensor) for name, tensor in frozen.items()}
        with pytest.raises(OptionError, match=r"torch\.func"):
            torch.func.grad(lambda t: pf.merge(adapter.apply(frozen, t), into=into)["0.weight"].sum())(tree)
        assert not any(tensor.any() for tensor in into.values())

    def test_what_has_no_dense_form_is_refused_first(self):
        _, adapter, frozen, tree = served()
        many = pf.route(adapter, frozen, pf.stack([tree, tree]), torch.tensor([0, 1]))
        into = {name: torch.zeros_like(tensor) for name, tensor in frozen.items()}
        with pytest.raises(RouteError):
            pf.merge(many, into=into)
        around = pf.bind(pf.bottleneck("0", rank=2), adapter.model)
        with pytest.raises(AddinError):
            pf.merge(around.apply(*around.init(0)), into=into)
        assert not any(tensor.any() for tensor in into.values())


ONE = torch.zeros(24, dtype=torch.float64)


def made_in_inference(*shape):
    with torch.inference_mode():
        return torch.zeros(*shape, dtype=torch.float64)


class TestGradients:
    def test_of_the_factors(self):
        _, adapter, frozen, tree = served()
        leaves = pf.map_leaves(lambda leaf: leaf.clone().requires_grad_(), tree)
        loss = lambda tree: pf.merge(adapter.apply(frozen, tree))["0.weight"].square().sum()
        value = loss(leaves)
        value.backward()
        grads = torch.func.grad(loss)(tree)
        for leaf, grad in zip(tree_leaves(leaves), tree_leaves(grads), strict=True):
            assert grad.any()
            assert same(leaf.grad, grad)
        _, slope = torch.func.jvp(loss, (tree,), (pf.map_leaves(torch.ones_like, tree),))
        assert same(slope, sum(grad.sum() for grad in tree_leaves(grads)))
        with torch.no_grad():
            assert same(loss(leaves), value.detach())

    def test_forward_mode_without_torch_func(self):
        _, adapter, frozen, tree = served()
        with torch.autograd.forward_ad.dual_level():
            dual = pf.map_leaves(lambda t: torch.autograd.forward_ad.make_dual(t, torch.ones_like(t)), tree)
            value = pf.merge(adapter.apply(frozen, dual))["0.weight"]
            assert torch.autograd.forward_ad.unpack_dual(value).tangent is not None

    def test_vmap(self):
        _, adapter, frozen, tree = served()
        trees = [pf.map_leaves(lambda leaf, k=k: leaf * k, tree) for k in (1, 2)]
        form = lambda tree: pf.merge(adapter.apply(frozen, tree))["0.weight"]
        both = torch.vmap(form)(pf.stack(trees))
        assert same(both, torch.stack([form(tree) for tree in trees]).detach())

    def test_meta_and_fake_tensors(self):
        matrix = Sum(Dense(randn(6, 4)), LowRank(randn(6, 2), randn(2, 4)))
        assert merged(operator(matrix.map(lambda t, n: t.to("meta")))).device.type == "meta"
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = matrix.map(lambda t, n: mode.from_tensor(t))
            assert type(merged(operator(fake))) is torch._subclasses.FakeTensor


class Peak(TorchDispatchMode):
    """The most bytes of storages that operators made and that live at once, apart from what was there before."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.largest = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = (torch.multiprocessing.reductions.StorageWeakRef(storage), storage.nbytes())
                self.largest = max(self.largest, storage.nbytes())
        self.live = {key: pair for key, pair in self.live.items() if not pair[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


@pytest.mark.parametrize("method", [pf.lora(".*", rank=4), pf.gift(".*", rank=4), pf.dora(".*", rank=4)])
def test_no_temporary_of_a_weights_size(monkeypatch, method):
    monkeypatch.setattr(rows, "CHUNK_BYTES", 2**14)
    net = nn.Sequential(*(nn.Linear(128, 256 if i % 2 else 128) for i in range(4))).bfloat16()
    adapter = pf.bind(method, pf.functionalize(net))
    frozen, tree = adapter.init(0)
    with torch.no_grad():
        weights = adapter.apply(frozen, tree)
        size = sum(value.shape.numel() * 2 for value in weights.values() if isinstance(value, Operator))
        few = 2**17  # a weight in float32 has as many bytes, or fewer by half
        into = {name: torch.empty_like(tensor) for name, tensor in frozen.items()}
        with Peak() as new:
            pf.merge(weights)
        with Peak() as given:
            pf.merge(weights, into=into)
        with Peak() as whole:
            for value in weights.values():
                if isinstance(value, Operator):
                    value.materialise()
    assert given.peak < few / 2, given.peak
    assert new.peak < size + few / 2, new.peak
    assert whole.peak > few  # the count sees a temporary where there is one


def test_the_base_is_untouched_and_memory_new():
    net, adapter, frozen, tree = served(dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in frozen.items()}
    leaves = [leaf.clone() for leaf in tree_leaves(tree)]
    value = pf.merge(adapter.apply(frozen, tree))["0.weight"]
    value.fill_(3.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen.items())
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(tree), leaves, strict=True))
    assert not any(parameter.eq(3.0).any() for parameter in net.parameters())

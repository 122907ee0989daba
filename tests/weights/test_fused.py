"""Fused products equal the composed ones: values, first and second gradients, tangents, maps; and what they keep."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import vmap
from torch.utils.checkpoint import checkpoint

import peft_func as pf
from peft_func.weights import fused
from peft_func.weights.branch import Branch
from peft_func.weights.fused import LowRankLinear, can_fuse
from peft_func.weights.graph import listening
from peft_func.weights.matrix import Dense, Diagonal, IdentityPlus, LowRank, Product, Sum
from tests.laws.test_nothing_dense import Watch
from tests.zoo import randn

GRAPHS = ["composed", "factored", "formed"]


def composed(x, dropped, W, bias, gain, A, B, scale, inside=False):
    branch = scale * ((x if dropped is None else dropped) @ A.T) @ B.T
    y = (x + branch) @ W.T if inside else branch + (x if W is None else x @ W.T)
    y = y if gain is None else y * gain
    return y if bias is None else y + bias


def operands(*, weight=True, bias=False, gain=False, dropped=False, inside=False, shape=(2, 3, 5)):
    """The tensors of a product, in the order of the Function; what is not wanted is None."""
    out = 4 if weight else shape[-1]
    return [
        randn(*shape),
        randn(*shape, seed=1) if dropped else None,
        randn(out, shape[-1], seed=2) if weight else None,
        randn(out, seed=3) if bias else None,
        randn(out, seed=4).abs() + 0.5 if gain else None,
        randn(2, shape[-1], seed=5),
        randn(shape[-1], 2, seed=6) / 4 if inside else randn(out, 2, seed=6),  # it goes through W, too
    ]


def trained(tensors):
    """Let everything but the matrix require a gradient; return those that do."""
    return [t.requires_grad_() for i, t in enumerate(tensors) if t is not None and i != 2]


def trained_pair(width, *, seed):
    return randn(width, 1, seed=seed).requires_grad_(), randn(1, width, seed=seed).requires_grad_()


def kinds():
    for formed, keeps, weight, bias, gain, dropped, inside in itertools.product([False, True], repeat=7):
        never_formed, around_a_weight = dropped or not weight or keeps or inside, bias or gain or inside
        if not (formed and never_formed) and (weight or not around_a_weight):
            yield formed, keeps, {"weight": weight, "bias": bias, "gain": gain, "dropped": dropped, "inside": inside}


@pytest.fixture(params=["narrow", "wide"])
def _ranks(request, monkeypatch):
    """Both ways to lay out the products, at the small ranks of the tests."""
    monkeypatch.setattr(fused, "WIDE", {"narrow": 32, "wide": 1}[request.param])


@pytest.mark.usefixtures("_ranks")
@pytest.mark.parametrize(("formed", "keeps", "kind"), list(kinds()))
class TestTheFunction:
    def call(self, formed, keeps, tensors, kind):
        y = LowRankLinear.apply(*tensors, 0.7, kind["inside"], formed, keeps)[0]
        return y.view(*tensors[0].shape[:-1], -1)

    def test_values_and_gradients_of_both_orders(self, formed, keeps, kind):
        tensors = operands(**kind)
        inputs = trained(tensors)
        results = []
        inside = kind["inside"]
        for function in (lambda: self.call(formed, keeps, tensors, kind), lambda: composed(*tensors, 0.7, inside)):
            y = function()
            once = torch.autograd.grad(function().sin().sum(), inputs)
            first = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
            results.append([y, *once, *first, *second])
        for ours, theirs in zip(*results, strict=True):
            assert ours.shape == theirs.shape
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)

    def test_each_gradient_alone(self, formed, keeps, kind):
        tensors = operands(**kind)
        for i, tensor in enumerate(tensors):
            if tensor is None or i == 2:
                continue
            tensor.requires_grad_()
            (ours,) = torch.autograd.grad(self.call(formed, keeps, tensors, kind).sin().sum(), [tensor])
            (theirs,) = torch.autograd.grad(composed(*tensors, 0.7, kind["inside"]).sin().sum(), [tensor])
            tensor.requires_grad_(False)
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)

    def test_forward_mode(self, formed, keeps, kind):
        tensors = operands(**kind)
        trained(tensors)
        with forward_ad.dual_level():
            duals = [
                None if t is None else forward_ad.make_dual(t, randn(*t.shape, seed=9 + i))
                for i, t in enumerate(tensors)
            ]
            ours = forward_ad.unpack_dual(self.call(formed, keeps, duals, kind)).tangent
            theirs = forward_ad.unpack_dual(composed(*duals, 0.7, kind["inside"])).tangent
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)

    def test_map(self, formed, keeps, kind):
        tensors = operands(**kind)
        A = randn(3, *tensors[5].shape, seed=8)
        mapped = vmap(lambda a: self.call(formed, keeps, [*tensors[:5], a, tensors[6]], kind))(A)
        wanted = [composed(*tensors[:5], a, tensors[6], 0.7, kind["inside"]) for a in A]
        assert torch.allclose(mapped, torch.stack(wanted), atol=1e-10)

    def test_a_batch_of_gradients(self, formed, keeps, kind):
        tensors = operands(**kind)
        inputs = trained(tensors)
        results = []
        for y in (self.call(formed, keeps, tensors, kind), composed(*tensors, 0.7, kind["inside"])):
            basis = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
            results.append(torch.autograd.grad(y, inputs, basis, is_grads_batched=True))
        for ours, theirs in zip(*results, strict=True):
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("_ranks")
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5)])
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("matrix", ["lora", "gift", "gift to more", "dora", "identity"])
def test_expressions_by_every_graph(shape, graph, matrix):
    out = {"identity": 5, "gift to more": 40}.get(matrix, 4)
    W, phi, psi = randn(out, 5), randn(5, 2, seed=1), randn(2, 5, seed=2)
    A, B, gain = randn(2, 5, seed=3), randn(out, 2, seed=4), randn(out, seed=5)
    bias, x = randn(out, seed=6), randn(*shape, seed=7)
    inputs = [t.requires_grad_() for t in (x, bias, *((A, B) if matrix in ("lora", "dora") else (phi, psi)))]
    expression, dense = {
        "lora": (Sum(Dense(W), LowRank(B, A, 0.7)), lambda: W + 0.7 * B @ A),
        "gift": (Product(Dense(W), IdentityPlus(LowRank(phi, psi, 0.7))), lambda: W + 0.7 * W @ phi @ psi),
        "gift to more": (Product(Dense(W), IdentityPlus(LowRank(phi, psi, 0.7))), lambda: W + 0.7 * W @ phi @ psi),
        "dora": (Product(Diagonal(gain), Sum(Dense(W), LowRank(B, A))), lambda: gain[:, None] * (W + B @ A)),
        "identity": (IdentityPlus(LowRank(phi, psi)), lambda: torch.eye(5).double() + phi @ psi),
    }[matrix]
    seen = []
    with pf.graph(graph), listening(lambda _, choice: seen.append(choice.absorbs)):
        y = expression.linear(x, bias)
    # W (phi psi) as (W phi) psi: always to form it, else where there are some rows, and not many columns.
    absorbs = "gift" in matrix and (graph == "formed" or (x.numel() > 5 and out == 4))
    assert seen == [absorbs]
    expected = x @ dense().T + bias
    assert y.shape == expected.shape
    assert torch.allclose(y, expected, rtol=0, atol=1e-10)
    ours = torch.autograd.grad(y.sin().sum(), inputs)
    theirs = torch.autograd.grad(expected.sin().sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-10)
        assert a.is_contiguous()


@pytest.mark.parametrize("trains", [False, True])
def test_slices_with_factors_of_their_own(trains):
    W, bias, x = randn(4, 5), randn(4), randn(3, 6, 5)
    A, B, phi = randn(3, 2, 5, seed=1), randn(3, 4, 2, seed=2), randn(3, 5, 2, seed=3)
    inputs = [t.requires_grad_(trains) for t in (x, A, B, phi)]
    low = fused.linear(x, W, bias, Branch(A, B, 0.7))
    gift = fused.input_side(x, W, bias, Branch(A, phi, 1.0))
    expected = [
        torch.stack([F.linear(x[i], W + 0.7 * B[i] @ A[i], bias) for i in range(3)]),
        torch.stack([F.linear(x[i], W + W @ phi[i] @ A[i], bias) for i in range(3)]),
    ]
    for ours, theirs in zip((low, gift), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)
    if trains:
        ours = torch.autograd.grad(low.sin().sum() + gift.sin().sum(), inputs)
        theirs = torch.autograd.grad(sum(y.sin().sum() for y in expected), inputs)
        assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(ours, theirs, strict=True))


def test_it_keeps_out_of_transforms_autocast_experts_and_mixed_bases():
    W, A, B, x = randn(4, 5), randn(2, 5), randn(4, 2), randn(3, 5)
    assert can_fuse(x, W, A, B)
    assert can_fuse(x, None, A, B)
    assert not can_fuse(x, W.float(), A, B)
    assert not can_fuse(x, W, A.float(), B)
    assert not can_fuse(x, W.expand(2, 4, 5), A, B)
    seen = []
    vmap(lambda a: seen.append(can_fuse(x, W, a, B)) or a)(A.expand(2, 2, 5))
    torch.func.grad(lambda a: seen.append(can_fuse(x, W, a, B)) or a.sum())(A)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen.append(can_fuse(x.float(), W.float(), A.float(), B.float()))
    assert seen == [False] * 3


@pytest.mark.usefixtures("_ranks")
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["lora", "gift", "dora"])
def test_half_precision_bases_with_float32_factors(graph, half, bias, kind):
    exact = [randn(32, 24), randn(16, 24, seed=1) / 5, randn(4, 24, seed=2) / 5, randn(16, 4, seed=3) / 2]
    exact[3] = randn(24, 4, seed=3) / 2 if kind == "gift" else exact[3]
    gain, b = randn(16, seed=4).abs() + 0.5, randn(16, seed=5) if bias else None

    def run(x, W, A, B, gain, b):
        x, A, B, gain = (t.detach().clone().requires_grad_() for t in (x, A, B, gain))
        low = LowRank(B, A, 0.5)
        matrix = Product(Dense(W), IdentityPlus(low)) if kind == "gift" else Sum(Dense(W), low)
        y = (Product(Diagonal(gain), matrix) if kind == "dora" else matrix).linear(x, b)
        inputs = [x, A, B, *([gain] if kind == "dora" else [])]
        return [y, *torch.autograd.grad((y.double() * randn(*y.shape, seed=8)).sum(), inputs)]

    x, W, A, B = exact
    wanted = run(x.to(half).double(), W.to(half).double(), A, B, gain, None if b is None else b.to(half).double())
    with pf.graph(graph):
        found = run(x.to(half), W.to(half), A.float(), B.float(), gain.float(), None if b is None else b.to(half))
    assert [t.dtype for t in found] == [half, half, *[torch.float32] * (len(found) - 2)]
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).abs().max() < 4 * torch.finfo(half).eps * theirs.abs().max()


class TestWhatIsBeforeTheGain:
    """DoRA takes it from its own output, unless that would be wrong."""

    def run(self, after=lambda y: y, gain=None, context=None):
        tensors = operands(bias=True, gain=True)
        tensors[4] = tensors[4] if gain is None else gain
        inputs = trained(tensors)
        y = LowRankLinear.apply(*tensors, 0.7, False, False, True)[0]
        ours = torch.autograd.grad(after(y).sin().sum(), inputs)
        theirs = torch.autograd.grad(after(composed(*tensors, 0.7).view(y.shape)).sin().sum(), inputs)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-10)

    def test_plainly(self):
        self.run()

    @pytest.mark.parametrize("after", [lambda y: y.relu_(), lambda y: y.mul_(3.0), lambda y: y[1:].zero_() + y[1:]])
    def test_after_the_model_wrote_to_the_output(self, after):
        self.run(after)

    @pytest.mark.parametrize("value", [0.0, 1e-12, -1e-3])
    def test_gains_near_zero(self, value):
        self.run(gain=torch.tensor([1.0, value, -2.0, 0.5], dtype=torch.float64))

    def test_under_hooks_for_saved_tensors(self):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            self.run()

    def test_backward_twice(self):
        tensors = operands(gain=True)
        inputs = trained(tensors)
        loss = LowRankLinear.apply(*tensors, 0.7, False, False, True)[0].sin().sum()
        first = torch.autograd.grad(loss, inputs, retain_graph=True)
        second = torch.autograd.grad(loss, inputs)
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(first, second, strict=True))

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpoints(self, reentrant):
        tensors = operands(gain=True, bias=True)
        inputs = trained(tensors)
        call = lambda x: LowRankLinear.apply(x, *tensors[1:], 0.7, False, False, True)[0].tanh()
        wanted = [t.grad for t in inputs] if call(tensors[0]).sum().backward() is None else None
        wanted = [g.clone() for g in wanted]
        for t in inputs:
            t.grad = None
        checkpoint(call, tensors[0], use_reentrant=reentrant).sum().backward()
        assert all(torch.allclose(t.grad, g, atol=1e-12) for t, g in zip(inputs, wanted, strict=True))


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_output_may_be_written_to(graph):
    # ReLU(inplace=True) behind an adapted layer, with a bias or without, in two dimensions or three.
    W, A, B = randn(4, 5), randn(2, 5, seed=1).requires_grad_(), randn(4, 2, seed=2).requires_grad_()
    for shape, bias in itertools.product([(3, 5), (2, 3, 5)], [None, randn(4)]):
        x = randn(*shape, seed=3).requires_grad_()
        with pf.graph(graph):
            y = Sum(Dense(W), LowRank(B, A)).linear(x, bias)
        ours = torch.autograd.grad(y.relu_().square().sum(), [x, A, B])
        theirs = torch.autograd.grad(F.linear(x, W + B @ A, bias).relu().square().sum(), [x, A, B])
        assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_frozen_weight_and_the_input_are_not_written(graph):
    tensors = W, B, A, x = randn(4, 5), randn(4, 2), randn(2, 5), randn(3, 5)
    B.requires_grad_()
    x.requires_grad_()
    before = [t.clone() for t in tensors]
    with pf.graph(graph):
        for matrix in (Sum(Dense(W), LowRank(B, A)), Product(Dense(W), IdentityPlus(LowRank(A.T, A)))):
            y = matrix.linear(x)
            dy = torch.ones_like(y)
            y.backward(dy)
            assert torch.equal(dy, torch.ones_like(y))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("graph", ["composed", "factored"])
def test_the_input_is_saved_once_for_all_who_read_it(graph):
    x = randn(8, 16).requires_grad_()
    h = x * 2
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    places = [(randn(16, 16, seed=i), *trained_pair(16, seed=i)) for i in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), pf.graph(graph):
        sum(Sum(Dense(W), LowRank(B, A)).linear(h).sum() for W, B, A in places)
    ours = {t.untyped_storage().data_ptr() for place in places for t in place}
    kept = sum(size for pointer, size in saved.items() if pointer not in ours)
    # h, and u with one column for each of the three; nothing as wide as an output.
    assert h.untyped_storage().data_ptr() in saved
    assert kept <= h.numel() * 8 + 3 * 8 * 8


@pytest.mark.parametrize("graph", GRAPHS)
def test_no_gradient_of_the_size_of_the_weight(graph):
    W, A, B = randn(53, 37), randn(3, 37).requires_grad_(), randn(53, 3).requires_grad_()
    x = randn(29, 37).requires_grad_()
    with pf.graph(graph):
        y = Sum(Dense(W), LowRank(B, A)).linear(x)
    with Watch([W]) as watch:
        y.square().sum().backward()
    assert len(watch.made) == (1 if graph == "formed" else 0)  # the sum itself, formed again


def nodes(y):
    names, pending = set(), [y.grad_fn]
    while pending:
        node = pending.pop()
        names.add(node.name())
        pending += [parent for parent, _ in node.next_functions if parent is not None]
    return names


def test_small_products_and_those_of_a_frozen_factor_stay_with_plain_operators():
    W, x, A, B = randn(4, 5), randn(3, 5).requires_grad_(), randn(2, 5).requires_grad_(), randn(4, 2).requires_grad_()
    assert "LowRankLinearBackward" not in nodes(Sum(Dense(W), LowRank(B, A)).linear(x))
    with pf.graph("factored"):
        assert "LowRankLinearBackward" in nodes(Sum(Dense(W), LowRank(B, A)).linear(x))
        # LoRA-FA: x is not kept, and it is no function of A.
        assert "LowRankLinearBackward" not in nodes(Sum(Dense(W), LowRank(B, A.detach())).linear(x))
    big = randn(64, 512).requires_grad_()
    W, A, B = randn(512, 512), randn(2, 512).requires_grad_(), randn(512, 2).requires_grad_()
    assert "LowRankLinearBackward" in nodes(Sum(Dense(W), LowRank(B, A)).linear(big))


def test_a_trained_base_gets_its_gradient():
    shapes = ((4, 5), (2, 5), (4, 2), (5, 2), (3, 5))
    W, A, B, phi, x = (randn(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes))
    low, gift = Sum(Dense(W), LowRank(B, A)), Product(Dense(W), IdentityPlus(LowRank(phi, A)))
    for graph, (matrix, factor) in itertools.product(GRAPHS, ((low, B), (gift, phi))):
        with pf.graph(graph):
            ours = torch.autograd.grad(matrix.linear(x).sin().sum(), [W, A, factor, x])
        update = B @ A if factor is B else W @ phi @ A
        theirs = torch.autograd.grad((x @ (W + update).T).sin().sum(), [W, A, factor, x])
        assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("graph", ["factored", "formed"])
def test_a_step_on_fake_and_meta_tensors(graph):
    from torch._subclasses.fake_tensor import FakeTensorMode

    adapter = pf.bind(pf.dora(".*", rank=2), pf.functionalize(torch.nn.Linear(5, 4)))
    frozen, tree = adapter.init(0)
    for mode in (FakeTensorMode(allow_non_fake_inputs=True), torch.device("meta")):
        with mode, pf.graph(graph):
            if isinstance(mode, torch.device):
                frozen, tree = (pf.map_leaves(lambda t: t.to("meta"), part) for part in (frozen, tree))
            leaves = pf.map_leaves(lambda t: t.detach().requires_grad_(), tree)
            adapter.model(adapter.apply(frozen, leaves), torch.empty(3, 5)).sum().backward()
        assert all(leaf.grad.shape == leaf.shape for _, leaf in pf.leaves(leaves))

"""A carrier answers as the weight would, is formed where nothing is known about a function, and never leaks."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peft_func as pf
from tests.zoo import ids, randn


class Uses(nn.Module):
    """A module that does something of the test's with its weight."""

    def __init__(self, use, shape=(4, 6)):
        super().__init__()
        self.weight = nn.Parameter(randn(*shape))
        self.use = use

    def forward(self, x):
        return self.use(self.weight, x)


def run(use, x=None, shape=(4, 6), policy="error", method=None):
    """Run a use on a structured weight and on the merged one; return both."""
    model = pf.functionalize(Uses(use, shape))
    adapter = pf.bind(method or pf.lora("weight", rank=2, alpha=3), model)
    frozen, tree = adapter.init(0)
    tree = pf.map_leaves(lambda t: t + randn(*t.shape), tree)
    weights = adapter.apply(frozen, tree)
    x = randn(5, 6, seed=3) if x is None else x
    with pf.densify(policy):
        return model(weights, x), model(pf.merge(weights), x)


STRUCTURED = {
    "linear": lambda w, x: F.linear(x, w),
    "linear of a keyword": lambda w, x: F.linear(input=x, weight=w, bias=None),
    "matmul": lambda w, x: torch.matmul(x, w.t()),
    "@ and T": lambda w, x: x @ w.T,
    "mT": lambda w, x: x @ w.mT,
    "on the left": lambda w, x: w @ x.T,
    "on the left of a vector": lambda w, x: w @ x[0],
    "vector on the left": lambda w, x: x[0] @ w.t(),
    "mm": lambda w, x: torch.mm(x, w.transpose(0, 1)),
    "addmm": lambda w, x: torch.addmm(torch.ones(4, dtype=x.dtype), x, w.t()),
    "addmm method": lambda w, x: torch.ones(4, dtype=x.dtype).addmm(x, w.t()),
    "transposed linear": lambda w, x: F.linear(F.linear(x, w), w.t()),
    "rows": lambda w, x: x @ w[1:3].T,
    "lookup": lambda w, x: w[torch.tensor([[0, 3], [1, 1]])],
    "embedding": lambda w, x: F.embedding(torch.tensor([[0, 3], [1, 1]]), w),
    "split": lambda w, x: torch.cat([F.linear(x, part) for part in w.split([1, 3])], -1),
    "split by size": lambda w, x: torch.cat([F.linear(x, part) for part in torch.split(w, 3)], -1),
    "chunk": lambda w, x: torch.cat([F.linear(x, part) for part in w.chunk(2, dim=0)], -1),
    "to its own dtype": lambda w, x: F.linear(x, w.to(x.dtype).to(x.device)),
    "contiguous": lambda w, x: F.linear(x, w.contiguous()),
    "detached": lambda w, x: F.linear(x, w.detach()),
    "data": lambda w, x: F.linear(x, w.data),
}

FORMED = {
    "einsum": lambda w, x: torch.einsum("oi,bi->bo", w, x),
    "elementwise": lambda w, x: F.linear(x, w * 2),
    "norm": lambda w, x: w.norm(dim=1),
    "cast": lambda w, x: w.to(torch.float32),
    "columns": lambda w, x: x[:, :3] @ w[:, 1:4].T,
    "stack": lambda w, x: torch.stack([w, w]),
    "view": lambda w, x: w.view(-1),
    "weight times weight": lambda w, x: w @ w.T,
    "addmm with beta": lambda w, x: torch.addmm(torch.ones(4, dtype=x.dtype), x, w.t(), beta=2),
    "sum over a list": lambda w, x: sum([w, w]),
}


@pytest.mark.parametrize("use", STRUCTURED.values(), ids=STRUCTURED.keys())
@pytest.mark.parametrize("method", [pf.lora("weight", rank=2), pf.gift("weight", rank=2), pf.dora("weight", rank=1)])
def test_structured_uses_are_right_and_form_nothing(use, method):
    y, expected = run(use, method=method)
    assert y.shape == expected.shape
    assert torch.allclose(y, expected, atol=1e-10)
    assert type(y) is Tensor


@pytest.mark.parametrize("use", FORMED.values(), ids=FORMED.keys())
def test_other_uses_form_the_weight_and_are_right(use):
    y, expected = run(use, policy="allow")
    assert torch.allclose(y, expected, atol=1e-10)
    with pytest.raises(pf.DensifyError, match="'weight' is formed"):
        run(use)
    with pytest.warns(pf.DensifyWarning, match="no rule for structured weights"):
        run(use, policy="warn")


def test_the_hint_comes_once_for_each_place():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            run(FORMED["norm"], policy="warn")
    assert len(caught) == 1


def test_experts_by_index_bmm_and_grouped_products():
    def by_index(w, x):
        return torch.stack([F.linear(x, w[e]) for e in (0, 2)]), F.linear(x, w[torch.tensor(1)])

    for use in (
        lambda w, x: torch.cat([part.flatten() for part in by_index(w, x)]),
        lambda w, x: torch.bmm(x.expand(3, 5, 6), w.transpose(1, 2)),
        lambda w, x: torch.baddbmm(torch.ones(3, 5, 4, dtype=x.dtype), x.expand(3, 5, 6), w.mT),
        lambda w, x: x @ w.transpose(-1, -2),
        lambda w, x: torch.bmm(w[torch.tensor([2, 0, 1, 1, 2])], x.unsqueeze(-1)),
    ):
        for method in (pf.lora("weight", rank=2), pf.gift("weight", rank=2), pf.ia3("weight", side="input")):
            y, expected = run(use, shape=(3, 4, 6), method=method)
            assert torch.allclose(y, expected, atol=1e-10)


def test_grouped_mm():
    def use(w, x):
        return F.grouped_mm(x, w.transpose(1, 2), offs=torch.tensor([2, 2, 7], dtype=torch.int32))

    net = Uses(use, shape=(3, 16, 8)).float()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.lora("weight", rank=2), model)
    frozen, tree = adapter.init(0)
    weights = adapter.apply(frozen, pf.map_leaves(lambda t: t + 0.3, tree))
    x = randn(7, 8).float()
    with pf.densify("error"):
        y = model(weights, x)
    assert torch.allclose(y, model(pf.merge(weights), x), atol=1e-4)


def test_questions_are_answered_as_by_the_weight():
    seen = {}

    def use(w, x):
        seen or seen.update(
            shape=w.shape, size=w.size(0), dim=w.dim(), numel=w.numel(), dtype=w.dtype, device=w.device, length=len(w),
            cuda=w.is_cuda, meta=w.is_meta, floating=w.is_floating_point(), grad=w.requires_grad, text=f"{w}",
            tensor=isinstance(w, Tensor), contiguous=w.is_contiguous(), leaf=w.is_leaf, cpu=w.is_cpu,
        )  # fmt: skip
        return x

    run(use)
    assert seen.pop("text") == "Carrier(Operator('weight', shape=(4, 6), dtype=torch.float64))"
    assert seen == dict(  # noqa: C408
        shape=(4, 6), size=4, dim=2, numel=24, dtype=torch.float64, device=torch.device("cpu"), length=4, cuda=False,
        meta=False, floating=True, grad=False, tensor=True, contiguous=True, leaf=False, cpu=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.add_(1),
        lambda w: w.mul_(2),
        lambda w: w.data.clamp_(-1, 1),
        lambda w: w.detach().zero_(),
        lambda w: w.__setitem__(0, 0.0),
        lambda w: torch.add(w, 1, out=w),
        lambda w: nn.init.zeros_(w),
        lambda w: w.copy_(torch.zeros(4, 6)),
        lambda w: setattr(w, "data", torch.zeros(4, 6)),
        lambda w: w.data_ptr(),
    ],
)
def test_writing_to_an_effective_weight_is_a_leak(write):
    with pytest.raises(pf.LeakError, match="'weight'"):
        run(lambda w, x: (write(w), x)[1], policy="allow")


class Square(torch.autograd.Function):
    """A product of a user's own, as extensions have them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, w):
        return x @ w.t()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return None, grad.t() @ x


def test_an_autograd_function_fed_the_carrier_is_an_error_not_a_lost_gradient():
    model = pf.functionalize(Uses(lambda w, x: Square.apply(x, w)))
    adapter = pf.bind(pf.lora("weight", rank=2), model)
    frozen, tree = adapter.init(0)
    x = randn(5, 6)

    def loss(tree):
        return model(adapter.apply(frozen, tree), x).square().sum()

    with pf.densify("allow"):
        with torch.no_grad():
            assert torch.isfinite(loss(tree))  # without gradients there is none to lose
        leaves = pf.map_leaves(lambda t: t.clone().requires_grad_(), tree)
        with pytest.raises(RuntimeError, match="meta"):
            loss(leaves).backward()
        plain = torch.func.grad(lambda tree: model(pf.merge(adapter.apply(frozen, tree)), x).square().sum())(tree)
        grads = torch.func.grad(loss)(tree)  # here the weight is formed for the function
        for leaf in ("A", "B"):
            assert torch.allclose(grads["lora"]["weight"][leaf], plain["lora"]["weight"][leaf], atol=1e-10)


def test_a_module_that_returns_its_weight_returns_a_tensor():
    y, expected = run(lambda w, x: {"w": w, "both": (w, x)}["both"], policy="error")
    assert type(y[0]) is Tensor
    assert torch.allclose(y[0], expected[0])


def test_padding_rows_get_no_gradient():
    def grads(merge):
        model = pf.functionalize(Uses(lambda w, x: F.embedding(x, w, padding_idx=-3)))
        adapter = pf.bind(pf.lora("weight", rank=2), model)
        frozen, tree = adapter.init(0)
        tree = pf.map_leaves(lambda t: (t + randn(*t.shape)).requires_grad_(), tree)
        weights = adapter.apply(frozen, tree)
        model(pf.merge(weights) if merge else weights, ids(3, 5, high=4)).square().sum().backward()
        return tree["lora"]["weight"]["A"].grad, tree["lora"]["weight"]["B"].grad

    for structured, dense in zip(grads(False), grads(True), strict=True):
        assert torch.allclose(structured, dense, atol=1e-10)
    assert not grads(False)[1][1].any()


def test_autocast_runs_in_half_precision_and_merges_in_full():
    net = nn.Linear(8, 4)
    model = pf.functionalize(net)
    adapter = pf.bind(pf.lora("weight", rank=2), model)
    frozen, tree = adapter.init(0)
    weights = adapter.apply(frozen, pf.map_leaves(lambda t: t + 0.1, tree))
    x = randn(3, 8).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(weights, x).dtype is torch.bfloat16
        inside = pf.merge(weights)["weight"]
    assert torch.equal(inside, pf.merge(weights)["weight"])


def test_a_half_precision_base_with_float32_factors():
    net = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2)).to(torch.bfloat16)
    model = pf.functionalize(net)
    for method in (pf.lora(".*", rank=2), pf.gift(".*", rank=2), pf.dora(".*", rank=1), pf.ia3(".*")):
        adapter = pf.bind(method, model)
        frozen, tree = adapter.init(0)
        for leaf in torch.utils._pytree.tree_leaves(tree):
            assert leaf.dtype is torch.float32
        with pf.densify("error"):
            y = model(adapter.apply(frozen, tree), randn(3, 8).to(torch.bfloat16))
        assert y.dtype is torch.bfloat16


@pytest.mark.parametrize("around", ["grad", "jvp", "vmap", "jacrev", "inference", "fake", "no_grad"])
def test_a_shape_that_is_first_met_inside_of_something_is_of_use_outside(around):
    from torch._subclasses.fake_tensor import FakeTensorMode

    from peft_func.weights.carrier import _shell

    _shell.cache_clear()
    model = pf.functionalize(nn.Linear(5, 4).double())
    adapter = pf.bind(pf.lora("weight", rank=2), model)
    frozen, tree = adapter.init(0)
    tree = pf.map_leaves(lambda t: t + 0.1, tree)

    def call(tree):
        return model(adapter.apply(frozen, tree), torch.ones(3, 5).double()).square().sum()

    expected = (pf.merge(adapter.apply(frozen, tree))["weight"].sum(1) + frozen["bias"]).square().sum() * 3
    match around:
        case "grad" | "jacrev":
            getattr(torch.func, around)(call)(tree)
        case "jvp":
            torch.func.jvp(call, (tree,), (tree,))
        case "vmap":
            torch.vmap(call)(pf.stack([tree, tree]))
        case "fake":
            with FakeTensorMode(allow_non_fake_inputs=True):
                call(tree)
        case _:
            with torch.inference_mode() if around == "inference" else torch.no_grad():
                call(tree)
    leaves = pf.map_leaves(lambda t: t.detach().clone().requires_grad_(), tree)
    loss = call(leaves)
    loss.backward()
    assert torch.allclose(loss, expected)
    assert all(leaf.grad is not None for _, leaf in pf.leaves(leaves))
    assert torch.allclose(torch.func.grad(call)(tree)["lora"]["weight"]["A"], leaves["lora"]["weight"]["A"].grad)

"""Bases in half precision, with float32 adapters, with and without autocast: dtypes, gradients, merges, memory."""

import contextlib
import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import peft_func as pf
from tests.zoo import ids, randn

HALVES = [torch.bfloat16, torch.float16]
DTYPES = pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
AUTOCAST = pytest.mark.parametrize("autocast", [None, *HALVES], ids=["plain", "autocast-bf16", "autocast-fp16"])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(23, 37), nn.Tanh(), nn.Linear(37, 37), nn.Tanh(), nn.Linear(37, 11))


def conv() -> nn.Module:
    layers = nn.Conv2d(3, 13, 3, padding=1), nn.Tanh(), nn.Conv2d(13, 7, 3), nn.Tanh(), nn.AvgPool2d(4), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(7, 11))


def words() -> nn.Module:
    return nn.Sequential(nn.Embedding(41, 19), nn.Linear(19, 11))


INPUTS = {mlp: randn(29, 23), conv: randn(29, 3, 6, 6), words: ids(29, 3, high=41)}
SHARE = {"rank": 3, "share": "none"}
CASES = {
    "lora": (mlp, pf.lora(".*", rank=3, alpha=5)),
    "gift": (mlp, pf.gift(".*", **SHARE)),
    "dora": (mlp, pf.dora(".*", rank=3, alpha=5)),
    "ia3": (mlp, pf.ia3(".*")),
    "magnitude": (mlp, pf.magnitude(".*")),
    "svdiff": (mlp, pf.svdiff(".*")),
    "wegeft": (mlp, pf.wegeft(".*", **SHARE)),
    "output-side wegeft": (mlp, pf.wegeft(".*", side="output", **SHARE)),
    "train": (mlp, pf.train(".*")),
    "chain": (mlp, pf.chain(pf.lora("0|2", rank=3), pf.gift("2", rank=2, share="none"), pf.train(r"4\..*"))),
    "conv lora": (conv, pf.lora(".*", rank=3, alpha=5)),
    "conv gift": (conv, pf.gift(".*", **SHARE)),
    "conv dora": (conv, pf.dora(".*", rank=3)),
    "conv ia3": (conv, pf.ia3(".*")),
    "embedding lora": (words, pf.lora(".*", rank=3, alpha=5)),
    "embedding gift": (words, pf.gift(".*", **SHARE)),
    "embedding dora": (words, pf.dora(".*", rank=3)),
}
EVERY = pytest.mark.parametrize("name", CASES)


def _moved(t: Tensor) -> Tensor:
    return t + 0.15 * ((1 + t.abs()) * torch.arange(1, t.numel() + 1).view_as(t).cos()).to(t.dtype)


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


class Run:
    """A case on a base of a dtype, and the same values in float64."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        build, self.method = CASES[name]
        torch.manual_seed(0)
        self.net, self.dtype, self.x = build().to(dtype), dtype, cast(INPUTS[build], dtype)
        self.model = pf.functionalize(self.net)
        self.adapter = pf.bind(self.method, self.model)
        self.frozen, tree = self.adapter.init(0)
        self.tree = pf.map_leaves(_moved, tree)
        self.wide = pf.functionalize(copy.deepcopy(self.net).double())
        self.target = randn(*self.net(self.x).shape, seed=5)

    def leaves(self) -> dict[str, Tensor]:
        """Return fresh leaves."""
        return pf.map_leaves(lambda t: t.clone().requires_grad_(), self.tree)

    def gradients(self, autocast: torch.dtype | None = None) -> list[Tensor]:
        """Return those of all leaves."""
        leaves = self.leaves()
        with on(autocast):
            y = self.model(self.adapter.apply(self.frozen, leaves), self.x)
        return torch.autograd.grad((y.double() * self.target).sum(), [t for _, t in pf.leaves(leaves)])

    def exact(self, leave_out: int | None = None) -> list[Tensor]:
        """Return them in float64, with one of the leaves at its first value if so wanted."""
        adapter = pf.bind(self.method, self.wide)
        leaves = pf.map_leaves(lambda t: t.double().requires_grad_(), self.tree)
        flat = [t for _, t in pf.leaves(leaves)]
        if leave_out is not None:
            first = [t for _, t in pf.leaves(self.adapter.init(0)[1])][leave_out]
            flat[leave_out].data.copy_(first)
        frozen = {name: t.double() for name, t in self.frozen.items()}
        y = self.wide(adapter.apply(frozen, leaves), cast(self.x, torch.float64))
        return torch.autograd.grad((y * self.target).sum(), flat)


def on(autocast: torch.dtype | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if autocast is None else torch.autocast("cpu", autocast)


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=["bf16", "fp16", "fp32"])
@AUTOCAST
@EVERY
def test_the_output_has_the_dtype_of_the_base_models(name, dtype, autocast):
    run = Run(name, dtype)
    with on(autocast):
        expected = run.net(run.x)
        y = run.model(run.adapter.apply(run.frozen, run.tree), run.x)
    assert y.dtype is expected.dtype
    assert not torch.equal(y, expected)


@DTYPES
@AUTOCAST
@EVERY
def test_gradients_are_float32_and_near_those_in_float64(name, dtype, autocast):
    run = Run(name, dtype)
    found, exact = run.gradients(autocast), run.exact()
    trained = {"train"} if name in ("train", "chain") else set()
    for (keys, _), grad in zip(pf.leaves(run.tree), found, strict=True):
        assert grad.dtype is (dtype if keys[0] in trained else torch.float32)
    coarse = max(torch.finfo(each).eps for each in (dtype, autocast) if each is not None)
    assert max(errors(found, exact)) < 4 * coarse, errors(found, exact)


@EVERY
def test_that_tolerance_sees_a_leaf_that_does_not_act(name):
    run = Run(name, torch.bfloat16)
    exact = run.exact()
    for i, (keys, _) in enumerate(pf.leaves(run.tree)):
        if keys[-1] != "4.bias":  # the bias at the end changes no gradient
            assert max(errors(run.exact(leave_out=i), exact)) > 6 * torch.finfo(torch.bfloat16).eps, keys


@DTYPES
@EVERY
def test_a_merge_is_rounded_once_also_under_autocast(name, dtype):
    run = Run(name, dtype)
    wide = pf.functionalize(copy.deepcopy(run.net).float())
    frozen = {key: t.float() for key, t in run.frozen.items()}
    exact = pf.merge(pf.bind(run.method, wide).apply(frozen, pf.map_leaves(lambda t: t.float(), run.tree)))
    for autocast in (None, *HALVES):
        with on(autocast):
            merged = pf.merge(run.adapter.apply(run.frozen, run.tree))
        for key, tensor in merged.items():
            assert tensor.dtype is dtype
            assert torch.equal(tensor, exact[key].to(dtype)), (key, autocast)


@DTYPES
def test_a_merge_by_hand(dtype):
    run = Run("lora", dtype)
    merged = pf.merge(run.adapter.apply(run.frozen, run.tree))
    for key, leaf in run.tree["lora"].items():
        assert torch.equal(merged[key], (run.model.params[key].float() + leaf["B"] @ leaf["A"] * (5 / 3)).to(dtype))


class Wide(TorchDispatchMode):
    """Collects the operators that make a float32 tensor of as many values as a base weight has, and of its extents."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.shapes = {self.kind(w.shape) for w in weights}
        self.made: list[str] = []

    @staticmethod
    def kind(shape: torch.Size) -> frozenset[int]:
        return frozenset((shape[0], math.prod(shape[1:]))) if len(shape) > 1 else frozenset()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            is_wide = isinstance(tensor, Tensor) and tensor.dtype in (torch.float32, torch.float64)
            if is_wide and tensor.device.type != "meta" and self.kind(tensor.shape) in self.shapes:
                self.made.append(f"{func}{list(tensor.shape)}")
        return out


@DTYPES
@AUTOCAST
@EVERY
def test_a_step_makes_no_float32_copy_of_a_base_weight(name, dtype, autocast):
    run = Run(name, dtype)
    leaves = run.leaves()
    run.gradients(autocast)  # what is computed once for a base (svdiff's decomposition) is not part of a step
    with Wide([w for w in run.model.params.values() if w.dim() > 1]) as watch:
        with on(autocast):
            y = run.model(run.adapter.apply(run.frozen, leaves), run.x)
        y.float().sum().backward()
    assert watch.made == []


def test_the_watch_sees_one():
    run = Run("lora", torch.bfloat16)
    with Wide([w for w in run.model.params.values() if w.dim() > 1]) as watch:
        run.model.params["2.weight"].float()
    assert len(watch.made) == 1


@EVERY
def test_an_optimizer_has_a_state_for_what_trains_and_for_nothing_else(name):
    run = Run(name, torch.bfloat16)
    leaves = run.leaves()
    named = {".".join(keys): leaf for keys, leaf in pf.leaves(leaves)}
    optimizer = torch.optim.AdamW(named.items(), lr=1e-3)
    run.model(run.adapter.apply(run.frozen, leaves), run.x).sum().backward()
    optimizer.step()
    assert {id(p) for p in optimizer.state} == {id(leaf) for leaf in named.values()}
    assert sorted(optimizer.param_groups[0]["param_names"]) == sorted(named)
    for leaf, state in optimizer.state.items():
        assert state["exp_avg"].dtype is state["exp_avg_sq"].dtype is leaf.dtype
        assert state["exp_avg"].shape == leaf.shape

    state = pf.optimizer(torch.optim.AdamW, lr=1e-3).init(run.tree)
    for key in ("exp_avg", "exp_avg_sq"):
        assert {".".join(keys): t.dtype for keys, t in pf.leaves(state[key])} == {k: t.dtype for k, t in named.items()}
    per_value = sum(t.numel() for key in ("exp_avg", "exp_avg_sq") for _, t in pf.leaves(state[key]))
    assert per_value == 2 * sum(leaf.numel() for leaf in named.values())

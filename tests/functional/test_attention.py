"""Attention inside transforms: no slow loop, no warning, the values and gradients of plain torch."""

import itertools
from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.functional import jacobian
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import peft_func as pf
from peft_func.functional import attention
from peft_func.functional.attention import attention_in_transforms
from peft_func.functional.fused_attention import fused_attention
from tests.zoo import randn


class Attend(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.query = nn.Linear(8, 8)
        self.options = options

    def forward(self, x):
        heads = lambda t: t.unflatten(-1, (2, 4)).transpose(-2, -3)
        return F.scaled_dot_product_attention(heads(self.query(x)), heads(x), heads(x), **self.options)


MASK = torch.tensor([[True, False, True], [True, True, True], [False, True, True]])
EMPTY = torch.tensor([[False, False, False], [True, True, True], [False, True, True]])
OPTIONS = [
    {},
    {"is_causal": True},
    {"attn_mask": MASK},
    {"attn_mask": EMPTY},
    {"attn_mask": MASK.double()},
    {"scale": 0.3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "causal", "mask", "a row of nothing", "bias", "scale"])
def test_vmap_is_the_loop_and_forward_mode_is_reverse_mode(options):
    model, x = pf.functionalize(Attend(**options).double()), randn(5, 3, 8)
    adapter = pf.bind(pf.lora("query", rank=2), model)
    frozen, tree = adapter.init(0)
    members = [pf.map_leaves(lambda t, i=i: t + 0.1 * i, tree) for i in range(1, 4)]
    call = lambda t: model(adapter.apply(frozen, t), x)
    loss = lambda t: call(t).square().sum()
    stacked = pf.stack(members)
    assert torch.allclose(torch.vmap(call)(stacked), torch.stack([call(t) for t in members]), atol=1e-12)
    grads = pf.unstack(torch.vmap(torch.func.grad(loss))(stacked))
    for member, slopes in zip(members, grads, strict=True):
        alone = torch.func.grad(loss)(member)
        for (_, a), (_, b) in zip(pf.leaves(slopes), pf.leaves(alone), strict=True):
            assert torch.allclose(a, b, atol=1e-10)
        _, slope = torch.func.jvp(loss, (member,), (pf.map_leaves(torch.ones_like, member),))
        assert torch.allclose(slope, sum(leaf.sum() for _, leaf in pf.leaves(alone)), atol=1e-10)
    hessian = torch.func.hessian(loss)(members[0])
    block = hessian["lora"]["query.weight"]["B"]["lora"]["query.weight"]["B"].reshape(16, 16)
    assert torch.allclose(block, block.T, atol=1e-10)


def test_outside_of_transforms_the_fused_kernel_runs():
    model, x = pf.functionalize(Attend().double()), randn(5, 3, 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(model.params, x)
    names = {event.key for event in profile.key_averages()}
    assert any("flash_attention" in name for name in names)


KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
KERNEL_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["fused", "composed"])
def route(request, monkeypatch):
    monkeypatch.setattr(attention, "_SMALL", 0 if request.param == "fused" else 10**9)
    return request.param


@pytest.fixture
def fused(monkeypatch):
    monkeypatch.setattr(attention, "_SMALL", 0)


def ours(*args, **kwargs):
    with attention_in_transforms():
        return F.scaled_dot_product_attention(*args, **kwargs)


def written_out(query, key, value, mask=None):
    scores = query @ key.mT / query.shape[-1] ** 0.5 + (0 if mask is None else mask)
    return scores.softmax(-1) @ value


def qkv(*lead, q=3, k=5, heads=2, dtype=torch.float64):
    return tuple(randn(*lead, 2, heads, length, 4, seed=seed).to(dtype) for seed, length in enumerate((q, k, k)))


def masks(*lead):
    keep = randn(*lead, 2, 2, 3, 5, seed=9) > -0.5
    keep[..., 0, 1, 0, :] = False  # a row that sees nothing
    at = lambda *index: keep[(..., *index)]
    full = slice(None)
    every = {
        "none": None,
        "4": keep,
        "batch only": at(full, slice(1), full, full),
        "heads only": at(slice(1), full, full, full),
        "keys only": at(full, slice(1), slice(1), full),
        "3": at(0, full, full, full),
        "3, one head": at(0, slice(1), full, full),
        "2": at(0, 1, full, full),
        "2, keys only": at(0, 0, slice(1), full),
    }
    added = torch.zeros(keep.shape, dtype=torch.float64).masked_fill(~keep, float("-inf"))
    return every | {"4, added": added + randn(*lead, 2, 2, 3, 5, seed=4), "2, float32": randn(*lead, 3, 5).float()}


MASKS = list(masks())


def in_turn(function, in_dims, *args):
    size = next(arg.shape[dim] for arg, dim in zip(args, in_dims, strict=True) if dim is not None)
    pick = lambda arg, dim, i: arg if dim is None else arg.select(dim, i)
    return torch.stack([function(*(pick(*pair, i) for pair in zip(args, in_dims, strict=True))) for i in range(size)])


def close(ours, theirs, atol=1e-10):
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
    else:
        for a, b in zip(ours, theirs, strict=True):
            close(a, b, atol)


@pytest.mark.parametrize("mapped", [m for m in itertools.product([0, None], repeat=4) if m != (None,) * 4])
@pytest.mark.parametrize("kind", MASKS)
def test_what_is_mapped_and_what_is_not(kind, mapped, fused):
    if kind == "none" and mapped[3] == 0:
        return
    args = [t[0] if dim is None else t for t, dim in zip(qkv(3), mapped[:3], strict=True)]
    mask = masks(*([] if mapped[3] is None else [3]))[kind]
    given = (*args, mask)
    seed = randn(3, 2, 2, 3, 4, seed=7)
    leaves = [t.clone().requires_grad_() for t in args]
    theirs = in_turn(F.scaled_dot_product_attention, mapped, *leaves, mask)
    with Count() as count:
        values = vmap(ours, in_dims=mapped)(*given)
        loss = lambda *three: (vmap(ours, in_dims=mapped)(*three, mask) * seed).sum()
        of_all = grad(loss, (0, 1, 2))(*args)
    close(values, theirs.detach())
    close(of_all, torch.autograd.grad((theirs * seed).sum(), leaves))
    assert count.calls[KERNEL] == 2
    assert count.calls[KERNEL_BACKWARD] == 1
    alone = lambda q, k, v, m, s: (F.scaled_dot_product_attention(q, k, v, m) * s).sum()
    gradient = grad(lambda q, k, v, m, s: (ours(q, k, v, m) * s).sum(), (0, 1, 2))
    with Count() as count:
        each = vmap(gradient, in_dims=(*mapped, 0))(*given, seed)
    assert (count.calls[KERNEL], count.calls[KERNEL_BACKWARD]) == (1, 1)
    for i in range(3):
        pick = [t if dim is None else t[i] for t, dim in zip(given, mapped, strict=True)]
        leaves = [t.clone().requires_grad_() for t in pick[:3]]
        close([g[i] for g in each], torch.autograd.grad(alone(*leaves, pick[3], seed[i]), leaves))


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}, {"enable_gqa": True}])
def test_nested_vmap_other_axes_and_chunks(options, route):
    heads = 4 if options.get("enable_gqa") else 2
    query, key, value = qkv(3, 2, heads=heads)[0], *qkv(2)[1:]
    key, value = key.movedim(0, 2), value.movedim(0, -1)
    call = lambda q, k, v: ours(q, k, v, **options)
    theirs = torch.stack(
        [
            torch.stack(
                [F.scaled_dot_product_attention(query[i, j], key[:, :, j], value[..., j], **options) for j in range(2)]
            )
            for i in range(3)
        ]
    )
    inner = vmap(call, in_dims=(0, 2, -1))
    for outer in (vmap(inner, in_dims=(0, None, None)), vmap(inner, in_dims=(0, None, None), chunk_size=2)):
        with Count() as count:
            close(outer(query, key, value), theirs)
        assert bool(count.calls[KERNEL]) == (route == "fused")
    slope = vmap(vmap(grad(lambda q, k, v: call(q, k, v).sin().sum(), 2), (0, 2, -1)), (0, None, None))
    leaf = value.clone().requires_grad_()
    for i in range(3):
        plain = sum(
            F.scaled_dot_product_attention(query[i, j], key[:, :, j], leaf[..., j], **options).sin().sum()
            for j in range(2)
        )
        close(slope(query, key, value)[i].movedim(0, -1), torch.autograd.grad(plain, leaf)[0])


@pytest.mark.parametrize("mapped", [(0, None, None), (None, 0, None), (None, None, 0)])
def test_a_batch_of_one(mapped, fused):
    args = [t[0, :1] if dim is None else t[:, :1] for t, dim in zip(qkv(3), mapped, strict=True)]
    mask = randn(1, 2, 3, 5)
    close(
        vmap(ours, in_dims=(*mapped, None))(*args, mask),
        in_turn(F.scaled_dot_product_attention, (*mapped, None), *args, mask),
    )


def test_forward_mode_over_a_backward_whose_forward_was_fused(fused):
    query, key, value = qkv(3)
    seed = randn(2, 2, 3, 4, seed=6)
    pull = lambda q, k, v: vjp(ours, q, k, v)[1]
    with Count() as count:
        slopes = vmap(lambda *qkv: jvp(pull(*qkv), (seed,), (seed,))[1])(query, key, value)
    assert count.calls[KERNEL] == 1
    close(slopes, vmap(lambda *qkv: pull(*qkv)(seed))(query, key, value))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("options", [{}, {"chunk_size": 5}, {"chunk_size": 1}])
def test_jacobians(kind, options, route):
    mask = masks()[kind]
    call = lambda q, k, v: ours(q, k, v, mask)
    given = qkv()
    theirs = jacobian(lambda *qkv: F.scaled_dot_product_attention(*qkv, mask), given)
    close(jacrev(call, (0, 1, 2), **options)(*given), theirs)
    close(jacfwd(call, (0, 1, 2))(*given), theirs)
    stacked = qkv(2)
    each = vmap(jacrev(call, (0, 1, 2)))(*stacked)
    for i in range(2):
        plain = lambda *qkv: F.scaled_dot_product_attention(*qkv, mask)
        close([g[i] for g in each], jacobian(plain, tuple(t[i] for t in stacked)))


def test_a_jacobian_of_one_tensor_that_is_query_key_and_value():
    x, y = randn(2, 1, 3, 2), randn(2, 1, 3, 2, seed=1)
    close(jacrev(lambda x: ours(x, x, x))(x), jacobian(lambda x: F.scaled_dot_product_attention(x, x, x), x))
    some = lambda x: ours(x, y, x.detach())
    close(jacrev(some)(x), jacfwd(some)(x))


@pytest.mark.parametrize("masked", [False, True])
def test_second_derivatives(masked, route):
    given = qkv()
    mask = randn(3, 5, seed=8) if masked else None
    loss = lambda q, k, v: ours(q, k, v, mask).sin().sum()
    theirs = torch.autograd.functional.hessian(lambda *qkv: written_out(*qkv, mask).sin().sum(), given)
    close(hessian(loss, (0, 1, 2))(*given), theirs)
    close(jacrev(jacrev(loss, (0, 1, 2)), (0, 1, 2))(*given), theirs)
    close(jacfwd(grad(loss, (0, 1, 2)), (0, 1, 2))(*given), theirs)
    # Forward mode, and another level of grad, over a backward whose forward is done.
    _, pull = vjp(loss, *given)
    one = torch.ones((), dtype=torch.float64)
    close(jvp(pull, (one,), (one,))[1], pull(one))
    close(grad(lambda s: sum(g.sum() for g in pull(s)))(one), sum(g.sum() for g in pull(one)))
    # vjp of vjp, each for three members.
    stacked, seeds = qkv(3), [t.cos() for t in qkv(3)]
    product = lambda q, k, v, *seeds: vjp(grad(loss, (0, 1, 2)), q, k, v)[1](seeds)
    each = vmap(product)(*stacked, *seeds)
    for i in range(3):
        leaves = [t[i].clone().requires_grad_() for t in stacked]
        first = torch.autograd.grad(written_out(*leaves, mask).sin().sum(), leaves, create_graph=True)
        close([g[i] for g in each], torch.autograd.grad(first, leaves, [s[i] for s in seeds]))


def test_a_row_of_nothing_has_finite_second_derivatives(route):
    product = lambda q, k, v: grad(lambda q: grad(lambda q: ours(q, k, v, EMPTY).sin().sum())(q).square().sum())(q)
    query, key, value = qkv(3, k=3)
    assert vmap(product)(query, key, value).isfinite().all()


def test_a_gradient_under_autograd_can_be_differentiated():
    given = qkv()
    leaves = [t.clone().requires_grad_() for t in given]
    inner = grad(lambda q, k, v: ours(q, k, v).sin().sum(), (0, 1, 2))(*leaves)
    ours_twice = torch.autograd.grad(sum(g.square().sum() for g in inner), leaves)
    first = torch.autograd.grad(written_out(*leaves).sin().sum(), leaves, create_graph=True)
    close(ours_twice, torch.autograd.grad(sum(g.square().sum() for g in first), leaves))


def test_a_gradient_under_autograd_of_one_by_another():
    query, key, value = qkv()
    leaf = query.clone().requires_grad_()
    inner = grad(lambda v: ours(leaf, key, v).sin().sum())(value)
    last = value.clone().requires_grad_()
    (first,) = torch.autograd.grad(written_out(leaf, key, last).sin().sum(), last, create_graph=True)
    close(*(torch.autograd.grad(g.square().sum(), leaf) for g in (inner, first)))


def test_one_backward_is_mapped_and_then_not():
    given, seeds = qkv(), randn(3, 2, 2, 3, 4, seed=5)
    for some in ((0, 1, 2), (2,), (0, 1)):
        call = lambda *tensors, some=some: ours(*(tensors[some.index(i)] if i in some else given[i] for i in range(3)))
        _, pull = vjp(call, *(given[i] for i in some))
        each = vmap(pull)(seeds)
        for i in range(3):
            close([g[i] for g in each], pull(seeds[i]))
        close(vmap(pull)(seeds), each)
        close(vmap(vmap(pull))(seeds[None]), [g[None] for g in each])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_function_itself(masked, causal):
    given = [t[:1, :1].clone().requires_grad_() for t in qkv()]
    mask = randn(1, 1, 1, 5) if masked else None
    call = lambda *qkv: fused_attention(*qkv, mask, causal, None)
    assert gradcheck(call, given, check_batched_grad=True)
    assert gradgradcheck(call, given)
    if not causal:
        close(call(*given), written_out(*given, mask))


@pytest.mark.parametrize("lengths", [(3, 5), (5, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_causal_with_and_without_a_mask(lengths, masked, route):
    stacked = qkv(3, q=lengths[0], k=lengths[1])
    mask = randn(*lengths, seed=3) if masked else None
    call = lambda q, k, v: ours(q, k, v, mask, is_causal=True)
    theirs = in_turn(lambda *qkv: F.scaled_dot_product_attention(*qkv, mask, is_causal=True), (0, 0, 0), *stacked)
    close(vmap(call)(*stacked), theirs)
    close(vmap(jacrev(call))(*stacked), vmap(jacfwd(call))(*stacked))


def test_a_mask_that_learns(fused):
    query, key, value = qkv(3)
    mask = randn(2, 3, 5)
    leaf = mask.clone().requires_grad_()
    theirs = torch.stack([F.scaled_dot_product_attention(q, k, v, leaf) for q, k, v in zip(query, key, value)])  # noqa: B905
    expected = torch.autograd.grad(theirs.sin().sum(), leaf)[0]
    with Count() as count:
        of_all = grad(lambda m: vmap(lambda q, k, v: ours(q, k, v, m))(query, key, value).sin().sum())(mask)
        of_each = vmap(lambda q, k, v: grad(lambda m: ours(q, k, v, m).sin().sum())(mask))(query, key, value)
        vmap(lambda q, k, v: ours(q, k, v, leaf))(query, key, value).sin().sum().backward()
    assert not count.calls[KERNEL]
    close(of_all, expected)
    close(of_each.sum(0), expected)
    close(leaf.grad, expected)
    close(
        jacrev(lambda m: ours(query[0], key[0], value[0], m))(mask),
        jacfwd(lambda m: ours(query[0], key[0], value[0], m))(mask),
    )


ODD = {
    "three dimensions": lambda q, k, v: ours(q[0], k[0], v[0]),
    "a batch that broadcasts": lambda q, k, v: ours(q, k[:1], v[:1]),
    "heads that broadcast": lambda q, k, v: ours(q, k[:, :1], v[:, :1]),
    "narrow values": lambda q, k, v: ours(q, k, v[..., :2]),
    "columns": lambda q, k, v: ours(q.mT.contiguous().mT, k.mT.contiguous().mT, v.mT.contiguous().mT),
    "one column expanded": lambda q, k, v: ours(q[..., :1].expand(2, 2, 3, 4), k, v),
    "no keys": lambda q, k, v: ours(q, k[:, :, :0], v[:, :, :0]),
    "no queries": lambda q, k, v: ours(q[:, :, :0], k, v),
    "no batch": lambda q, k, v: ours(q[:0], k[:0], v[:0]),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_the_kernel_cannot_take(kind, route):
    stacked = qkv(3)
    theirs = in_turn(ODD[kind], (0, 0, 0), *stacked)  # no transform is active
    close(vmap(ODD[kind])(*stacked), theirs)
    close(vmap(jacrev(ODD[kind]))(*stacked), vmap(jacfwd(ODD[kind]))(*stacked))
    single = [t[0] for t in stacked]
    close(jacrev(ODD[kind])(*single), jacfwd(ODD[kind])(*single))
    slopes = grad(lambda *qkv: ODD[kind](*qkv).sin().sum(), (0, 1, 2))
    forward = jvp(slopes, tuple(single), tuple(single))[1]
    close(vjp(slopes, *single)[1](tuple(single)), forward)  # the second derivative is symmetric


def test_a_vmap_over_nothing(route):
    nothing = [t[:0] for t in qkv(3)]
    assert vmap(ours)(*nothing).shape == (0, 2, 2, 3, 4)
    assert vmap(grad(lambda q, k, v: ours(q, k, v).sum()))(*nothing).shape == (0, 2, 2, 3, 4)


def test_dropout_drops(fused):
    query, key, value = qkv(3)
    call = lambda q, k, v: ours(q, k, v, dropout_p=0.5)
    assert not torch.equal(vmap(call, randomness="different")(query, key, value), vmap(ours)(query, key, value))
    with pytest.raises(RuntimeError, match="random"):
        vmap(call)(query, key, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", [None, "bool", "float32"])
def test_other_dtypes(dtype, mask, route):
    stacked = qkv(3, dtype=dtype)
    mask = {None: None, "bool": masks()["3"], "float32": randn(3, 5).float()}[mask]
    theirs = in_turn(lambda *qkv: F.scaled_dot_product_attention(*qkv, mask), (0, 0, 0), *stacked)
    atol = 1e-5 if dtype == torch.float32 else 0.03
    close(vmap(lambda *qkv: ours(*qkv, mask))(*stacked), theirs, atol)
    slopes = vmap(grad(lambda *qkv: ours(*qkv, mask).sin().sum()))(*stacked)
    leaves = [t.clone().requires_grad_() for t in stacked]
    loss = in_turn(lambda *qkv: F.scaled_dot_product_attention(*qkv, mask), (0, 0, 0), *leaves).sin().sum()
    close(slopes, torch.autograd.grad(loss, leaves[0])[0], atol)


def test_autocast_lowers_what_torch_lowers(route):
    stacked = [t.float() for t in qkv(3)]
    with torch.autocast("cpu", torch.bfloat16):
        for mask in (None, randn(3, 5).float(), masks()["2"]):
            theirs = in_turn(lambda *qkv, m=mask: F.scaled_dot_product_attention(*qkv, m), (0, 0, 0), *stacked)
            close(vmap(lambda *qkv, m=mask: ours(*qkv, m))(*stacked), theirs, 0.02)
            call = lambda *qkv, m=mask: ours(*qkv, m)
            single = tuple(t[0] for t in stacked)
            slope = jacrev(call)(*single)
            assert slope.dtype == torch.float32
            query, *rest = single
            plain = partial(F.scaled_dot_product_attention, key=rest[0], value=rest[1], attn_mask=mask)
            close(slope, jacobian(plain, query), 0.02)
        assert vmap(ours)(*qkv(3)).dtype == torch.float64


def test_plain_grad_runs_the_kernels_of_torch():
    query, key, value = qkv()
    loss = lambda q, k, v: ours(q, k, v).sin().sum()
    with Count() as count:
        slopes = grad(loss, (0, 1, 2))(query, key, value)
    assert (count.calls[KERNEL], count.calls[KERNEL_BACKWARD]) == (1, 1)
    leaves = [t.clone().requires_grad_() for t in (query, key, value)]
    close(slopes, torch.autograd.grad(F.scaled_dot_product_attention(*leaves).sin().sum(), leaves))


def test_a_jacobian_of_a_model(route):
    model, x = pf.functionalize(Attend(is_causal=True).double()), randn(2, 3, 8)
    adapter = pf.bind(pf.lora("query", rank=1), model)
    frozen, tree = adapter.init(0)
    tree = pf.map_leaves(lambda t: t + 0.1, tree)
    call = lambda t: model(adapter.apply(frozen, t), x)
    for (_, a), (_, b) in zip(pf.leaves(jacrev(call)(tree)), pf.leaves(jacfwd(call)(tree)), strict=True):
        close(a, b)


def test_large_work_is_fused_and_small_work_is_composed():
    small, large = [randn(2, 1, 1, 4, 4)] * 3, [randn(4, 1, 2, 128, 4)] * 3
    with Count() as count:
        vmap(ours)(*small)
    assert not count.calls[KERNEL]
    with Count() as count:
        vmap(ours)(*large)
    assert count.calls[KERNEL] == 1

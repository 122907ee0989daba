"""`g (x W^T + s (x A^T) B^T) + b` with one base product, and never a gradient of the size of W.

The branch may also be inside, `g (x + s (x A^T) B^T) W^T + b`; and there are three ways to compute either:

    composed   plain operators, the branch accumulated into the base product
    factored   an autograd Function over the same products
    formed     an autograd Function that forms V = W + s B A in forward, and again in backward: x V^T

Which is used is chosen for each product (`peft_func.weights.graph`). The Functions save x itself, which the query, key
and value of a layer share, and u = x A^T where it is small. With v = (g dy) B, backward is that of Hu et al. (arXiv
2106.09685): dB = s (g dy)^T u, dA = s v^T x, dx = (g dy) W + s v A. With the branch inside, it is that of a branch
without W, once (g dy) W has taken the place of dy.

Products with a narrow side take longer where that side comes last and has strides; so a B of few columns is copied to
`[rank, out]`, and dB is `(u^T dy)^T`.

All this is for plain eager mode: functorch and compile get the composed form of `peft_func.weights.matrix`, which they
map, differentiate and fuse on their own; autocast too, which leaves in-place products alone.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_func.weights.branch import Branch, accumulated_slices, composed, gained, narrow
from peft_func.weights.eager import in_transform
from peft_func.weights.gain import Alias, gain_gradient, may_alias
from peft_func.weights.graph import PLAIN, SMALL, Choice, Graph, Shape, attended, choose

# The rank from which products are not narrow any more.
WIDE = 32


def can_fuse(x: Tensor, W: Tensor | None, A: Tensor, B: Tensor) -> bool:
    """Whether the product may be fused: one base matrix, fitting dtypes, outside of transforms and autocast."""
    return (
        (W is None or (W.dim() == 2 and x.dtype == W.dtype))
        and (A.dim() == B.dim() == 2 or (x.dim() == 3 and A.dim() == B.dim() == 3 and len(A) == len(B) == len(x)))
        and A.dtype == B.dtype
        and not in_transform()
        and not under_autocast(x.device)
    )


def under_autocast(device: torch.device) -> bool:
    """Whether autocast is on for a device; on meta, where torch refuses the question, it is not."""
    # Most calls are under none, for any device, which is a cheaper question.
    return torch._C._is_any_autocast_enabled() and device.type != "meta" and torch.is_autocast_enabled(device.type)


def linear(x: Tensor, W: Tensor, bias: Tensor | None, branch: Branch, gain: Tensor | None = None) -> Tensor:
    """Return `gain * (x W^T + branch) + bias`, `[*, in]` to `[*, out]`, where `can_fuse` says so.

    Args:
        x: `[*, in]`.
        W: `[out, in]`.
        bias: `[out]`, or None.
        branch: the low-rank part.
        gain: `[out]`, or None.
    """
    if branch.A.dim() == 3:
        return gained(accumulated_slices(x, W, bias if gain is None else None, branch), gain, bias)
    return _run(x, W, bias, branch, gain, _choice(x, W, branch))


def input_side(x: Tensor, W: Tensor | None, bias: Tensor | None, branch: Branch) -> Tensor:
    """Return `(x + branch) W^T + bias`, where `can_fuse` says so; without W, that is x + branch."""
    if branch.A.dim() == 3:
        y = accumulated_slices(x, None, None, branch)
        return y if W is None else F.linear(y, W, bias)
    choice = _choice(x, W, branch, input_side=True)
    if W is not None:
        branch = branch._replace(B=torch.mm(W, branch.B)) if choice.absorbs else branch._replace(inside=True)
    return _run(x, W, bias, branch, None, choice)


def _choice(x: Tensor, W: Tensor | None, branch: Branch, *, input_side: bool = False) -> Choice:
    A, B = branch.A, branch.B
    outputs = (B if W is None else W).shape[0]
    if x.numel() * outputs < SMALL and not attended():
        return PLAIN
    grad = torch.is_grad_enabled()
    shape = Shape(
        tokens=x.numel() // A.shape[1],
        inputs=A.shape[1],
        outputs=outputs,
        rank=A.shape[0],
        trains=grad and (A.requires_grad or B.requires_grad),
        needs_input=grad and x.requires_grad,
        may_form=W is not None and branch.dropped is None and W.dtype == A.dtype and A.dtype.itemsize >= 4,
        # Where A is frozen (LoRA-FA), autograd itself need not keep x; the function has no gradient of W.
        may_fuse=grad and A.requires_grad and not (W is not None and W.requires_grad),
        input_side=input_side and W is not None,
    )
    return choose(shape)


def _run(
    x: Tensor, W: Tensor | None, bias: Tensor | None, branch: Branch, gain: Tensor | None, choice: Choice
) -> Tensor:
    A, B, scale, dropped, inside = branch
    formed = choice.graph is Graph.FORMED
    if choice.fuses:
        y: Tensor = _fused(x, dropped, W, bias, gain, A, B, scale, inside, formed, choice.keeps)[0]
    else:
        y = gained(composed(x, W, bias if gain is None else None, branch, formed=formed), gain, bias)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


class LowRankLinear(torch.autograd.Function):
    """The factored and the formed graph: y `[tokens, out]`, and what is kept for backward: u, and y before the gain.

    What is before the gain is as wide as y. It is not kept where it can be computed from y, which the next operator of
    a model mostly keeps in any case. Such an alias would keep its memory under hooks for saved tensors (checkpoints
    among them), and is of no use once the model has written to y: see `peft_func.weights.gain`.
    """

    @staticmethod
    def forward(
        x: Tensor, dropped: Tensor | None, W: Tensor | None, bias: Tensor | None, gain: Tensor | None,
        A: Tensor, B: Tensor, scale: float, inside: bool, formed: bool, keeps: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """Compute y."""
        x = x.reshape(-1, A.shape[1])
        alias = gain is None or may_alias(x, bias)
        inner, kept = bias if gain is None else None, None
        if formed and alias:
            return F.linear(x, _formed(W, A, B, scale, gain), bias), None, None
        if formed:
            y = F.linear(x, _formed(W, A, B, scale, None), inner)
        else:
            u = narrow(x if dropped is None else dropped.reshape(x.shape), A)
            if W is None or inside:
                y = _plus(x, u, _turned(B), scale, fresh=False)
                y = y if W is None else F.linear(y, W, inner)
            else:
                y = _plus(F.linear(x, W, inner), u, _turned(B), scale, fresh=True)
            kept = u if keeps else None
        if gain is None:
            return y, kept, None
        before = None if alias else y.clone()
        if bias is None or gain.dtype != y.dtype:
            y.mul_(gain)
            return y if bias is None else y.add_(bias), kept, before
        return torch.addcmul(bias, y, gain, out=y), kept, before

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep what backward needs."""
        x, dropped, W, bias, gain, A, B, ctx.scale, ctx.inside, ctx.formed, _ = inputs
        y, *kept = output
        ctx.mark_non_differentiable(*(tensor for tensor in kept if tensor is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, dropped, W, bias, gain, A, B, *kept)
        ctx.save_for_forward(x, dropped, W, bias, gain, A, B)
        ctx.output = Alias(y) if gain is not None and kept[1] is None else None

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        """Return the gradients, by the factors."""
        if dy is None:
            return (None,) * 11
        x, dropped, W, bias, gain, A, B, u, before = ctx.saved_tensors
        wants, scale = ctx.needs_input_grad, ctx.scale
        z = (x if dropped is None else dropped).reshape(-1, A.shape[1])
        dx = d_dropped = dA = dB = d_bias = d_gain = None
        if wants[3]:
            d_bias = dy.sum(0)
        if wants[4]:
            branch = Branch(A, B, scale, dropped, ctx.inside)
            again = functools.partial(composed, x, W, None, branch)
            d_gain, ctx.output = gain_gradient(dy, gain, bias, before, ctx.output, again), None
        fresh = W is not None
        if ctx.inside:
            dy, W, gain = _through(dy, W, gain), None, None
            fresh = not torch.is_grad_enabled()  # a graph of this backward keeps it
        wide = dy.to(A.dtype)
        if wants[5] or wants[1] or (wants[0] and not ctx.formed):
            v = torch.mm(wide, _turned(B if gain is None else B * gain.unsqueeze(1).to(B.dtype)).t())
        if wants[5]:
            dA = torch.mm(v.t(), z.to(A.dtype)) * scale
        if wants[6]:
            # A graph of this backward needs u as a function of x and A.
            u = narrow(z, A) if u is None or torch.is_grad_enabled() else u
            dB = torch.mm(u.t(), wide).t().contiguous() if _is_narrow(B) else torch.mm(wide.t(), u)
            dB = dB * (scale if gain is None else scale * gain.unsqueeze(1).to(dB.dtype))
        if wants[0] and ctx.formed:
            dx = torch.mm(dy, _formed(W, A, B, scale, gain)).view(x.shape)
        elif wants[0]:
            dx = _through(dy, W, gain)
            dx = (dx if dropped is not None else _plus(dx, v, A, scale, fresh=fresh)).view(x.shape)
        if wants[1]:
            d_dropped = (torch.mm(v, A) * scale).to(dropped.dtype).view(x.shape)
        return dx, d_dropped, None, d_bias, d_gain, dA, dB, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Return the tangent of y, which is linear in each of its inputs."""
        x, dropped, W, _, gain, A, B = ctx.saved_tensors
        d_x, d_dropped, d_W, d_bias, d_gain, d_A, d_B, *_ = tangents
        flat = (-1, A.shape[1])
        z, d_z = (x, d_x) if dropped is None else (dropped, d_dropped)
        branch = Branch(A, B, ctx.scale, dropped, ctx.inside)
        through = (lambda t: t) if W is None else functools.partial(F.linear, weight=W)
        terms = [] if d_x is None else [through(d_x.reshape(flat))]
        if d_W is not None:
            terms.append(F.linear(composed(x, None, None, branch) if ctx.inside else x.reshape(flat), d_W))
        for z_, A_, B_ in ((d_z, A, B), (z, d_A, B), (z, A, d_B)):
            if z_ is not None and A_ is not None and B_ is not None:
                term = (F.linear(narrow(z_.reshape(flat), A_), B_) * ctx.scale).to(x.dtype)
                terms.append(through(term) if ctx.inside else term)
        dy = sum(terms) if gain is None else sum(terms) * gain
        if d_gain is not None:
            dy = dy + composed(x, W, None, branch) * d_gain
        dy = dy if d_bias is None else dy + d_bias
        if not isinstance(dy, Tensor):
            dy = x.new_zeros(z.reshape(flat).shape[0], (W if ctx.inside else B).shape[0])
        return dy.to(x.dtype), None, None

    @staticmethod
    def vmap(_: Any, in_dims: Any, *args: Any) -> Any:
        """Map the composed form."""
        return (torch.vmap(_unfused, in_dims)(*args), None, None), (0, None, None)


_fused: Callable[..., Any] = LowRankLinear.apply


def _unfused(
    x: Tensor, dropped: Tensor | None, W: Tensor | None, bias: Tensor | None, gain: Tensor | None,
    A: Tensor, B: Tensor, scale: float, inside: bool, *_: Any,
) -> Tensor:  # fmt: skip
    y = composed(x, W, bias if gain is None else None, Branch(A, B, scale, dropped, inside), in_place=False)
    return gained(y, gain, bias)


def _through(dy: Tensor, W: Tensor | None, gain: Tensor | None) -> Tensor:
    """Return `(gain dy) W`, the gradient of what the matrix acts on."""
    dy = dy if gain is None else (dy * gain).to(dy.dtype)
    return dy if W is None else torch.mm(dy, W)


def _is_narrow(B: Tensor) -> bool:
    return B.shape[1] < WIDE


def _turned(B: Tensor) -> Tensor:
    """Return `B^T`, without strides if it is narrow."""
    return B.t().contiguous() if _is_narrow(B) else B.t()


def _plus(y: Tensor, u: Tensor, right: Tensor, scale: float, *, fresh: bool) -> Tensor:
    """Return `y + s u right`, into y if nobody else has it."""
    if y.dtype != u.dtype:
        product = torch.mm(u, right) * scale
        return y.add_(product) if fresh else (y + product).to(y.dtype)
    return y.addmm_(u, right, alpha=scale) if fresh else torch.addmm(y, u, right, alpha=scale)


def _formed(W: Any, A: Tensor, B: Tensor, scale: float, gain: Tensor | None) -> Tensor:
    V = torch.addmm(W, B, A, alpha=scale)
    return V if gain is None else V.mul_(gain.unsqueeze(1))

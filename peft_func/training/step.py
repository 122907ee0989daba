"""One step of training as one pure function: loss, gradient, clipping and update."""

import contextlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from peft_func.ensemble.training import clip_members
from peft_func.errors import OptionError, TreeError
from peft_func.training.gradient import ValueAndGrad, value_and_grad
from peft_func.training.optimizer import Optimizer
from peft_func.trees.paths import Tree, leaves, map_leaves
from peft_func.trees.stack import count_stacked
from peft_func.weights.eager import in_transform


class FunctionalOptimizer(Protocol):
    """What optax, torchopt and `pf.optimizer` agree on."""

    @property
    def init(self) -> Callable[..., Any]:
        """`(params) -> state`."""

    @property
    def update(self) -> Callable[..., tuple[Any, Any]]:
        """`(grads, state, params=...) -> (what to add, new state)`."""


class Stepped(NamedTuple):
    """What a step gives.

    Attributes:
        tree: the new tree.
        state: the new state of the optimizer.
        value: the loss before the step; `(loss, aux)` with `has_aux`.
    """

    tree: Tree
    state: Any
    value: Any


def step(
    loss: Callable[..., Any] | None,
    optimizer: Optimizer | FunctionalOptimizer,
    *,
    clip_norm: float | Tensor | None = None,
    has_aux: bool = False,
    accumulate: int = 1,
    members: bool = False,
    grads: ValueAndGrad | None = None,
) -> Callable[..., Stepped]:
    """Tie loss, gradient, clipping and update into one pure function `(tree, state, *args) -> (tree, state, value)`.

    Args:
        loss: `(tree, *args) -> scalar`, or `(scalar, aux)` with `has_aux`; None if `grads` is given.
        optimizer: of `pf.optimizer`, or a functional one such as `torchopt.adamw(1e-3)`; it is told `inplace=False`.
        clip_norm: the largest 2-norm of the gradient, as in `torch.nn.utils.clip_grad_norm_`; of each member's own
            with `members`, where it may be a tensor `[K]`.
        has_aux: whether the loss gives a second value, which comes back in `value`.
        accumulate: every tensor among the arguments is cut along its first axis into so many equal parts, whose
            gradients are averaged: the memory of one part, and the gradient of the whole for a loss that is a mean.
        members: whether the tree is a stacked one: the loss gives one for each member, `[K]`, and every member is
            trained as if alone.
        grads: `(tree, *args) -> (gradients, value)` in place of a loss, such as one of `pf.member_grads`.

    Returns:
        A function that gives `(tree, state, value)`, by name too, and writes nothing of its input. Gradients are by
        autograd, or by `torch.func.grad` inside its transforms.

    Raises:
        OptionError: options that do not go together, or an optimizer that would mix members.
        TreeError: a loss of another shape, or one that does not depend on the tree.

    Example:
        >>> import torch, peft_func as pf
        >>> model = pf.functionalize(torch.nn.Linear(4, 3))
        >>> adapter = pf.bind(pf.lora("weight", rank=2), model)
        >>> frozen, tree = adapter.init(0)
        >>> def loss(tree, x, y):
        ...     return torch.nn.functional.cross_entropy(model(adapter.apply(frozen, tree), x), y)
        >>> adamw = pf.optimizer(torch.optim.AdamW, lr=1e-2)
        >>> step, state = pf.step(loss, adamw, clip_norm=1.0), adamw.init(tree)
        >>> x, y, values = torch.eye(4), torch.tensor([0, 1, 2, 0]), []
        >>> for _ in range(30):
        ...     tree, state, value = step(tree, state, x, y)
        ...     values.append(float(value))
        >>> values[-1] < values[0]
        True
    """
    for name in ("init", "update"):
        if not callable(getattr(optimizer, name, None)):
            raise OptionError(
                f"step takes a functional optimizer with init and update, not {_named(optimizer)}; write "
                "pf.optimizer(torch.optim.AdamW, lr=1e-3)"
            )
    if members and isinstance(optimizer, Optimizer) and not optimizer.elementwise:
        raise OptionError(
            f"{optimizer.cls.__name__} has statistics of whole tensors, which would mix members: step them one by one "
            "(pf.unstack), or take one that works entry by entry, such as torch.optim.AdamW"
        )
    if (loss is None) == (grads is None) or (grads is not None and has_aux):
        raise OptionError("step takes a loss, or grads= and neither a loss nor has_aux")
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise OptionError(f"accumulate={accumulate!r}; it is a whole number of parts, 1 or more")
    _check_norm(clip_norm, members=members)
    grads_of = grads if loss is None else value_and_grad(loss, has_aux=has_aux, members=members)
    assert grads_of is not None
    update = _updating(optimizer)
    if accumulate > 1:
        grads_of = _accumulated(grads_of, accumulate, has_aux=has_aux)

    def run(tree: Mapping[str, Any], state: Any, *args: Any) -> Stepped:
        if members and loss is None:
            count_stacked(tree)
        found, value = grads_of(tree, *args)
        if clip_norm is not None:
            found = clip_members(found, clip_norm)[0] if members else clipped(found, clip_norm)
        new, new_state = update(found, state, tree)
        return Stepped(new, new_state, value)

    return run


def clipped(grads: Mapping[str, Any], max_norm: float | Tensor) -> Tree:
    """Scale a whole gradient down to a 2-norm, as `torch.nn.utils.clip_grad_norm_` does, into a new tree."""
    norms = [torch.linalg.vector_norm(leaf) for _, leaf in leaves(grads)]
    norm = torch.linalg.vector_norm(torch.stack([each.to(norms[0].device) for each in norms]))
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return map_leaves(lambda leaf: leaf * factor.to(leaf.device, leaf.dtype), grads)


def _updating(optimizer: Optimizer | FunctionalOptimizer) -> Callable[..., tuple[Tree, Any]]:
    """Return `(grads, state, tree) -> (new tree, new state)` of either."""
    if isinstance(optimizer, Optimizer):
        exact: Callable[..., tuple[Tree, Any]] = optimizer.step
        return exact
    # torchopt's default is inplace=True, which writes into the state that the caller still holds.
    known = inspect.signature(optimizer.update).parameters.values()
    takes = any(parameter.name == "inplace" or parameter.kind is parameter.VAR_KEYWORD for parameter in known)
    extra = {"inplace": False} if takes else {}

    def run(grads: Tree, state: Any, tree: Mapping[str, Any]) -> tuple[Tree, Any]:
        # A graph from step to step would grow for ever; inside a transform the gradient through the step is wanted.
        with contextlib.nullcontext() if in_transform() else torch.no_grad():
            updates, new = optimizer.update(grads, state, params=tree, **extra)
            return map_leaves(torch.add, tree, updates), new

    return run


def _accumulated(grads_of: ValueAndGrad, count: int, *, has_aux: bool) -> ValueAndGrad:
    """Average gradients and losses over equal parts of the arguments; what else the loss gives comes as a list."""

    def run(tree: Mapping[str, Any], *args: Any) -> tuple[Tree, Any]:
        sizes = [leaf.shape[:1] for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
        if not sizes or any(not size or size[0] % count for size in sizes):
            raise TreeError(
                f"accumulate={count} cuts every tensor among the arguments into {count} equal parts along its first "
                f"axis; the axes are {[list(size) for size in sizes]}"
            )
        total: Tree | None = None
        losses, others = [], []
        for number in range(count):
            found, value = grads_of(tree, *_part(args, number, count))
            total = found if total is None else map_leaves(torch.add, total, found)
            losses.append(value[0] if has_aux else value)
            others.append(value[1] if has_aux else None)
        assert total is not None
        loss = torch.stack(losses).mean(0)
        return map_leaves(lambda leaf: leaf / count, total), (loss, others) if has_aux else loss

    return run


def _part(args: Any, number: int, count: int) -> Any:
    return pytree.tree_map_only(Tensor, lambda leaf: leaf.chunk(count)[number], args)


def _check_norm(norm: Any, *, members: bool) -> None:
    if isinstance(norm, Tensor) and (not members or norm.dim() != 1):
        raise OptionError(f"clip_norm is a tensor {list(norm.shape)}; only members have one each, [K]")
    number = isinstance(norm, int | float) and not isinstance(norm, bool) and norm > 0
    if norm is not None and not isinstance(norm, Tensor) and not number:
        raise OptionError(f"clip_norm={norm!r}; it is a number above 0")


def _named(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"

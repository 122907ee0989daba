"""The value and the gradient of a loss over a tree, and what a loss must be."""

from collections.abc import Callable, Mapping
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor

from peft_func.errors import TreeError
from peft_func.functional.gradient import gradient_of
from peft_func.trees.paths import Tree, leaves
from peft_func.trees.stack import count_stacked

ValueAndGrad = Callable[..., tuple[Tree, Any]]
"""`(tree, *args) -> (gradients, value)`."""


def value_and_grad(loss: Callable[..., Any], *, has_aux: bool = False, members: bool = False) -> ValueAndGrad:
    """Return a function for the gradient and the value of a loss over a tree.

    Args:
        loss: `(tree, *args) -> scalar`, or `(scalar, aux)`; one loss for each member, `[K]`, with `members`.
        has_aux: whether the loss gives a second value, which is passed on.
        members: whether the tree is a stacked one; each member's gradient is that of its own loss.

    Returns:
        `f(tree, *args)` gives `(gradients, value)` or `(gradients, (value, aux))`, without a graph.

    Raises:
        TreeError: the tree has no leaf, or the loss is of another shape, or does not depend on the tree.
    """

    def grads_of(tree: Mapping[str, Any], *args: Any) -> tuple[Tree, Any]:
        if not any(leaves(tree)):
            raise TreeError("the tree has no leaves; there is nothing to train")
        count = count_stacked(tree) if members else None

        rest: list[Any] = []

        def total(own: Any) -> tuple[Tensor, list[Tensor]]:
            found = loss(own, *args)
            if has_aux and not (isinstance(found, tuple) and len(found) == 2):
                raise TreeError(f"with has_aux=True the loss gives (loss, aux); it gave {_kind(found)}")
            value = found[0] if has_aux else found
            _check_loss(value, count)
            tensors = [value.detach()]
            if has_aux:  # torch.func.grad hands on tensors only
                parts, form = pytree.tree_flatten(found[1])
                tensors += [part.detach() for part in parts if isinstance(part, Tensor)]
                rest[:] = [form, [None if isinstance(part, Tensor) else (part,) for part in parts]]
            # Members do not meet, so the gradient of the sum holds each one's own.
            return value.sum(), tensors

        grads, tensors = gradient_of(total, tree)
        if grads is None:
            raise TreeError(
                "the loss does not depend on the tree: nothing of it was used, or the graph was cut (detach, no_grad, "
                "inference_mode) on the way"
            )
        if not has_aux:
            return grads, tensors[0]
        form, others = rest
        kept = iter(tensors[1:])
        return grads, (
            tensors[0],
            pytree.tree_unflatten([next(kept) if one is None else one[0] for one in others], form),
        )

    return grads_of


def _check_loss(value: Any, count: int | None) -> None:
    wanted = "a scalar tensor" if count is None else f"one loss for each of {count} members, [{count}]"
    if not isinstance(value, Tensor) or value.shape != (() if count is None else (count,)):
        hint = "; sum or average it" if count is None and isinstance(value, Tensor) else ""
        raise TreeError(f"the loss is {wanted}; it gave {_kind(value)}{hint}")
    if not value.is_floating_point():
        raise TreeError(f"the loss is {value.dtype}; a floating-point number has a gradient")


def _kind(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"

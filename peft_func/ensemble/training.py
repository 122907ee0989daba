"""Many adapters trained side by side: a loss and a gradient for each member, and what optimizers do for each.

The leaves of a stacked tree are ordinary tensors, so an optimizer that works entry by entry (SGD, Adam, AdamW, ...)
over them trains every member as if it were alone. What looks at a whole tree (the norm that clips, a learning rate
of one's own, stopping early) is here for each member on its own.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from peft_func.ensemble.ensemble import Ensemble, ensemble
from peft_func.ensemble.members import count_members
from peft_func.errors import OptionError, TreeError
from peft_func.functional.gradient import gradient_of
from peft_func.functional.model import FunctionalModel
from peft_func.transforms.bind import Adapter
from peft_func.trees.paths import Tree, join, leaves, map_leaves

MemberGrads = Callable[..., tuple[Tree, Tensor]]
"""`(frozen, stacked, inputs, targets=()) -> (gradients, losses)`, as `member_grads` returns it."""


def member_grads(
    adapter: Adapter,
    loss: Callable[..., Tensor],
    *,
    model: FunctionalModel | None = None,
    in_dims: int | None = None,
    how: str = "auto",
    chunk_size: int | None = None,
    randomness: str = "different",
) -> MemberGrads:
    """Return a function for the loss and the gradient of every member of a stacked tree, in one pass.

    Args:
        adapter: the bound adapter.
        loss: `(output, *targets) -> scalar`, for one member's output; it is mapped over the members.
        model: another callable of the same module, such as `model.train()`.
        in_dims: None if all members see the same inputs and targets; 0 if each has its own, on a leading axis.
        how: as in `pf.ensemble`.
        chunk_size: the most members whose activations are held at once; None for all.
        randomness: as in `pf.ensemble`.

    Returns:
        `f(frozen, stacked, inputs, targets=())`, where `inputs` and `targets` are tuples (`inputs` may be a dict of
        keyword arguments), gives `(gradients, losses)`: a stacked tree, and a tensor `[K]`. Member `k`'s gradient is
        that of its own loss alone.

    Raises:
        OptionError: an unknown option.
        TreeError: the loss is no scalar for each member, or inputs or targets are no tuples, or not of the members.

    Example:
        >>> import torch, peft_func as pf
        >>> model = pf.functionalize(torch.nn.Linear(4, 3))
        >>> adapter = pf.bind(pf.lora("weight", rank=2), model)
        >>> frozen, stacked = adapter.init(0)[0], pf.stack([adapter.init(seed)[1] for seed in range(5)])
        >>> grads_of = pf.member_grads(adapter, torch.nn.functional.cross_entropy)
        >>> grads, losses = grads_of(frozen, stacked, (torch.randn(8, 4),), (torch.arange(8) % 3,))
        >>> losses.shape, grads["lora"]["weight"]["B"].shape
        (torch.Size([5]), torch.Size([5, 3, 2]))
    """
    if isinstance(in_dims, tuple):
        raise OptionError(f"member_grads: in_dims={in_dims!r}; it is 0 or None, for all inputs and targets")
    run = ensemble(adapter, model=model, in_dims=in_dims, how=how, chunk_size=chunk_size, randomness=randomness)

    def grads_of(
        frozen: Mapping[str, Tensor], stacked: Mapping[str, Any], inputs: Any, targets: tuple[Any, ...] = ()
    ) -> tuple[Tree, Tensor]:
        count = count_members(adapter, stacked)
        _check_data(inputs, targets, None if in_dims is None else count)
        size = count if chunk_size is None else chunk_size
        grads, losses = [], []
        for start in range(0, count, size):
            part = _members(stacked, slice(start, start + size))
            own = (inputs, targets)
            if in_dims == 0:
                own = _taken(own, slice(start, start + size))
            some, values = _grads(run, loss, frozen, part, *own)
            grads.append(some)
            losses.append(values)
        joined = grads[0] if len(grads) == 1 else map_leaves(lambda *parts: torch.cat(parts), *grads)
        return joined, torch.cat(losses)

    return grads_of


def _grads(
    run: Ensemble, loss: Callable[..., Tensor], frozen: Any, stacked: Tree, inputs: Any, targets: Any
) -> tuple[Tree, Tensor]:
    def total(tree: Any) -> tuple[Tensor, Tensor]:
        output = run(frozen, tree, **inputs) if isinstance(inputs, Mapping) else run(frozen, tree, *inputs)
        own = targets if run.in_dims == 0 else ()
        axes = [_axes(value) for value in (output, *own)] + [None] * (len(targets) - len(own))
        losses = torch.func.vmap(loss, in_dims=tuple(axes), randomness=run.randomness)(output, *targets)
        if losses.dim() != 1:
            raise TreeError(f"the loss of a member is a scalar; this one is {tuple(losses.shape[1:])}")
        # Members do not meet, so the gradient of the sum holds each one's own.
        return losses.sum(), losses.detach()

    grads, losses = gradient_of(total, stacked)
    return map_leaves(torch.zeros_like, stacked) if grads is None else grads, losses


def clip_members(grads: Mapping[str, Any], max_norm: float | Tensor) -> tuple[Tree, Tensor]:
    """Scale the gradient of each member down to a norm, as `torch.nn.utils.clip_grad_norm_` does for one.

    Args:
        grads: a stacked tree.
        max_norm: the largest 2-norm of a member's whole gradient; a number, or `[K]`.

    Returns:
        `(clipped, norms)`: a new tree, and the norms before, `[K]`.

    Example:
        >>> import torch, peft_func as pf
        >>> pf.clip_members({"a": torch.tensor([[3.0, 4.0], [0.3, 0.4]])}, 1.0)[1]
        tensor([5.0000, 0.5000])
    """
    squares = [torch.linalg.vector_norm(leaf.reshape(len(leaf), -1), dim=1) for _, leaf in leaves(grads)]
    if not squares:
        raise TreeError("clip_members needs a stacked tree with leaves")
    norms = torch.linalg.vector_norm(torch.stack(squares), dim=0)
    return scale_members(grads, (max_norm / (norms + 1e-6)).clamp(max=1.0)), norms


def scale_members(tree: Mapping[str, Any], factors: Tensor) -> Tree:
    """Scale every member by its own number: a learning rate for each, say.

    Args:
        tree: a stacked tree.
        factors: `[K]`.

    Example:
        >>> import torch, peft_func as pf
        >>> pf.scale_members({"a": torch.ones(2, 3)}, torch.tensor([1.0, 0.1]))["a"][1]
        tensor([0.1000, 0.1000, 0.1000])
    """
    _check_factors(tree, factors, "factors")
    return map_leaves(lambda leaf: leaf * _beside(factors, leaf).to(leaf.dtype), tree)


def hold_members(new: Mapping[str, Any], old: Mapping[str, Any], active: Tensor) -> Tree:
    """Take the new values of the members that are active, and keep the old ones of those that have stopped.

    Works for an optimizer's moments as for parameters: a member that is held is bitwise unchanged. What all members
    share, such as a count of steps, has no members; leave it as it is new.

    Args:
        new: a stacked tree.
        old: another of the same structure.
        active: a bool for each member, `[K]`.

    Example:
        >>> import torch, peft_func as pf
        >>> old, new = {"a": torch.zeros(2, 1)}, {"a": torch.ones(2, 1)}
        >>> pf.hold_members(new, old, torch.tensor([True, False]))["a"].tolist()
        [[1.0], [0.0]]
    """
    _check_factors(new, active, "active")
    if active.dtype != torch.bool:
        raise TreeError(f"active is a bool for each member; it is {active.dtype}")
    return map_leaves(lambda now, before: torch.where(_beside(active, now), now, before), new, old)


def _taken(values: Any, which: slice) -> Any:
    return pytree.tree_map_only(Tensor, lambda leaf: leaf[which], values)


def _axes(value: Any) -> Any:
    return pytree.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, value)


def _check_data(inputs: Any, targets: Any, count: int | None) -> None:
    """Check that inputs and targets are what holds the arguments, and, if there is a count, have members in front."""
    if not isinstance(inputs, tuple | list | Mapping) or not isinstance(targets, tuple | list):
        raise TreeError(
            "inputs is a tuple of the model's arguments (or a dict), targets one of what the loss takes besides: "
            f"f(frozen, stacked, (x,), (y,)); they are a {type(inputs).__name__} and a {type(targets).__name__}"
        )
    for leaf in pytree.tree_leaves((inputs, targets)):
        if count is not None and isinstance(leaf, Tensor) and leaf.shape[:1] != (count,):
            raise TreeError(
                f"with in_dims=0 inputs and targets have {count} members in front; one is {list(leaf.shape)}"
            )


def _members(stacked: Mapping[str, Any], which: slice) -> Tree:
    return map_leaves(lambda leaf: leaf[which], stacked)


def _beside(values: Tensor, leaf: Tensor) -> Tensor:
    return values.to(leaf.device).view(-1, *[1] * (leaf.dim() - 1))


def _check_factors(tree: Mapping[str, Any], factors: Tensor, name: str) -> None:
    for keys, leaf in leaves(tree):
        if not isinstance(factors, Tensor) or factors.dim() != 1 or leaf.dim() == 0 or len(leaf) != len(factors):
            found = tuple(factors.shape) if isinstance(factors, Tensor) else type(factors).__name__
            raise TreeError(f"{name} has one entry for each member; it is {found}, {join(keys)!r} {tuple(leaf.shape)}")

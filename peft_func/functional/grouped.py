"""Calls with weights that differ along the batch.

They take one pass where the functions that the model uses have rules for them, and otherwise `torch.func.vmap` over the
groups, which is slower and always right.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from peft_func.errors import RouteError
from peft_func.weights.groups import Grouped, Groups
from peft_func.weights.operator import Operator

_MAPPED = object()


def mixing_norm(root: nn.Module) -> str | None:
    """Return the path of a module that normalises over the batch it meets, if there is one."""
    path: str
    for path, module in root.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            return path
    return None


def batch_second(root: nn.Module) -> str | None:
    """Return the path of a module whose activations have the batch on their second axis, if there is one."""
    path: str
    for path, module in root.named_modules():
        # Attention with separate projections transposes its inputs before its weights come into play.
        separate = isinstance(module, nn.MultiheadAttention) and not module._qkv_same_embed_dim
        if separate or getattr(module, "batch_first", True) is False:
            return path
    return None


def groups_among(weights: Mapping[str, Tensor | Operator]) -> Groups | None:
    """Return the groups that these weights are for, if they differ along the batch at all."""
    return next((value.groups for value in weights.values() if isinstance(value, Grouped)), None)


def call_by_group(
    call: Callable[..., Any], weights: Mapping[str, Tensor | Operator], groups: Groups, args: Any, kwargs: Any
) -> Any:
    """Call `call(weights, *args, **kwargs)` for every group, through vmap, and join the outputs to one batch.

    Tensors among the arguments whose leading axis is as long as the batch are taken apart; all others are shared.

    Raises:
        RouteError: the output of a group has not the group's samples on its leading axis.
    """
    apart = {name: value.take_apart() for name, value in weights.items() if isinstance(value, Grouped)}
    axes = [axis for _, some, _ in apart.values() for axis in some]
    every = [tensor for tensors, _, _ in apart.values() for tensor in tensors]

    def one(tensors: Sequence[Tensor], args: Any, kwargs: Any) -> Any:
        rest, own = list(tensors), dict(weights)
        for name, (mine, _, build) in apart.items():
            own[name] = build(rest[: len(mine)])
            del rest[: len(mine)]
        return call(own, *args, **kwargs)

    def split(leaf: Any) -> Any:
        batched = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == groups.total
        return leaf.reshape(groups.count, groups.size, *leaf.shape[1:]) if batched else leaf

    def axis(leaf: Any) -> int | None:
        return 0 if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == groups.total else None

    given, spec = pytree.tree_flatten((args, kwargs))

    def flat(tensors: Sequence[Tensor], *leaves: Any) -> Any:
        return one(tensors, *pytree.tree_unflatten(leaves, spec))

    output = vmapped(flat, (axes, *map(axis, given)))(every, *map(split, given))
    return pytree.tree_map(lambda leaf: _join(leaf, groups) if isinstance(leaf, Tensor) else leaf, output)


def _join(leaf: Tensor, groups: Groups) -> Tensor:
    if leaf.dim() < 2 or leaf.shape[1] != groups.size:
        raise RouteError(
            f"the model returns a tensor of shape {tuple(leaf.shape[1:])} for {groups.size} samples of one adapter, so "
            "the samples of the batch cannot be put together again; let it return one row for each sample"
        )
    return leaf.flatten(0, 1)


def vmapped(
    function: Callable[..., Any], in_dims: Any, *, randomness: str = "different", chunk_size: int | None = None
) -> Callable[..., Any]:
    """Return `torch.func.vmap` of a function that may return things other than tensors; those come from one call."""

    def mapped(*args: Any) -> Any:
        kept: list[tuple[list[Any], Any]] = []

        def tensors_of(*inner: Any) -> list[Tensor]:
            flat, spec = pytree.tree_flatten(function(*inner))
            kept.append(([_MAPPED if isinstance(leaf, Tensor) else leaf for leaf in flat], spec))
            return [leaf for leaf in flat if isinstance(leaf, Tensor)]

        outputs = iter(
            torch.func.vmap(tensors_of, in_dims=in_dims, randomness=randomness, chunk_size=chunk_size)(*args)
        )
        others, spec = kept[0]
        return pytree.tree_unflatten([next(outputs) if leaf is _MAPPED else leaf for leaf in others], spec)

    return mapped


def check_norms(path: str | None) -> None:
    """Refuse weights that differ along the batch where a norm mixes its samples.

    Raises:
        RouteError: there is such a norm.
    """
    if path is not None:
        raise RouteError(
            f"{path!r} normalises over the batch, which mixes samples of different adapters; use model.eval(), or "
            "pf.ensemble, which gives every member a batch of its own"
        )

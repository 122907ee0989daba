"""Calls with weights that differ along the batch.

They take one pass where the functions that the model uses have rules for them, and otherwise `torch.func.vmap` over the
groups, which is slower and always right. Where torch has no batching rule (recurrent cells) it becomes a loop.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from peft_func.errors import RouteError
from peft_func.weights.groups import Grouped, Groups, spare_groups
from peft_func.weights.mapping import Weights
from peft_func.weights.merge import arounds_of
from peft_func.weights.operator import Operator

if TYPE_CHECKING:
    from peft_func.functional.model import FunctionalModel

_MAPPED = object()
_VALUES = (
    type(None), bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device, torch.Size, type, FunctionType,
)  # fmt: skip


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


def is_mapped(tensor: Tensor) -> bool:
    """Whether a `vmap` around this call maps a tensor."""
    functorch = torch._C._functorch
    if torch.compiler.is_compiling():
        return bool(functorch.is_batchedtensor(tensor))  # Dynamo does not know the other questions
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def groups_among(weights: Mapping[str, Tensor | Operator]) -> Groups | None:
    """Return the groups that these weights are for, if they differ along the batch at all."""
    found = next((value.groups for value in weights.values() if isinstance(value, Grouped)), None)
    return found or next((around.groups for around in arounds_of(weights) if around.groups is not None), None)


def call_routed(
    model: "FunctionalModel", weights: Mapping[str, Tensor | Operator], groups: Groups, args: Any, kwargs: Any
) -> Any:
    """Call a model with weights that differ along the batch, in one pass if that can be right.

    Raises:
        RouteError: no argument has a row for each sample, or the model mixes samples.
    """
    check_norms(model.mixing_norm)
    shapes = _shapes((args, kwargs))
    if all(shape[0] != groups.total for shape in shapes):
        raise _no_batch(groups, shapes)
    # A call in which the length of the batch is like no other shows that the batch is the leading axis wherever these
    # weights are used. So it is in a batch of any length, also if that is the length of a sequence by chance.
    if any(around.groups is not None for around in arounds_of(weights)):
        return _call_mapped(model, weights, groups, args, kwargs)
    places = tuple(name for name, value in weights.items() if isinstance(value, Grouped))
    sight = (groups.size, places, tuple((-1, *shape[1:]) if shape[0] == groups.total else shape for shape in shapes))
    ambiguous = spare_groups(groups.count, groups.size, _others(shapes, groups)) > 0
    items = weights
    if ambiguous and sight in model.sights and not torch.compiler.is_compiling():
        known = replace(groups, known=True)
        items = {name: op.among(known) if isinstance(op, Grouped) else op for name, op in weights.items()}
    if model.batch_second is None and (not ambiguous or items is not weights):
        try:
            output = model.with_state(items, model.state, *args, **kwargs)[0]
        except RouteError:
            if torch.compiler.is_compiling():
                raise
        else:
            if not torch.compiler.is_compiling():
                model.sights.add(sight)
            return output
    return call_by_group(model, weights, groups, args, kwargs)  # a longer batch comes here again


def _shapes(values: Any) -> list[tuple[int, ...]]:
    leaves = pytree.tree_leaves(values)
    return [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]


def _others(shapes: Iterable[tuple[int, ...]], groups: Groups) -> set[int]:
    """Return the lengths of the axes of arguments that are not the batch, and of the model's tables."""
    inner = {length for shape in shapes for length in (shape[1:] if shape[0] == groups.total else shape)}
    return inner | {shape[0] for shape in groups.tables}


def _no_batch(groups: Groups, shapes: Iterable[tuple[int, ...]]) -> RouteError:
    found = ", ".join(map(str, shapes))
    return RouteError(
        f"the weights are for a batch of {groups.total} samples; no argument has as many rows: {found or 'no tensors'}"
    )


def call_by_group(
    call: Callable[..., Any], weights: Mapping[str, Tensor | Operator], groups: Groups, args: Any, kwargs: Any
) -> Any:
    """Call `call(weights, *args, **kwargs)` where one pass over the batch as it is cannot be right.

    If an axis is as long as the batch by chance, a batch of some more groups, which are dropped again, tells them
    apart. Otherwise the call is mapped over the groups, through vmap, and the outputs are joined to one batch. Tensors
    among the arguments whose leading axis is as long as the batch are taken apart; all others are shared.

    Raises:
        RouteError: no argument has the batch, or the output of a group has not its samples on its leading axis.
    """
    shapes = _shapes((args, kwargs))
    if all(shape[0] != groups.total for shape in shapes):
        raise _no_batch(groups, shapes)
    lengths = _others(shapes, groups) | {shape[0] for shape in groups.weights}
    spare = spare_groups(groups.count, groups.size, lengths)
    if spare:
        try:
            return _call_longer(call, weights, groups, spare, args, kwargs)
        except RouteError:
            pass
    return _call_mapped(call, weights, groups, args, kwargs)


def _call_longer(
    call: Callable[..., Any], weights: Mapping[str, Any], groups: Groups, spare: int, args: Any, kwargs: Any
) -> Any:
    """Call with some more groups, all like the first."""
    longer = replace(groups, count=groups.count + spare)

    def pad(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.shape[:1] != (groups.total,):
            return leaf
        return torch.cat([leaf, *[leaf[: groups.size]] * spare])

    def cut(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return check_value(leaf)
        if leaf.shape[:1] != (longer.total,):
            raise RouteError(f"the model returns {tuple(leaf.shape)}, which is not one row for each sample")
        return leaf[: groups.total]

    items = {name: op.lengthened(longer) if isinstance(op, Grouped) else op for name, op in weights.items()}
    args, kwargs = pytree.tree_map(pad, (args, kwargs))
    return pytree.tree_map(cut, call(items, *args, **kwargs))


def _call_mapped(
    call: Callable[..., Any], weights: Mapping[str, Tensor | Operator], groups: Groups, args: Any, kwargs: Any
) -> Any:
    apart = {name: value.take_apart() for name, value in weights.items() if isinstance(value, Grouped)}
    axes = [axis for _, some, _ in apart.values() for axis in some]
    every = [tensor for tensors, _, _ in apart.values() for tensor in tensors]
    trees = [{} if around.groups is None else around.tree for around in arounds_of(weights)]
    tensors_around, trees_spec = pytree.tree_flatten(trees)
    axes, every = axes + [0] * len(tensors_around), every + tensors_around

    def one(tensors: Sequence[Tensor], args: Any, kwargs: Any) -> Any:
        rest, own = list(tensors), dict(weights)
        for name, (mine, _, build) in apart.items():
            own[name] = build(rest[: len(mine)])
            del rest[: len(mine)]
        if isinstance(weights, Weights):
            mapped = zip(weights.arounds, pytree.tree_unflatten(rest, trees_spec), strict=True)
            arounds = tuple(a if a.groups is None else replace(a, tree=tree, groups=None) for a, tree in mapped)
            own = Weights(own, weights.base, weights.layouts, arounds)
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
    """Return `torch.func.vmap` of a function that may return things other than tensors; those come from one call.

    `in_dims` has an entry for each argument: 0 or None for all its tensors, or a list for a list of tensors.
    """

    def mapped(*args: Any) -> Any:
        kept: list[tuple[list[Any], Any]] = []

        def tensors_of(*inner: Any) -> list[Tensor]:
            flat, spec = pytree.tree_flatten(function(*inner))
            kept.append(([_MAPPED if isinstance(leaf, Tensor) else check_value(leaf) for leaf in flat], spec))
            return [leaf for leaf in flat if isinstance(leaf, Tensor)]

        try:
            outputs = torch.func.vmap(tensors_of, in_dims=in_dims, randomness=randomness, chunk_size=chunk_size)(*args)
        except RuntimeError as error:
            if "Batching rule not implemented" not in str(error) or torch.compiler.is_compiling():
                raise
            outputs = [torch.stack(parts) for parts in zip(*_looped(tensors_of, in_dims, args), strict=True)]
        rest = iter(outputs)
        others, spec = kept[-1]
        return pytree.tree_unflatten([next(rest) if leaf is _MAPPED else leaf for leaf in others], spec)

    return mapped


def _looped(function: Callable[..., list[Tensor]], in_dims: Any, args: Sequence[Any]) -> Iterator[list[Tensor]]:
    """Do what vmap does, one call after the other."""
    dims = [
        dim if isinstance(dim, list) else [dim] * len(pytree.tree_leaves(arg))
        for dim, arg in zip(in_dims, args, strict=True)
    ]
    flat, spec = pytree.tree_flatten(tuple(args))
    axes = [axis for some in dims for axis in some]
    count = next(len(leaf) for leaf, axis in zip(flat, axes, strict=True) if axis == 0)
    for i in range(count):
        own = [leaf[i] if axis == 0 else leaf for leaf, axis in zip(flat, axes, strict=True)]
        yield function(*pytree.tree_unflatten(own, spec))


def check_value(leaf: Any) -> Any:
    """Return what a model gave back besides tensors, if it can be the same for all members.

    Raises:
        RouteError: it is an object that may hold tensors, which nobody would take apart.
    """
    if isinstance(leaf, _VALUES):
        return leaf
    raise RouteError(
        f"the model returns a {type(leaf).__name__}, whose tensors cannot be taken apart by adapter; let it return "
        "tensors, tuples, lists or dicts (transformers: use_cache=False), or register the class as a pytree"
    )


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

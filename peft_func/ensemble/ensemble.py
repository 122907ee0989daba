"""K adapters over one input, or each over its own, in one pass."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from peft_func.ensemble.members import count_members, grouped_weights, groups_in
from peft_func.errors import OptionError, RouteError, TreeError
from peft_func.functional.grouped import check_value, vmapped
from peft_func.functional.model import FunctionalModel
from peft_func.transforms.bind import Adapter
from peft_func.transforms.options import check_choice
from peft_func.trees.paths import map_leaves
from peft_func.weights.groups import Groups, spare_groups

InDims = int | tuple[int | None, ...] | None
"""Which positional arguments have a leading axis over the members: none, all (0), or 0 or None for each."""


@dataclass(frozen=True)
class Ensemble:
    """A bound adapter over many trees; made by `pf.ensemble`.

    Attributes:
        adapter: the bound adapter.
        model: what is called.
        in_dims: which arguments have a leading axis over the members.
        how: `"fold"`, `"vmap"` or `"auto"`.
        chunk_size: the most members in one pass, or None.
        randomness: that of `torch.func.vmap`.
    """

    adapter: Adapter
    model: FunctionalModel
    in_dims: InDims
    how: str
    chunk_size: int | None
    randomness: str

    def __call__(self, frozen: Mapping[str, Tensor], stacked: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Call the model with every member.

        Args:
            frozen: the base weights.
            stacked: the members' trees, stacked: every leaf `[K, *shape]`.
            *args: what the model takes; those that `in_dims` says with a leading axis of length K.
            **kwargs: likewise: `in_dims=0` is for them too, otherwise they are shared.

        Returns:
            The model's output; every tensor in it has a leading axis over the members: `[K, batch, ...]`.

        Raises:
            TreeError: the tree is no stack, or an argument has not one entry for each member.
            RouteError: `how="fold"`, and the model does not keep the batch on the leading axis, or cannot be seen to;
                or the model returns objects that hold tensors and are no pytrees.
        """
        count = count_members(self.adapter, stacked)
        mapped = self._mapped(count, args, kwargs)
        size = count if self.chunk_size is None else self.chunk_size
        if size >= count:
            return self._run(count, frozen, stacked, mapped)
        parts = []
        for start in range(0, count, size):
            end = min(start + size, count)
            tree = map_leaves(lambda leaf, s=start, e=end: leaf[s:e], stacked)
            own = [(leaf[start:end] if is_own else leaf, is_own) for leaf, is_own in mapped[0]]
            parts.append(self._run(end - start, frozen, tree, (own, mapped[1])))
        return pytree.tree_map(lambda first, *rest: torch.cat([first, *rest]) if _is_tensor(first) else first, *parts)

    def _mapped(self, count: int, args: Any, kwargs: Any) -> tuple[list[tuple[Any, bool]], Any]:
        """Return the flat arguments, each with whether it has an axis over the members, and their structure."""
        dims = self.in_dims if isinstance(self.in_dims, tuple) else (self.in_dims,) * len(args)
        if len(dims) != len(args):
            raise OptionError(f"in_dims names {len(dims)} arguments, but {len(args)} were given")
        flat: list[tuple[Any, bool]] = []
        for value, dim in [*zip(args, dims, strict=True), *((value, self.in_dims) for value in kwargs.values())]:
            for leaf in pytree.tree_leaves(value):
                own = dim == 0 and _is_tensor(leaf)
                if own and (leaf.dim() == 0 or leaf.shape[0] != count):
                    raise TreeError(
                        f"in_dims says that an argument has an axis over the {count} members; it is {tuple(leaf.shape)}"
                    )
                flat.append((leaf, own))
        return flat, pytree.tree_structure((args, kwargs))

    def _run(self, count: int, frozen: Any, stacked: Any, mapped: tuple[list[tuple[Any, bool]], Any]) -> Any:
        flat, spec = mapped
        reason = self._against_folding(flat)
        if self.how == "fold" and reason is not None:
            raise RouteError(reason)
        if self.how != "vmap" and reason is None:
            try:
                return self._fold(count, frozen, stacked, mapped)
            except RuntimeError as error:  # RouteError is one
                expected = isinstance(error, RouteError) or _unclear(flat)
                if self.how == "fold" or not expected or torch.compiler.is_compiling():
                    raise

        def one(tree: Any, *leaves: Any) -> Any:
            args, kwargs = pytree.tree_unflatten(leaves, spec)
            return self.model(self.adapter.apply(frozen, tree), *args, **kwargs)

        in_dims = (0, *(0 if own else None for _, own in flat))
        return vmapped(one, in_dims, randomness=self.randomness)(stacked, *(leaf for leaf, _ in flat))

    def _against_folding(self, flat: list[tuple[Any, bool]]) -> str | None:
        """Say why the members cannot be joined to the batch, as far as that can be seen before the call."""
        if self.adapter.arounds:
            return "add-ins are functions of one member's activations"
        if self.model.mixing_norm is not None:
            return f"{self.model.mixing_norm!r} normalises over the batch, which would be that of all members"
        if self.model.batch_second is not None:
            return f"{self.model.batch_second!r} has the batch on its second axis"
        if self.randomness == "same" and self.model.trains:
            return "members that are folded into the batch cannot share the masks of dropout"
        size = _batch_size(flat)
        if size is None:
            return "no argument is a tensor with a batch"
        for leaf, own in flat:
            # A vector of one entry may stand beside any batch; with one for each member it would be a batch.
            if own and (leaf.shape[1:2] != (size,) or (size == 1 and leaf.dim() == 2)):
                return f"an argument of each member is {tuple(leaf.shape[1:])}, which is no batch of {size}"
        return None

    def _fold(self, count: int, frozen: Any, stacked: Any, mapped: tuple[list[tuple[Any, bool]], Any]) -> Any:
        """Join the members to the batch: base products run once over all of them.

        If anything is as long as the whole batch by chance, more members, which are dropped again, tell them apart.
        """
        flat, spec = mapped
        size = _batch_size(flat) or 0
        shapes = [tuple(leaf.shape[1:] if own else leaf.shape) for leaf, own in flat if _is_tensor(leaf)]
        lengths = {length for shape in shapes for length in (shape[1:] if shape[:1] == (size,) else shape)}
        groups = groups_in(self.model, count, size)
        lengths.update(length for shape in groups.weights | groups.tables for length in shape)
        spare = spare_groups(count, size, lengths)
        groups = replace(groups, count=count + spare)

        def longer(leaf: Tensor) -> Tensor:
            return torch.cat([leaf, leaf[:1].expand(spare, *leaf.shape[1:])]) if spare else leaf

        def join(leaf: Any, *, own: bool) -> Any:
            if own:
                return longer(leaf).flatten(0, 1)
            if _is_tensor(leaf) and leaf.dim() and leaf.shape[0] == size:
                return leaf.expand(groups.count, *leaf.shape).flatten(0, 1)
            return leaf

        args, kwargs = pytree.tree_unflatten([join(leaf, own=own) for leaf, own in flat], spec)
        weights = grouped_weights(self.adapter, frozen, map_leaves(longer, stacked), groups)
        output, _ = self.model.with_state(weights, self.model.state, *args, **kwargs)
        parts = pytree.tree_map(lambda leaf: _part(leaf, groups), output)
        return pytree.tree_map(lambda leaf: leaf[:count] if _is_tensor(leaf) else leaf, parts) if spare else parts


def ensemble(
    adapter: Adapter,
    *,
    model: FunctionalModel | None = None,
    in_dims: InDims = None,
    how: str = "auto",
    chunk_size: int | None = None,
    randomness: str = "different",
) -> Ensemble:
    """Return `f(frozen, stacked, *args, **kwargs)`: the model's outputs with every one of K stacked trees.

    The values are those of `torch.func.vmap(lambda tree: model(adapter.apply(frozen, tree), *args))(stacked)`. The
    fast way folds the members into the batch: every base product runs once, over all of them, and only what belongs to
    the members is batched. It is taken where the model keeps the batch on the leading axis of its activations, as far
    as can be seen; otherwise `vmap` is. What cannot be seen is a model that mixes the samples of its batch (subtracts
    their mean, say): `how="vmap"` is for it.

    Args:
        adapter: the bound adapter.
        model: another callable of the same module, such as `model.train()`; by default the one it is bound to.
        in_dims: None if all members get the same arguments; 0 if every tensor among them has a leading axis over the
            members; or a tuple of 0 and None for the positional arguments.
        how: `"auto"`, or force `"fold"` or `"vmap"`.
        chunk_size: the most members in one pass: less memory, more passes.
        randomness: of dropout: `"different"` for each member, `"same"` (in train mode that takes `vmap`), or `"error"`
            under `vmap`.

    Raises:
        OptionError: an unknown option.

    Example:
        >>> import torch, peft_func as pf
        >>> model = pf.functionalize(torch.nn.Linear(4, 3))
        >>> adapter = pf.bind(pf.lora("weight", rank=2), model)
        >>> frozen, stacked = adapter.init(0)[0], pf.stack([adapter.init(seed)[1] for seed in range(5)])
        >>> pf.ensemble(adapter)(frozen, stacked, torch.ones(2, 4)).shape
        torch.Size([5, 2, 3])
    """
    if not isinstance(adapter, Adapter):
        raise OptionError(
            f"ensemble takes a bound adapter, not a {type(adapter).__name__}; call pf.bind(method, model)"
        )
    if model is not None and not isinstance(model, FunctionalModel):
        raise OptionError(f"ensemble: model is a {type(model).__name__}, and must be a functional one: model.train()")
    check_choice("ensemble", "how", how, ("auto", "fold", "vmap"))
    check_choice("ensemble", "randomness", randomness, ("different", "same", "error"))
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise OptionError(f"ensemble: chunk_size={chunk_size!r} is a number of members, at least 1, or None")
    if any(dim not in (0, None) for dim in (in_dims if isinstance(in_dims, tuple) else (in_dims,))):
        raise OptionError(f"ensemble: in_dims={in_dims!r}; the members lie on the leading axis: 0, or None")
    return Ensemble(adapter, model or adapter.model, in_dims, how, chunk_size, randomness)


def _batch_size(flat: list[tuple[Any, bool]]) -> int | None:
    """Return the length of the batch: that of the first tensor argument."""
    return next((int(leaf.shape[own]) for leaf, own in flat if _is_tensor(leaf) and leaf.dim() > own), None)


def _unclear(flat: list[tuple[Any, bool]]) -> bool:
    """Whether an argument may have been taken for a batch because it is as long (a mask over positions)."""
    size = _batch_size(flat)
    return any(not own and _is_tensor(leaf) and size in leaf.shape[1:] for leaf, own in flat)


def _part(leaf: Any, groups: Groups) -> Any:
    if not _is_tensor(leaf):
        if isinstance(leaf, int) and leaf == groups.total > 1:
            raise RouteError(f"the model returns the number {leaf}, the length of the batch of all members")
        return check_value(leaf)
    if leaf.dim() == 0 or leaf.shape[0] != groups.total or (groups.count > 1 and groups.total in leaf.shape[1:]):
        raise RouteError(
            f"the model returns a tensor of shape {tuple(leaf.shape)}, which is not one row for each of the "
            f"{groups.total} samples of all members, so it cannot be taken apart"
        )
    return leaf.reshape(groups.count, groups.size, *leaf.shape[1:])


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)

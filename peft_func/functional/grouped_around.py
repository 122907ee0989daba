"""Functions around modules whose tensors differ along the batch: the call is mapped over the groups of the batch."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from peft_func.errors import RouteError
from peft_func.functional.surround import Inner
from peft_func.weights.around import Around
from peft_func.weights.groups import Groups


def grouped_around(around: Around, groups: Groups, chosen: Tensor | None) -> Around:
    """Return an around for a routed batch.

    Args:
        around: its tensors have a leading axis over the groups.
        groups: of the batch.
        chosen: for each group whether it has an adapter at all; None if all do.
    """
    if chosen is None or not around.changes:
        return replace(around, groups=groups)
    tree = {"chosen": chosen, "tree": around.tree}
    return replace(around, groups=groups, tree=tree, function=functools.partial(_if_chosen, around.function))


def _if_chosen(function: Callable[..., Any], tree: Mapping[str, Any], inner: Inner, *args: Any, **kwargs: Any) -> Any:
    output = function(tree["tree"], inner, *args, **kwargs)
    notes = dict(inner.notes)
    plain, spec = pytree.tree_flatten(inner(*args, **kwargs))
    inner.notes.clear()  # what was noted in the plain run is not what this adapter's sinks should find
    inner.notes.update(notes)
    own, own_spec = pytree.tree_flatten(output)

    def choose(mine: Any, base: Any) -> Any:
        if not isinstance(mine, Tensor) or not isinstance(base, Tensor):
            return mine
        if mine.shape != base.shape:
            raise RouteError(
                f"at {inner.path!r} an add-in makes {tuple(mine.shape)} of {tuple(base.shape)}, so a batch cannot hold "
                "samples of the plain base (-1) as well; call the model for these on their own"
            )
        return torch.where(tree["chosen"], mine, base)

    if spec != own_spec:
        raise RouteError(f"at {inner.path!r} an add-in returns another structure than the module: no place for -1")
    return pytree.tree_unflatten([choose(mine, base) for mine, base in zip(own, plain, strict=True)], own_spec)

"""A batch in another order: samples of one adapter side by side, so that they share its factors in `pf.route`.

This is for speed alone, so it is done only where it helps, and where it is plain what belongs to a sample: where every
argument is a tensor or a plain value, and nothing but the leading axis is as long as the batch.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from math import gcd
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from peft_func.errors import RouteError

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


def order_by_adapter(names: Sequence[str | None], values: Sequence[Any]) -> list[int] | None:
    """Return which sample comes first, second, ..., or None to leave the batch as it is.

    Args:
        names: the adapter of each sample.
        values: all arguments of the call.
    """
    counts = Counter(names)
    if gcd(*counts.values()) == gcd(*(len(list(run)) for _, run in groupby(names))):
        return None  # route shares as much already
    if not all(isinstance(value, _PLAIN) or _is_clear(value, len(names)) for value in values):
        return None
    place = {name: number for number, name in enumerate(counts)}
    return sorted(range(len(names)), key=lambda sample: place[names[sample]])


def take(value: Any, order: Sequence[int]) -> Any:
    """Return an argument with its samples in another order; what is no tensor over the batch stays as it is."""
    if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != len(order):
        return value
    return value.index_select(0, torch.tensor(order, device=value.device))


def put_back(output: Any, order: Sequence[int]) -> Any:
    """Return a model's output with its samples in the order before `take`.

    Raises:
        RouteError: there is something in it whose samples cannot be told.
    """
    back = sorted(range(len(order)), key=order.__getitem__)

    def restore(leaf: Any) -> Any:
        if leaf is None or (isinstance(leaf, Tensor) and leaf.dim() == 0):
            return leaf
        if isinstance(leaf, Tensor) and leaf.shape[0] == len(order) not in leaf.shape[1:]:
            return take(leaf, back)
        raise RouteError(f"a {type(leaf).__name__} in the output is not one row for each sample")

    return pytree.tree_map(restore, output)


def _is_clear(value: Any, batch: int) -> bool:
    """Say whether it is a tensor of which one sees if it is over the batch; of a vector one does not."""
    return isinstance(value, Tensor) and batch not in value.shape[1:] and value.shape != (batch,)

"""Every sample of a batch through an adapter of its own, in one pass.

Mixed batches of low-rank adapters: Punica (arXiv 2310.18547), S-LoRA (arXiv 2311.03285). Here for any method: the
base products run once over the whole batch, and what belongs to an adapter is gathered for the samples that use it.
"""

from collections.abc import Collection, Mapping
from itertools import groupby
from math import gcd
from typing import Any

import torch
from torch import Tensor

from peft_func.ensemble.choice import Choice
from peft_func.ensemble.members import count_members, grouped_weights, groups_in
from peft_func.errors import OptionError
from peft_func.transforms.bind import Adapter
from peft_func.trees.paths import leaves, map_leaves
from peft_func.weights.groups import Grouped, column
from peft_func.weights.mapping import Weights

BASE = -1
"""The index of a sample that goes through the plain base model."""


def route(adapter: Adapter, frozen: Mapping[str, Tensor], stacked: Mapping[str, Any], index: Tensor) -> Weights:
    """Return weights with which sample `i` of a batch goes through adapter `index[i]`.

    The batch is the leading axis of the inputs and of the activations inside the model. Samples of one adapter that
    stand side by side share its factors: sort the batch by adapter where you can.

    Every tensor among the model's arguments whose leading axis is as long as the batch is one row for each sample; all
    others belong to all samples. Where another axis is as long (a sequence of as many tokens), the call takes
    `torch.func.vmap`, in which axes do not meet.

    Args:
        adapter: the bound adapter.
        frozen: the base weights, as `adapter.init` gives them.
        stacked: trees of this adapter, stacked (`pf.stack`): every leaf `[K, *shape]`.
        index: int64 `[batch]`, on the CPU or the device of the leaves: which of the K trees each sample uses; -1 is
            the plain base.

    Returns:
        What `model` takes, for this batch: weights for one call, differentiable in both trees. Gradients land only in
        the adapters that are used.

    Raises:
        OptionError: the index is no int64 vector, or out of range (checked on the CPU, in eager mode).
        TreeError: the tree is no stack of this adapter's trees.

    Example:
        >>> import torch, peft_func as pf
        >>> model = pf.functionalize(torch.nn.Linear(4, 3))
        >>> adapter = pf.bind(pf.ia3("weight"), model)
        >>> frozen, tree = adapter.init(0)
        >>> stacked = pf.stack([tree, pf.map_leaves(lambda t: 2 * t, tree)])
        >>> x, bias = torch.ones(3, 4), frozen["bias"]
        >>> y = model(pf.route(adapter, frozen, stacked, torch.tensor([1, 0, -1])), x) - bias
        >>> torch.equal(y[0], 2 * y[1]), torch.equal(y[1], y[2])
        (True, True)
    """
    count = count_members(adapter, stacked)
    used, some_base = _read_index(index, count)
    groups = groups_in(adapter.model, len(used), len(index) // len(used))
    used = used.to(next(tensor.device for _, tensor in leaves(stacked)))
    gathered = map_leaves(lambda leaf: leaf.index_select(0, used.clamp_min(0)), stacked)
    weights = grouped_weights(adapter, frozen, gathered, groups)
    if not some_base:
        return weights
    # A method of the user's may give a constant; the library's own leave the base or change it.
    foreign = {path for part in adapter.parts if part.part.kind is None for path in part.seen}
    return _or_base(weights, used >= 0, foreign)


def _read_index(index: Tensor, count: int) -> tuple[Tensor, bool]:
    """Return the adapter of every group, and whether a sample may go through the plain base."""
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.dim() != 1 or index.shape[0] == 0:
        found = f"{index.dtype} {list(index.shape)}" if isinstance(index, Tensor) else f"a {type(index).__name__}"
        raise OptionError(f"index is an int64 tensor over the batch, such as torch.tensor([0, 2, -1]); it got {found}")
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    if torch.compiler.is_compiling() or index.device.type != "cpu" or wrapped(index):
        return index, True  # its values are not at hand
    values = index.tolist()
    odd = next((value for value in values if not BASE <= value < count), None)
    if odd is not None:
        raise OptionError(f"index holds {odd}; there are {count} adapters, 0 to {count - 1}, and -1 is the plain base")
    size = gcd(*(len(list(run)) for _, run in groupby(values)))
    return index[::size], BASE in values


def _or_base(weights: Weights, chosen: Tensor, foreign: Collection[str]) -> Weights:
    """Put the base weight where a group has chosen no adapter; `chosen` is a bool for each group."""
    items = dict(weights)
    for path, value in weights.items():
        if isinstance(value, Grouped):
            layout, base = weights.layouts[path], weights.base[path].to(value.dtype)
            single = column(base) if value.is_vector else layout.to_matrix(base)
            choice = Choice(single, chosen, 0 if value.is_vector else len(layout.batch), path not in foreign)
            items[path] = value.replace(choice.effective(value.matrix))
    return Weights(items, weights.base, weights.layouts)

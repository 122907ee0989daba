"""Every sample of a batch through an adapter of its own, in one pass.

Mixed batches of low-rank adapters: Punica (arXiv 2310.18547), S-LoRA (arXiv 2311.03285). Here for any method: the
base products run once over the whole batch, and what belongs to an adapter is gathered for the samples that use it.
"""

from collections.abc import Callable, Mapping
from itertools import groupby
from math import gcd
from typing import Any

import torch
from torch import Tensor

from peft_func.ensemble.choice import Choice
from peft_func.ensemble.members import count_members, grouped_weights, groups_in
from peft_func.errors import OptionError
from peft_func.functional.grouped_around import grouped_around
from peft_func.transforms.bind import Adapter
from peft_func.trees.paths import leaves, map_leaves
from peft_func.weights.groups import column
from peft_func.weights.layout import Storage
from peft_func.weights.mapping import Weights
from peft_func.weights.matrix import Matrix

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
        >>> x = torch.ones(3, 4)
        >>> y = model(pf.route(adapter, frozen, stacked, torch.tensor([1, 0, -1])), x)
        >>> alone = [adapter.apply(frozen, tree) for tree in reversed(pf.unstack(stacked))] + [model.params]
        >>> [torch.allclose(y[i], model(weights, x[i])) for i, weights in enumerate(alone)]
        [True, True, True]
    """
    count = count_members(adapter, stacked)
    used, some_base = _read_index(index, count)
    groups = groups_in(adapter.model, len(used), len(index) // len(used))
    used = used.to(next(tensor.device for _, tensor in leaves(stacked)))
    rows, chosen = used.clamp_min(0), used >= 0
    few = count <= len(used)  # then what a method computes for each adapter is computed once, and gathered where used
    layouts = adapter.model.layouts
    # A method of the user's may give a constant; the library's own leave the base or change it.
    foreign = {path for part in adapter.parts if part.part.kind is None for path in part.seen} if some_base else set()

    def choice_at(path: str, dtype: torch.dtype) -> Choice:
        own = frozen.get(path, adapter.model.params[path]).to(dtype)
        vector = layouts[path].storage is Storage.VECTOR
        single = column(own) if vector else layouts[path].to_matrix(own)
        return Choice(single, chosen, 0 if vector else len(layouts[path].batch), path not in foreign)

    def take(path: str, dtype: torch.dtype) -> Callable[[Matrix], Matrix]:
        choice = choice_at(path, dtype) if some_base else None
        experts = 0 if layouts[path].storage is Storage.VECTOR else len(layouts[path].batch)

        def gathered(matrix: Matrix) -> Matrix:
            if few:
                matrix = matrix.map(lambda t, ndim: t.index_select(0, rows) if t.dim() > ndim + experts else t)
            return matrix if choice is None else choice.effective(matrix)

        return gathered

    each = map_leaves(lambda leaf: leaf.index_select(0, rows), stacked) if not few or adapter.arounds else stacked
    weights = grouped_weights(adapter, frozen, stacked if few else each, groups, take if few or some_base else None)
    if adapter.arounds:
        arounds = adapter.surroundings(each)
        return weights.surrounded(grouped_around(around, groups, chosen if some_base else None) for around in arounds)
    return weights


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

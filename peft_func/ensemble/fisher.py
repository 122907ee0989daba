"""The diagonal of the empirical Fisher information: F = mean over samples of (d loss / d theta)^2.

Matena and Raffel, arXiv 2111.09832; Kunstner et al., arXiv 1905.12558, on what it is not: with the data's labels it
is the empirical Fisher; with labels drawn from the model's own predictions, the same function gives the Fisher itself.
"""

from collections.abc import Callable, Mapping
from typing import Any

import optree
import torch
from torch import Tensor

from peft_func.ensemble.values import wide
from peft_func.errors import OptionError, TreeError
from peft_func.trees.paths import Tree, map_leaves


def fisher(loss: Callable[..., Tensor], tree: Mapping[str, Any], *samples: Any, chunk_size: int = 64) -> Tree:
    """Return the mean squared gradient of a loss over samples, for every element of a tree.

    Args:
        loss: `(tree, *sample) -> scalar`: the negative log-likelihood of *one* sample, which has no batch axis (the
            model adds it: `model(weights, x[None])`). It is differentiated for a chunk of samples at once by `vmap`,
            so it draws no random numbers: use `model.eval()`.
        tree: where to differentiate: a trainable tree, or `model.params`.
        *samples: tensors, or nested containers of them, with one common leading axis: the samples.
        chunk_size: how many gradients are held at once.

    Returns:
        A tree of the same paths and shapes, of elements from 0 up, in float32 at least.

    Raises:
        TreeError: there are no samples, or their numbers differ.
        OptionError: `chunk_size` is no positive int.

    Example:
        >>> import torch, peft_func as pf
        >>> loss = lambda tree, x, y: 0.5 * (tree["slope"] * x - y) ** 2
        >>> pf.fisher(loss, {"slope": torch.tensor(0.0)}, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
        {'slope': tensor(2.5000)}
    """
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise OptionError(f"chunk_size={chunk_size!r} is no number of samples")
    tensors: list[Any] = optree.tree_leaves(samples)  # type: ignore[arg-type]
    if not tensors or not all(isinstance(tensor, Tensor) and tensor.ndim for tensor in tensors):
        raise TreeError("fisher takes samples: tensors with a leading axis, fisher(loss, tree, x, y)")
    lengths = {len(tensor) for tensor in tensors}
    if len(lengths) != 1 or lengths == {0}:
        raise TreeError(f"fisher takes samples with one common leading length, above 0; these have {sorted(lengths)}")
    (count,) = lengths
    gradient = torch.vmap(torch.func.grad(loss), in_dims=(None, *[0] * len(samples)))

    def squares(start: int) -> Tree:
        chunk = optree.tree_map(lambda tensor: tensor[start : start + chunk_size], samples)  # type: ignore[arg-type]
        return map_leaves(lambda grad: wide(grad).square().sum(0), gradient(dict(tree), *chunk))

    total = squares(0)
    for start in range(chunk_size, count, chunk_size):
        total = map_leaves(torch.add, total, squares(start))
    return map_leaves(lambda value: value / count, total)

"""Magnitude: W' = diag(m / |V|) V, where V is the weight as it arrives and |V| the norms of its rows.

The second half of DoRA (Liu et al., arXiv 2402.09353), over whatever came before it in a chain. As there (section
4.3), the norm is a constant in backward.
"""

import torch
from torch import Tensor

from peft_func.functional.model import FunctionalModel
from peft_func.transforms.transform import Changes, Part, Transform, check_name
from peft_func.trees.paths import Tree
from peft_func.trees.select import Where
from peft_func.weights.absorb import square_norms
from peft_func.weights.mapping import Weights
from peft_func.weights.matrix import Diagonal, Product
from peft_func.weights.operator import full_precision


def magnitude(where: Where, *, name: str = "magnitude") -> Part:
    """Train the norm of every row of the selected weights, apart from its direction.

    Leaves of `trainable[name][path]`: `magnitude` [out] (for experts [experts, out]), at init the norms of the rows
    of the weight that it receives, so that nothing changes at first.

    Args:
        where: a selector; only parameters of two dimensions or more are looked at.
        name: the sub-tree.

    Example:
        >>> import torch, peft_func as pf
        >>> model = pf.functionalize(torch.nn.Linear(4, 3))
        >>> method = pf.chain(pf.gift("weight", rank=2), pf.magnitude("weight"))
        >>> frozen, trainable = pf.bind(method, model).init(0)
        >>> trainable["magnitude"]["weight"]["magnitude"].shape
        torch.Size([3])
    """

    def make(paths: tuple[str, ...], model: FunctionalModel) -> Transform:
        return magnitude_of(paths)

    return Part(where, make, check_name(name), "magnitude", {})


def magnitude_of(paths: tuple[str, ...]) -> Transform:
    """Return the transform for these places."""

    def init(weights: Weights, key: int) -> Tree:
        return {path: {"magnitude": _norms(path, weights)} for path in paths}

    def apply(tree: Tree, weights: Weights) -> Changes:
        changes = {}
        for path in paths:
            norms = _norms(path, weights)
            # A row of zeros (an embedding's padding) has no direction: it stays a row of zeros.
            scale = tree[path]["magnitude"] / torch.where(norms == 0, torch.ones_like(norms), norms)
            changes[path] = Product(Diagonal(scale), weights.matrix(path))
        return changes

    return Transform(init, apply)


def _norms(path: str, weights: Weights) -> Tensor:
    detached = weights.matrix(path).deterministic().map(lambda tensor, _: tensor.detach())
    with full_precision(detached.tensors()[0].device):
        return square_norms(detached).clamp_min(0).sqrt()

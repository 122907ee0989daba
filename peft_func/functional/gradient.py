"""The gradient of a function of a tree: by autograd, or by `torch.func.grad` inside its transforms.

Both give the same numbers. Autograd is the faster one in eager mode; inside `vmap`, `grad` or `torch.compile` only
`torch.func.grad` nests.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from peft_func.trees.paths import Tree, from_leaves, leaves, map_leaves
from peft_func.weights.eager import in_transform


def gradient_of(function: Callable[[Any], tuple[Tensor, Any]], tree: Mapping[str, Any]) -> tuple[Tree | None, Any]:
    """Return the gradient of a function over a tree, and what else the function gives.

    Args:
        function: `tree -> (scalar, tensors)`.
        tree: its leaves are neither written nor asked for a graph.

    Returns:
        `(gradients, tensors)`, without a graph; outside of transforms the first is None if the scalar has no graph to
        any leaf.

    Example:
        >>> import torch
        >>> gradient_of(lambda tree: (tree["a"].square().sum(), ()), {"a": torch.tensor([1.0, 2.0])})
        ({'a': tensor([2., 4.])}, ())
    """
    if in_transform():
        gradients: Tree
        gradients, rest = torch.func.grad(function, has_aux=True)(dict(tree))
        return gradients, rest
    own = map_leaves(lambda leaf: leaf.detach().requires_grad_(), tree)
    with torch.enable_grad():
        scalar, rest = function(own)
    if not scalar.requires_grad:
        return None, rest
    flat = dict(leaves(own))
    found = torch.autograd.grad(scalar, list(flat.values()), materialize_grads=True)
    return from_leaves(zip(flat, found, strict=True)), rest

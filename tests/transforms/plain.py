"""Plain torch re-derivations: what a method's weight is, written without the library, and a module called with it."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.zoo import Animal

VALUES, GRADS = 1e-10, 1e-8


def as_matrix(net: nn.Module, path: str, weight: Tensor) -> Tensor:
    """A stored weight as `[*batch, out, in * taps]`, told from its module."""
    module = net.get_submodule(path.rpartition(".")[0])
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return weight.transpose(0, 1).flatten(1)
    if isinstance(module, nn.modules.conv._ConvNd):
        return weight.flatten(1)
    return weight.mT if isinstance(module, Conv1D) else weight


def as_stored(net: nn.Module, path: str, matrix: Tensor) -> Tensor:
    """The inverse of `as_matrix`."""
    module = net.get_submodule(path.rpartition(".")[0])
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return matrix.reshape(matrix.shape[0], module.in_channels, *module.kernel_size).transpose(0, 1)
    if isinstance(module, nn.modules.conv._ConvNd):
        return matrix.reshape(matrix.shape[0], -1, *module.kernel_size)
    return matrix.mT if isinstance(module, Conv1D) else matrix


def low_rank(net: nn.Module, path: str, leaf: dict[str, Tensor], scale: float) -> Tensor:
    """`scale * B A`, in the shape that the module stores."""
    A, B = leaf["A"], leaf["B"]
    if isinstance(net.get_submodule(path.rpartition(".")[0]), nn.modules.conv._ConvNd):
        A, B = A.flatten(1), B.flatten(1)
    return as_stored(net, path, scale * (B @ A))


def call(net: nn.Module, weights: dict[str, Tensor], animal: Animal, seed: int = 0) -> Tensor:
    """The module's output with some of its weights replaced."""
    args, kwargs = animal.inputs(seed)
    # On a copy: functional_call leaves a module that is reachable by two paths corrupted (pytorch#164759).
    return animal.output(torch.func.functional_call(copy.deepcopy(net), weights, args, kwargs))


def random_like(tree: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Random values for every leaf, none of them zero."""
    generator = torch.Generator().manual_seed(seed)

    def draw(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: draw(value) for key, value in node.items()}
        return torch.randn(node.shape, dtype=torch.float64, generator=generator) / 2

    return draw(tree)


def leaves_of(tree: Any) -> list[Tensor]:
    """The leaves, in the order of the dicts."""
    return [tree] if isinstance(tree, Tensor) else [leaf for value in tree.values() for leaf in leaves_of(value)]


def grads_of(output: Tensor, tree: Any) -> list[Tensor]:
    """Gradients of an uneven loss of the output."""
    return list(torch.autograd.grad((output * output.cos()).sum(), leaves_of(tree), materialize_grads=True))


def learnable(tree: Any) -> Any:
    """A copy whose leaves require gradients."""
    if isinstance(tree, Tensor):
        return tree.detach().clone().requires_grad_()
    return {key: learnable(value) for key, value in tree.items()}


def same(a: Any, b: Any, tolerance: float = VALUES) -> None:
    """Assert that two tensors, lists or trees are equal to a tolerance, absolute and relative."""
    if isinstance(a, Tensor):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
    elif isinstance(a, dict):
        assert set(a) == set(b)
        for key in a:
            same(a[key], b[key], tolerance)
    else:
        for left, right in zip(a, b, strict=True):
            same(left, right, tolerance)

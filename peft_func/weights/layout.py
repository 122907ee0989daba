"""How a parameter, as its module stores it, is seen as a matrix `[out, in]` (or a batch of them)."""

from dataclasses import dataclass, field
from enum import Enum
from math import prod

import torch
from torch import Tensor, nn

from peft_func.errors import OptionError
from peft_func.trees.select import Info


class Storage(Enum):
    """How a weight is stored."""

    VECTOR = "vector"  # a bias or a norm: no matrix
    MATRIX = "matrix"  # [out, in], an embedding's [rows, dim], or [experts, out, in]
    TRANSPOSED = "transposed"  # HF Conv1D: [in, out]
    CONV = "conv"  # [out, in / groups, *kernel]
    CONV_TRANSPOSED = "conv_transposed"  # [in, out / groups, *kernel]


@dataclass(frozen=True)
class Layout:
    """The storage and the stored shape of one parameter.

    Attributes:
        storage: how it is stored.
        shape: as it is stored.
        size: the same, as tensors have it.
        is_conv: whether it has a kernel.
        kernel: the extents of the kernel; empty where there is none.
        taps: the number of weights between one input channel and one output channel.
        batch: the leading dimensions of a batch of matrices (experts).
    """

    storage: Storage
    shape: tuple[int, ...]
    # Every call of a model asks for these.
    size: torch.Size = field(init=False, compare=False, repr=False)
    is_conv: bool = field(init=False, compare=False, repr=False)
    kernel: tuple[int, ...] = field(init=False, compare=False, repr=False)
    taps: int = field(init=False, compare=False, repr=False)
    batch: tuple[int, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        is_conv = self.storage in (Storage.CONV, Storage.CONV_TRANSPOSED)
        kernel = self.shape[2:] if is_conv else ()
        known = {
            "size": torch.Size(self.shape),
            "is_conv": is_conv,
            "kernel": kernel,
            "taps": prod(kernel),
            "batch": () if is_conv else self.shape[:-2],
        }
        vars(self).update(known)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The shape of the matrix: `[*batch, out, in]`, with `in` times the taps of the kernel."""
        if self.storage is Storage.MATRIX:
            return self.shape
        match self.storage:
            case Storage.CONV:
                return (self.shape[0], prod(self.shape[1:]))
            case Storage.CONV_TRANSPOSED:
                return (self.shape[1], self.shape[0] * self.taps)
            case Storage.TRANSPOSED:
                return (self.shape[1], self.shape[0])
        raise OptionError(f"a parameter of shape {self.shape} is no matrix; select weights of 2 dimensions or more")

    def to_matrix(self, stored: Tensor) -> Tensor:
        """View a stored weight as its matrix."""
        if self.storage is Storage.MATRIX:
            return stored
        match self.storage:
            case Storage.CONV:
                return stored.flatten(1)
            case Storage.CONV_TRANSPOSED:
                return stored.transpose(0, 1).flatten(1)
            case Storage.TRANSPOSED:
                return stored.mT
            case _:
                return stored

    def to_stored(self, matrix: Tensor) -> Tensor:
        """View a matrix as the weight that the module stores."""
        match self.storage:
            case Storage.CONV:
                return matrix.reshape(self.shape)
            case Storage.CONV_TRANSPOSED:
                return matrix.reshape(matrix.shape[0], -1, *self.kernel).transpose(0, 1)
            case Storage.TRANSPOSED:
                return matrix.mT
            case _:
                return matrix

    def factor(self, tensor: Tensor) -> Tensor:
        """View a factor `[*batch, n, ...]`, whose last dimensions may be those of a kernel, as a matrix."""
        return tensor.flatten(1) if self.is_conv else tensor


def layout_of(info: Info) -> Layout:
    """Tell the layout of a parameter from the classes of the modules that own it."""
    kinds = info.modules
    if info.ndim < 2:
        storage = Storage.VECTOR
    elif info.ndim > 2 and any(issubclass(kind, nn.modules.conv._ConvTransposeNd) for kind in kinds):
        storage = Storage.CONV_TRANSPOSED
    elif info.ndim > 2 and any(issubclass(kind, nn.modules.conv._ConvNd) for kind in kinds):
        storage = Storage.CONV
    elif any(
        base.__name__ == "Conv1D" and base.__module__ == "transformers.pytorch_utils"
        for kind in kinds
        for base in kind.__mro__
    ):
        storage = Storage.TRANSPOSED
    else:
        storage = Storage.MATRIX
    return Layout(storage, info.shape)

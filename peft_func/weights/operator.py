"""An effective weight: a matrix expression, seen as the parameter that a module expects."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_func.errors import TreeError
from peft_func.weights.fused import under_autocast
from peft_func.weights.layout import Layout
from peft_func.weights.matrix import Matrix


class Operator:
    """An effective weight that acts without being formed.

    It stands for a tensor: torch functions on it work on its dense form. `w + delta` and the like therefore give a
    tensor; to keep the structure, write the change as a `Matrix` (see `Weights.matrix`).

    Attributes:
        matrix: the expression, `[*batch, out, in]`.
        layout: how the module stores the parameter.
        dtype: the dtype of the parameter.
        path: the parameter's name, for messages.
    """

    def __init__(self, matrix: Matrix, layout: Layout, dtype: torch.dtype, path: str) -> None:
        if matrix.shape != layout.matrix_shape:
            raise TreeError(f"{path}: a matrix of shape {matrix.shape} stands for one of shape {layout.matrix_shape}")
        self.matrix = matrix
        self.layout = layout
        self.dtype = dtype
        self.path = path

    @property
    def shape(self) -> torch.Size:
        """The shape of the parameter."""
        return self.layout.size

    @property
    def ndim(self) -> int:
        """The number of dimensions of the parameter."""
        return len(self.layout.shape)

    @property
    def device(self) -> torch.device:
        """The device of its tensors."""
        return self.tensors()[0].device

    @property
    def requires_grad(self) -> bool:
        """Whether any of its tensors requires a gradient."""
        return any(tensor.requires_grad for tensor in self.tensors())

    @property
    def has_dropout(self) -> bool:
        """Whether it drops units when it acts."""
        return self.matrix.has_dropout

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors it is made of, the base weight first."""
        return self.matrix.tensors()

    def materialise(self) -> Tensor:
        """Form it: computed in float32 at least, and rounded once to the dtype of the parameter."""
        return self.exact().to(self.dtype)

    def exact(self) -> Tensor:
        """Form it in the dtype it is computed in, without the rounding."""
        matrix = self.matrix
        with full_precision(self.device):
            return self.layout.to_stored(matrix.dense(matrix.compute_dtype))

    def replace(self, matrix: Matrix) -> "Operator":
        """Return another matrix in the same place."""
        return Operator(matrix, self.layout, self.dtype, self.path)

    def __repr__(self) -> str:
        return f"Operator({self.path!r}, shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run any torch function on the dense form."""
        return func(*formed(args), **formed(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        # The methods of a tensor: w.norm(dim=1), w.T, w.new_zeros(3).
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        return getattr(self.materialise(), name)

    def __len__(self) -> int:
        return self.layout.shape[0]

    __hash__ = object.__hash__


def _on_dense(name: str) -> Callable[..., Any]:
    def method(self: Operator, *args: Any) -> Any:
        return getattr(self.materialise(), name)(*args)

    return method


# What is written with a sign (w + 1, 2 ** w, w > 0, w[0]) comes neither through __torch_function__ nor __getattr__.
_SIGNS = """
    add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod pow rpow matmul rmatmul
    neg pos abs lt le gt ge eq ne getitem
"""
for _name in _SIGNS.split():
    setattr(Operator, f"__{_name}__", _on_dense(f"__{_name}__"))


def formed(value: Any) -> Any:
    """Replace the operators in (nested) arguments by their dense forms."""
    match value:
        case Operator():
            return value.materialise()
        case tuple() | list():
            return type(value)(formed(item) for item in value)
        case dict():
            return {key: formed(item) for key, item in value.items()}
        case _:
            return value


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Turn autocast off: a merge inside its region would otherwise round the product of the factors."""
    if under_autocast(device):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()

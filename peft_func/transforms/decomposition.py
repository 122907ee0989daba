"""Singular value decompositions of base weights, each computed once for a tensor and kept while it lives.

`apply` is a pure function of the weights, and a decomposition is far too dear for every call. What is kept here changes
no result, only when it is computed: a result belongs to one tensor object (by a weak reference) in one version of its
contents, so base weights that are cast, moved, replaced or written to are decomposed anew.
"""

import threading
import weakref
from typing import NamedTuple

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from peft_func.errors import OptionError
from peft_func.weights.layout import Layout


class Decomposition(NamedTuple):
    """`U diag(sigma) V^T`: `U` `[*, h, n]`, `sigma` `[*, n]` descending, `Vt` `[*, n, w]`, with n = min(h, w)."""

    U: Tensor
    sigma: Tensor
    Vt: Tensor


class _Kept(NamedTuple):
    tensor: weakref.ReferenceType[Tensor]
    version: int
    parts: Decomposition


class Decompositions:
    """The decompositions of the weights of one bound method, by path and tensor; safe for threads."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()
        # Tuples that are replaced as a whole, so that a reader needs no lock.
        self._kept: dict[str, tuple[_Kept, ...]] = {}

    def of(self, path: str, base: Tensor, layout: Layout, view: tuple[int, ...]) -> Decomposition:
        """Return the decomposition of a base weight, seen as a matrix of the shape `view`.

        Raises:
            OptionError: the weight is not finite.
        """
        if torch.compiler.is_compiling():
            # None can be kept while a graph is traced. One that was before is a constant of the graph, which `id` has
            # guarded by the identity of the tensor; `is` guards nothing, but `id` is only for what the graph is given.
            for kept in () if _needs_graph(base) else self._kept.get(path, ()):
                if kept.tensor() is base and id(kept.tensor()) == id(base):
                    return kept.parts
            return _decompose(base, layout, view)
        if base.is_meta or _needs_graph(base) or torch._C._functorch.is_functorch_wrapped_tensor(base):
            return self._decompose(path, base, layout, view)
        found = self._find(path, base)
        if found is None:
            with self._lock:
                found = self._find(path, base) or self._add(path, base, layout, view)
        return found

    def _find(self, path: str, base: Tensor) -> Decomposition | None:
        for kept in self._kept.get(path, ()):
            if kept.tensor() is base and kept.version == _version(base):
                return kept.parts
        return None

    def _add(self, path: str, base: Tensor, layout: Layout, view: tuple[int, ...]) -> Decomposition:
        version = _version(base)
        # What is kept outlives the call, so it must be plain: no part of a graph, of a map, or of inference mode.
        with temporarily_clear_interpreter_stack(), torch.inference_mode(mode=False), torch.no_grad():
            parts = self._decompose(path, base.detach(), layout, view)
            if not torch.isfinite(parts.sigma).all():
                raise OptionError(f"{self.name}: the base weight {path!r} cannot be decomposed: it is not finite")
        others = [kept for kept in self._kept.get(path, ()) if kept.tensor() is not None and kept.tensor() is not base]
        self._kept[path] = (*others, _Kept(weakref.ref(base), version, parts))
        return parts

    def _decompose(self, path: str, base: Tensor, layout: Layout, view: tuple[int, ...]) -> Decomposition:
        try:
            return _decompose(base, layout, view)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise OptionError(f"{self.name}: the base weight {path!r} cannot be decomposed: {error}") from error


def _decompose(base: Tensor, layout: Layout, view: tuple[int, ...]) -> Decomposition:
    matrix = layout.to_matrix(base).reshape(view)
    dtype = torch.promote_types(base.dtype, torch.float32)
    return Decomposition(*torch.linalg.svd(matrix.to(dtype), full_matrices=False))


def _needs_graph(base: Tensor) -> bool:
    return base.requires_grad and torch.is_grad_enabled()


def _version(base: Tensor) -> int:
    return 0 if base.is_inference() else base._version

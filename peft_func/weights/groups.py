"""Weights that differ along the batch: sample by sample (routing), or member by member (ensembles).

The leading axis of every activation is taken as `count` groups of `size` consecutive samples. The weights of a group
are matrices with one more axis in front, `[count, out, in]`, in which whatever all groups share (the base weight)
stays as it is: its product runs once, over the whole batch.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from peft_func.errors import RouteError, TreeError
from peft_func.weights.layout import Layout, Storage
from peft_func.weights.matrix import Dense, Matrix
from peft_func.weights.operator import Operator, full_precision


@dataclass(frozen=True)
class Groups:
    """How the leading axis falls into groups.

    What is as long as the batch by chance must not be taken for it: a sequence, or a tensor of the model's own.

    Attributes:
        count: the number of groups.
        size: the consecutive samples in each.
        weights: the shapes of the model's weights.
        tables: those of them, and of its buffers, that a model may use as activations (queries, positions).
        known: whether the model has been seen, in a batch of another length, to keep the batch on the leading axis.
    """

    count: int
    size: int
    weights: frozenset[tuple[int, ...]] = frozenset()
    tables: frozenset[tuple[int, ...]] = frozenset()
    known: bool = False

    @property
    def total(self) -> int:
        """The samples in the batch."""
        return self.count * self.size

    def split(self, x: Tensor, what: str, *, flattened: bool = False, inner: Sequence[int] | None = None) -> Tensor:
        """View `[total, ...]` as `[count, size, ...]`; one sample for all, `[1, ...]`, is repeated.

        Args:
            x: an activation.
            what: who asks, for the message.
            flattened: whether `[total * n, ...]` is meant too: samples whose own positions were joined to the batch.
            inner: the lengths of the axes that could be the batch as well; by default, of all but the first and last.

        Raises:
            RouteError: its leading axis is not the batch, or cannot be told from something as long.
        """
        if self.count == 1 and x.dim():
            return x.unsqueeze(0)  # whatever its axes are, all of it belongs to the one group
        inner = x.shape[1:-1] if inner is None else inner
        ambiguous = self.total in inner or (x.shape[:1] == (self.total,) and tuple(x.shape) in self.tables)
        if ambiguous and not self.known:
            raise RouteError(
                f"{what} meets an activation of shape {tuple(x.shape)} in a batch of {self.total}, and cannot tell "
                "which axis is the batch; a batch of another length can be told"
            )
        rows = x.shape[0] if x.dim() else 0
        if rows == 1 and self.total > 1:
            x = x.expand(self.total, *x.shape[1:])
        elif rows == 0 or rows % self.total or (rows != self.total and not flattened):
            raise RouteError(
                f"{what} meets an activation of shape {tuple(x.shape)} in a batch of {self.total}: its leading axis is "
                "not the batch, so its samples cannot be told apart"
            )
        return x.reshape(self.count, x.shape[0] // self.count, *x.shape[1:])


def spare_groups(count: int, size: int, lengths: Collection[int]) -> int:
    """Return how many groups more make a batch that is not as long as any of these."""
    return 0 if count == 1 else next(n for n in range(len(lengths) + 1) if (count + n) * size not in lengths)


def column(vector: Tensor) -> Tensor:
    """View a vector, or a number, as a matrix of one column."""
    return vector.reshape(-1, 1)


class Grouped(Operator):
    """An effective weight with one more axis in front, over the groups of a batch.

    A vector (a bias, a norm's weight) is held as a matrix of one column. A tensor of the expression with an axis more
    than it has in a single matrix differs between groups, and has that axis in front.

    With `take`, the axis of `source` is over adapters instead, and `take` gives the matrix of the groups each time that
    the weight is used: what is gathered for a batch is there for one use only.
    """

    def __init__(
        self,
        source: Matrix,
        groups: Groups,
        layout: Layout,
        dtype: torch.dtype,
        path: str,
        take: Callable[[Matrix], Matrix] | None = None,
    ) -> None:
        single = (prod(layout.shape), 1) if layout.storage is Storage.VECTOR else layout.matrix_shape
        if source.shape[-len(single) :] != single or (
            take is None and source.shape[: -len(single)] not in ((), (groups.count,))
        ):
            raise TreeError(f"{path}: a matrix of shape {source.shape} for {groups.count} groups of {single}")
        self.source = source
        self.take = take
        self.groups = groups
        self.layout = layout
        self.dtype = dtype
        self.path = path

    @property
    def matrix(self) -> Matrix:  # type: ignore[override]
        """The expression over the groups."""
        return self.source if self.take is None else self.take(self.source)

    @property
    def has_dropout(self) -> bool:
        return self.source.has_dropout

    def tensors(self) -> tuple[Tensor, ...]:
        return self.source.tensors()

    @property
    def is_vector(self) -> bool:
        """Whether the parameter has fewer than two dimensions."""
        return self.layout.storage is Storage.VECTOR

    def exact(self) -> Tensor:
        """Refuse: it stands for many weights.

        Raises:
            RouteError: always.
        """
        raise RouteError(
            f"{self.path!r} is a weight for each of {self.groups.count} groups of samples, and has no one dense form; "
            "merge the weights of one adapter: pf.merge(adapter.apply(frozen, tree))"
        )

    def each(self) -> Tensor:
        """Form all of them: `[count, *shape]`."""
        matrix = self.matrix
        with full_precision(self.device):
            dense = matrix.dense(matrix.compute_dtype).to(self.dtype)
        if len(matrix.shape) == (2 if self.is_vector else len(self.layout.matrix_shape)):
            dense = dense.expand(self.groups.count, *dense.shape)
        if self.is_vector:
            return dense.reshape(self.groups.count, *self.layout.shape)
        return torch.func.vmap(self.layout.to_stored)(dense)

    def replace(self, matrix: Matrix) -> "Grouped":
        return Grouped(matrix, self.groups, self.layout, self.dtype, self.path)

    def among(self, groups: Groups) -> "Grouped":
        """Return it for the same groups, of which more is known."""
        return Grouped(self.source, groups, self.layout, self.dtype, self.path, self.take)

    def lengthened(self, groups: Groups) -> "Grouped":
        """Return it for more groups; those behind its own are like the first."""
        extra = 0 if self.is_vector else len(self.layout.batch)
        more = groups.count - self.groups.count

        def longer(tensor: Tensor, ndim: int) -> Tensor:
            if tensor.dim() == ndim + extra:
                return tensor
            return torch.cat([tensor, tensor[:1].expand(more, *tensor.shape[1:])])

        return Grouped(self.matrix.map(longer), groups, self.layout, self.dtype, self.path)

    def take_apart(self) -> tuple[list[Tensor], list[int | None], Callable[[Sequence[Tensor]], Tensor | Operator]]:
        """Return its tensors, the axis of each over which the groups lie (or None), and how one group's is built."""
        axes: list[int | None] = []
        extra = 0 if self.is_vector else len(self.layout.batch)

        def note(tensor: Tensor, ndim: int) -> Tensor:
            axes.append(0 if tensor.dim() > ndim + extra else None)
            return tensor

        whole = self.matrix
        tensors = list(whole.map(note).tensors())

        def one(own: Sequence[Tensor]) -> Tensor | Operator:
            rest = iter(own)
            matrix = whole.map(lambda *_: next(rest))
            if self.is_vector:
                return matrix.dense(self.dtype).reshape(self.layout.shape)
            if isinstance(matrix, Dense):
                return self.layout.to_stored(matrix.tensor).to(self.dtype)
            return Operator(matrix, self.layout, self.dtype, self.path)

        return tensors, axes, one

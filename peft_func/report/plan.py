"""How the low-rank products of an adapter would be computed for a batch, and why."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from peft_func.report.table import aligned
from peft_func.transforms.bind import Adapter
from peft_func.trees.paths import map_leaves
from peft_func.weights.graph import Choice, Graph, Shape, listening
from peft_func.weights.matrix import Matrix
from peft_func.weights.operator import Operator


class Planned(NamedTuple):
    """One product with an adapted weight.

    Attributes:
        path: the weight's name.
        shape: tokens, widths and rank; None where nothing is chosen.
        graph: what computes it: `"composed"`, `"factored"` or `"formed"`.
        factored: multiply-adds with the factors (composed or in one function), without those that the base has by
            itself; None likewise.
        formed: those with the matrix formed.
        reason: in words.
    """

    path: str
    shape: Shape | None
    graph: str
    factored: int | None
    formed: int | None
    reason: str


@dataclass(frozen=True)
class Plan:
    """What `plan` found; `print` it, or read its rows.

    Attributes:
        rows: one for each product, in the order of the calls.
    """

    rows: tuple[Planned, ...]

    def __str__(self) -> str:
        head = ("weight", "tokens", "in", "out", "rank", "graph", "factored", "formed", "because")
        cells: list[tuple[str, ...]] = [head]
        for row in self.rows:
            shape = ("", "", "", "") if row.shape is None else tuple(map(str, row.shape[:4]))
            counts = tuple("" if count is None else _millions(count) for count in (row.factored, row.formed))
            cells.append((row.path, *shape, row.graph, *counts, row.reason))
        first, *others = (line.rstrip() for line in aligned(cells, "<>>>><>><"))
        note = "factored, formed: millions of multiply-adds in a step, besides those of the base"
        return "\n".join([first, "-" * len(first), *others, note])


def plan(adapter: Adapter, /, *args: Any, **kwargs: Any) -> Plan:
    """Return how each low-rank product would be computed in a training step, and why (see `pf.graph`).

    The model is called once with the adapter's first values, gradients on; nothing is kept.

    Args:
        adapter: a bound method.
        *args: a batch, as the model takes it. Only its shapes and dtypes matter.
        **kwargs: likewise.

    Example:
        >>> import torch, peft_func as pf
        >>> adapter = pf.bind(pf.lora("weight", rank=8), pf.functionalize(torch.nn.Linear(128, 128)))
        >>> print(pf.plan(adapter, torch.ones(4096, 128)))
        weight  tokens   in  out  rank  graph   factored  formed  because
        -----------------------------------------------------------------
        weight    4096  128  128     8  formed     25.17   16.91  forming the matrix costs less
        factored, formed: millions of multiply-adds in a step, besides those of the base
    """
    frozen, trainable = adapter.init(0)
    leaves = map_leaves(lambda leaf: leaf.detach().requires_grad_(leaf.is_floating_point()), trainable)
    seen = _Seen()
    devices = {op.device for op in adapter.model.params.values() if op.device.type == "cuda"}
    with torch.random.fork_rng(devices), torch.enable_grad(), listening(seen.chose):
        weights = adapter.apply(frozen, leaves)
        watched = {path: _watched(op, seen) for path, op in weights.items() if isinstance(op, Operator)}
        adapter.model(weights.updated(watched), *args, **kwargs)
    chosen = {row.path for row in seen.rows}
    others = [_unchosen(path, op) for path, op in watched.items() if path not in chosen]
    return Plan((*seen.rows, *others))


class _Seen:
    """Puts together the weight that is asked for its matrix, and the choice that follows."""

    def __init__(self) -> None:
        self.path = ""
        self.rows: list[Planned] = []

    def chose(self, shape: Shape, choice: Choice) -> None:
        costs, graph = choice.costs, choice.graph
        formed = costs[Graph.FORMED] if shape.may_form else None
        factored = costs[Graph.COMPOSED if graph is Graph.COMPOSED else Graph.FACTORED]
        self.rows.append(Planned(self.path, shape, graph.value, factored, formed, choice.reason))


class _Watched(Operator):
    """An operator that says when its matrix is asked for."""

    seen: _Seen

    @property
    def matrix(self) -> Matrix:
        if hasattr(self, "seen"):
            self.seen.path = self.path
        return self._matrix

    @matrix.setter
    def matrix(self, matrix: Matrix) -> None:
        self._matrix = matrix

    def replace(self, matrix: Matrix) -> Operator:
        return _watched(super().replace(matrix), self.seen)


def _watched(op: Operator, seen: _Seen) -> _Watched:
    watched = _Watched(op.matrix, op.layout, op.dtype, op.path)
    watched.seen = seen
    return watched


def _unchosen(path: str, op: Operator) -> Planned:
    kind = "a convolution" if op.layout.is_conv else "a lookup, or a matrix of another form"
    return Planned(path, None, Graph.COMPOSED.value, None, None, f"{kind}: plain operators")


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f}"

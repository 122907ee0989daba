"""Which graph computes a low-rank product: a cost model in multiply-adds, a way to force it, and who wants to know.

With T tokens, a matrix `[o, i]`, rank r, u = x A^T and v = dy B, everything besides the two products with the base
costs, in a training step,

    factored   r * 3 T (i + o)             u, u B^T; then v, v A, dA, dB; r T i more if u is computed again
    formed     r * (2 i o + 2 T (i + o))   V = W + s B A in forward and in backward; u, v, dA, dB

so forming pays when tokens are many: T (i + o) above 2 i o. It also reads and writes the weight once more, which no
count of products shows; therefore it has to save a tenth. (The two graphs: Cherniuk et al., RunLoRA, arXiv 2312.03415.)
What is kept for backward is bounded likewise: u is computed again where it is larger than 1/32 of both x and y.

GIFT's x (I + phi psi)^T W^T costs `r * 6 T i`, and a copy of x; or it becomes W + (W phi) psi first, before the choice
above: `r * 2 i o` more, and nothing is copied. That is less where the outputs are fewer, or the weight is small; and in
the first layers of a model, whose input has no gradient: dy W, which phi needs inside, is a product with the base.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from enum import Enum
from typing import Literal, NamedTuple, TypeAlias

from peft_func.errors import OptionError
from peft_func.weights.densify import forming_is_an_error

# Below so many multiply-adds in the base product, plain operators cost less than a Function written in Python.
SMALL = 2**22
SAVING = 9 / 10
KEPT = 1 / 32
# Multiply-adds of narrow products in the time that it takes to copy one number, about, on a CPU.
COPY = 12


class Graph(Enum):
    """How a low-rank product is computed; see `peft_func.weights.fused`."""

    COMPOSED = "composed"
    FACTORED = "factored"
    FORMED = "formed"


class Shape(NamedTuple):
    """What a choice depends on.

    Attributes:
        tokens: T, the rows of the activation.
        inputs: i.
        outputs: o.
        rank: r.
        trains: whether the factors get gradients.
        needs_input: whether the activation does.
        may_form: whether the sum can be formed without a loss: there is a matrix, of the factors' dtype, float32 at
            least, and no dropout. The same is asked for W B to take the place of B.
        may_fuse: whether one autograd function may be used for it.
        input_side: whether the branch is added to the input: x + u B^T goes through the matrix, or B becomes W B first.
    """

    tokens: int
    inputs: int
    outputs: int
    rank: int
    trains: bool
    needs_input: bool
    may_form: bool
    may_fuse: bool
    input_side: bool = False


class Choice(NamedTuple):
    """What was chosen, and why.

    Attributes:
        graph: how it is computed.
        fuses: whether by one autograd function; otherwise by plain operators.
        keeps: whether that keeps u for backward.
        absorbs: whether a branch on the side of the input goes through the matrix first, `W B` in place of B.
        costs: multiply-adds besides those of the base, by graph.
        reason: in words.
    """

    graph: Graph
    fuses: bool
    keeps: bool
    absorbs: bool
    costs: dict[Graph, int]
    reason: str


PLAIN = Choice(Graph.COMPOSED, False, True, False, {}, "small: plain operators cost least")
"""The choice for small products, where the choosing would cost more than what it saves."""

Listener: TypeAlias = Callable[[Shape, Choice], None]

_forced: ContextVar[Graph | None] = ContextVar("graph", default=None)
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def choose(shape: Shape) -> Choice:
    """Choose the graph of one product."""
    choice = _choose(shape, _forced.get(), forming_is_an_error())
    listener = _listener.get()
    if listener is not None:
        listener(shape, choice)
    return choice


def attended() -> bool:
    """Whether a choice is forced, or somebody listens."""
    return _forced.get() is not None or _listener.get() is not None


@functools.lru_cache(maxsize=4096)
def _choose(shape: Shape, forced: Graph | None, no_forming: bool) -> Choice:
    small = forced is None and shape.tokens * shape.inputs * shape.outputs < SMALL
    absorbs = not small and _absorbs(shape)
    costs = costs_of(shape, absorbs=absorbs)
    if small:
        return PLAIN._replace(costs=costs)
    graph, reason = _forced_graph(shape, forced, no_forming) if forced else _cheapest(shape, costs, no_forming)
    if graph is Graph.FACTORED and not shape.may_fuse:
        graph, reason = Graph.COMPOSED, f"{reason}; autograd needs no function for them"
    fuses = graph is not Graph.COMPOSED and shape.may_fuse
    if absorbs and graph is not Graph.FORMED:
        reason += "; W B takes the place of B"
    return Choice(graph, fuses, _keeps(shape), absorbs or (shape.input_side and graph is Graph.FORMED), costs, reason)


def _forced_graph(shape: Shape, forced: Graph, no_forming: bool) -> tuple[Graph, str]:
    if forced is not Graph.FORMED or (shape.may_form and not no_forming):
        return forced, "forced"
    why = "densify='error'" if shape.may_form else "dropout, another dtype, or no matrix there"
    return Graph.FACTORED, f"forced to formed, but not possible: {why}"


def _cheapest(shape: Shape, costs: dict[Graph, int], no_forming: bool) -> tuple[Graph, str]:
    if no_forming or not shape.may_form:
        return Graph.FACTORED, "the matrix cannot be formed here"
    if costs[Graph.FORMED] <= SAVING * costs[Graph.FACTORED]:
        return Graph.FORMED, "forming the matrix costs less"
    cheaper = costs[Graph.FORMED] < costs[Graph.FACTORED]
    return Graph.FACTORED, "forming the matrix saves less than a tenth" if cheaper else "the factors cost less"


def _keeps(shape: Shape) -> bool:
    return shape.rank <= KEPT * max(shape.inputs, shape.outputs)


def _absorbs(shape: Shape) -> bool:
    if not (shape.input_side and shape.may_form):
        return False
    absorbed, inside = (costs_of(shape, absorbs=absorbs)[Graph.COMPOSED] for absorbs in (True, False))
    return absorbed < inside + COPY * shape.tokens * shape.inputs


def costs_of(shape: Shape, *, absorbs: bool) -> dict[Graph, int]:
    """Count multiply-adds besides those of the base, by graph."""
    T, i, o, r, trains, needs_input = shape[:6]
    absorbing = (1 + trains) * i * o if shape.input_side else 0
    inside = shape.input_side and not absorbs
    end = i if inside else o  # the width where the branch ends
    u, through = T * i, T * (i + end)
    v = T * end if trains or needs_input else 0
    again = u if trains and not _keeps(shape) else 0
    composed = through + v + trains * through + needs_input * u + (0 if inside else absorbing)
    formed = (1 + (trains and needs_input)) * i * o + trains * 2 * T * (i + o) + absorbing
    # What is inside has its gradient through the base, even where the input has none.
    base = T * i * o if inside and trains and not needs_input else 0
    factored = base + r * (composed + again)
    return {Graph.COMPOSED: base + r * composed, Graph.FACTORED: factored, Graph.FORMED: r * formed}


@contextlib.contextmanager
def graph(kind: Literal["auto", "composed", "factored", "formed"]) -> Iterator[None]:
    """Choose how low-rank products are computed in this block (and thread), whatever their shapes.

    The values are the same up to rounding. A matrix is never formed where that would lose something (dropout, half
    precision) or where `pf.densify("error")` forbids it; the factors are used there.

    Args:
        kind: `"composed"` of plain operators, `"factored"`, `"formed"`, or `"auto"`, the cheapest for each shape, as
            `pf.plan` explains.

    Raises:
        OptionError: an unknown kind.

    Example:
        >>> import peft_func as pf
        >>> with pf.graph("factored"):
        ...     pass  # a training step here never forms W + s B A
    """
    known = {"auto": None, **{each.value: each for each in Graph}}
    if kind not in known:
        raise OptionError(f"graph takes {', '.join(map(repr, known))}, not {kind!r}")
    token = _forced.set(known[kind])
    try:
        yield
    finally:
        _forced.reset(token)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell a function of every choice in this block (and thread)."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)

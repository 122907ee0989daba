"""What trains, as a table; and how all tables of this room are drawn as text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft_func.transforms.bind import Adapter, check_tree
from peft_func.trees.paths import join, leaves


@dataclass(frozen=True)
class Table:
    """The trainable leaves; `print` it, or read its rows.

    Attributes:
        rows: `(name, shape, count)` for every leaf.
        total: how many values train.
        base: how many values the model has.
        index: whether the text numbers the rows.
    """

    rows: tuple[tuple[str, tuple[int, ...], int], ...]
    total: int
    base: int
    index: bool = False

    @property
    def percent(self) -> float:
        """What trains, in per cent of the model."""
        return 100.0 * self.total / self.base if self.base else 0.0

    def __str__(self) -> str:
        cells: list[tuple[str, ...]] = [("name", "shape", "count")]
        cells += [(name, " x ".join(map(str, shape)) or "scalar", f"{count:,}") for name, shape, count in self.rows]
        cells.append(("total", "", f"{self.total:,}"))
        sides = "<>>"
        if self.index:
            numbers = ["index", *map(str, range(len(self.rows))), ""]
            cells = [(number, *row) for number, row in zip(numbers, cells, strict=True)]
            sides = "<<>>"
        lines = aligned(cells, sides)
        rule = "-" * len(lines[0])
        note = f"{self.percent:.4g} % of the {self.base:,} values of the model train"
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], note])


def aligned(cells: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Return the rows of a table as lines, each column as wide as its widest cell.

    Args:
        cells: the rows; the first holds the headings.
        sides: `<` or `>` for each column: to which side its cells go.
    """
    wide = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, wide, strict=True)) for row in cells
    ]


def table(adapter: Adapter, trainable: Mapping[str, Any], *, index: bool = False) -> Table:
    """Return a table of what trains: name, shape and count of every leaf; totals and per cent.

    Args:
        adapter: a bound method.
        trainable: its second tree.
        index: number the rows, from 0, in a first column.

    Raises:
        TreeError: the tree is not one of this adapter's.

    Example:
        >>> import torch, peft_func as pf
        >>> adapter = pf.bind(pf.lora("weight", rank=2), pf.functionalize(torch.nn.Linear(8, 4)))
        >>> print(pf.table(adapter, adapter.init(0)[1]))
        name           shape  count
        ---------------------------
        lora.weight.A  2 x 8     16
        lora.weight.B  4 x 2      8
        ---------------------------
        total                    24
        66.67 % of the 36 values of the model train
    """
    check_tree(trainable, adapter.spec)
    rows = tuple((join(keys), tuple(tensor.shape), tensor.numel()) for keys, tensor in leaves(trainable))
    base = sum(tensor.numel() for tensor in adapter.model.params.values())
    return Table(rows, sum(count for *_, count in rows), base, index)

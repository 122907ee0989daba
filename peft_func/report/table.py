"""What trains, as a table."""

from collections.abc import Mapping
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
    """

    rows: tuple[tuple[str, tuple[int, ...], int], ...]
    total: int
    base: int

    @property
    def percent(self) -> float:
        """What trains, in per cent of the model."""
        return 100.0 * self.total / self.base if self.base else 0.0

    def __str__(self) -> str:
        cells = [("name", "shape", "count")]
        cells += [(name, " x ".join(map(str, shape)) or "scalar", f"{count:,}") for name, shape, count in self.rows]
        cells.append(("total", "", f"{self.total:,}"))
        wide = [max(len(row[i]) for row in cells) for i in range(3)]
        lines = [f"{a:<{wide[0]}}  {b:>{wide[1]}}  {c:>{wide[2]}}" for a, b, c in cells]
        rule = "-" * len(lines[0])
        note = f"{self.percent:.4g} % of the {self.base:,} values of the model train"
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], note])


def table(adapter: Adapter, trainable: Mapping[str, Any]) -> Table:
    """Return a table of what trains: name, shape and count of every leaf; totals and per cent.

    Args:
        adapter: a bound method.
        trainable: its second tree.

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
    return Table(rows, sum(count for *_, count in rows), base)

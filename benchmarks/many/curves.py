"""What K adapters cost, over K: a batch of fixed size that K adapters share, and K adapters trained side by side."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.many import comparisons as parts
from benchmarks.many.minilm import Encoder

COUNTS = (1, 2, 4, 8, 16, 32)
BATCH, LENGTH = 32, 32
"""Samples and tokens of the batch that is routed; members that train have 2 samples of that length each."""


def measured(encoder: Encoder, rounds: int, *, scale: int = 1) -> dict[str, Any]:
    """Return the shortest seconds of every way, for every number of adapters."""
    found: dict[str, Any] = {"counts": list(COUNTS), "mixed": {}, "training": {}}
    for count in COUNTS:
        mixed = parts.mixed_batch(encoder, count, BATCH // count, LENGTH // scale)
        trained = parts.training(encoder, count, 2, LENGTH // scale, vmap=True)
        for kind, case in (("mixed", mixed), ("training", trained)):
            for name, seconds in measure.interleave(case.calls, rounds, title=case.title).items():
                found[kind].setdefault(name, []).append(round(min(seconds), 6))
    return found


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draw the curves into a file.

    Raises:
        ValueError: matplotlib does not know the file's ending.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    base = found["mixed"][parts.PLAIN]
    for name in (parts.PEFT_MIXED, parts.ROUTE, parts.SORTED):
        left.plot(found["counts"], [t / b for t, b in zip(found["mixed"][name], base, strict=True)], "o-", label=name)
    left.set(title=f"A batch of {BATCH} x {LENGTH} tokens through K adapters", ylabel="time / plain base forward")
    single = found["training"][parts.PEFT_TURN][0]
    for name in (parts.PEFT_TURN, parts.VMAP, parts.FOLD):
        values = [t / single for t in found["training"][name]]
        right.plot(found["counts"], values, "o-", label=name)
    right.set(title=f"K adapters trained, 2 x {LENGTH} tokens each", ylabel="time / one PEFT step")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(found["counts"], [str(count) for count in found["counts"]])
        axes.set_xlabel("K")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    left.set_ylim(bottom=0)
    right.set_yscale("log", base=2)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)

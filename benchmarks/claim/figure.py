"""Accuracy against trained numbers, as a picture."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw every method as a point with its deviation; the linear probe, which trains nothing else, as a line."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for found in results:
        accuracy = 100 * mean(found["accuracies"])
        spread = 100 * stdev(found["accuracies"]) if len(found["accuracies"]) > 1 else 0.0
        if found["trained"] == 0:
            axes.axhline(accuracy, color="0.6", linestyle="--")
            axes.annotate(f"{found['name']}", (0.99, accuracy), xycoords=("axes fraction", "data"), ha="right",
                          va="bottom", color="0.4")  # fmt: skip
            continue
        color = "C3" if found["name"].startswith(("GIFT", "WeGeFT")) else "C0"
        axes.errorbar(found["trained"], accuracy, yerr=spread, fmt="o", color=color, capsize=3)
        left = color == "C3" or found["trained"] == max(other["trained"] for other in results)
        axes.annotate(
            found["name"],
            (found["trained"], accuracy),
            xytext=(-6 if left else 6, 5),
            ha="right" if left else "left",
            textcoords="offset points",
            fontsize=8,
        )
    axes.set_xscale("log")
    axes.set_xlabel("numbers trained besides the head")
    axes.set_ylabel("accuracy on held-out docstrings, %")
    axes.margins(x=0.2)
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)

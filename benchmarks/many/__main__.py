"""`python -m benchmarks.many`: measure, print one table for each comparison, keep the numbers, draw the curves."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks import measure, report
from benchmarks.many import comparisons, curves, minilm, tables

app = typer.Typer(add_completion=False)

MIXED = [(8, 4, 64), (32, 1, 32)]
TRAINING = [(8, 2, 32), (8, 4, 64)]


@app.command()
def main(
    rounds: Annotated[int, typer.Option(help="How often each is timed.")] = 9,
    threads: Annotated[int | None, typer.Option(help="Threads; default: torch's own choice.")] = None,
    with_curves: Annotated[bool, typer.Option("--curves", help="Also the curves over the number of adapters.")] = False,
    with_banks: Annotated[bool, typer.Option("--banks", help="Also banks and the loading of files.")] = False,
    tiny: Annotated[bool, typer.Option(help="A tiny random model: a check of the benchmark, no measurement.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the curves into this file (.svg or .png).")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    show: Annotated[Path | None, typer.Option(help="Measure nothing; show what this file holds.")] = None,
) -> None:
    """Compare many adapters in one pass with PEFT, side by side in one process."""
    record = json.loads(show.read_text(encoding="utf-8")) if show else None
    if record is None:
        record = measured(
            rounds, report.used_threads(threads), with_curves=with_curves or plot is not None, with_banks=with_banks,
            tiny=tiny,
        )  # fmt: skip
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    for entry in record["comparisons"]:
        if markdown:
            typer.echo(tables.markdown(entry))
        else:
            console.print(tables.table(entry))
    if json_path is not None:
        tables.write(json_path, record)
    if plot is not None:
        curves.draw(record["curves"], plot)


def measured(
    rounds: int, threads: int, *, with_curves: bool = False, with_banks: bool = False, tiny: bool = False
) -> dict[str, Any]:
    """Run the comparisons; return their numbers, ready for JSON."""
    scale = 8 if tiny else 1
    encoder = minilm.load(32, tiny=tiny)
    cases = [comparisons.mixed_batch(encoder, k, each, length // scale) for k, each, length in MIXED]
    cases += [comparisons.training(encoder, k, each, length // scale) for k, each, length in TRAINING]
    entries = []
    for case in cases:
        seconds = measure.interleave(case.calls, rounds, title=case.title)
        entries.append(tables.entry(case, seconds))
    record: dict[str, Any] = {"machine": report.machine(threads), "comparisons": entries}
    if with_banks:
        entries += tables.banks(tiny=tiny)
    if with_curves:
        record["curves"] = curves.measured(encoder, max(3, rounds // 2), scale=scale)
    return record


if __name__ == "__main__":
    app()

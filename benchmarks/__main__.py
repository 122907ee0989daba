"""`python -m benchmarks`: measure, print one table, keep the numbers, draw them."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks import devices, peers, plot, report, suite, variants

app = typer.Typer(add_completion=False)

Model = Enum("Model", {name: name for name in suite.CHOICES}, type=str)
Name = Enum("Name", {name: name for name in variants.VARIANTS}, type=str)

WIDTH = 160
"""Of the table: a terminal that is narrower wraps its lines, instead of losing columns."""


@app.command()
def main(
    model: Annotated[list[Model] | None, typer.Option(help="What to measure; several allowed.")] = None,
    rank: Annotated[list[int] | None, typer.Option(help="The rank of every method; several allowed.")] = None,
    rounds: Annotated[int, typer.Option(help="Steps of each row.")] = 7,
    threads: Annotated[int | None, typer.Option(help="Threads; default: torch's own choice.")] = None,
    only: Annotated[list[Name] | None, typer.Option(help="Only these rows.")] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda: the rows for a GPU.")] = "cpu",
    compiled: Annotated[bool, typer.Option("--compile", help="Also torch.compile of LoRA (minutes).")] = False,
    with_memory: Annotated[bool, typer.Option("--memory/--no-memory", help="The peak memory of a step.")] = True,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    show: Annotated[Path | None, typer.Option(help="Measure nothing; print the table of this file.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Add the runs to this file.")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Draw the ratios (.svg or .png).")] = None,
) -> None:
    """Compare training steps of peft_func with those of its peers, side by side in one process."""
    if show is not None:
        records = report.read(show)
    else:
        try:
            where = devices.find(device)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--device") from None
        names = [item.value for item in only or ()]
        chosen = suite.groups(where, [item.value for item in model or ()], rank or (), names, compiled=compiled)
        for line in peers.missing().values():
            typer.echo(line, err=True)
        records = _measured(chosen, rounds, where, report.used_threads(threads), with_memory, json_path)
    if markdown:
        typer.echo(report.markdown(records))
    else:
        Console(width=max(Console().width, WIDTH)).print(report.table(records))
    if plot_path is not None:
        plot.draw(records, plot_path)


def _measured(
    chosen: list[suite.Group], rounds: int, device: torch.device, threads: int, memory: bool, path: Path | None
) -> list[report.Run]:
    """Run the groups; the file has each of them as soon as it is done."""
    records = []
    for number, group in enumerate(chosen, 1):
        typer.echo(f"{number} of {len(chosen)}: {group.title}", err=True)
        records.append(suite.run(group, rounds, device, threads, with_memory=memory))
        if path is not None:
            report.write(path, records[-1:])
    return records


if __name__ == "__main__":
    app()

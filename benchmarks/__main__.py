"""`python -m benchmarks`: measure, and print a table of ratios for each model and rank."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import measure, memory, models, overhead, report, variants

app = typer.Typer(add_completion=False)

Model = Enum("Model", {name: name for name in (*models.MODELS, report.OVERHEAD)}, type=str)
Name = Enum("Name", {name: name for name in variants.VARIANTS}, type=str)


def measure_model(
    model: str, rank: int, rounds: int, *, only: tuple[str, ...] = (), threads: int = 1, with_memory: bool = False
) -> report.Run:
    """Check that the variants of a model agree, and measure their steps.

    Args:
        model: a name of `models.MODELS`.
        rank: of every method.
        rounds: how many steps of each are timed.
        only: names of variants; empty for all.
        threads: of torch, for the record and for the processes that measure memory.
        with_memory: measure peak memory too.

    Raises:
        DifferentComputationError: two variants that should agree do not.
    """
    built = variants.build(models.build(model), rank, only)
    variants.verify(built)
    calls = {name: variant.step for name, variant in built.items()}
    seconds = measure.interleave(calls, rounds, title=f"{model}, rank {rank}")
    peak = memory.peaks(model, built, rank, threads) if with_memory else {}
    return report.run(model, rank, seconds, report.machine(threads), peak)


def measure_overhead(rounds: int, threads: int) -> report.Run:
    """Measure what a call costs besides arithmetic."""
    rank = 4
    seconds = measure.interleave(overhead.build(rank=rank), rounds, title="overhead", warmup=3)
    return report.run(report.OVERHEAD, rank, seconds, report.machine(threads), {})


@app.command()
def main(
    model: Annotated[list[Model] | None, typer.Option(help="What to measure; default: bert, llama, overhead.")] = None,
    rank: Annotated[list[int] | None, typer.Option(help="The rank of every method; several allowed.")] = None,
    rounds: Annotated[int, typer.Option(help="Steps of each variant.")] = 7,
    threads: Annotated[int | None, typer.Option(help="Threads; default: torch's own choice.")] = None,
    only: Annotated[list[Name] | None, typer.Option(help="Only these variants.")] = None,
    with_memory: Annotated[bool, typer.Option("--memory", help="Also the peak memory of a step.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    show: Annotated[Path | None, typer.Option(help="Measure nothing; print the tables of this file.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Add the runs to this file.")] = None,
) -> None:
    """Compare training steps of peft_func with those of its peers, side by side in one process."""
    console = Console()
    console = console if console.is_terminal else Console(width=120)

    def tell(record: report.Run) -> None:
        if markdown:
            typer.echo(report.markdown(record))
        else:
            console.print(report.table(record))

    def keep(record: report.Run) -> None:
        tell(record)
        if json_path is not None:
            report.write(json_path, [record])

    if show is not None:
        for record in report.read(show):
            tell(record)
        return
    used = report.used_threads(threads)
    names = tuple(item.value for item in only or ())
    chosen = [item.value for item in model] if model is not None else ["bert", "llama", report.OVERHEAD]
    for name in chosen:
        if name == report.OVERHEAD:
            keep(measure_overhead(20 * rounds, used))
            continue
        for r in rank or [8]:
            keep(measure_model(name, r, rounds, only=names, threads=used, with_memory=with_memory))


if __name__ == "__main__":
    app()

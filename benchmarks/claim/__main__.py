"""`python -m benchmarks.claim`: accuracy of few trained numbers on real sentences, as a table and a plot.

Every method trains the same classifier: the really pre-trained MiniLM encoder and a linear head, which is told from a
docstring of the standard library which package it comes from. Five seeds (of the first values and of the order of the
sentences) are trained side by side as one stacked tree. The learning rate of each method is chosen before, by one short
run for each candidate on a part of the training sentences.
"""

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import torch
import typer
from transformers import AutoTokenizer

import peft_func as pf
from benchmarks import report
from benchmarks.claim import docstrings, figure
from benchmarks.claim.methods import METHODS, Entry
from benchmarks.claim.train import Classifier, train
from benchmarks.many import minilm

app = typer.Typer(add_completion=False)


def classifier() -> tuple[pf.FunctionalModel, docstrings.Task]:
    """Return the model and the task."""
    task = docstrings.load(AutoTokenizer.from_pretrained(minilm.folder(), local_files_only=True))
    return pf.functionalize(Classifier(minilm.pretrained(), len(task.names)).eval()), task


def chosen_rate(model: pf.FunctionalModel, entry: Entry, task: docstrings.Task) -> float:
    """Return the best learning rate, by one epoch on three quarters of the training sentences and the last quarter."""
    cut = len(task.train[0]) * 3 // 4
    parts = [tuple(column[part] for column in task.train) for part in (slice(0, cut), slice(cut, None))]
    inner = docstrings.Task(parts[0], parts[1], task.names)
    found = {
        rate: train(model, entry.method, inner, seeds=1, epochs=1, rate=rate, title=f"{entry.name}, {rate}")
        for rate in entry.rates
    }
    return max(found, key=lambda rate: found[rate].accuracies[0])


@app.command()
def main(
    seeds: Annotated[int, typer.Option(help="Members of each stack.")] = 5,
    epochs: Annotated[int, typer.Option(help="Passes over the sentences.")] = 2,
    only: Annotated[list[str] | None, typer.Option(help="Names of methods.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write (and add) the numbers to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw accuracy against trained numbers.")] = None,
    show: Annotated[Path | None, typer.Option(help="Train nothing; show what this file holds.")] = None,
    one: Annotated[str | None, typer.Option(help="Train this method and print JSON: a process of its own.")] = None,
) -> None:
    """Compare methods on real sentences."""
    if one is not None:
        typer.echo(json.dumps(run(next(entry for entry in METHODS if entry.name == one), seeds, epochs)))
        return
    record: dict[str, Any] = {"machine": report.machine(torch.get_num_threads()), "seeds": seeds, "epochs": epochs}
    source = show or json_path
    record["results"] = json.loads(source.read_text(encoding="utf-8"))["results"] if source and source.exists() else []
    if show is None:
        for entry in METHODS:
            if only is None or entry.name in only:
                found = _in_a_process(entry.name, seeds, epochs)
                record["results"] = [r for r in record["results"] if r["name"] != entry.name] + [found]
                typer.echo(f"{entry.name}: {mean(found['accuracies']):.4f}", err=True)
                if json_path is not None:
                    json_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    order = [entry.name for entry in METHODS]
    results = sorted(record["results"], key=lambda r: order.index(r["name"]))
    typer.echo(markdown(results))
    if plot is not None:
        figure.draw(results, plot)


def run(entry: Entry, seeds: int, epochs: int) -> dict[str, Any]:
    """Train all seeds of one method; return what came out."""
    model, task = classifier()
    rate = chosen_rate(model, entry, task)
    before = _peak()
    found = train(model, entry.method, task, seeds=seeds, epochs=epochs, rate=rate, title=entry.name)
    return {
        "name": entry.name,
        "rate": rate,
        "accuracies": found.accuracies,
        "trained": found.trained,
        "seconds": found.seconds,
        "peak_mib": _peak(),
        "peak_before_mib": before,
    }


def _in_a_process(name: str, seeds: int, epochs: int) -> dict[str, Any]:
    """Run one method in a process of its own, so that its peak of memory is its own."""
    command = [sys.executable, "-m", "benchmarks.claim", "--one", name, "--seeds", str(seeds), "--epochs", str(epochs)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603
    return json.loads(done.stdout.splitlines()[-1])


def _peak() -> float:
    """Return the most memory that this process has held, MiB (Linux)."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    found = [line for line in lines if line.startswith("VmHWM")]
    return round(int(found[0].split()[1]) / 1024, 1) if found else float("nan")


def markdown(results: list[dict[str, Any]]) -> str:
    """Return the table."""
    lines = [
        "| method | trained besides the head | accuracy, % | deviation | learning rate | seconds | peak MiB |",
        "| :-- | --: | --: | --: | --: | --: | --: |",
    ]
    for r in results:
        spread = stdev(r["accuracies"]) if len(r["accuracies"]) > 1 else 0.0
        lines.append(
            f"| {r['name']} | {r['trained']:,} | {100 * mean(r['accuracies']):.1f} | {100 * spread:.1f} | "
            f"{r['rate']:g} | {r['seconds']:.0f} | {r['peak_mib']:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    app()

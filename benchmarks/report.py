"""Runs as data: a table on the terminal, a table in Markdown, a JSON file."""

import datetime as dt
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import torch
from rich.table import Table

from benchmarks import models, overhead, variants

Run: TypeAlias = dict[str, Any]
"""One table: model, rank, seconds by variant, peak bytes by variant (where measured), and the machine."""

OVERHEAD = "overhead"


def machine(threads: int) -> dict[str, Any]:
    """Say where, when and with what a run was made."""
    packages = ("torch", "transformers", "peft")
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.processor() or platform.machine()


def run(
    model: str, rank: int, seconds: Mapping[str, list[float]], info: Mapping[str, Any], peak: Mapping[str, int]
) -> Run:
    """Make the record of a run; times are kept to the microsecond, those of single calls to a hundredth of that."""
    digits = 8 if model == OVERHEAD else 6
    rounded = {name: [round(value, digits) for value in values] for name, values in seconds.items()}
    return {"model": model, "rank": rank, "machine": dict(info), "seconds": rounded, "peak_bytes": dict(peak)}


def ratio(seconds: Mapping[str, list[float]], name: str, peer: str) -> tuple[float, float]:
    """Return `(low, median)`: the shortest time over the peer's shortest, and the median of the rounds' ratios."""
    pairs = zip(seconds[name], seconds[peer], strict=True)
    return min(seconds[name]) / min(seconds[peer]), median(ours / theirs for ours, theirs in pairs)


def title(record: Run) -> str:
    """Return the heading of a run."""
    rounds = len(next(iter(record["seconds"].values())))
    if record["model"] == OVERHEAD:
        return f"A call of 150 linear layers of 8 x 8, LoRA of rank {record['rank']}, {rounds} rounds"
    return f"{models.TITLES[record['model']]}, rank {record['rank']}, {rounds} rounds"


def header(record: Run) -> list[str]:
    """Return the names of the columns."""
    base, unit = ("plain", "us") if record["model"] == OVERHEAD else ("floor", "ms")
    columns = ["", f"min {unit}", f"median {unit}", "against", "low", "median", f"/ {base}, low", "median"]
    return columns + (["peak MiB"] if record["peak_bytes"] else [])


def rows(record: Run) -> Iterator[list[str]]:
    """Yield the lines of the table: one for each variant, and one more for each further peer."""
    small = record["model"] == OVERHEAD
    peers, base, scale = (overhead.PEERS, overhead.PLAIN, 1e6) if small else (variants.PEERS, variants.FLOOR, 1e3)
    digits = 0 if small or min(map(min, record["seconds"].values())) > 0.1 else 1
    seconds, peak = record["seconds"], record["peak_bytes"]
    for name, values in seconds.items():
        line = [name, f"{scale * min(values):.{digits}f}", f"{scale * median(values):.{digits}f}"]
        against = [[peer, *_two(seconds, name, peer)] for peer in peers.get(name, ()) if peer in seconds]
        floor = _two(seconds, name, base) if base in seconds and name != base else ["", ""]
        memory = ([f"{peak[name] / 2**20:.1f}" if name in peak else ""]) if peak else []
        first, *more = against or [["", "", ""]]
        yield line + first + floor + memory
        for other in more:
            yield ["", "", "", *other, "", "", *["" for _ in memory]]


def _two(seconds: Mapping[str, list[float]], name: str, peer: str) -> list[str]:
    return [f"{value:.2f}" for value in ratio(seconds, name, peer)]


def table(record: Run) -> Table:
    """Return the table for a terminal."""
    result = Table(title=title(record), title_justify="left")
    for i, column in enumerate(header(record)):
        result.add_column(column, justify="left" if i in (0, 3) else "right", no_wrap=True)
    for line in rows(record):
        result.add_row(*line)
    return result


def markdown(record: Run) -> str:
    """Return the same table in Markdown."""
    names = header(record)
    align = [":--" if i in (0, 3) else "--:" for i in range(len(names))]
    lines = [names, align, *rows(record)]
    return f"**{title(record)}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def read(path: Path) -> list[Run]:
    """Return the runs of a file; none if there is no file."""
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []


def write(path: Path, records: list[Run]) -> None:
    """Write runs to a JSON file; those of the same model and rank that it holds are replaced, others kept."""
    runs = {(record["model"], record["rank"]): record for record in [*read(path), *records]}
    text = json.dumps({"runs": list(runs.values())}, indent=1)
    # One line for each list of times: short, and readable in a diff.
    text = re.sub(r"\[[\d\s.,e-]*\]", lambda found: " ".join(found[0].split()), text)
    path.write_text(text + "\n", encoding="utf-8")


def used_threads(wanted: int | None) -> int:
    """Set the number of threads, if one is wanted, and return how many there are."""
    if wanted:
        torch.set_num_threads(wanted)
    return torch.get_num_threads()

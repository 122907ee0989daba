"""Runs as data: one table on the terminal, the same in Markdown, a JSON file."""

import datetime as dt
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from math import floor, log10
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import torch
from rich import box
from rich.table import Table

Run: TypeAlias = dict[str, Any]
"""One group of rows, measured in turn.

Keys: `model`, `rank`, `kind`, `title`, `weights`, `machine`; `base`, the row that overhead is counted from; `against`,
the peers by row; `seconds`, those of every round by row; `peak_bytes` by row, where measured.
"""

HEADER = [
    "", "min ms", "median ms", "against", "time, low", "median", "/ floor, low", "median", "overhead, low", "median",
    "peak MiB", "/ peer",
]  # fmt: skip
TEXT = (0, 3)
"""The columns that hold words."""


def machine(threads: int, device: str | None = None) -> dict[str, Any]:
    """Say where, when and with what a run was made; libraries that are not installed are left out."""
    there = {found.name for found in importlib.metadata.distributions()}
    names = ("torch", "transformers", "peft", "loralib", "torchtune", "torchao")
    return {
        "device": device or cpu_name(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names if name in there},
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
    }


def cpu_name() -> str:
    """Return the model of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.processor() or platform.machine()


def rounded(seconds: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Keep five digits of every time: more than any of them repeats."""
    return {name: [float(f"{value:.5g}") for value in values] for name, values in seconds.items()}


def ratio(seconds: Mapping[str, list[float]], name: str, peer: str) -> tuple[float, float]:
    """Return `(low, median)`: the shortest time over the peer's shortest, and the median of the rounds' ratios."""
    pairs = zip(seconds[name], seconds[peer], strict=True)
    return min(seconds[name]) / min(seconds[peer]), median(ours / theirs for ours, theirs in pairs)


def overhead(seconds: Mapping[str, list[float]], base: str, name: str, peer: str) -> tuple[float, float]:
    """Return `(low, median)` of what a row costs above the base, over what the peer costs above it.

    Both are `(a - 1) / (b - 1)`, where a and b are the ratios of the row and of the peer to the base; not a number
    where the peer costs less than a twentieth above it: what is left then is noise over noise.
    """
    pairs = zip(ratio(seconds, name, base), ratio(seconds, peer, base), strict=True)
    low, middle = ((ours - 1) / (theirs - 1) if theirs >= 1.05 else float("nan") for ours, theirs in pairs)
    return low, middle


def rows(record: Run) -> Iterator[list[str]]:
    """Yield the lines of a run: one for each row, and one more for each further peer."""
    seconds, peak, base = record["seconds"], record["peak_bytes"], record["base"]
    for name, values in seconds.items():
        peers = [peer for peer in record["against"].get(name, ()) if peer in seconds]
        first, *more = [_against(record, name, peer) for peer in peers] or [(["", "", ""], ["", ""], [""])]
        times = [name, _three(1e3 * min(values)), _three(1e3 * median(values))]
        above = _two(*ratio(seconds, name, base)) if base in seconds else ["", ""]
        held = [f"{peak[name] / 2**20:.1f}" if name in peak else ""]
        yield [*times, *first[0], *above, *first[1], *held, *first[2]]
        for ratios, over, memory in more:
            yield ["", "", "", *ratios, "", "", *over, "", *memory]


def _against(record: Run, name: str, peer: str) -> tuple[list[str], list[str], list[str]]:
    seconds, peak, base = record["seconds"], record["peak_bytes"], record["base"]
    counted = base in seconds and base not in (name, peer)
    over = _two(*overhead(seconds, base, name, peer)) if counted else ["", ""]
    return [peer, *_two(*ratio(seconds, name, peer))], over, _two(peak[name] / peak[peer]) if peer in peak else [""]


def _two(*values: float) -> list[str]:
    return ["" if value != value else f"{value:.2f}" for value in values]


def _three(value: float) -> str:
    """Write a number with three digits, or all of those before the point."""
    return f"{value:.{max(0, 2 - floor(log10(value)))}f}"


def heading(record: Run) -> list[str]:
    """Return the line above a run's rows."""
    rounds = len(next(iter(record["seconds"].values())))
    return [record["title"], f"{rounds} rounds", *["" for _ in HEADER[2:]]]


def table(records: list[Run]) -> Table:
    """Return the one table of several runs, for a terminal."""
    result = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    for i, column in enumerate(HEADER):
        word = i in TEXT
        result.add_column(
            column.replace(", ", "\n"),
            justify="left" if word else "right",
            no_wrap=not word,
            max_width=32 if word else 9,
        )
    for record in records:
        result.add_section()
        result.add_row(*heading(record), style="bold")
        for line in rows(record):
            result.add_row(*line)
    return result


def markdown(records: list[Run]) -> str:
    """Return the same table in Markdown."""
    lines = [HEADER, [":--" if i in TEXT else "--:" for i in range(len(HEADER))]]
    for record in records:
        title, *rest = heading(record)
        lines += [[f"**{title}**", *rest], *rows(record)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def read(path: Path) -> list[Run]:
    """Return the runs of a file; none if there is no file."""
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []


def write(path: Path, records: list[Run]) -> None:
    """Write runs to a JSON file; those of the same rows that it holds are replaced, others kept."""
    runs = {(record["model"], record["rank"], record["kind"]): record for record in [*read(path), *records]}
    text = json.dumps({"runs": list(runs.values())}, indent=1)
    # One line for each list: short, and readable in a diff.
    text = re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text)
    path.write_text(text + "\n", encoding="utf-8")


def used_threads(wanted: int | None) -> int:
    """Set the number of threads, if one is wanted, and return how many there are."""
    if wanted:
        torch.set_num_threads(wanted)
    return torch.get_num_threads()

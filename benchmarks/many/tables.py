"""Comparisons as data and as tables."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from benchmarks import bank, loading
from benchmarks.many.comparisons import Comparison
from benchmarks.report import ratio

HEADER = ["", "min ms", "median ms", "against", "low", "median"]


def entry(case: Comparison, seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    """Return a comparison's numbers, ready for JSON."""
    against = {name: list(peers) for name, peers in case.against.items() if name in seconds}
    rounded = {name: [round(value, 7) for value in values] for name, values in seconds.items()}
    return {"title": case.title, "seconds": rounded, "against": against}


def banks(*, tiny: bool = False) -> list[dict[str, Any]]:
    """Measure the loading of 50 folders, and a bank with few and with many adapters; return their entries."""
    sizes = (2, 4) if tiny else (10, 1000)
    loaded = loading.seconds(4, 1, layers=1, hidden=32) if tiny else loading.seconds()
    found = bank.measure("tiny" if tiny else "bert", sizes=sizes, rounds=3 if tiny else 101)
    ours = [loading.ONE, loading.BOUND, loading.MANY]
    entries = [entry(Comparison("Loading adapter folders", {}, {name: [loading.PEFT] for name in ours}), loaded)]
    for what, by_size in found.items():
        few, many = (f"{what}, {size} there" for size in sizes)
        seconds = {few: [by_size[sizes[0]]], many: [by_size[sizes[1]]]}
        entries.append(entry(Comparison(f"A bank: {what}, medians", {}, {many: [few]}), seconds))
    return entries


def rows(found: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield the lines of a table: one for each variant, and one more for each further peer."""
    seconds = found["seconds"]
    digits = 1 if min(map(min, seconds.values())) > 0.01 else 3
    for name, values in seconds.items():
        line = [name, f"{1e3 * min(values):.{digits}f}", f"{1e3 * median(values):.{digits}f}"]
        against = [
            [peer, *(f"{value:.2f}" for value in ratio(seconds, name, peer))] for peer in found["against"].get(name, ())
        ]
        first, *more = against or [["", "", ""]]
        yield line + first
        for other in more:
            yield ["", "", "", *other]


def table(found: Mapping[str, Any]) -> Table:
    """Return the table for a terminal."""
    result = Table(title=f"{found['title']}, {_rounds(found)} rounds", title_justify="left")
    for i, column in enumerate(HEADER):
        result.add_column(column, justify="left" if i in (0, 3) else "right", no_wrap=True)
    for line in rows(found):
        result.add_row(*line)
    return result


def markdown(found: Mapping[str, Any]) -> str:
    """Return the same table in Markdown."""
    align = [":--" if i in (0, 3) else "--:" for i in range(len(HEADER))]
    lines = [HEADER, align, *rows(found)]
    heading = f"**{found['title']}, {_rounds(found)} rounds**"
    return heading + "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Write the numbers to a JSON file, each list of times on one line."""
    text = re.sub(r"\[[\d\s.,e-]*\]", lambda found: " ".join(found[0].split()), json.dumps(record, indent=1))
    path.write_text(text + "\n", encoding="utf-8")


def _rounds(found: Mapping[str, Any]) -> int:
    return len(next(iter(found["seconds"].values())))

"""The demo's tables, as rich draws them."""

from collections.abc import Callable, Sequence
from statistics import mean

from rich import box
from rich.table import Table

import peft_func as pf
from peft_func.cli.scores import Scores


def parameter_table(table: pf.Table, members: int) -> Table:
    """Draw what trains in one member.

    Args:
        table: what `pf.table` says of it.
        members: how many there are, for the caption.
    """
    drawn = Table(
        title="What trains, in each member",
        caption=f"{table.percent:.1f} % of the model's {table.base:,} values; {members} members, "
        f"{members * table.total:,} values in all",
        box=box.SIMPLE_HEAD,
    )
    drawn.add_column("name", overflow="fold")
    drawn.add_column("shape", justify="right")
    drawn.add_column("count", justify="right")
    for name, shape, count in table.rows:
        drawn.add_row(name, " x ".join(map(str, shape)), f"{count:,}")
    drawn.add_section()
    drawn.add_row("total", "", f"{table.total:,}", style="bold")
    return drawn


def score_table(base: Scores, members: Sequence[Scores], best: int, ensemble: Scores, images: int) -> Table:
    """Draw the scores of all predictors.

    Args:
        base: the scores of the base.
        members: those of the members.
        best: the number of the best member.
        ensemble: the scores of the ensemble.
        images: how many held-out images they are for.
    """
    drawn = Table(
        title=f"On {images} held-out digits 5 to 9",
        caption="ECE: expected calibration error (10 bins). NLL: negative log-likelihood.\n"
        "Min and max: of each column by itself. Best: most accurate, in hindsight.",
        box=box.SIMPLE_HEAD,
    )
    drawn.add_column("predictor")
    for heading in ("accuracy (%)", "ECE (%)", "NLL (nats per image)"):
        drawn.add_column(heading, justify="right")

    def row(label: str, of: Callable[[Callable[[Scores], float]], float], style: str = "") -> None:
        accuracy, ece, nll = of(lambda s: s.accuracy), of(lambda s: s.ece), of(lambda s: s.nll)
        drawn.add_row(label, f"{100 * accuracy:.1f}", f"{100 * ece:.1f}", f"{nll:.3f}", style=style)

    row("base, not adapted", lambda get: get(base))
    drawn.add_section()
    row("members, mean", lambda get: mean(map(get, members)))
    row("members, min", lambda get: min(map(get, members)))
    row("members, max", lambda get: max(map(get, members)))
    row(f"best member (number {best + 1})", lambda get: get(members[best]))
    drawn.add_section()
    row(f"ensemble of {len(members)}", lambda get: get(ensemble), style="bold")
    return drawn

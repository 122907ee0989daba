"""The ratios as a picture: one bar for each row of ours against its first peer, with the floor marked."""

from pathlib import Path

from benchmarks.report import Run, ratio

INK = "#7f7f7f"
"""Of words and lines: as readable on white as on black, since the picture itself has no background."""


def draw(records: list[Run], path: Path) -> None:
    """Draw the bars into a file: the length is the median of the rounds' ratios, the dot the ratio of the lows.

    Raises:
        ValueError: matplotlib does not know the file's ending.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    lines = [
        (record, name, record["against"][name][0])
        for record in records
        for name in record["seconds"]
        if name.startswith("peft_func") and record["against"].get(name)
    ]
    figure = Figure(figsize=(9, 1.2 + 0.38 * len(lines)), layout="constrained")
    axes = figure.subplots()
    for y, (record, name, peer) in enumerate(lines):
        seconds, base = record["seconds"], record["base"]
        low, middle = ratio(seconds, name, peer)
        axes.barh(y, middle, height=0.6, color="#4c92c3")
        axes.plot(low, y, "o", color="#1b4f72", markersize=5, markeredgecolor="white")
        axes.text(max(low, middle) + 0.025, y, f"{middle:.2f}", va="center", color=INK, fontsize=8)
        if base in seconds and peer != base:
            axes.plot([ratio(seconds, base, peer)[1]] * 2, [y - 0.38, y + 0.38], color="#e07b39", linewidth=2)
    axes.axvline(1, color=INK, linestyle="--", linewidth=1)
    labels = [f"{name.removeprefix('peft_func ')} / {peer}\n{record['title']}" for record, name, peer in lines]
    axes.set_yticks(range(len(lines)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("time / time of the peer", color=INK)
    axes.tick_params(colors=INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    marks = [
        Line2D([], [], color="#4c92c3", linewidth=6, label="median of rounds"),
        Line2D([], [], color="#1b4f72", marker="o", linestyle="", label="ratio of lows"),
        Line2D([], [], color="#e07b39", linewidth=2, label="floor"),
        Line2D([], [], color=INK, linestyle="--", linewidth=1, label="peer"),
    ]
    axes.legend(
        handles=marks, frameon=False, labelcolor=INK, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1)
    )
    figure.savefig(path, transparent=True, metadata={"Date": None} if path.suffix == ".svg" else None)

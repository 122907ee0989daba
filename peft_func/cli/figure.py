"""The demo's figure: how the members learned, how far they may be believed, and what they disagree about."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_func.cli.extras import require
from peft_func.cli.scores import Reliability, Scores
from peft_func.cli.train import Curves
from peft_func.interop.atomic import renamed_into

# Okabe and Ito's colours, which the colour-blind can tell apart.
MEMBER, MEAN, ENSEMBLE, BASE, RIGHT, WRONG = "#56B4E9", "#0072B2", "#D55E00", "#777777", "#007A5A", "#B03A00"
COLUMNS = 6
FEWEST = 5  # predictions in a bin that is drawn: the accuracy of fewer is noise
DISPUTED = 2 * COLUMNS


@dataclass(frozen=True)
class Disputed:
    """One image, and what the members take it for.

    Attributes:
        image: `[height, width]`, from 0 (paper) to 1 (ink).
        digit: what it is.
        votes: `{digit: how many members say so}`, the most first; no zeros.
        right: whether the ensemble is right.
    """

    image: Tensor
    digit: int
    votes: dict[int, int]
    right: bool


@dataclass(frozen=True)
class Story:
    """All that the figure shows.

    Attributes:
        title: the line on top.
        curves: how the members learned.
        base: the scores of the base.
        ensemble: those of the ensemble.
        reliability: `{label: bins}`, the members first, the ensemble second.
        disputed: the images on which the members disagree most.
        members: how many there are.
    """

    title: str
    curves: Curves
    base: Scores
    ensemble: Scores
    reliability: dict[str, Reliability]
    disputed: Sequence[Disputed]
    members: int


def write_figure(path: Path, story: Story) -> None:
    """Draw the figure into a PNG file.

    Args:
        path: the file; its folder must exist.
        story: what to show.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    matplotlib = require("matplotlib")
    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11, "font.size": 10}
    # A bare Figure, not pyplot's: no window system, no global list of figures.
    with matplotlib.rc_context(style):
        figure = require("matplotlib.figure").Figure(figsize=(12, 8.4), layout="constrained")
        figure.suptitle(story.title, fontsize=13, fontweight="bold")
        above, below = figure.subfigures(2, 1, height_ratios=[1.05, 1], hspace=0.04)
        loss, accuracy, calibration = above.subplots(1, 3)
        _draw_loss(loss, story)
        _draw_accuracy(accuracy, story)
        _draw_calibration(calibration, story)
        _draw_disputed(below, story)
        with renamed_into(path) as temporary:
            figure.savefig(temporary, dpi=150, format="png")


def _draw_members(axes: Any, steps: list[int], values: Tensor) -> None:
    """Draw one curve for each member, and their mean: `values` is `[len(steps), members]`."""
    members = values.shape[1]
    marker = "." if len(steps) < 5 else None  # a line through one point would not be seen
    lines = axes.plot(steps, values.tolist(), color=MEMBER, linewidth=0.8, alpha=0.65, marker=marker, clip_on=False)
    lines[0].set_label("a member" if members > 1 else "the member")
    if members > 1:
        mean = values.mean(1).tolist()
        axes.plot(steps, mean, color=MEAN, linewidth=1.6, marker=marker, clip_on=False, label="mean of the members")
    axes.set_xlim(0, steps[-1])
    axes.xaxis.get_major_locator().set_params(integer=True)


def _draw_loss(axes: Any, story: Story) -> None:
    values = story.curves.loss
    steps = torch.arange(1, len(values) + 1).tolist()
    _draw_members(axes, steps, values)
    axes.set(title="Loss on the training batches", xlabel="step", ylabel="cross-entropy (nats per image)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _draw_accuracy(axes: Any, story: Story) -> None:
    steps, values = story.curves.evaluated.tolist(), 100 * story.curves.accuracy
    _draw_members(axes, steps, values)
    axes.axhline(100 * story.ensemble.accuracy, color=ENSEMBLE, linestyle="--", label="ensemble, at the end")
    axes.axhline(100 * story.base.accuracy, color=BASE, linestyle=":", label="base")
    axes.set(title="Accuracy on the held-out digits", xlabel="step", ylabel="accuracy (%)")
    axes.set_ylim(0, 103)
    axes.legend(frameon=False, loc="best")


def _draw_calibration(axes: Any, story: Story) -> None:
    axes.plot([0, 100], [0, 100], color=BASE, linestyle=":", label="confidence = accuracy")
    for (label, bins), color, marker in zip(story.reliability.items(), (MEAN, ENSEMBLE), "os", strict=True):
        filled = bins.count >= FEWEST
        share = (bins.count / bins.count.sum())[filled]
        x, y = (100 * bins.confidence[filled]).tolist(), (100 * bins.accuracy[filled]).tolist()
        axes.plot(x, y, color=color, linewidth=1.4, label=label)
        axes.scatter(x, y, s=(10 + 120 * share).tolist(), color=color, marker=marker, alpha=0.75, linewidths=0)
    axes.set(title="Calibration on the held-out digits", xlabel="confidence (%)", ylabel="accuracy (%)")
    axes.set_xlim(18, 103)  # of five classes, the most probable one has 20 % at least
    axes.set_ylim(0, 103)
    axes.legend(
        frameon=False, loc="best", title=f"area: share of the images; bins of {FEWEST} or more", title_fontsize=8
    )


def _draw_disputed(figure: Any, story: Story) -> None:
    if story.members > 1:
        title = (
            f"Held-out digits on which the {story.members} members disagree most, and their votes (digit\u00d7members)"
        )
    else:
        title = "Held-out digits of which the only member is least sure, and its vote"
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(2, COLUMNS, gridspec_kw={"hspace": 0.02})
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=True, color="#CCCCCC", linewidth=0.8)
    for axes, item in zip(grid.flat, story.disputed, strict=False):
        axes.imshow(item.image.tolist(), cmap="gray_r", vmin=0, vmax=1)
        votes = "  ".join(f"{digit}\u00d7{count}" for digit, count in item.votes.items())
        lines = [f"true digit {item.digit}", *textwrap.wrap(votes, 20)]
        axes.set_title("\n".join(lines), fontsize=9, color=RIGHT if item.right else WRONG)
    figure.supxlabel("green: the ensemble is right; red: it is wrong", fontsize=9)

"""Figures of clusters: maps over images, before and after the update, and heat maps over tokens."""

import importlib
import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_func.errors import MissingExtraError, OptionError
from peft_func.report.maps import ClusterMaps, TokenMaps, When, is_images

COLOURS = "inferno"
CELL, GAP = 1.15, 0.06  # the size of a panel and the space between two, in inches
WHENS: tuple[When, When] = ("before", "after")
FORMATS = ("png", "svg", "pdf")


def save_figures(
    places: Sequence[tuple[str, ClusterMaps | TokenMaps]],
    inputs: Tensor,
    folder: Path,
    format: str = "png",
    *,
    limit: int = 4,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    tokens: Sequence[Sequence[str]] | None = None,
) -> list[Path]:
    """Draw one figure for each place into a folder; see `Clusters.save`."""
    if format not in FORMATS:
        raise OptionError(f"the format is one of {', '.join(FORMATS)}, not {format!r}")
    if limit < 1:
        raise OptionError(f"limit={limit} would draw nothing")
    matplotlib = _imported("matplotlib")
    images = pictures(inputs[:limit], mean, std) if is_images(inputs) else None
    folder.mkdir(parents=True, exist_ok=True)
    digits, files = len(str(len(places))), []
    # Letters of an SVG stay letters; a fixed salt makes its bytes depend on the maps only.
    style = {"font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "peft_func"}
    for number, (place, maps) in enumerate(places, 1):
        with matplotlib.rc_context(style):
            if isinstance(maps, ClusterMaps):
                figure = image_figure(maps, images, limit)
            else:
                figure = token_figure(maps, _labels(inputs, maps, tokens), limit)
            name = re.sub(r"[^\w.#-]", "_", place) or "model"
            files.append(folder / f"{number:0{digits}}-{name}.{format}")
            _write(figure, files[-1], format)
    return files


def pictures(images: Tensor, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Tensor:
    """Return images `[batch, height, width, 3]` from 0 to 1, to be looked at.

    Args:
        images: `[batch, height, width]` or `[batch, channels, height, width]`; channels other than one or three are
            drawn as their mean.
        mean: of each channel, if they were normalised; else each image runs from its least to its largest value.
        std: likewise.

    Raises:
        OptionError: only one of `mean` and `std` is given, or they are for another number of channels.
    """
    x = images.detach().float().cpu()
    x = x[:, None] if x.dim() == 3 else x
    if (mean is None) != (std is None):
        raise OptionError("give both mean and std, or neither")
    if mean is not None and std is not None:
        if not len(mean) == len(std) == x.shape[1]:
            raise OptionError(f"mean and std have {len(mean)} and {len(std)} values for {x.shape[1]} channels")
        x = x * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    else:
        low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
        x = (x - low) / torch.where(high > low, high - low, torch.ones_like(high))
    x = x if x.shape[1] == 3 else x.mean(1, keepdim=True)
    return x.clamp(0, 1).expand(-1, 3, -1, -1).movedim(1, -1)


def overlay(pictures: Tensor, maps: Tensor) -> Tensor:
    """Return pictures under the maps of clusters: `[batch, clusters, height, width, 3]`.

    Args:
        pictures: `[batch, height, width, 3]`, from 0 to 1.
        maps: `[batch, clusters, height, width]`, scaled and thresholded: where a map is 0, the picture is seen,
            in a paler grey.
    """
    colours = torch.tensor(_imported("matplotlib").colormaps[COLOURS](maps.numpy())[..., :3], dtype=torch.float32)
    # Less contrast than the picture has: the colours of the map must be what is seen first.
    grey = 0.2 + 0.6 * pictures.mean(-1, keepdim=True).expand(pictures.shape)[:, None]
    blend = 0.7 * (maps > 0).float()[..., None]
    return (1 - blend) * grey + blend * colours


def image_figure(maps: ClusterMaps, images: Tensor | None = None, limit: int = 4) -> Any:
    """Draw the clusters of one place: a column for each, two rows for each image, before and after the update.

    Args:
        maps: the clusters.
        images: `[batch, height, width, 3]` as `pictures` gives them; None draws the maps alone.
        limit: how many images.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    count = min(limit, len(maps.after))
    if images is None:
        images = torch.ones(count, *maps.after.shape[-2:], 3)
    # Small images are enlarged, so that the resized maps look smooth and the pixels stay square.
    factor = max(1, math.ceil(96 / max(images.shape[1:3])))
    height, width = images.shape[1] * factor, images.shape[2] * factor
    large = F.interpolate(images[:count].movedim(-1, 1), scale_factor=factor, mode="nearest").movedim(1, -1)
    # In inches, by hand: a layout engine takes seconds for so many axes.
    wide, high = CELL, CELL * height / width
    size = (0.4 + (wide + GAP) * (maps.rank + 1), 1.35 + count * (2 * (high + GAP) + 0.1))
    left = 0.35 + max(0.0, 4.5 - size[0]) / 2
    size = (max(size[0], 4.5), size[1])
    figure = _imported("matplotlib.figure").Figure(figsize=size)
    _title(figure, maps.place, y=1 - 0.08 / size[1], verticalalignment="top")

    def add_axes(x: float, y: float, wide: float, high: float) -> Any:
        return figure.add_axes((x / size[0], 1 - (y + high) / size[1], wide / size[0], high / size[1]))

    axes = [
        [
            add_axes(left + (wide + GAP) * column, 0.65 + (row // 2) * 0.1 + (high + GAP) * row, wide, high)
            for column in range(maps.rank + 1)
        ]
        for row in range(2 * count)
    ]
    for offset, when in enumerate(WHENS):
        shown = overlay(large, _drawable(maps, when, count, (height, width)))
        for i in range(count):
            row = axes[2 * i + offset]
            row[0].imshow(large[i].numpy())
            row[0].set_ylabel(when, fontsize=10)
            for k in range(maps.rank):
                row[k + 1].imshow(shown[i, k].numpy())
    for column, label in enumerate(["input", *(f"#{k + 1}" for k in range(maps.rank))]):
        axes[0][column].set_title(label, fontsize=10)
    every = [each for row in axes for each in row]
    for each in every:
        each.set(xticks=[], yticks=[])
        each.spines[:].set(color="#BBBBBB", linewidth=0.6)
    bar = add_axes((size[0] - 3.5) / 2, size[1] - 0.55, 3.5, 0.1)
    _colour_bar(figure, "map, scaled to 1; clear below 0.5", least=0.5, cax=bar)
    return figure


def token_figure(maps: TokenMaps, labels: Sequence[Sequence[str]], limit: int = 4) -> Any:
    """Draw the clusters of one place over the tokens of texts: a row for each text, panels before and after.

    Args:
        maps: the clusters.
        labels: what to write at the tokens of each text.
        limit: how many texts.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    count = min(limit, len(maps.after))
    lengths = [max(1, _end(maps, i)) for i in range(count)]
    longest = max((len(label) for text in labels[:count] for label in text), default=1)
    width = 2 * (0.32 * maps.rank + 0.4) + 0.085 * longest + 1.4
    height = sum(0.24 * n + 0.55 for n in lengths) + 0.7
    figure = _imported("matplotlib.figure").Figure(figsize=(max(width, 5.2), max(height, 2.6)), layout="constrained")
    _title(figure, maps.place)
    axes = figure.subplots(count, 2, squeeze=False, sharex=True, height_ratios=lengths)
    for j, when in enumerate(WHENS):
        values = maps.scaled(when).detach().cpu()
        for i in range(count):
            each, n = axes[i, j], lengths[i]
            each.imshow(values[i, :n].float().numpy(), cmap=COLOURS, vmin=0, vmax=1, aspect="auto")
            each.set_xticks(range(maps.rank), [str(k + 1) for k in range(maps.rank)], fontsize=8)
            each.set_yticks(range(n), list(labels[i])[:n] if j == 0 else [""] * n, fontsize=8)
            each.tick_params(length=0)
        axes[0, j].set_title(f"{when} the update", fontsize=10)
        axes[-1, j].set_xlabel("cluster", fontsize=9)
    _colour_bar(figure, "scaled to 1 over a text", ax=axes, fraction=0.05, shrink=0.6, aspect=40, pad=0.02)
    return figure


def _drawable(maps: ClusterMaps, when: When, count: int, size: tuple[int, int]) -> Tensor:
    part = ClusterMaps(maps.place, maps.before[:count], maps.after[:count], maps.chance[:count])
    return part.thresholded(size, when).detach().float().cpu()


def _title(figure: Any, place: str, **where: Any) -> None:
    # About nine bold letters to an inch, and two lines at most; paths have no spaces to break at.
    lines = textwrap.wrap(f"Clusters of {place}", int(9 * figure.get_figwidth()), max_lines=2, placeholder="...")
    figure.suptitle("\n".join(lines), fontsize=12 if len(lines) == 1 else 10, fontweight="bold", **where)


def _colour_bar(figure: Any, label: str, least: float = 0.0, **where: Any) -> None:
    # Only the part of the colours that is drawn.
    colours = _imported("matplotlib").colormaps[COLOURS](torch.linspace(least, 1, 256).numpy())
    shown = _imported("matplotlib.colors").ListedColormap(colours)
    norm = _imported("matplotlib.colors").Normalize(least, 1)
    mappable = _imported("matplotlib.cm").ScalarMappable(norm, shown)
    bar = figure.colorbar(mappable, **where, orientation="horizontal")
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


def _end(maps: TokenMaps, text: int) -> int:
    """Return how many tokens a text has up to its last that is no padding."""
    present = maps.present[text].nonzero()
    return int(present.max()) + 1 if len(present) else 0


def _labels(ids: Tensor, maps: TokenMaps, tokens: Sequence[Sequence[str]] | None) -> list[list[str]]:
    """Return what to write at every token: what the user gave, or its number in the vocabulary, or its place."""
    batch, count = maps.after.shape[:2]
    if tokens is not None:
        texts = [[str(token) for token in text] for text in tokens]
        ends = [_end(maps, i) for i in range(batch)]
        if len(texts) != batch or not all(end <= len(text) <= count for end, text in zip(ends, texts, strict=False)):
            raise OptionError(
                f"tokens is one list of strings for each of the {batch} texts, from its first token to its last; they "
                f"have {ends} tokens, and there are lists of {[len(text) for text in texts]}"
            )
        return [text + [""] * (count - len(text)) for text in texts]
    if ids.shape == (batch, count):
        return [[str(number) for number in text] for text in ids.tolist()]
    return [[str(number) for number in range(count)] for _ in range(batch)]


def _write(figure: Any, path: Path, format: str) -> None:
    """Write a figure under another name first: no half-written file, whatever happens."""
    temporary = path.with_name(f".{path.name}.part")
    metadata = {"Date": None} if format == "svg" else {"CreationDate": None} if format == "pdf" else None
    try:
        figure.savefig(temporary, dpi=100, format=format, metadata=metadata)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"figures need matplotlib, which cannot be imported ({error}); "
            "install it with: pip install 'peft_func[demo]'"
        ) from error

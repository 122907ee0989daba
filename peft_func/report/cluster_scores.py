"""How well clusters fit masks: intersection over union, and the pointing game; next to what chance gives.

The pointing game is Zhang et al.'s, "Top-down Neural Attention by Excitation Backprop", arXiv 1608.00507: is the peak
of a map inside the mask? Random directions through the same features tell how much of a score is due to the clusters;
the best of several is compared with the best of as many.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from peft_func.errors import OptionError
from peft_func.report.maps import THRESHOLD, ClusterMaps, scaled, thresholded


@dataclass(frozen=True)
class PlaceScore:
    """The scores of one place, means over the images.

    Attributes:
        place: the path of the module.
        before: `(best, mean)` over the clusters, of the features without the update.
        after: `(best, mean)`, of those with it.
        chance: `(best, mean)`, of those with it along as many random directions.
        best: the number of the cluster that is best after, from 0.
        clusters: the score of every cluster, after.
    """

    place: str
    before: tuple[float, float]
    after: tuple[float, float]
    chance: tuple[float, float]
    best: int
    clusters: tuple[float, ...]


@dataclass(frozen=True)
class ClusterScores:
    """Scores of clusters against masks; `print` them, or read them.

    Attributes:
        iou: for each place, the intersection over union of the thresholded maps with the masks.
        pointing: for each place, the share of images on which the peak of a map is inside the mask.
        area: the share of the images that the masks cover: what a peak at random scores, and a map that is all above
            the threshold.
    """

    iou: tuple[PlaceScore, ...]
    pointing: tuple[PlaceScore, ...]
    area: float

    def __str__(self) -> str:
        head = ("place", "best", "before", "after", "chance", "mean:", "before", "after", "chance")
        cells: list[tuple[str, ...]] = [head]
        rules = []
        for title, rows in (("intersection over union", self.iou), ("pointing accuracy", self.pointing)):
            rules.append((len(cells), title))
            for row in rows:
                three = (row.before, row.after, row.chance)
                numbers = [[f"{100 * pair[i]:.1f}" for pair in three] for i in (0, 1)]
                cells.append((row.place, f"#{row.best + 1}", *numbers[0], "", *numbers[1]))
        wide = [max(len(row[i]) for row in cells) for i in range(len(head))]
        lines = ["  ".join([f"{row[0]:<{wide[0]}}", *(f"{c:>{n}}" for c, n in zip(row[1:], wide[1:], strict=True))])
                 for row in cells]  # fmt: skip
        rule = "-" * len(lines[0])
        for at, title in reversed(rules):
            lines[at:at] = [rule, title]
        note = f"in %; the masks cover {100 * self.area:.1f} % of the images; chance: as many random directions"
        return "\n".join([*lines, rule, note])


def intersection_over_union(maps: Tensor, mask: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """Return how much of what maps and masks cover together they both cover.

    Args:
        maps: `[batch, clusters, h, w]`, raw; they are resized to the masks, scaled and thresholded.
        mask: bool `[batch, H, W]`.
        threshold: a map covers what is not below it.

    Returns:
        `[batch, clusters]`, from 0 to 1.

    Raises:
        OptionError: the mask is no mask for these maps.

    Example:
        >>> import torch
        >>> from peft_func.report.cluster_scores import intersection_over_union
        >>> intersection_over_union(torch.tensor([[[[0.0, 1.0, 0.9]]]]), torch.tensor([[[True, True, False]]]))
        tensor([[0.3333]])
    """
    mask = _checked(mask, maps)
    covered = thresholded(maps, (mask.shape[-2], mask.shape[-1]), threshold) > 0
    both, either = (covered & mask).sum((-2, -1)), (covered | mask).sum((-2, -1))
    return both.to(maps.dtype) / either


def pointing_accuracy(maps: Tensor, mask: Tensor) -> Tensor:
    """Return whether the peak of each map is inside the mask: the pointing game.

    Args:
        maps: `[batch, clusters, h, w]`, raw; they are resized to the masks. A flat map has no peak.
        mask: bool `[batch, H, W]`.

    Returns:
        `[batch, clusters]`, 0 or 1.

    Raises:
        OptionError: the mask is no mask for these maps.
    """
    mask = _checked(mask, maps)
    values = scaled(maps, (mask.shape[-2], mask.shape[-1])).flatten(-2)
    peak, where = values.max(-1)
    inside = mask.flatten(-2).expand(values.shape).gather(-1, where[..., None])[..., 0]
    return (inside & (peak > 0)).to(maps.dtype)


def score_places(places: Iterable[ClusterMaps], mask: Tensor, threshold: float = THRESHOLD) -> ClusterScores:
    """Return the scores of the clusters of every place against one mask for each image."""
    places = list(places)
    iou = [_score(maps, lambda raw: intersection_over_union(raw, mask, threshold)) for maps in places]
    pointing = [_score(maps, lambda raw: pointing_accuracy(raw, mask)) for maps in places]
    return ClusterScores(tuple(iou), tuple(pointing), float(mask.double().mean()))


Measure: TypeAlias = Callable[[Tensor], Tensor]


def _score(maps: ClusterMaps, measure: Measure) -> PlaceScore:
    before, after, chance = (measure(raw.detach()).double().mean(0) for raw in (maps.before, maps.after, maps.chance))
    # The mean best of `rank` directions: that of one draw would be noise.
    lucky = chance.reshape(-1, maps.rank).amax(1).mean()
    return PlaceScore(
        maps.place,
        (float(before.amax()), float(before.mean())),
        (float(after.amax()), float(after.mean())),
        (float(lucky), float(chance.mean())),
        int(after.argmax()),
        tuple(after.tolist()),
    )


def _checked(mask: Tensor, maps: Tensor) -> Tensor:
    """Return the mask as bool `[batch, 1, H, W]`."""
    wanted = f"a bool tensor [{maps.shape[0]}, height, width], one mask for each image"
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = mask.dtype if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise OptionError(f"the mask is {found}; it must be {wanted}; write e.g. images > 0.5")
    if mask.dim() != 3 or mask.shape[0] != maps.shape[0] or not mask.shape[-1] or not mask.shape[-2]:
        raise OptionError(f"the mask is {list(mask.shape)}; it must be {wanted}")
    empty = (~mask.flatten(1).any(1)).nonzero().flatten().tolist()
    if empty:
        raise OptionError(f"the mask of image {empty[0]} has nothing inside; leave out images that show nothing")
    return mask[:, None].to(maps.device)

"""Maps of clusters: how strongly each place of an image, or each token, belongs to each column of C."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_func.errors import OptionError

When: TypeAlias = Literal["before", "after", "chance"]
"""Which features: without the update, with it, or with it but along random directions in place of the clusters."""

THRESHOLD = 0.5


def is_images(inputs: Tensor) -> bool:
    """Whether a model's input is images: floats `[batch, height, width]` or `[batch, channels, height, width]`."""
    return inputs.is_floating_point() and inputs.dim() in (3, 4)


def scaled(maps: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Return maps `[*, h, w]`, resized (bilinear) to `size`, each then scaled to run from 0 to 1.

    A map that is the same everywhere says nothing: it becomes 0.
    """
    if size is not None and tuple(size) != tuple(maps.shape[-2:]):
        flat = maps.reshape(1, -1, *maps.shape[-2:])
        flat = F.interpolate(flat, size=tuple(size), mode="bilinear", align_corners=False)
        maps = flat.reshape(*maps.shape[:-2], *flat.shape[-2:])
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / torch.where(high > low, high - low, torch.ones_like(high))


def thresholded(maps: Tensor, size: tuple[int, int] | None = None, threshold: float = THRESHOLD) -> Tensor:
    """Return what `scaled` returns, with 0 for all that is below the threshold."""
    return _cut(scaled(maps, size), threshold)


def _cut(values: Tensor, threshold: float) -> Tensor:
    if not 0 < threshold <= 1:
        raise OptionError(f"a threshold lies above 0 and up to 1, since maps run from 0 to 1; it got {threshold}")
    return torch.where(values >= threshold, values, torch.zeros_like(values))


@dataclass(frozen=True, eq=False)
class ClusterMaps:
    """The maps of the clusters of one place over images.

    Attributes:
        place: the path of the module.
        before: `[batch, rank, h, w]`, raw: of the module's output as it would be without the update.
        after: the same of its output with the update.
        chance: `[batch, n * rank, h, w]`: as `after`, of random directions in place of the clusters.
    """

    place: str
    before: Tensor
    after: Tensor
    chance: Tensor

    @property
    def rank(self) -> int:
        """The number of clusters."""
        return self.after.shape[1]

    def scaled(self, size: tuple[int, int] | None = None, when: When = "after") -> Tensor:
        """Return `[batch, rank, *size]`: resized (bilinear) to `size`, each map scaled to run from 0 to 1."""
        return scaled(self.raw(when), size)

    def thresholded(
        self, size: tuple[int, int] | None = None, when: When = "after", threshold: float = THRESHOLD
    ) -> Tensor:
        """Return what `scaled` returns, with 0 for all that is below the threshold."""
        return thresholded(self.raw(when), size, threshold)

    def raw(self, when: When) -> Tensor:
        """Return the raw maps, by their name.

        Raises:
            OptionError: there are none of that name.
        """
        if when not in ("before", "after", "chance"):
            raise OptionError(f"when is 'before', 'after' or 'chance', not {when!r}")
        value: Tensor = getattr(self, when)
        return value

    def __repr__(self) -> str:
        batch, rank, h, w = self.after.shape
        return f"ClusterMaps({self.place!r}: {batch} images, {rank} clusters, {h} x {w})"


@dataclass(frozen=True, eq=False)
class TokenMaps:
    """The maps of the clusters of one place over tokens of text.

    Attributes:
        place: the path of the module.
        before: `[batch, tokens, rank]`, raw: of the module's output as it would be without the update.
        after: the same of its output with the update.
        present: `[batch, tokens]`, which tokens are no padding.
    """

    place: str
    before: Tensor
    after: Tensor
    present: Tensor

    @property
    def rank(self) -> int:
        """The number of clusters."""
        return self.after.shape[-1]

    def scaled(self, when: When = "after") -> Tensor:
        """Return `[batch, tokens, rank]`: each cluster scaled to run from 0 to 1 over a text; padding is 0."""
        if when not in ("before", "after"):
            raise OptionError(f"when is 'before' or 'after', not {when!r}")
        raw: Tensor = getattr(self, when)
        absent = ~self.present[..., None]
        low = raw.masked_fill(absent, torch.inf).amin(1, keepdim=True)
        high = raw.masked_fill(absent, -torch.inf).amax(1, keepdim=True)
        span = torch.where(high > low, high - low, torch.ones_like(high))
        return ((raw - low) / span).masked_fill(absent, 0)

    def thresholded(self, when: When = "after", threshold: float = THRESHOLD) -> Tensor:
        """Return what `scaled` returns, with 0 for all that is below the threshold."""
        return _cut(self.scaled(when), threshold)

    def __repr__(self) -> str:
        batch, tokens, rank = self.after.shape
        return f"TokenMaps({self.place!r}: {batch} texts, {tokens} tokens, {rank} clusters)"

"""The maps of all places together: to read, to score and to draw."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from peft_func.errors import OptionError, SelectorError
from peft_func.report.cluster_figures import save_figures
from peft_func.report.cluster_scores import ClusterScores, score_places
from peft_func.report.maps import THRESHOLD, ClusterMaps, TokenMaps
from peft_func.trees.select import nearest


@dataclass(frozen=True, eq=False)
class Clusters(Mapping[str, ClusterMaps | TokenMaps]):
    """The maps of the clusters of every place, by the path of its module; what `cluster_maps` returns.

    Attributes:
        places: the maps. A module that is called several times has one entry for each call: `"block#1"`, `"block#2"`.
        inputs: the images `[batch, ...]` or token numbers `[batch, tokens]` that the model was given.
    """

    places: dict[str, ClusterMaps | TokenMaps]
    inputs: Tensor

    def __getitem__(self, place: str) -> ClusterMaps | TokenMaps:
        if place not in self.places:
            raise SelectorError(
                f"there are no maps of {place!r}; the nearest: {', '.join(nearest(place, self.places))}"
            )
        return self.places[place]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def scores(self, mask: Tensor, *, threshold: float = THRESHOLD) -> ClusterScores:
        """Return how well every cluster fits a mask of each image, and how well as many random directions do.

        Args:
            mask: bool `[batch, height, width]`, in the size in which to compare; no mask is empty.
            threshold: a map covers what is not below it.

        Raises:
            OptionError: the mask does not fit, or the maps are of text.
        """
        images = [maps for maps in self.places.values() if isinstance(maps, ClusterMaps)]
        if len(images) != len(self.places):
            raise OptionError("masks are of images; these maps are of tokens: compare .scaled() with your own labels")
        return score_places(images, mask, threshold)

    def save(
        self,
        folder: str | Path,
        *,
        format: str = "png",
        limit: int = 4,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        tokens: Sequence[Sequence[str]] | None = None,
    ) -> list[Path]:
        """Draw one figure for each place: the maps before and after the update, over the images or over the tokens.

        Args:
            folder: where to; it is made if it is not there, and figures of the same names are replaced.
            format: `"png"`, `"svg"` or `"pdf"`.
            limit: how many images or texts of the batch are drawn.
            mean: of each channel, if the images were normalised; else each image is drawn from its least to its largest
                value.
            std: likewise.
            tokens: for text, what to write at the tokens of each text; their numbers by default.

        Returns:
            The files, in the order of the places.

        Raises:
            MissingExtraError: matplotlib is not installed.
            OptionError: an option does not fit the maps.
            OSError: a file cannot be written.
        """
        return save_figures(
            list(self.places.items()), self.inputs, Path(folder), format, limit=limit, mean=mean, std=std, tokens=tokens
        )

    def __repr__(self) -> str:
        return f"Clusters({', '.join(map(repr, self.places.values()))})"

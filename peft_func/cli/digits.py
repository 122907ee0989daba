"""The demo's data: the handwritten digits that ship with scikit-learn, in an old task and a new one.

1797 images of 8 x 8 pixels (Alpaydin and Kaynak, UCI Machine Learning Repository, 1998). They are read from the
installed package: nothing is downloaded.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import peft_func as pf
from peft_func.cli.extras import require

CLASSES = 5
OLD = range(CLASSES)
NEW = range(CLASSES, 2 * CLASSES)


@dataclass(frozen=True)
class Examples:
    """Labelled images.

    Attributes:
        images: `[n, 8, 8]`, float32 from 0 (paper) to 1 (ink).
        labels: `[n]`, int64 from 0 to 4: the digit itself in the old task, the digit minus 5 in the new one.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> "Examples":
        """Return some of them, by an int64 tensor `[k]`."""
        return Examples(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Digits:
    """The two tasks.

    Attributes:
        old: digits 0 to 4, to pre-train on.
        old_test: digits 0 to 4, held out.
        new: digits 5 to 9, the few labelled examples to adapt to.
        new_test: digits 5 to 9, all the others, held out.
    """

    old: Examples
    old_test: Examples
    new: Examples
    new_test: Examples


def load_digits(key: int, *, per_class: int = 10) -> Digits:
    """Return the digits, split at random.

    Args:
        key: the split depends on it and on nothing else.
        per_class: how many examples of every new digit may be learned from; the rest is held out.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    pixels, targets = require("sklearn.datasets").load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).to(torch.float32).reshape(-1, 8, 8) / 16  # stored as 0 to 16
    digits = torch.from_numpy(targets).to(torch.int64)

    def split(task: range, share: float) -> tuple[Examples, Examples]:
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        for digit in task:
            found = torch.nonzero(digits == digit).flatten()
            generator = torch.Generator().manual_seed(pf.split(key, f"digit {digit}"))
            found = found[torch.randperm(len(found), generator=generator)]
            count = share if isinstance(share, int) else round(share * len(found))
            parts[0].append(found[:count])
            parts[1].append(found[count:])
        first, second = map(torch.cat, parts)
        return (
            Examples(images[first], digits[first] - task.start),
            Examples(images[second], digits[second] - task.start),
        )

    return Digits(*split(OLD, 0.8), *split(NEW, per_class))

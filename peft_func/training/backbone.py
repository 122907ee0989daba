"""The learning rates of a backbone that joins the training of its head, as Lightning's BackboneFinetuning has them.

    e <  E: none, the backbone is frozen
    e == E: beta(E) = initial, or ratio * eta(E)
    e >  E: beta(e) = growth(e + 1) * beta(e - 1), and eta(e) where it is aligned and would be above

for the epoch e and the head's rate eta(e).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from peft_func.errors import OptionError


@dataclass(frozen=True)
class BackboneSchedule:
    """The learning rate of a backbone from epoch to epoch: frozen, then a part of the head's, growing up to it.

    The rates are to the last digit those of `lightning.pytorch.callbacks.BackboneFinetuning`.

    Attributes:
        unfreeze_at: the first epoch in which the backbone trains.
        growth: what its rate is multiplied with in every later epoch; a number, or a function that is called, as
            Lightning's `lambda_func` is, with the number of the epoch plus one.
        ratio: its first rate as a part of the head's in that epoch.
        initial: its first rate itself, instead.
        align: whether the rate never exceeds that of the head.

    Raises:
        OptionError: an option is out of range.

    Example:
        >>> import peft_func as pf
        >>> pf.BackboneSchedule(unfreeze_at=2).rates([0.1] * 8)
        [None, None, 0.010000000000000002, 0.020000000000000004, 0.04000000000000001, 0.08000000000000002, 0.1, 0.1]
    """

    unfreeze_at: int = 10
    growth: float | Callable[[int], float] = 2.0
    ratio: float = 0.1
    initial: float | None = None
    align: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.unfreeze_at, bool) or not isinstance(self.unfreeze_at, int) or self.unfreeze_at < 0:
            raise OptionError(f"unfreeze_at is an epoch from 0 on, not {self.unfreeze_at!r}")
        if not callable(self.growth):
            _number("growth", self.growth)
        _number("ratio", self.ratio)
        if self.initial is not None:
            _number("initial", self.initial)

    def rate(self, epoch: int, head_rate: float, previous: float | None = None) -> float | None:
        """Return the rate in an epoch.

        Args:
            epoch: the epoch, from 0 on.
            head_rate: the head's rate in it.
            previous: the backbone's rate in the epoch before; None where it joins with this one.

        Returns:
            The rate; None while the backbone is frozen.

        Raises:
            OptionError: a rate is negative or not finite, or the growth is.
        """
        head_rate = _number("head_rate", head_rate)
        if epoch < self.unfreeze_at:
            return None
        if epoch == self.unfreeze_at or previous is None:
            return head_rate * self.ratio if self.initial is None else float(self.initial)
        growth = _number("growth", self.growth(epoch + 1) if callable(self.growth) else self.growth)
        rate = growth * previous
        return head_rate if self.align and rate > head_rate else rate

    def rates(self, head_rates: Iterable[float]) -> list[float | None]:
        """Return the rates of all epochs, given those of the head from epoch 0 on."""
        found: list[float | None] = []
        for epoch, head_rate in enumerate(head_rates):
            found.append(self.rate(epoch, head_rate, found[-1] if found else None))
        return found


def _number(name: str, value: object) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]  # also a 0-dim tensor, as torch.optim may hold rates
    except (TypeError, ValueError):
        raise OptionError(f"{name} is a number, not {value!r}") from None
    if isinstance(value, bool | str) or not 0 <= number < math.inf:
        raise OptionError(f"{name} is a finite number from 0 on, not {value!r}")
    return number

"""`BackboneFinetuning` for `lightning.Trainer`: Lightning's schedule of a backbone that joins its head."""

from collections.abc import Mapping

from lightning.pytorch import LightningModule, Trainer

from peft_func.errors import SelectorError
from peft_func.training.backbone import BackboneSchedule
from peft_func.training.lightning_callbacks import FunctionalFinetuning
from peft_func.training.lightning_selection import infos_of
from peft_func.trees.select import Info, Where, nearest, resolve


class BackboneFinetuning(FunctionalFinetuning):
    """Trains the head, then the backbone as well, at a rate that grows from epoch to epoch up to that of the head.

    The rates are those of `schedule`; the head's is that of the optimizer's first group. What is outside the backbone
    is as the module has it.

    Args:
        backbone: the path of a module, or a selector.
        schedule: from which epoch the backbone trains, and at which rates; by default from epoch 10, at a tenth of the
            head's, then doubled every epoch.
        train_norms: see `FunctionalFinetuning`; as in Lightning, those of the backbone train from the start by default.
            With False they never train.
        update_statistics: see there.
        optimizer: see there.

    Raises:
        SelectorError: no parameter is the backbone's.

    Example:
        >>> import peft_func as pf
        >>> schedule = pf.BackboneSchedule(unfreeze_at=2, growth=1.5)
        >>> callback = pf.lightning.BackboneFinetuning("encoder", schedule, train_norms=False)
    """

    backbone: Where = "backbone"
    train_norms = True

    def __init__(
        self,
        backbone: Where = "backbone",
        schedule: BackboneSchedule | None = None,
        *,
        train_norms: bool | None = True,
        update_statistics: bool | None = None,
        optimizer: int | None = None,
    ) -> None:
        super().__init__(train_norms=train_norms, update_statistics=update_statistics, optimizer=optimizer)
        self.backbone = backbone
        self.rates = BackboneSchedule() if schedule is None else schedule
        self._names: frozenset[str] = frozenset()
        self._head: frozenset[str] = frozenset()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            infos = infos_of(pl_module)
            trains = {name for name, parameter in pl_module.named_parameters() if parameter.requires_grad}
            self._names = frozenset(_part(self.backbone, pl_module, infos))
            self._head = frozenset(trains - self._names)
        super().setup(trainer, pl_module, stage)

    def selection(self, epoch: int) -> Where:
        return lambda path, info: path in self._head or (epoch >= self.rates.unfreeze_at and path in self._names)

    def chosen(self, pl_module: LightningModule, epoch: int) -> set[str]:
        return super().chosen(pl_module, epoch) & (self._head | self._names)  # norms that the user froze stay frozen

    def rate(self, epoch: int, head_rate: float, previous: float | None) -> float | None:
        if epoch < self.rates.unfreeze_at:  # norms of the backbone that the module left out of its optimizer
            return self.rates.rate(self.rates.unfreeze_at, head_rate, None) if previous is None else None
        return self.rates.rate(epoch, head_rate, previous)


def _part(where: Where, pl_module: LightningModule, infos: Mapping[str, Info]) -> set[str]:
    """Return the names of the parameters of a module by its path, or of those that a selector chooses."""
    if isinstance(where, str) and where in dict(pl_module.named_modules()):
        below = {name for name in infos if name.startswith(f"{where}.")}
        if below:
            return below
    try:
        return set(resolve(where, infos.values(), "backbone"))
    except SelectorError as error:
        paths = [path for path, _ in pl_module.named_modules() if path]
        close = ", ".join(nearest(where if isinstance(where, str) else "", paths))
        raise SelectorError(f"{error} The nearest modules: {close}.") from None

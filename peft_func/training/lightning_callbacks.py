"""Fine-tuning callbacks for `lightning.Trainer`: what trains is a function of the epoch.

Nothing is remembered that the epoch does not say, except how the optimizer came by its groups; that is kept by name in
the checkpoint, so that a run which is resumed anywhere goes on as if it had never stopped.
"""

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from peft_func.errors import FileFormatError, OptionError, SelectorError
from peft_func.training.lightning_groups import held, join, leave, names_by_group, regroup, set_rate
from peft_func.training.lightning_selection import infos_of
from peft_func.training.lightning_statistics import Quiet, hides_statistics
from peft_func.training.lightning_strategy import check_strategy, wrap_again
from peft_func.training.norms import norms
from peft_func.trees.select import Where, resolve

_STATE = {"epoch", "groups", "trains", "joined"}


class FunctionalFinetuning(Callback):  # type: ignore[misc]
    r"""Sets what trains at the start of every epoch, and gives the optimizer's groups what thaws.

    Give a schedule, or override `selection`. Selectors see the names of `pl_module.named_parameters()`; what is
    selected trains, and everything else is frozen: no gradient, no place in the optimizer, no optimizer state. The
    module's own `configure_optimizers` makes the optimizer for what trains at epoch 0 (all that requires a gradient).
    What thaws later joins it in a group of its own, with a rate from `rate`, which then keeps its ratio to the rate of
    the first group under any scheduler of torch. Which parameter is which goes by identity.

    Args:
        schedule: from the epoch to a selector, such as `pf.schedule({0: "head.*", 5: ".*"})`.
        initial_rate: the rate of a group that joins; None divides the rate of the first group by `denominator`.
        denominator: see there.
        train_norms: whether the parameters of normalisation layers train, in all epochs; None leaves that to the
            selection.
        update_statistics: whether BatchNorms normalise with the batch and update their running statistics in training.
            None is for those whose parameters train; the others normalise with the stored statistics.
        optimizer: the index of the optimizer for what thaws, where there are several.

    Raises:
        OptionError: an option cannot work; there are two such callbacks, or several optimizers and none is chosen; the
            strategy fixes what trains (FSDP, DeepSpeed).
        SelectorError: an epoch selects nothing.
        FileFormatError: a checkpoint is resumed whose parameters or groups are others.

    Example:
        >>> import peft_func as pf
        >>> class Unfreeze(pf.lightning.FunctionalFinetuning):
        ...     def selection(self, epoch):
        ...         return r".*" if epoch >= 7 else ~pf.path(r"feature_extractor\..*")
        >>> callbacks = [Unfreeze()]  # for lightning.Trainer(callbacks=callbacks)
    """

    # Of the class, so that a subclass need not call __init__.
    schedule: Callable[[int], Where] | None = None
    initial_rate: float | None = None
    denominator: float = 10.0
    train_norms: bool | None = None
    update_statistics: bool | None = None
    optimizer: int | None = None
    _fit: tuple[Trainer, LightningModule] | None = None
    _restored: Mapping[str, Any] | None = None

    def __init__(
        self,
        schedule: Callable[[int], Where] | None = None,
        *,
        initial_rate: float | None = None,
        denominator: float = 10.0,
        train_norms: bool | None = None,
        update_statistics: bool | None = None,
        optimizer: int | None = None,
    ) -> None:
        super().__init__()
        if schedule is not None and not callable(schedule):
            raise OptionError(f"schedule is a function of the epoch, not {schedule!r}; pf.schedule makes one of a dict")
        if not denominator > 0 or (initial_rate is not None and not initial_rate >= 0):
            raise OptionError(f"rates are positive; denominator is {denominator!r}, initial_rate {initial_rate!r}")
        self.schedule, self.initial_rate, self.denominator = schedule, initial_rate, denominator
        self.train_norms, self.update_statistics, self.optimizer = train_norms, update_statistics, optimizer

    def selection(self, epoch: int) -> Where:
        """Return what trains in an epoch; the default asks the schedule."""
        if self.schedule is None:
            kind = type(self).__name__
            raise OptionError(f"{kind} has no schedule: give {kind}(pf.schedule({{0: ...}})), or override selection")
        return self.schedule(epoch)

    def rate(self, epoch: int, head_rate: float, previous: float | None) -> float | None:
        """Return the learning rate of a group that joined; asked for each such group at the start of every epoch.

        Args:
            epoch: the epoch that starts.
            head_rate: the rate of the optimizer's first group now.
            previous: what this method said for the group last; None when the group joins.

        Returns:
            The rate, or None to leave it as the schedulers have it. When a group joins, None is not possible.
        """
        if previous is not None:
            return None
        return head_rate / self.denominator if self.initial_rate is None else self.initial_rate

    def chosen(self, pl_module: LightningModule, epoch: int) -> set[str]:
        """Return the names of what trains in an epoch: the selection, with or without the norms."""
        infos = infos_of(pl_module)
        names = set(resolve(self.selection(epoch), infos.values(), f"epoch {epoch}"))
        if self.train_norms is not None:
            is_norm = norms()
            affine = {name for name, info in infos.items() if is_norm(name, info)}
            names = names | affine if self.train_norms else names - affine
        if not names:
            raise SelectorError(f"epoch {epoch}: nothing but norms is selected, and train_norms is False")
        return names

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restored = None  # Lightning loads states after this; one that was loaded for a test is not for a fit
        if stage != "fit":
            return
        check_strategy(trainer, type(self).__name__)
        if sum(isinstance(callback, FunctionalFinetuning) for callback in trainer.callbacks) > 1:
            raise OptionError("two callbacks cannot both decide what trains; make one schedule of the two")
        if self.update_statistics is not None and hides_statistics(pl_module):
            raise OptionError(
                "update_statistics does not reach the net inside pf.Adapted; name its BatchNorms with always_eval=..."
            )
        self._fit = (trainer, pl_module)
        self._joined: dict[int, float] = {}  # index of the group: the rate that was last given
        self._quiet = Quiet(self.update_statistics)
        self._epoch = -1  # the last that was begun
        _require_grad(pl_module, self.chosen(pl_module, 0))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the groups as they were saved: the state of the optimizer is loaded into them next."""
        if len(trainer.optimizers) > 1 and self.optimizer is None:
            raise OptionError(
                f"there are {len(trainer.optimizers)} optimizers; say which one steps what thaws: optimizer=0"
            )
        restored, self._restored = self._restored, None
        if restored is None:
            return
        if restored.keys() != _STATE or len(restored["groups"]) != len(trainer.optimizers):
            raise FileFormatError(
                f"the checkpoint's state of {type(self).__name__} is of another callback, or not for "
                f"{len(trainer.optimizers)} optimizer(s): resume with those that it was saved with"
            )
        parameters = dict(pl_module.named_parameters())
        for optimizer, groups in zip(trainer.optimizers, restored["groups"], strict=True):
            regroup(optimizer, _schedulers(trainer), groups, parameters)
        self._epoch = restored["epoch"]
        self._joined = {int(index): rate for index, rate in restored["joined"].items()}
        if _require_grad(pl_module, set(restored["trains"])):
            wrap_again(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._quiet.choose(pl_module)  # a run that is resumed inside an epoch does not start that epoch again

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, pl_module, trainer.current_epoch)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Lightning starts no epoch where it resumes from the last batch of the one before.
        self._begin(trainer, pl_module, trainer.current_epoch)
        self._quiet.hold()  # at every batch: validation, or the module's own hooks, may have set the modes

    def _begin(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> None:
        if epoch == self._epoch:
            return
        self._epoch = epoch
        chosen = self.chosen(pl_module, epoch)
        flipped = _require_grad(pl_module, chosen)
        parameters = dict(pl_module.named_parameters())
        for optimizer in trainer.optimizers:
            leave(optimizer, (parameter for name, parameter in parameters.items() if name not in chosen))
        # What a module leaves out of its optimizer from the start (a teacher) stays out.
        first = resolve(self.selection(0), infos_of(pl_module).values(), "epoch 0")
        present = held(trainer.optimizers)
        joining = {
            name: parameter
            for name, parameter in parameters.items()
            if name in chosen and (name in flipped or name not in first) and id(parameter) not in present
        }
        self._move_rates(trainer, epoch)
        if joining:
            self._join(trainer, epoch, joining)
        if flipped:
            wrap_again(trainer)
        self._quiet.choose(pl_module)

    def _move_rates(self, trainer: Trainer, epoch: int) -> None:
        optimizer = trainer.optimizers[self.optimizer or 0]
        head_rate = float(optimizer.param_groups[0]["lr"])
        for index, previous in self._joined.items():
            rate = self.rate(epoch, head_rate, previous)
            if rate is not None:
                self._joined[index] = rate
                set_rate(optimizer, _schedulers(trainer), index, rate, rate / head_rate if head_rate else None)

    def _join(self, trainer: Trainer, epoch: int, joining: Mapping[str, nn.Parameter]) -> None:
        optimizer, schedulers = trainer.optimizers[self.optimizer or 0], _schedulers(trainer)
        groups = optimizer.param_groups
        head_rate = float(groups[0]["lr"])
        # A scheduler may have the head at zero just now: what the rates begin with then says how they are related.
        reference = head_rate or float(groups[0].get("initial_lr", 0.0))
        rate = self.rate(epoch, reference, None)
        if rate is None or not rate >= 0:
            raise OptionError(f"{type(self).__name__}.rate gave {rate!r} for a group that joins at epoch {epoch}")
        empty = next((index for index in self._joined if not groups[index]["params"]), None)
        index = join(optimizer, schedulers, joining, empty)
        self._joined[index] = rate
        set_rate(optimizer, schedulers, index, rate if head_rate else 0.0, rate / reference if reference else 1.0)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._quiet.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._fit is not None:
            self._quiet.release()

    def state_dict(self) -> dict[str, Any]:
        """Return the groups by name, and what trains; the rest of a group is in the state of its optimizer."""
        if self._fit is None or not self._fit[0].optimizers:
            return {}
        trainer, pl_module = self._fit
        parameters = dict(pl_module.named_parameters())
        return {
            "epoch": self._epoch,
            "groups": [names_by_group(optimizer, parameters) for optimizer in trainer.optimizers],
            "trains": [name for name, parameter in parameters.items() if parameter.requires_grad],
            "joined": {str(index): rate for index, rate in self._joined.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict or None


def _require_grad(pl_module: LightningModule, names: set[str]) -> set[str]:
    """Let these parameters train, and no others; return the names of what changed."""
    changed = set()
    for name, parameter in pl_module.named_parameters():
        if parameter.requires_grad != (name in names):
            parameter.requires_grad_(name in names)
            changed.add(name)
    return changed


def _schedulers(trainer: Trainer) -> list[Any]:
    return [config.scheduler for config in trainer.lr_scheduler_configs]

"""Small modules, data and quiet trainers for the tests of Lightning."""

import contextlib
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import peft_func as pf
from tests.training.nets import copy_of

F = nn.functional

# Lightning's own use of torch, and hints about the speed of real runs.
QUIET = [
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def trainer(tmp_path, *callbacks, **options):
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, pl.callbacks.ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": tmp_path,
    }
    return pl.Trainer(**{**settings, **options}, callbacks=list(callbacks))


def data(count=16, inside=4, classes=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, inside, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, classes, (count,), generator=generator)


def loader(batch=4, **options):
    return DataLoader(TensorDataset(*data(**options)), batch)


class Batches:
    """A loader that knows where it is: Lightning restores it inside an epoch, as it does torchdata's.

    Of several processes each takes its share of every batch.
    """

    def __init__(self, batch=4, rank=0, world=1, **options):
        x, y = data(**options)
        self.batches = [(x[rank::world], y[rank::world]) for x, y in zip(x.split(batch), y.split(batch), strict=True)]
        self.next, self.resumed = 0, False

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        if not self.resumed:
            self.next = 0
        self.resumed = False
        while self.next < len(self.batches):
            self.next += 1
            yield self.batches[self.next - 1]

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next, self.resumed = state["next"] % len(self), True


class WithNorm(pl.LightningModule):
    """A backbone with a BatchNorm, and a head; the optimizer is for what requires a gradient, as the contract asks."""

    def __init__(self, optimizer=None, scheduler=None, head_only=False, interval="epoch"):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 2)
        self.double()
        self.make, self.scheduler, self.head_only, self.interval = optimizer, scheduler, head_only, interval

    def forward(self, x):
        return self.head(self.backbone(x))

    def training_step(self, batch, index):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        parameters = self.head.parameters() if self.head_only else self.parameters()
        make = self.make or (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
        optimizer = make([p for p in parameters if p.requires_grad])
        if self.scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": self.scheduler(optimizer), "interval": self.interval}]


class Log(pl.Callback):
    """What trains, and how, at the end of every batch."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        groups = trainer.optimizers[0].param_groups
        names = {id(p): name for name, p in pl_module.named_parameters()}
        self.rows.append(
            {
                "epoch": trainer.current_epoch,
                "loss": float(outputs["loss"]),
                "rates": [group["lr"] for group in groups],
                "groups": [[names[id(p)] for p in group["params"]] for group in groups],
                "trains": {name for name, p in pl_module.named_parameters() if p.requires_grad},
                "state": copy_of(pl_module),
            }
        )

    def of_epochs(self, key):
        last = {row["epoch"]: row[key] for row in reversed(self.rows)}
        return [last[epoch] for epoch in sorted(last)]


class Stop(Exception):
    """What ends a run as a killed process would."""


class StopAt(pl.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise Stop


def run_until(step, tmp_path, module, train, *callbacks, val=None, **options):
    with contextlib.suppress(Stop):
        trainer(tmp_path, *callbacks, StopAt(step), **options).fit(module, train, val)
        raise AssertionError("it was not stopped")


BACKBONE_NORM = {"backbone.1.weight", "backbone.1.bias"}
BACKBONE = BACKBONE_NORM | {f"backbone.{i}.{kind}" for i in (0, 3) for kind in ("weight", "bias")}
HEAD = {"head.weight", "head.bias"}
HEAD_THEN_ALL = {0: r"head\..*", 2: ".*"}


def backbone(unfreeze_at=2, *, growth=2.0, initial=None, align=True, **options):
    schedule = pf.BackboneSchedule(unfreeze_at=unfreeze_at, growth=growth, initial=initial, align=align)
    return pf.lightning.BackboneFinetuning(schedule=schedule, **options)


Theirs = pl.callbacks.BackboneFinetuning


class TheirsByHand(pl.callbacks.BaseFinetuning):
    """Lightning's own, as it is written by hand: freezes the backbone, thaws it at epoch 2."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)


def functional_module():
    """An adapter of two parts as a LightningModule."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    method = pf.chain(pf.lora("0", rank=2), pf.train("2", name="head"))

    def adamw(named):
        return torch.optim.AdamW([p for _, p in named], lr=0.01)

    return pf.lightning.FunctionalModule(base, method, loss=F.cross_entropy, optimizer=adamw)


def finetuning(schedule=None, **options):
    return pf.lightning.FunctionalFinetuning(pf.schedule(schedule or HEAD_THEN_ALL), **options)


def fit(tmp_path, callback, module=None, epochs=5, val=None, **options):
    log, module = Log(), WithNorm() if module is None else module
    runner = trainer(tmp_path, callback, log, max_epochs=epochs, **options)
    runner.fit(module, loader(), val)
    return SimpleNamespace(log=log, module=module, trainer=runner, optimizer=runner.optimizers[0])

"""The runs of the tests of DDP, as a script: Lightning starts it once for each process.

python -m tests.training.ddp_runs FOLDER
"""

import os
import sys
import warnings
from functools import partial

import lightning.pytorch as pl
import torch
from torch import nn

from tests.training.lightning_runs import Batches, Log, Theirs, backbone, finetuning, functional_module, trainer

F = nn.functional
WORLD = 2
EPOCHS = 6
SCHEDULE = {0: "head.*", 1: r"(head|backbone\.2).*", 2: ".*", 3: "head.*", 4: ".*"}
PARTS = {0: r"adapted\.head.*", 1: r"adapted\.(head|lora).*", 3: r".*\.B", 4: ".*"}


class Plain(pl.LightningModule):
    """Without BatchNorm, whose statistics are those of the process."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 2)
        self.double()

    def training_step(self, batch, index):
        return F.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.8)]


RUNS = {
    "schedule": (Plain, partial(finetuning, SCHEDULE)),
    "adapter": (functional_module, partial(finetuning, PARTS)),
    "backbone": (Plain, backbone),
    "theirs": (Plain, partial(Theirs, unfreeze_backbone_at_epoch=2)),
}


def run(folder, name, world, resume=None, save=False, **options):
    """Train, and return the states of every epoch's first step and of the end."""
    build, callback = RUNS[name]
    rank, log = int(os.environ.get("LOCAL_RANK", "0")) if world > 1 else 0, Log()
    saves = [pl.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1)] if save else []
    module = build()
    runner = trainer(
        folder, callback(), log, *saves, devices=world, max_epochs=EPOCHS, use_distributed_sampler=False, **options
    )
    val = Batches(rank=rank, world=world, seed=2) if name == "adapter" else None
    runner.fit(module, Batches(rank=rank, world=world), val, ckpt_path=resume)
    rows = [row["state"] for row in log.rows]
    if val is not None:
        rows[-1]["val_loss"] = runner.callback_metrics["val_loss"].double()  # of all processes
    if world > 1:
        rank = runner.global_rank
        torch.save(rows, f"{folder}/{name}{'-resumed' if resume else ''}-{rank}.pt")
    return rows


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    target = sys.argv[1]
    for each in RUNS:
        run(target, each, WORLD, strategy="ddp", save=each == "schedule")
    for step in (10,):  # in the third epoch
        run(target, "schedule", WORLD, f"{target}/step={step}.ckpt", strategy="ddp")

"""A run that is killed and resumed, anywhere in the schedule, goes on to the bit as if it had not been."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.optim import lr_scheduler

import peft_func as pf
from tests.training.lightning_runs import (
    QUIET,
    Batches,
    Log,
    TheirsByHand,
    WithNorm,
    backbone,
    finetuning,
    functional_module,
    loader,
    run_until,
    trainer,
)
from tests.training.nets import copy_of, equal

pytestmark = QUIET

SCHEDULE = {0: "head.*", 1: r"(head|backbone\.3).*", 2: ".*", 4: "head.*", 5: ".*"}
EPOCHS, BATCHES = 6, 4
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAM = partial(torch.optim.AdamW, lr=0.01)


scheduled = partial(finetuning, SCHEDULE)


def every_step(tmp_path):
    return pl.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)


def optimizer_state(runner):
    """Every group and every moment, by name."""
    names = {p: name for name, p in runner.lightning_module.named_parameters()}
    return [
        (
            [
                {key: [names[p] for p in value] if key == "params" else value for key, value in g.items()}
                for g in o.param_groups
            ],
            {names[p]: state for p, state in o.state.items()},
        )
        for o in runner.optimizers
    ]


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def whole(tmp_path, build, callback, **options):
    """Run to the end, with a checkpoint of every step on the way."""
    log = Log()
    runner = trainer(tmp_path, callback(), log, every_step(tmp_path), max_epochs=EPOCHS, **options)
    runner.fit(build(), Batches())
    return runner, log


def resumed(tmp_path, step, build, callback, **options):
    log, path = Log(), tmp_path / f"step={step}.ckpt"
    runner = trainer(tmp_path, callback(), log, every_step(tmp_path / "again"), max_epochs=EPOCHS, **options)
    runner.fit(build(), Batches(), ckpt_path=path, weights_only=True)
    return runner, log


def both(tmp_path, step, build, callback):
    return whole(tmp_path, build, callback), resumed(tmp_path, step, build, callback)


CASES = {
    "sgd": (partial(WithNorm, SGD), scheduled),
    "adamw": (partial(WithNorm, ADAM), scheduled),
    "adamw, every step a rate": (
        partial(WithNorm, ADAM, lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)), interval="step"),
        scheduled,
    ),
    "one cycle": (
        partial(WithNorm, SGD, lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=30), interval="step"),
        scheduled,
    ),
    "backbone": (partial(WithNorm, SGD, lambda o: lr_scheduler.StepLR(o, 1, 0.7)), backbone),
    "backbone without norms": (partial(WithNorm, ADAM), partial(backbone, train_norms=False)),
    "backbone, optimizer of the head": (partial(WithNorm, SGD, head_only=True), backbone),
}


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """The uninterrupted run of a case, made once."""
    made = {}

    def get(case):
        if case not in made:
            folder = tmp_path_factory.mktemp("whole")
            made[case] = (folder, *whole(folder, *CASES[case]))
        return made[case]

    return get


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("step", [2, 4, 8, 10, 15, 16, 18, 20], ids="step {}".format)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(wholes, case, step):
    folder, one, one_log = wholes(case)
    two, two_log = resumed(folder, step, *CASES[case])
    tail = one_log.rows[step:]
    assert len(two_log.rows) == EPOCHS * BATCHES - step
    for row, again in zip(tail, two_log.rows, strict=True):
        assert {**row, "state": None} == {**again, "state": None}
        assert equal(row["state"], again["state"])
    assert same(optimizer_state(one), optimizer_state(two))
    assert any(not torch.equal(v, one_log.rows[0]["state"][n]) for n, v in two_log.rows[-1]["state"].items())


@pytest.mark.parametrize("case", ["adamw, every step a rate", "backbone"])
@pytest.mark.parametrize("epoch", range(5))
def test_a_run_resumed_from_the_end_of_an_epoch_is_the_uninterrupted_one(tmp_path, wholes, case, epoch):
    build, callback = CASES[case]
    save = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer(tmp_path, callback(), save, max_epochs=epoch + 1).fit(build(), Batches())
    log = Log()
    runner = trainer(tmp_path, callback(), log, pl.callbacks.ModelCheckpoint(tmp_path), max_epochs=EPOCHS)
    runner.fit(build(), Batches(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
    _, _, whole_log = wholes(case)
    for row, again in zip(whole_log.rows[(epoch + 1) * BATCHES :], log.rows, strict=True):
        assert row["rates"] == again["rates"]
        assert equal(row["state"], again["state"])


def test_a_resumed_run_with_validation_between_is_the_uninterrupted_one(tmp_path):
    """With validation inside the epoch, the checkpoint is of its end; the modes have been switched between."""
    build, val = partial(WithNorm, ADAM), loader(seed=2)
    runs = []
    for stop in (None, 10):
        log, module = Log(), build()
        save = pl.callbacks.ModelCheckpoint(tmp_path / str(stop), "{step}", every_n_train_steps=2, save_top_k=-1)
        options = {"max_epochs": EPOCHS, "val_check_interval": 2}
        if stop:
            run_until(stop, tmp_path, module, Batches(), scheduled(), save, val=val, **options)
            module = build()
        path = tmp_path / str(stop) / f"step={stop}.ckpt" if stop else None
        trainer(tmp_path, scheduled(), log, save, **options).fit(module, Batches(), val, ckpt_path=path)
        runs.append(log.rows)
    for row, again in zip(runs[0][10:], runs[1], strict=True):
        assert equal(row["state"], again["state"])


@pytest.mark.parametrize("step", [3, 4, 9, 12])
def test_a_resumed_functional_module_is_the_uninterrupted_one(tmp_path, step):
    callback = partial(finetuning, {0: r"adapted\.head.*", 1: ".*", 3: r".*\.B"})
    (one, one_log), (two, two_log) = both(tmp_path, step, functional_module, callback)
    for row, again in zip(one_log.rows[step:], two_log.rows, strict=True):
        assert equal(row["state"], again["state"])
    assert same(optimizer_state(one), optimizer_state(two))


@pytest.mark.parametrize("step", [12, 14])
def test_row_resume_does_not_freeze_again_what_had_thawed(tmp_path, step):
    build = partial(WithNorm, SGD)
    for callback, right in ((partial(finetuning, {0: "head.*", 2: ".*"}), True), (TheirsByHand, False)):
        (one, one_log), (two, two_log) = both(tmp_path / str(right), step, build, callback)
        assert (one_log.rows[-1]["trains"] == two_log.rows[-1]["trains"]) is right  # their open bug 21901
        assert equal(copy_of(one.lightning_module), copy_of(two.lightning_module)) is right


def test_row_the_number_of_groups_is_that_of_the_checkpoint(tmp_path):
    build = partial(WithNorm, SGD)
    _, (runner, log) = both(tmp_path, 16, build, scheduled)
    assert [len(groups) for groups in log.of_epochs("groups")] == [3, 3]
    assert [len(group["params"]) for group in runner.optimizers[0].param_groups] == [2, 6, 0]


def test_a_longer_run_goes_on_past_the_end(tmp_path):
    runner = trainer(tmp_path, scheduled(), max_epochs=3)
    runner.fit(WithNorm(ADAM), Batches())
    runner.save_checkpoint(tmp_path / "end.ckpt")
    log, again = Log(), trainer(tmp_path, scheduled(), max_epochs=EPOCHS)
    again.callbacks.append(log)
    again.fit(WithNorm(ADAM), Batches(), ckpt_path=tmp_path / "end.ckpt")
    _, whole_log = whole(tmp_path, partial(WithNorm, ADAM), scheduled)
    for row, other in zip(log.rows, whole_log.rows[12:], strict=True):
        assert equal(row["state"], other["state"])


def test_the_state_of_the_callback_is_plain_data_by_name(tmp_path):
    runner = trainer(tmp_path, scheduled(), max_epochs=3)
    runner.fit(WithNorm(ADAM), Batches())
    runner.save_checkpoint(tmp_path / "end.ckpt")
    state = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]["FunctionalFinetuning"]
    assert state["groups"] == [
        [
            ["head.weight", "head.bias"],
            ["backbone.3.weight", "backbone.3.bias"],
            ["backbone.0.weight", "backbone.0.bias", "backbone.1.weight", "backbone.1.bias"],
        ]
    ]
    assert set(state["trains"]) == {name for group in state["groups"][0] for name in group}
    assert list(state["joined"]) == ["1", "2"]


def test_a_checkpoint_of_another_module_or_optimizer_is_an_error(tmp_path):
    runner = trainer(tmp_path, scheduled(), max_epochs=2)
    runner.fit(WithNorm(SGD), Batches())
    runner.save_checkpoint(tmp_path / "end.ckpt")

    class Renamed(WithNorm):
        def __init__(self):
            super().__init__(SGD)
            self.top = self.head
            del self.head
            self.strict_loading = False

        def forward(self, x):
            return self.top(self.backbone(x))

    class ManyGroups(WithNorm):
        def configure_optimizers(self):
            return SGD([{"params": [p]} for p in self.parameters()])

    for module, schedule, message in (
        (Renamed(), {0: "top.*"}, r"'head\.weight' and 1 more"),
        (ManyGroups(), SCHEDULE, "8 groups, and the checkpoint has 2"),
    ):
        with pytest.raises(pf.FileFormatError, match=message):
            trainer(tmp_path, finetuning(schedule), max_epochs=4).fit(
                module, Batches(), ckpt_path=tmp_path / "end.ckpt"
            )


SCRIPT = """
import os, signal, sys, torch
from functools import partial
import lightning.pytorch as pl
from tests.training.lightning_runs import Batches, WithNorm, trainer
from tests.training.test_lightning_resume import ADAM, every_step, scheduled
class Kill(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 10:
            os.kill(os.getpid(), signal.SIGKILL)
folder = sys.argv[1]
trainer(folder, scheduled(), every_step(folder), Kill(), max_epochs=6).fit(WithNorm(ADAM), Batches())
"""


@pytest.mark.slow
def test_a_killed_process_is_resumed_to_the_bit(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    log = Log()
    trainer(tmp_path, scheduled(), log, every_step(tmp_path), max_epochs=EPOCHS).fit(
        WithNorm(ADAM), Batches(), ckpt_path=tmp_path / "step=10.ckpt"
    )
    _, whole_log = whole(tmp_path / "whole", partial(WithNorm, ADAM), scheduled)
    for row, again in zip(whole_log.rows[10:], log.rows, strict=True):
        assert equal(row["state"], again["state"])

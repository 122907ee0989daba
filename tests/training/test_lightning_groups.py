"""Groups, optimizers and schedulers while what trains changes."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from peft_func.training.lightning_groups import join, leave
from tests.training.lightning_runs import (
    BACKBONE,
    HEAD,
    QUIET,
    Theirs,
    WithNorm,
    backbone,
    data,
    finetuning,
    fit,
    loader,
)

F = nn.functional
pytestmark = QUIET

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=0.05, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.05),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.05),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_curve_is_that_of_plain_pytorch_with_one_optimizer_a_part(tmp_path, make):
    """A peer by another way: every part has an optimizer of its own, which lives as long as the part trains."""
    schedule = {0: "head.*", 1: ".*", 3: r"backbone\..*", 4: ".*"}
    run = fit(tmp_path, finetuning(schedule, denominator=5), WithNorm(make), epochs=6, gradient_clip_val=None)
    plain, (x, y) = WithNorm(), data()
    optimizers, losses = {}, []
    for epoch in range(6):
        parts = {0: ("head",), 3: ("backbone",)}.get(epoch, ("head",) if epoch == 0 else ("head", "backbone"))
        for gone in optimizers.keys() - set(parts):
            del optimizers[gone]
        for name in parts:
            if name not in optimizers:
                optimizers[name] = make(getattr(plain, name).parameters())
                if epoch:
                    optimizers[name].param_groups[0]["lr"] /= 5
        plain.train()
        plain.backbone.train("backbone" in parts)
        for i in range(0, 16, 4):
            loss = F.cross_entropy(plain(x[i : i + 4]), y[i : i + 4])
            plain.zero_grad()
            loss.backward()
            for optimizer in optimizers.values():
                optimizer.step()
            losses.append(float(loss.detach()))
    assert [row["loss"] for row in run.log.rows] == pytest.approx(losses, abs=1e-12)


def test_what_freezes_leaves_the_optimizer_with_its_state_and_gradient(tmp_path):
    run = fit(tmp_path, finetuning({0: ".*", 2: "head.*", 3: ".*"}), WithNorm(OPTIMIZERS["adamw"]), epochs=3)
    module, optimizer = run.module, run.optimizer
    assert {id(p) for p in optimizer.state} == {id(p) for p in module.head.parameters()}
    assert all(p.grad is None and not p.requires_grad for p in module.backbone.parameters())
    states = run.log.of_epochs("state")
    for name in BACKBONE:
        assert torch.equal(run.log.rows[7]["state"][name], states[2][name])


def test_a_part_that_thaws_again_fills_its_empty_group(tmp_path):
    run = fit(tmp_path, finetuning({0: "head.*", 1: ".*", 2: "head.*", 3: ".*", 4: "head.*", 5: ".*"}), epochs=6)
    assert [len(groups) for groups in run.log.of_epochs("groups")] == [1, 2, 2, 2, 2, 2]
    assert [bool(groups[-1]) for groups in run.log.of_epochs("groups")] == [True, True, False, True, False, True]


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 24),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 7),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=30),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=5),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=10),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=30),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.LinearLR(o, 0.1, total_iters=10)]
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=6), lr_scheduler.CosineAnnealingLR(o, 30)], [10]
    ),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_group_that_joined_keeps_its_ratio_under_every_scheduler(tmp_path, scheduler):
    schedule = {0: "head.*", 2: r"(head|backbone\.3).*", 4: ".*"}
    run = fit(tmp_path, finetuning(schedule), WithNorm(scheduler=scheduler, interval="step"), epochs=6)
    for row in run.log.rows:
        assert row["rates"][1:] == pytest.approx([row["rates"][0] / 10] * (row["epoch"] // 2), rel=1e-12)
    assert len({row["rates"][0] for row in run.log.rows}) > 2


def test_schedulers_by_group_stop_lightnings_own_callback(tmp_path):
    """zip(strict=True) in torch's schedulers: theirs adds a group, and tells no scheduler."""
    module = WithNorm(scheduler=SCHEDULERS["LambdaLR"], interval="step", head_only=True)
    with pytest.raises(ValueError, match="zip"):
        fit(tmp_path, Theirs(unfreeze_backbone_at_epoch=2), module)


def test_a_plateau_scheduler_follows_as_well(tmp_path):
    class Plateau(WithNorm):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            plateau = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=10, min_lr=[1e-5])
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}

    run = fit(tmp_path, finetuning(), Plateau(), epochs=5, val=loader())
    rates = run.log.of_epochs("rates")
    assert rates[-1][1] == pytest.approx(rates[-1][0] / 10)
    assert rates[-1][0] < 0.1


def test_a_part_that_thaws_while_the_head_stands_at_zero_follows_it_later(tmp_path):
    module = WithNorm(scheduler=lambda o: lr_scheduler.LambdaLR(o, lambda epoch: [0.5, 0.0, 0.0, 1.0][epoch % 4]))
    run = fit(tmp_path, finetuning(), module, epochs=4)
    assert run.log.of_epochs("rates")[2] == [0.0, 0.0]
    assert run.log.of_epochs("rates")[3] == pytest.approx([0.1, 0.01])


def test_an_optimizer_of_named_parameters_keeps_their_names(tmp_path):
    class Named(WithNorm):
        def configure_optimizers(self):
            return torch.optim.SGD([(n, p) for n, p in self.named_parameters() if p.requires_grad], lr=0.1)

    run = fit(tmp_path, finetuning({0: "head.*", 1: ".*", 2: r"backbone\..*", 3: ".*"}), Named(), epochs=4)
    for group, names in zip(run.optimizer.param_groups, run.log.of_epochs("groups")[-1], strict=True):
        assert group["param_names"] == names


def test_a_module_outside_the_optimizer_from_the_start_stays_out(tmp_path):
    class WithTeacher(WithNorm):
        def __init__(self):
            super().__init__()
            self.teacher = nn.Linear(4, 2).double()

        def configure_optimizers(self):
            return torch.optim.SGD(self.head.parameters(), lr=0.1)

    run = fit(tmp_path, backbone(1, train_norms=None), WithTeacher(), epochs=2)
    assert [set(group) for group in run.log.of_epochs("groups")[1]] == [HEAD, BACKBONE]


def test_a_parameter_that_the_user_froze_outside_the_backbone_stays_frozen(tmp_path):
    module = WithNorm()
    module.head.bias.requires_grad_(False)
    run = fit(tmp_path, backbone(1), module, epochs=2)
    assert run.log.of_epochs("trains")[1] == BACKBONE | {"head.weight"}


def test_a_group_that_is_filled_again_has_the_defaults_of_the_optimizer():
    one, two = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([one], lr=0.1, weight_decay=0.5)
    index = join(optimizer, [], {"two": two})
    optimizer.param_groups[index].update(weight_decay=7.0, lr=3.0)
    leave(optimizer, [two])
    assert join(optimizer, [], {"two": two}, index) == index
    group = optimizer.param_groups[index]
    assert (group["weight_decay"], group["lr"], len(optimizer.param_groups)) == (0.5, 0.1, 2)
    assert group["params"][0] is two

"""What trains, epoch by epoch: the tests of Lightning's callbacks, and its known bugs with the right behaviour."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import peft_func as pf
from tests.training.lightning_runs import QUIET, Log, WithNorm, data, equal, loader, trainer

pl = pytest.importorskip("lightning.pytorch")
F = nn.functional
pytestmark = QUIET

Theirs = pl.callbacks.BackboneFinetuning
BACKBONE_NORM = {"backbone.1.weight", "backbone.1.bias"}
BACKBONE = BACKBONE_NORM | {f"backbone.{i}.{kind}" for i in (0, 3) for kind in ("weight", "bias")}
HEAD = {"head.weight", "head.bias"}
HEAD_THEN_ALL = {0: r"head\..*", 2: ".*"}


def backbone(unfreeze_at=2, *, growth=2.0, initial=None, align=True, **options):
    schedule = pf.BackboneSchedule(unfreeze_at=unfreeze_at, growth=growth, initial=initial, align=align)
    return pf.lightning.BackboneFinetuning(schedule=schedule, **options)


def finetuning(schedule=None, **options):
    return pf.lightning.FunctionalFinetuning(pf.schedule(schedule or HEAD_THEN_ALL), **options)


def fit(tmp_path, callback, module=None, epochs=5, val=None, **options):
    log, module = Log(), WithNorm() if module is None else module
    runner = trainer(tmp_path, callback, log, max_epochs=epochs, **options)
    runner.fit(module, loader(), val)
    return SimpleNamespace(log=log, module=module, trainer=runner, optimizer=runner.optimizers[0])


def step_lr(optimizer):
    return lr_scheduler.StepLR(optimizer, 1, gamma=0.7)


# ---- 5.3 and 5.4: the tests to mirror


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")  # theirs, at the norms
@pytest.mark.parametrize("options", [{}, {"align": False}, {"initial": 0.02, "growth": 1.5}], ids=str)
@pytest.mark.parametrize("scheduler", [None, step_lr], ids=["constant", "StepLR"])
def test_the_eight_epochs_of_the_backbone_are_lightnings_to_the_bit(tmp_path, options, scheduler):
    ours = fit(tmp_path, backbone(**options), WithNorm(scheduler=scheduler), epochs=8)
    theirs = fit(
        tmp_path,
        Theirs(
            unfreeze_backbone_at_epoch=2,
            lambda_func=lambda epoch: options.get("growth", 2.0),
            backbone_initial_lr=options.get("initial"),
            should_align=options.get("align", True),
        ),
        WithNorm(scheduler=scheduler),
        epochs=8,
    )
    assert ours.log.of_epochs("rates") == theirs.log.of_epochs("rates")
    assert [row["loss"] for row in ours.log.rows] == [row["loss"] for row in theirs.log.rows]
    assert equal(ours.module.state_dict(), theirs.module.state_dict())


def test_the_rates_of_the_backbone_are_those_of_the_reference(tmp_path):
    def rates(**options):
        return [rate for _, rate in fit(tmp_path, backbone(**options), epochs=8).log.of_epochs("rates")[2:]]

    assert rates() == pytest.approx([0.01, 0.02, 0.04, 0.08, 0.1, 0.1], abs=1e-15)
    assert rates(align=False) == pytest.approx([0.01, 0.02, 0.04, 0.08, 0.16, 0.32], abs=1e-15)
    assert rates(initial=0.02, growth=1.5) == pytest.approx([0.02, 0.03, 0.045, 0.0675, 0.1, 0.1], abs=1e-15)


def test_a_parameter_already_in_the_optimizer_is_not_added_and_nothing_warns(tmp_path):
    class Everything(WithNorm):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    run = fit(tmp_path, finetuning({0: ".*", 1: r"(head|backbone\.3)\..*"}), Everything(), epochs=2)
    (first,) = run.log.of_epochs("groups")[0]
    assert set(first) == BACKBONE | HEAD
    assert run.log.of_epochs("groups")[1] == [["backbone.3.weight", "backbone.3.bias", "head.weight", "head.bias"]]


@pytest.mark.parametrize("norms", [None, True, False])
def test_freeze_and_unfreeze_with_norms_in_and_out(tmp_path, norms):
    run = fit(tmp_path, finetuning(train_norms=norms), epochs=3)
    frozen, thawed = {
        None: (HEAD, HEAD | BACKBONE),
        True: (HEAD | BACKBONE_NORM, HEAD | BACKBONE),
        False: (HEAD, (HEAD | BACKBONE) - BACKBONE_NORM),
    }[norms]
    for trains, groups, expected in zip(
        run.log.of_epochs("trains"), run.log.of_epochs("groups"), [frozen, frozen, thawed], strict=True
    ):
        assert trains == expected
        assert sorted(name for group in groups for name in group) == sorted(expected)


def test_nested_lists_of_modules_are_unions_of_selectors(tmp_path):
    where = pf.path(r"backbone\.0\..*") | (pf.path(r"backbone\.3\..*") | ["head"])
    run = fit(tmp_path, finetuning({0: where}), epochs=1)
    assert run.log.of_epochs("trains") == [HEAD | BACKBONE - BACKBONE_NORM]


@pytest.mark.parametrize(("options", "rate"), [({}, 0.001), ({"denominator": 4}, 0.0025), ({"initial_rate": 100}, 100)])
def test_the_rate_of_a_group_is_given_or_a_fraction_of_the_heads(tmp_path, options, rate):
    module = WithNorm(lambda parameters: torch.optim.SGD(parameters, lr=0.01))
    run = fit(tmp_path, finetuning({0: "head.*", 1: ".*"}, **options), module, epochs=2)
    assert run.log.of_epochs("rates") == [[0.01], [0.01, rate]]


class Layers(pl.LightningModule):
    """Layers that thaw one after the other, from the last on; one of them owns a parameter and a submodule."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.layer.append(Scaled())
        self.double()

    def training_step(self, batch, index):
        x = batch[0]
        for layer in self.layer:
            x = torch.tanh(layer(x))
        return F.cross_entropy(x, batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.scale = nn.Linear(4, 2), nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.scale * self.inner(x)


class LayerByLayer(pf.lightning.FunctionalFinetuning):
    """Written without a call of super().__init__(), as in the seed's document."""

    def __init__(self, layers):
        self.layers = layers

    def selection(self, epoch):
        return [self.layers[number] for number in range(epoch + 1)]


def test_layers_thaw_epoch_by_epoch_and_the_groups_are_saved_by_name(tmp_path):
    callback = LayerByLayer(["layer.3", "inner", "layer.2", "layer.1"])
    run = fit(tmp_path, callback, Layers(), epochs=4)
    expected = [
        ["layer.3.scale"],
        ["layer.3.inner.weight", "layer.3.inner.bias"],
        ["layer.2.weight", "layer.2.bias"],
        ["layer.1.weight", "layer.1.bias"],
    ]
    assert run.log.of_epochs("groups") == [expected[: epoch + 1] for epoch in range(4)]
    assert callback.state_dict()["groups"] == [expected]


def test_a_selection_that_knows_no_more_layers_says_so_past_the_end(tmp_path):
    runner = trainer(tmp_path, LayerByLayer(["layer.3", "layer.2"]), max_epochs=2)
    module = Layers()
    runner.fit(module, loader())
    runner.save_checkpoint(tmp_path / "end.ckpt")
    longer = trainer(tmp_path, LayerByLayer(["layer.3", "layer.2"]), max_epochs=4)
    with pytest.raises(IndexError):
        longer.fit(module, loader(), ckpt_path=tmp_path / "end.ckpt")


def test_conv_blocks_and_a_parameter_of_their_parent_are_nine_parameters(tmp_path):
    class Block(nn.Module):
        def __init__(self, inside, out):
            super().__init__()
            self.conv, self.act, self.bn = nn.Conv2d(inside, out, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(out)

        def forward(self, x):
            return self.bn(self.act(self.conv(x)))

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(Block(1, 2), Block(2, 2))
            self.shift = nn.Parameter(torch.zeros(1))  # of the parent itself

        def forward(self, x):
            return self.blocks(x.view(-1, 1, 2, 2)).flatten(1) + self.shift

    module = WithNorm()
    module.backbone = nn.Sequential(Encoder()).double()
    run = fit(tmp_path, backbone(1, train_norms=False), module, epochs=2)
    first, second = run.log.of_epochs("groups")
    assert first == [["head.weight", "head.bias"]]
    encoder = [name for name, _ in module.backbone.named_parameters()]
    assert len(encoder) == 9
    assert set(second[1]) == {f"backbone.{name}" for name in encoder if ".bn." not in name}
    run = fit(tmp_path, backbone(0, train_norms=False), module, epochs=1)
    assert len(run.log.rows[0]["trains"]) == 9 - 4 + 2


@pytest.mark.parametrize("name", ["DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy"])
def test_a_strategy_that_shards_the_parameters_is_refused_by_name(name):
    kind = getattr(pl.strategies, name)
    fake = SimpleNamespace(strategy=kind.__new__(kind), callbacks=[])
    with pytest.raises(pf.OptionError, match=name):
        finetuning().setup(fake, WithNorm(), "fit")


def test_a_module_without_the_backbone_is_an_error_that_names_the_nearest(tmp_path):
    callback = pf.lightning.BackboneFinetuning("backbonne")
    with pytest.raises(pf.SelectorError, match=r"'backbonne' matches none .* nearest modules: backbone"):
        fit(tmp_path, callback)
    run = fit(tmp_path, pf.lightning.BackboneFinetuning(pf.glob("backbone.*")), epochs=1)
    assert run.log.rows[0]["trains"] == HEAD | BACKBONE_NORM


# ---- 5.5: what is wrong there is right here


def test_row_train_bn_false_is_honoured_in_the_frozen_phase(tmp_path):
    ours = fit(tmp_path, backbone(train_norms=False), epochs=4)
    for row in ours.log.rows:
        assert not row["trains"] & BACKBONE_NORM
        assert equal(
            {n: row["state"][n] for n in BACKBONE_NORM}, {n: WithNorm().state_dict()[n] for n in BACKBONE_NORM}
        )
    theirs = fit(tmp_path, Theirs(unfreeze_backbone_at_epoch=2, train_bn=False), epochs=1)
    assert theirs.log.rows[0]["trains"] >= BACKBONE_NORM  # their bug 21531


def statistics_of(state):
    return torch.cat([state["backbone.1.running_mean"], state["backbone.1.running_var"]])


@pytest.mark.parametrize("norms", [None, False])
def test_row_running_statistics_stay_with_frozen_norms(tmp_path, norms):
    start = statistics_of(WithNorm().state_dict())
    run = fit(tmp_path, finetuning(train_norms=norms), epochs=4, val=loader(seed=2))
    changed = [not torch.equal(statistics_of(state), start) for state in run.log.of_epochs("state")]
    assert changed == ([False, False, True, True] if norms is None else [False] * 4)
    theirs = fit(tmp_path, Theirs(unfreeze_backbone_at_epoch=2, train_bn=False), epochs=3)
    assert not torch.equal(statistics_of(theirs.module.state_dict()), start)  # their bug 15062


@pytest.mark.parametrize("update", [True, False])
def test_running_statistics_can_be_kept_or_updated_in_all_epochs(tmp_path, update):
    start = statistics_of(WithNorm().state_dict())
    run = fit(tmp_path, finetuning(update_statistics=update), epochs=3, val=loader(seed=2))
    changed = [not torch.equal(statistics_of(state), start) for state in run.log.of_epochs("state")]
    assert changed == [update] * 3


def test_a_frozen_norm_normalises_alike_in_training_and_in_evaluation(tmp_path):
    """Theirs takes the batch's statistics in training, and the stored ones in evaluation."""
    x, y = data()
    for callback, alike in ((finetuning(), True), (Theirs(unfreeze_backbone_at_epoch=2, train_bn=False), False)):
        module = WithNorm()
        with torch.no_grad():
            in_eval = float(F.cross_entropy(module.eval()(x[:4]), y[:4]))
        run = fit(tmp_path, callback, module.train(), epochs=1)
        assert (run.log.rows[0]["loss"] == pytest.approx(in_eval, abs=1e-14)) is alike


def test_modes_survive_validation_and_hooks_and_are_given_back(tmp_path):
    class Own(WithNorm):
        def on_train_epoch_start(self):
            self.train()

        def on_validation_model_train(self):
            self.train()

    modes = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            modes.append((pl_module.training, pl_module.backbone.training, pl_module.backbone[1].training))

    module = Own()
    log = Log()
    trainer(tmp_path, finetuning({0: "head.*", 1: ".*", 2: "head.*"}), log, Watch(), max_epochs=3).fit(
        module, loader(), loader()
    )
    assert modes == [(True, True, False)] * 4 + [(True, True, True)] * 4 + [(True, True, False)] * 4
    assert all(part.training for part in module.modules())


def test_a_norm_that_the_user_put_in_eval_mode_stays_there(tmp_path):
    module = WithNorm()
    module.backbone.eval()
    with pytest.warns(UserWarning, match="eval mode at the start of training"):
        fit(tmp_path, finetuning(), module, epochs=3)
    assert not any(part.training for part in module.backbone.modules())


def test_row_equal_values_do_not_make_parameters_the_same(tmp_path):
    class Twins(WithNorm):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.BatchNorm1d(8)).double()

    for callback, count in ((finetuning({0: "head.*", 1: ".*"}), 6), (TheirUnfreeze(), 4)):
        run = fit(tmp_path, callback, Twins(), epochs=2)
        groups = run.log.of_epochs("groups")[1][1:]
        assert sum(map(len, groups)) == count  # theirs drops the second norm: equal to the first


class TheirUnfreeze(pl.callbacks.BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            for part in pl_module.backbone[:2]:
                self.unfreeze_and_add_param_group(part, optimizer)
            with pytest.warns(UserWarning, match="already exist"):
                self.unfreeze_and_add_param_group(pl_module.backbone[2], optimizer)


def test_row_the_rate_of_new_groups_is_a_method_to_override(tmp_path):
    class Gentle(pf.lightning.FunctionalFinetuning):
        def rate(self, epoch, head_rate, previous):
            return head_rate / 100 if previous is None else min(3 * previous, head_rate)

    schedule = pf.schedule({0: "head.*", 1: r"(head|backbone\.3).*", 2: ".*"})
    run = fit(tmp_path, Gentle(schedule), epochs=4)
    expected = [[0.1], [0.1, 0.001], [0.1, 0.003, 0.001], [0.1, 0.009, 0.003]]
    for rates, wanted in zip(run.log.of_epochs("rates"), expected, strict=True):
        assert rates == pytest.approx(wanted)


def test_row_norms_that_train_from_the_start_do_not_warn_at_unfreeze(tmp_path):
    run = fit(tmp_path, backbone(1), epochs=2)
    assert set(run.log.of_epochs("groups")[0][0]) == HEAD | BACKBONE_NORM
    assert set(run.log.of_epochs("groups")[1][1]) == BACKBONE - BACKBONE_NORM


def test_norms_train_from_the_start_also_where_the_optimizer_was_made_for_the_head(tmp_path):
    run = fit(tmp_path, backbone(1), WithNorm(head_only=True), epochs=3)
    assert [set(group) for group in run.log.of_epochs("groups")[1]] == [HEAD, BACKBONE_NORM, BACKBONE - BACKBONE_NORM]
    wanted = [[0.1, 0.01], [0.1, 0.01, 0.01], [0.1, 0.02, 0.02]]
    for rates, expected in zip(run.log.of_epochs("rates"), wanted, strict=True):
        assert rates == pytest.approx(expected)


# ---- groups, optimizers and schedulers while the set changes


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


# ---- adapters under the callback


def test_parts_of_an_adapter_thaw_by_their_paths_and_by_the_modules_they_are_for(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)).double()
    method = pf.chain(pf.lora("0", rank=2), pf.train(pf.of_type(nn.BatchNorm1d)), pf.train("3", name="head"))
    module = pf.lightning.FunctionalModule(
        base,
        method,
        loss=F.cross_entropy,
        optimizer=lambda named: torch.optim.SGD([p for _, p in named], lr=0.1),
        always_eval=pf.of_type(nn.BatchNorm1d),
    )
    schedule = {0: r"adapted\.head\..*", 1: r"adapted\.(head|lora)\..*", 2: pf.of_type(nn.BatchNorm1d)}
    run = fit(tmp_path, finetuning(schedule), module, epochs=3)
    head, lora, norm = (
        {f"adapted.{name}" for name in names}
        for names in (
            ("head.3.weight", "head.3.bias"),
            ("lora.0.weight.A", "lora.0.weight.B"),
            ("train.1.weight", "train.1.bias"),
        )
    )
    assert run.log.of_epochs("trains") == [head, head | lora, norm]
    assert len(run.module.state_dict()) == 6 + 3
    run = fit(tmp_path, finetuning({0: ".*"}, train_norms=False), module, epochs=1)
    assert run.log.of_epochs("trains") == [head | lora]


def test_statistics_inside_an_adapted_net_are_the_modules_business(tmp_path):
    base = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).double()
    module = pf.lightning.FunctionalModule(base, pf.lora("0", rank=2), loss=F.cross_entropy)
    with pytest.raises(pf.OptionError, match="always_eval"):
        fit(tmp_path, finetuning({0: ".*"}, update_statistics=False), module)


# ---- bad input


class GAN(WithNorm):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return loss

    def configure_optimizers(self):
        return [torch.optim.SGD([getattr(self.head, name)], lr=0.1) for name in ("weight", "bias")]


def test_of_several_optimizers_one_is_chosen(tmp_path):
    with pytest.raises(pf.OptionError, match="2 optimizers"):
        fit(tmp_path, finetuning(), GAN())
    run = fit(tmp_path, finetuning({0: "head.*", 1: ".*"}, optimizer=1), GAN(), epochs=2)
    first, second = run.trainer.optimizers
    assert [len(group["params"]) for group in first.param_groups] == [1]
    assert [len(group["params"]) for group in second.param_groups] == [1, 6]


def test_bad_options_and_selections_are_errors(tmp_path):
    kind = pf.lightning.FunctionalFinetuning
    with pytest.raises(pf.OptionError, match=r"pf\.schedule"):
        kind({0: ".*"})
    for options in ({"denominator": 0}, {"initial_rate": -1}, {"denominator": float("nan")}):
        with pytest.raises(pf.OptionError, match="rates are positive"):
            kind(**options)
    with pytest.raises(pf.OptionError, match="override selection"):
        fit(tmp_path, kind())
    with pytest.raises(pf.OptionError, match="two callbacks"):
        trainer(tmp_path, finetuning(), backbone(), max_epochs=1).fit(WithNorm(), loader())
    with pytest.raises(pf.SelectorError, match=r"epoch 1: .*hed.* matches none .*head"):
        fit(tmp_path, finetuning({0: "head.*", 1: "hed.*"}))
    with pytest.raises(pf.SelectorError, match="nothing but norms"):
        fit(tmp_path, finetuning({0: pf.of_type(nn.BatchNorm1d)}, train_norms=False))
    with pytest.raises(pf.OptionError, match="gave None"):
        fit(tmp_path, type("Silent", (kind,), {"rate": lambda *args: None})(pf.schedule(HEAD_THEN_ALL)))


def test_evaluation_touches_nothing(tmp_path):
    module = WithNorm()
    trainer(tmp_path, finetuning()).validate(module, loader(), verbose=False)
    assert all(p.requires_grad for p in module.parameters())

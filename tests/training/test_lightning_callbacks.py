"""What trains, epoch by epoch: the tests of Lightning's own callbacks, adapters, and bad input."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import peft_func as pf
from tests.training.lightning_runs import (
    BACKBONE,
    BACKBONE_NORM,
    HEAD,
    HEAD_THEN_ALL,
    QUIET,
    Log,
    Theirs,
    WithNorm,
    backbone,
    finetuning,
    fit,
    loader,
    pl,
    trainer,
)
from tests.training.nets import equal

F = nn.functional
pytestmark = QUIET


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


def test_a_checkpoint_with_the_state_of_another_callback_is_refused(tmp_path):
    callback = finetuning()
    for state in ({"internal_optimizer_metadata": {}}, {"epoch": 0, "groups": [[], []], "trains": [], "joined": {}}):
        runner = trainer(tmp_path, callback, max_epochs=1)
        runner.fit(WithNorm(), loader())
        checkpoint = runner._checkpoint_connector.dump_checkpoint(weights_only=False)
        checkpoint["callbacks"]["FunctionalFinetuning"] = state
        torch.save(checkpoint, tmp_path / "foreign.ckpt")
        with pytest.raises(pf.FileFormatError, match="of another callback, or not for 1 optimizer"):
            trainer(tmp_path, callback, max_epochs=2).fit(WithNorm(), loader(), ckpt_path=tmp_path / "foreign.ckpt")


def test_a_state_that_was_loaded_for_an_evaluation_is_not_for_the_next_fit(tmp_path):
    run = fit(tmp_path, finetuning(), epochs=3)
    run.trainer.save_checkpoint(tmp_path / "end.ckpt")
    callback, module = finetuning(), WithNorm()
    trainer(tmp_path, callback).validate(module, loader(), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    again = fit(tmp_path, callback, module, epochs=1)
    assert again.log.rows[0]["trains"] == HEAD
    assert again.log.rows[0]["groups"] == [["head.weight", "head.bias"]]


def test_a_second_fit_goes_on_where_the_schedule_is(tmp_path):
    log = Log()
    runner = trainer(tmp_path, finetuning(), log, max_epochs=3)
    module = WithNorm()
    runner.fit(module, loader())
    runner.fit_loop.max_epochs = 5
    runner.fit(module, loader())
    assert log.of_epochs("trains") == [HEAD, HEAD] + [HEAD | BACKBONE] * 3
    assert [len(groups) for groups in log.of_epochs("groups")] == [1, 1, 2, 2, 2]


def test_accumulated_and_clipped_gradients_stop_at_the_boundary(tmp_path):
    """Two batches a step, with clipping: the same as one batch of both, where nothing normalises over the batch."""
    curves = []
    for batch, accumulate in ((4, 2), (8, 1)):
        module = WithNorm()
        module.backbone[1] = nn.Identity()
        runner = trainer(
            tmp_path, finetuning(), max_epochs=4, accumulate_grad_batches=accumulate, gradient_clip_val=0.3
        )
        runner.fit(module, loader(batch))
        curves.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    torch.testing.assert_close(curves[0], curves[1], rtol=0, atol=1e-12)

"""What is known to be wrong in Lightning's callbacks, with the right behaviour; each test is named after its row."""

import pytest
import torch
from torch import nn

import peft_func as pf
from tests.training.lightning_runs import (
    BACKBONE,
    BACKBONE_NORM,
    HEAD,
    QUIET,
    Log,
    Theirs,
    TheirsByHand,
    WithNorm,
    backbone,
    data,
    finetuning,
    fit,
    loader,
    pl,
    trainer,
)
from tests.training.nets import equal

F = nn.functional
pytestmark = QUIET


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


class TheirUnfreeze(TheirsByHand):
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


def test_a_norm_without_parameters_is_frozen_with_the_part_around_it(tmp_path):
    start = statistics_of(WithNorm().state_dict())
    for schedule, kept in (({0: "head.*"}, True), ({0: r"(head|backbone\.0).*"}, False)):
        module = WithNorm()
        module.backbone[1] = nn.BatchNorm1d(8, affine=False).double()
        run = fit(tmp_path, finetuning(schedule), module, epochs=1)
        assert torch.equal(statistics_of(run.module.state_dict()), start) is kept


def test_norms_that_the_user_froze_outside_the_backbone_stay_frozen(tmp_path):
    module = WithNorm()
    module.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 2)).double()
    module.head[0].requires_grad_(False)
    run = fit(tmp_path, backbone(1), module, epochs=2)
    assert run.log.of_epochs("trains")[1] == BACKBONE | {"head.1.weight", "head.1.bias"}

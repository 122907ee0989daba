"""The rates of a backbone, to the digit those of Lightning's callback."""

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import peft_func as pf
from tests.training.lightning_runs import QUIET, loader, trainer

pytestmark = QUIET


class Rates(pl.LightningModule):
    """A head and a backbone; it notes the rates of every epoch."""

    def __init__(self, gamma):
        super().__init__()
        self.backbone, self.head, self.gamma = nn.Linear(4, 4).double(), nn.Linear(4, 2).double(), gamma
        self.seen = []

    def training_step(self, batch, index):
        if index == 0:
            self.seen.append([group["lr"] for group in self.optimizers().param_groups])
        return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.head.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=self.gamma)]


CASES = [
    {},
    {"align": False},
    {"initial": 0.02, "growth": 1.5},
    {"growth": lambda epoch: 1 + epoch / 7, "align": False},
    {"ratio": 0.3, "unfreeze_at": 0},
    {"initial": 0.4},
    {"growth": 0.5, "unfreeze_at": 3},
    {"unfreeze_at": 9},
]


@pytest.mark.parametrize("gamma", [1.0, 0.7])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_rates_are_lightnings_to_the_bit(case, gamma, tmp_path):
    options = {"unfreeze_at": 2, **CASES[case]}
    ours = pf.BackboneSchedule(**options)
    growth = options.get("growth", 2.0)
    theirs = pl.callbacks.BackboneFinetuning(
        unfreeze_backbone_at_epoch=options["unfreeze_at"],
        lambda_func=growth if callable(growth) else lambda epoch: growth,
        backbone_initial_ratio_lr=options.get("ratio", 0.1),
        backbone_initial_lr=options.get("initial"),
        should_align=options.get("align", True),
    )
    module = Rates(gamma)
    trainer(tmp_path, theirs, max_epochs=8).fit(module, loader())
    heads = [rates[0] for rates in module.seen]
    # The scheduler moves the new group as well, and the callback overwrites that at the start of the next epoch.
    assert ours.rates(heads) == [rates[1] if len(rates) > 1 else None for rates in module.seen]
    assert len(heads) == 8


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, [0.01, 0.02, 0.04, 0.08, 0.1, 0.1]),
        ({"align": False}, [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64]),
        ({"initial": 0.02, "growth": 1.5}, [0.02, 0.03, 0.045, 0.0675, 0.1]),
    ],
)
def test_the_known_sequences(options, wanted):
    rates = pf.BackboneSchedule(unfreeze_at=2, **options).rates([0.1] * (2 + len(wanted)))
    assert rates[:2] == [None, None]
    assert [round(rate, 12) for rate in rates[2:]] == wanted


@given(st.integers(0, 6), st.floats(0.1, 3.0), st.lists(st.floats(1e-6, 1.0), min_size=8, max_size=8))
def test_an_aligned_rate_is_never_above_the_heads(unfreeze_at, growth, heads):
    rates = pf.BackboneSchedule(unfreeze_at=unfreeze_at, growth=growth).rates(heads)
    assert rates[:unfreeze_at] == [None] * unfreeze_at
    assert all(rate <= head for rate, head in zip(rates[unfreeze_at:], heads[unfreeze_at:], strict=True))


def test_one_that_joins_late_begins_as_at_its_epoch():
    schedule = pf.BackboneSchedule(unfreeze_at=2, ratio=0.5)
    assert schedule.rate(7, 0.1) == schedule.rate(2, 0.1) == 0.05
    assert schedule.rate(2, torch.tensor(0.25), 17.0) == 0.125


@pytest.mark.parametrize(
    "options",
    [
        {"unfreeze_at": -1},
        {"unfreeze_at": 1.5},
        {"unfreeze_at": True},
        {"growth": -1.0},
        {"growth": "2"},
        {"growth": None},
        {"ratio": float("nan")},
        {"initial": float("inf")},
        {"initial": -0.1},
    ],
    ids=str,
)
def test_bad_options_are_refused(options):
    with pytest.raises(pf.OptionError, match=next(iter(options))):
        pf.BackboneSchedule(**options)


def test_bad_rates_are_refused():
    with pytest.raises(pf.OptionError, match="head_rate"):
        pf.BackboneSchedule().rate(0, float("nan"))
    with pytest.raises(pf.OptionError, match="growth"):
        pf.BackboneSchedule(unfreeze_at=0, growth=lambda epoch: -1.0).rates([0.1, 0.1])

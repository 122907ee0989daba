"""`pf.lightning.FunctionalModule`, in real loops; and the door that imports Lightning only when it is asked for."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import peft_func as pf
from peft_func.errors import MissingExtraError
from tests.test_rooms import ALONE
from tests.training.lightning_runs import QUIET, Log, data, loader, trainer
from tests.training.nets import equal

F = nn.functional
ROOT = Path(__file__).parents[2]
pytestmark = QUIET


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()


METHOD = pf.chain(pf.lora("0", rank=2), pf.train("2"))


def module(base=None, **options):
    options = {"loss": F.cross_entropy, "optimizer": partial(adam, lr=0.01)} | options
    return pf.lightning.FunctionalModule(base or net(), METHOD, **options)


def adam(named, lr):
    return torch.optim.Adam([p for _, p in named], lr=lr)


def accuracy(output, target):
    return (output.argmax(1) == target).double().mean()


def python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_an_import_of_the_library_does_not_import_lightning():
    code = "import sys, peft_func as pf; pf.lightning; assert not {'lightning', 'torchmetrics'} & set(sys.modules)"
    done = python(code)
    assert done.returncode == 0, done.stderr[-2000:]


def test_without_lightning_the_error_says_what_to_install():
    code = ALONE + (
        "try:\n    pf.lightning.FunctionalModule\n"
        "except pf.MissingExtraError as error:\n"
        "    assert \"pip install 'peft_func[lightning]'\" in str(error), error\n"
        "else:\n    raise AssertionError\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr[-2000:]
    assert issubclass(MissingExtraError, ImportError)


def test_the_door_lists_its_names_and_refuses_others():
    assert {"FunctionalModule", "FunctionalFinetuning", "BackboneFinetuning"} <= set(dir(pf.lightning))
    with pytest.raises(AttributeError, match="FunctionalFinetuning"):
        pf.lightning.Trainer  # noqa: B018


def test_the_learning_curve_is_that_of_plain_pytorch(tmp_path):
    base, log = net(), Log()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    tuned = module(base)
    trainer(tmp_path, log, max_epochs=3).fit(tuned, DataLoader(Pairs(), 4))
    plain, x, y, losses = net(), *data(), []
    A = pf.bind(METHOD, pf.functionalize(plain)).init(0)[1]["lora"]["0.weight"]
    A, B = (nn.Parameter(A[name].clone()) for name in "AB")
    head = [nn.Parameter(p.detach().clone()) for p in plain[2].parameters()]
    optimizer = torch.optim.Adam([A, B, *head], lr=0.01)
    for _ in range(3):
        for i in range(0, 16, 4):
            hidden = torch.tanh(plain[0](x[i : i + 4]) + x[i : i + 4] @ A.T @ B.T)  # alpha is the rank: scale 1
            loss = F.cross_entropy(F.linear(hidden, *head), y[i : i + 4])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    torch.testing.assert_close(torch.tensor([r["loss"] for r in log.rows]), torch.tensor(losses), rtol=0, atol=1e-12)
    assert sum(losses[8:]) < sum(losses[:4])
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


class Pairs(torch.utils.data.Dataset):
    def __init__(self):
        self.x, self.y = data()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.y[index]


def test_losses_and_metrics_are_logged_and_the_losses_are_in_the_progress_bar(tmp_path):
    runner = trainer(tmp_path, max_epochs=1)
    tuned = module(metrics={"accuracy": accuracy})
    runner.fit(tuned, loader(), loader())
    logged = set(runner.callback_metrics)
    assert {"train_loss", "val_loss", "train_accuracy", "val_accuracy"} <= logged
    assert {"train_loss", "val_loss"} <= set(runner.progress_bar_metrics)
    (results,) = runner.test(tuned, loader(), verbose=False)
    x, y = data()
    with torch.no_grad():
        assert results["test_loss"] == pytest.approx(float(F.cross_entropy(tuned(x), y)))
        assert results["test_accuracy"] == pytest.approx(float(accuracy(tuned(x), y)))


def test_a_mean_over_an_epoch_weighs_batches_by_their_size(tmp_path):
    tuned = module()
    (results,) = trainer(tmp_path).validate(tuned, loader(batch=5), verbose=False)  # 5, 5, 5, 1
    x, y = data()
    with torch.no_grad():
        assert results["val_loss"] == pytest.approx(float(F.cross_entropy(tuned(x), y)))


def test_predictions_are_the_outputs_for_pairs_and_for_bare_inputs(tmp_path):
    tuned, (x, _) = module(), data()
    for batches in (loader(), DataLoader(x, 4)):
        outputs = torch.cat(trainer(tmp_path).predict(tuned, batches))
        torch.testing.assert_close(outputs, tuned(x).detach(), rtol=0, atol=1e-14)


def test_a_checkpoint_holds_the_adapter_only_and_loads_strictly(tmp_path):
    runner = trainer(tmp_path, max_epochs=1)
    tuned = module()
    runner.fit(tuned, loader())
    path = tmp_path / "adapter.ckpt"
    runner.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    names = {"adapted.lora.0.weight.A", "adapted.lora.0.weight.B", "adapted.train.2.weight", "adapted.train.2.bias"}
    assert saved["state_dict"].keys() == names
    assert not saved.get("hyper_parameters")
    kind = pf.lightning.FunctionalModule
    again = kind.load_from_checkpoint(path, weights_only=True, net=net(), method=METHOD, loss=F.cross_entropy)
    assert equal(again.state_dict(), tuned.state_dict())
    fresh = module()
    assert not equal(fresh.state_dict(), tuned.state_dict())
    fresh.load_state_dict(saved["state_dict"], strict=True)
    assert equal(fresh.state_dict(), tuned.state_dict())


def test_a_checkpoint_of_another_method_is_refused(tmp_path):
    runner = trainer(tmp_path)
    runner.fit_loop.max_epochs = 1
    runner.fit(module(), loader())
    path = tmp_path / "adapter.ckpt"
    runner.save_checkpoint(path)
    with pytest.raises(RuntimeError, match=r"adapted\.lora\.2\.weight\.A"):
        pf.lightning.FunctionalModule.load_from_checkpoint(path, net=net(), method=pf.lora(".*", rank=2))


def test_the_merged_state_dict_makes_the_plain_net_give_the_same(tmp_path):
    tuned, plain, (x, _) = module(), net(), data()
    trainer(tmp_path, max_epochs=1).fit(tuned, loader())
    plain.load_state_dict(tuned.merged_state_dict(), strict=True)
    torch.testing.assert_close(plain(x), tuned(x), rtol=0, atol=1e-12)


def test_any_step_can_be_overridden_and_a_scheduler_returned(tmp_path):
    class Mine(pf.lightning.FunctionalModule):
        def training_step(self, batch, batch_idx):
            return 2 * super().training_step(batch, batch_idx)

    def with_scheduler(named):
        optimizer = torch.optim.SGD([p for _, p in named], lr=0.5)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}

    log = Log()
    mine = Mine(net(), METHOD, loss=F.cross_entropy, optimizer=with_scheduler)
    trainer(tmp_path, log, max_epochs=2).fit(mine, loader())
    x, y = data()
    first = F.cross_entropy(module()(x[:4]), y[:4])
    assert log.rows[0]["loss"] == pytest.approx(2 * float(first.detach()))
    assert log.of_epochs("rates") == [[0.5], [0.25]]


def test_dict_batches_take_the_loss_of_the_net_or_one_that_is_given(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2, dtype=torch.float64)

        def forward(self, x, labels=None):
            logits = self.layer(x)
            return Output(logits, None if labels is None else F.cross_entropy(logits, labels))

    class Output:
        def __init__(self, logits, loss):
            self.logits, self.loss = logits, loss

    x, y = data()
    batches = [{"x": x[i : i + 4], "labels": y[i : i + 4]} for i in range(0, 16, 4)]
    losses = []
    for loss in (None, lambda output, target: F.cross_entropy(output.logits, target)):
        log = Log()
        torch.manual_seed(0)
        tuned = pf.lightning.FunctionalModule(Net(), pf.lora(".*", rank=1), loss=loss)
        trainer(tmp_path, log, max_epochs=2).fit(tuned, DataLoader(batches, batch_size=None))
        losses.append([row["loss"] for row in log.rows])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("loss", "batch", "message"),
    [
        (F.cross_entropy, (torch.ones(2, 4), torch.ones(2), torch.ones(2)), "tuple of 3"),
        (F.cross_entropy, torch.ones(2, 4), "not a Tensor"),
        (None, data(), "without a loss"),
    ],
)
def test_a_batch_that_is_not_understood_is_an_error_that_says_so(loss, batch, message):
    with pytest.raises(pf.OptionError, match=message):
        module(loss=loss).training_step(batch, 0)


def test_options_that_are_no_functions_are_refused():
    for options in ({"loss": "cross_entropy"}, {"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))])}):
        with pytest.raises(pf.OptionError, match="is a function, not"):
            module(**options)
    with pytest.raises(pf.OptionError, match="accuracy is a function"):
        module(metrics={"accuracy": 1})


def test_batch_norms_of_the_net_keep_their_statistics_where_asked(tmp_path):
    for keep in (True, False):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).double()
        where = pf.of_type(nn.BatchNorm1d) if keep else None
        tuned = module(base, always_eval=where)
        trainer(tmp_path, max_epochs=2).fit(tuned, loader(), loader())
        mean = tuned.state_dict()["adapted.net.1.running_mean"]
        assert torch.equal(mean, torch.zeros(8, dtype=torch.float64)) is keep
        assert torch.equal(base[1].running_mean, torch.zeros(8, dtype=torch.float64))


def test_an_empty_fit_of_freeze_and_unfreeze_keeps_the_module(tmp_path):
    tuned, (x, _) = module(), data()
    before = tuned(x).detach()
    tuned.freeze()
    assert not any(p.requires_grad for p in tuned.parameters())
    assert torch.equal(tuned(x), before)
    tuned.unfreeze()
    assert all(p.requires_grad for p in tuned.parameters())


def test_the_size_of_a_batch_is_that_of_its_first_tensor(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2, dtype=torch.float64)

        def forward(self, x, scale):
            return scale * self.layer(x)

    x, y = data()
    scale = torch.full((2,), 0.5, dtype=torch.float64)
    batches = [{"x": x[i : i + 5], "scale": scale, "labels": y[i : i + 5]} for i in range(0, 16, 5)]  # 5, 5, 5, 1
    tuned = pf.lightning.FunctionalModule(Scaled(), pf.lora(".*", rank=1), loss=F.cross_entropy)
    (results,) = trainer(tmp_path).validate(tuned, DataLoader(batches, batch_size=None), verbose=False)
    with torch.no_grad():
        assert results["val_loss"] == pytest.approx(float(F.cross_entropy(tuned(x, scale=scale), y)))

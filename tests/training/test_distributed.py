"""`pf.Adapted` in two processes that share every batch (DDP over gloo): the values are those of one process."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import peft_func as pf
from tests.training import workers
from tests.training.tiny import LORA, bert, rows
from tests.zoo import ConvNet, randn, seeded

ROOT = Path(__file__).parents[2]


def sentences():
    made = rows(2 * workers.SHARE * workers.STEPS, 0)
    ids, labels = torch.stack([row["input_ids"] for row in made]), torch.tensor([row["labels"] for row in made])
    return ids.view(workers.STEPS, 2 * workers.SHARE, -1), labels.view(workers.STEPS, -1)


def images():
    draw = torch.Generator().manual_seed(0)
    return randn(workers.STEPS, 2 * workers.SHARE, 4, 8, 8), torch.randint(3, (workers.STEPS, 8), generator=draw)


def spawned(module, data, folder, *, accumulate=1, **options):
    """Train in two processes that get the module by pickle; return what both found."""
    folder.mkdir()
    arguments = (module, data, str(folder), options, accumulate)
    torch.multiprocessing.spawn(workers.share, arguments, nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accumulate", "options"),
    [(1, {}), (3, {"gradient_as_bucket_view": True}), (1, {"static_graph": True})],
    ids=["plain", "accumulated", "static"],
)
def test_two_processes_are_one_with_the_joined_batch(tmp_path, accumulate, options):
    net = bert().double().train()
    module = pf.Adapted(net, LORA, 3)
    alone = copy.deepcopy(module)
    losses = workers.steps(alone, sentences(), accumulate=accumulate)
    both = spawned(module, sentences(), tmp_path / "ddp", accumulate=accumulate, **options)
    np.testing.assert_allclose(np.mean([found["losses"] for found in both], axis=0), losses, rtol=1e-10)
    assert both[0]["losses"] != both[1]["losses"]
    expected, start = alone.state_dict(), module.state_dict()
    for name, value in expected.items():
        assert torch.equal(both[0]["state"][name], both[1]["state"][name])
        torch.testing.assert_close(both[0]["state"][name], value, rtol=1e-10, atol=1e-10)
        assert not torch.equal(value, start[name])
    merged = torch.load(tmp_path / "ddp" / "merged-1.pt")
    assert merged.keys() == net.state_dict().keys()
    for name, value in alone.merged_state_dict().items():
        torch.testing.assert_close(merged[name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_batch_statistics_are_shared_as_those_of_the_plain_module(tmp_path):
    net = seeded(ConvNet)().train()
    plain = spawned(net, images(), tmp_path / "plain")
    ours = spawned(pf.Adapted(net, pf.train(".*")), images(), tmp_path / "ours")
    for one, other, rank in zip(ours, plain, range(2), strict=True):
        assert one["losses"] == other["losses"]
        merged = torch.load(tmp_path / "ours" / f"merged-{rank}.pt")
        assert merged.keys() == other["state"].keys()
        assert all(torch.equal(value, merged[name]) for name, value in other["state"].items())
        assert int(merged["norm.num_batches_tracked"]) == workers.STEPS


@pytest.mark.slow
def test_the_trainer_in_two_processes_is_the_trainer_in_one(tmp_path):
    alone = workers.run_trainer(tmp_path / "alone", 2 * workers.SHARE)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1",
        "--nproc-per-node=2", "-m", "tests.training.workers", str(tmp_path),
    ]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=env, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert [found["world"] for found in both] == [2, 2]
    np.testing.assert_allclose(both[0]["curve"], alone["curve"], rtol=1e-6)  # Trainer adds losses in float32
    for name, value in alone["state"].items():
        assert torch.equal(both[0]["state"][name], both[1]["state"][name])
        torch.testing.assert_close(both[0]["state"][name], value, rtol=1e-10, atol=1e-10)
    assert both[0]["eval"] == pytest.approx(alone["eval"], rel=1e-6)
    assert (tmp_path / "run" / f"checkpoint-{workers.STEPS}" / "model.safetensors").exists()


def test_data_parallel_is_refused():
    module = pf.Adapted(bert(), LORA)
    with pytest.raises(pf.ModuleRefusedError, match="torchrun"):
        module._replicate_for_data_parallel()  # what nn.DataParallel calls

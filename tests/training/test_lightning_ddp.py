"""Two processes, gloo, while what trains changes: the same weights as one process on the joined batches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.ddp_runs import EPOCHS, RUNS, WORLD, run
from tests.training.lightning_runs import QUIET
from tests.training.nets import equal

pytestmark = [pytest.mark.slow, *QUIET]
BATCHES = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ddp")
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.ddp_runs", str(path)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return path


def of(folder, name, rank=0):
    return torch.load(folder / f"{name}-{rank}.pt", weights_only=True)


def farthest(one, other):
    return max((value - other[name]).abs().max().item() for name, value in one.items())


@pytest.mark.parametrize("name", ["schedule", "adapter", "backbone"])
def test_row_ddp_works_when_what_trains_changes(folder, tmp_path, name):
    single = run(tmp_path, name, 1)
    one, two = (of(folder, name, rank) for rank in range(WORLD))
    assert len(one) == len(two) == len(single) == EPOCHS * BATCHES
    for alone, first, second in zip(single, one, two, strict=True):
        assert farthest(alone, first) < 1e-10
        assert equal(first, second)
    moved = {key for key, value in single[0].items() if farthest({key: value}, single[-1]) > 1e-3}
    assert moved == single[0].keys()


def test_a_run_resumed_in_mid_schedule_is_the_uninterrupted_one_to_the_bit(folder):
    for rank in range(WORLD):
        for again, row in zip(of(folder, "schedule-resumed", rank), of(folder, "schedule", rank)[10:], strict=True):
            assert equal(again, row)


def test_under_lightnings_own_callback_the_processes_part_at_the_unfreeze(folder):
    """What it compares with: their open bug 20340."""
    one, two = (of(folder, "theirs", rank) for rank in range(WORLD))
    apart = [farthest(first, second) > 1e-6 for first, second in zip(one, two, strict=True)]
    assert apart == [False] * (2 * BATCHES) + [True] * (4 * BATCHES)
    assert set(RUNS) == {"schedule", "adapter", "backbone", "theirs"}

"""The benchmark measures what it says: variants that agree, every name in the table, and a table that is its data."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import measure, memory, models, overhead, report, variants
from benchmarks.__main__ import app, measure_model

BENCHMARKS = Path(report.__file__).parent


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads on tiny tensors wait for each other more than they compute
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def case():
    return models.build("tiny")


@pytest.fixture(scope="module")
def record():
    return measure_model("tiny", 4, 1)


def test_every_variant_is_in_the_table(record):
    names = [line[0] for line in report.rows(record) if line[0]]
    assert names == list(variants.VARIANTS)
    assert all(len(line) == len(report.header(record)) for line in report.rows(record))


def test_every_linear_layer_of_the_blocks_is_adapted(case):
    assert len(case.places) == 2 * 6
    assert {models.group(path) for path in case.places} >= {"attention.self.query", "output.dense"}


@pytest.mark.parametrize("pair", variants.EQUAL)
def test_variants_of_a_pair_agree(case, pair):
    variants.verify(variants.build(case, 4, pair))


@pytest.mark.parametrize("pair", variants.EQUAL)
def test_another_start_is_noticed(case, pair):
    built = variants.build(case, 4, pair)
    with torch.no_grad():
        next(iter(built[pair[0]].leaves.values())).mul_(1.001)
    with pytest.raises(variants.DifferentComputationError, match="start from different values"):
        variants.verify(built)


@pytest.mark.parametrize("pair", variants.EQUAL)
def test_another_loss_is_noticed(case, pair):
    built = variants.build(case, 4, pair)
    ours = built[pair[0]]
    built[pair[0]] = replace(ours, loss=lambda: ours.loss() * 1.001)
    with pytest.raises(variants.DifferentComputationError, match="the loss differs"):
        variants.verify(built)


@pytest.mark.parametrize("pair", variants.EQUAL)
def test_another_gradient_behind_the_same_loss_is_noticed(case, pair):
    built = variants.build(case, 4, pair)
    ours = built[pair[0]]
    *_, leaf = ours.leaves.values()
    built[pair[0]] = replace(ours, loss=lambda: ours.loss() + 0.1 * (leaf - leaf.detach()).sum())
    with pytest.raises(variants.DifferentComputationError, match=r"the gradient of .* differs"):
        variants.verify(built)


def test_a_missing_leaf_is_noticed(case):
    built = variants.build(case, 4, (variants.LORA, variants.PEFT_LORA))
    ours = built[variants.LORA]
    first, *rest = ours.leaves
    built[variants.LORA] = replace(ours, leaves={name: ours.leaves[name] for name in rest})
    with pytest.raises(variants.DifferentComputationError, match=first.replace(".", r"\.")):
        variants.verify(built)


def test_rounds_rotate_and_each_variant_runs_once_in_each():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = measure.interleave(calls, 2, warmup=0)
    assert order == ["a", "b", "c", "b", "c", "a"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_ratios_are_of_the_same_round():
    seconds = {"ours": [1.0, 4.0, 9.0], "theirs": [2.0, 2.0, 3.0]}
    assert report.ratio(seconds, "ours", "theirs") == (0.5, 2.0)


def test_peak_memory_counts_what_lives_at_once():
    def call():
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        return second, torch.empty(200)

    assert memory.peak_of(call) == 4 * 1500


def test_overhead_runs():
    seconds = measure.interleave(overhead.build(layers=3), 1, warmup=0)
    info = report.machine(1)
    assert len(list(report.rows(report.run(report.OVERHEAD, 4, seconds, info, {})))) == len(seconds) + 1


def test_command_line_writes_runs_and_shows_them(tmp_path):
    path = tmp_path / "runs.json"
    arguments = ["--model", "tiny", "--rounds", "1", "--threads", "1", "--rank", "2"]
    for _ in range(2):
        result = CliRunner().invoke(app, [*arguments, "--only", variants.FLOOR, "--json", str(path)])
        assert result.exit_code == 0, result.output
    (run,) = report.read(path)
    assert run["rank"] == 2
    assert run["machine"]["threads"] == 1
    assert len(run["seconds"][variants.FLOOR]) == 1
    shown = CliRunner().invoke(app, ["--show", str(path), "--markdown"])
    assert shown.output.strip() == report.markdown(run).strip()


def test_readme_shows_the_recorded_runs():
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    for run in report.read(BENCHMARKS / "results" / "cpu-2-cores.json"):
        assert report.markdown(run) in text

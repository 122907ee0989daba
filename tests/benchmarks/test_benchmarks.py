"""The benchmark measures what it says: variants that agree, every name in the table, and a table that is its data."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import measure, memory, models, peers, report, suite, variants
from benchmarks.__main__ import app

BENCHMARKS = Path(report.__file__).parent
CPU = torch.device("cpu")
COMPILED = (variants.PEFT_COMPILED, variants.LORA_COMPILED)
PAIRS = [
    (first, name)
    for first, *others in variants.EQUAL
    for name in others
    if name in variants.available() and name not in COMPILED
]


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
def records():
    groups = suite.groups(CPU, ["tiny", *suite.CALLS], ranks=[4])
    with pytest.MonkeyPatch.context() as patch:
        for module in suite.CALLS.values():
            patch.setattr(module, "build", partial(module.build, layers=3))
        return [suite.run(group, 1, CPU, 1, with_memory=False) for group in groups]


def test_every_variant_is_in_the_table_and_names_its_peer(records):
    assert {name for record in records for name in record["seconds"]} >= set(variants.available()) - set(COMPILED)
    for record in records:
        lines = list(report.rows(record))
        assert all(len(line) == len(report.HEADER) for line in lines)
        assert list(dict.fromkeys(line[0] for line in lines if line[0])) == list(record["seconds"])
        assert [line[0] for line in lines if not line[3]] == [record["base"]]
        assert {name for peers in record["against"].values() for name in peers} <= set(record["seconds"])


@pytest.mark.parametrize("module", suite.CALLS.values())
def test_every_peer_of_a_call_is_there(module):
    assert {module.BASE, *module.PEERS, *(name for peers in module.PEERS.values() for name in peers)} <= set(
        module.build(layers=3)
    )


def test_overhead_is_shown_beside_both_ratios(records):
    lora = next(record for record in records if record["kind"] == "LoRA")
    lora["seconds"] = {variants.FLOOR: [1.0, 2.0], variants.PEFT_LORA: [3.0, 4.0], variants.LORA: [2.0, 5.0]}
    (line,) = [line for line in report.rows(lora) if line[0] == variants.LORA]
    assert line[1:4] == ["2000", "3500", variants.PEFT_LORA]
    # ours / PEFT: 2/3 and the median of 2/3 and 5/4; ours / floor: 2 and of 2, 2.5; PEFT / floor: 3 and of 3, 2
    assert line[4:10] == ["0.67", "0.96", "2.00", "2.25", "0.50", "0.83"]


def test_every_linear_layer_of_the_blocks_is_adapted(case):
    assert len(case.places) == 2 * 6
    assert {models.group(path) for path in case.places} >= {"attention.self.query", "output.dense"}


@pytest.mark.parametrize("pair", PAIRS)
def test_variants_of_a_pair_agree(case, pair):
    variants.verify(variants.build(case, 4, pair))


def test_compiled_variants_agree(case, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # Inductor takes minutes
    variants.verify(variants.build(case, 4, COMPILED))
    torch.compiler.reset()


def test_bfloat16_variants_agree():
    built = variants.build(models.build("tiny-bf16"), 4)
    variants.verify(built)
    assert {leaf.dtype for variant in built.values() for leaf in variant.leaves.values()} == {torch.bfloat16}


@pytest.mark.parametrize(("name", "billions"), [("llama-1b", 1.24), ("llama-8b", 8.03)])
def test_large_models_are_made_on_the_device_in_their_dtype(name, billions):
    net = models.build(name, "meta").net
    assert {(tensor.device.type, tensor.dtype) for tensor in net.parameters()} == {("meta", torch.bfloat16)}
    assert sum(tensor.numel() for tensor in net.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
    assert torch.get_default_dtype() == torch.float32


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    variants.build(models.build("tiny"), 4)
    for module in suite.CALLS.values():
        module.build(layers=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_cuda_measures_what_needs_it():
    groups = suite.groups(torch.device("cuda"))
    assert [(group.model, group.rank) for group in groups] == [
        ("llama-1b", 16), ("llama-1b", 64), ("llama-8b", 16), ("llama-8b", 64)
    ]  # fmt: skip
    assert all({*COMPILED, variants.PEFT_LORA, variants.LORA, variants.FACTORED} < set(g.names) for g in groups)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without one")
@pytest.mark.parametrize("name", ["cuda", "cuda:1", "cpu:1", "tpu"])
def test_a_missing_device_is_an_error_that_names_those_there(name):
    result = CliRunner().invoke(app, ["--device", name])
    assert result.exit_code == 2
    assert f"there is no device '{name}' here" in result.output
    assert "sees cpu" in " ".join(result.output.replace("│", " ").split())


def test_a_peer_that_is_not_installed_is_left_out_with_a_line(monkeypatch):
    def fail(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(peers.importlib, "import_module", fail)
    assert peers.missing()["loralib"] == "without loralib (No module named 'loralib'): pip install loralib"
    assert set(peers.missing()) == {variants.LORALIB, variants.TORCHTUNE}
    (group,) = [group for group in suite.groups(CPU, ["tiny"], [4]) if group.kind == "LoRA"]
    assert group.names == (variants.FLOOR, variants.PEFT_LORA, variants.LORA, variants.FACTORED)


@pytest.mark.parametrize("pair", PAIRS)
def test_another_start_is_noticed(case, pair):
    built = variants.build(case, 4, pair)
    with torch.no_grad():
        next(iter(built[pair[1]].leaves.values())).mul_(1.001)
    with pytest.raises(variants.DifferentComputationError, match="start from different values"):
        variants.verify(built)


@pytest.mark.parametrize("pair", PAIRS)
def test_another_loss_is_noticed(case, pair):
    built = variants.build(case, 4, pair)
    ours = built[pair[1]]
    built[pair[1]] = replace(ours, loss=lambda: ours.loss() * 1.001)
    with pytest.raises(variants.DifferentComputationError, match="the loss differs"):
        variants.verify(built)


@pytest.mark.parametrize("pair", PAIRS)
def test_another_gradient_behind_the_same_loss_is_noticed(case, pair):
    built = variants.build(case, 4, pair)
    ours = built[pair[1]]
    *_, leaf = ours.leaves.values()
    built[pair[1]] = replace(ours, loss=lambda: ours.loss() + 0.1 * (leaf - leaf.detach()).sum())
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


def test_overhead_over_a_peer_at_the_base_is_not_a_number():
    seconds = {"base": [1.0, 1.0], "peer": [1.04, 1.5], "ours": [1.1, 1.25]}
    low, median = report.overhead(seconds, "base", "ours", "peer")
    assert low != low
    assert median == pytest.approx(0.175 / 0.27)


def test_a_device_is_waited_for_around_each_call():
    order = []
    measure.interleave({"a": lambda: order.append("a")}, 2, warmup=0, wait=lambda: order.append("wait"))
    assert order == ["wait", "a", "wait"] * 2


@pytest.mark.slow
def test_peak_memory_is_measured_in_processes_of_their_own():
    found = memory.peaks("tiny", [variants.FLOOR, variants.PEFT_LORA, variants.DENSE_GIFT], 4, 1)
    assert 0 < found[variants.FLOOR] < found[variants.PEFT_LORA] < found[variants.DENSE_GIFT]


def test_command_line_writes_runs_and_shows_and_draws_them(tmp_path):
    path, picture = tmp_path / "runs.json", tmp_path / "runs.svg"
    options = ["--model", "tiny", "--rounds", "1", "--threads", "1", "--rank", "2", "--no-memory", "--json", str(path)]
    for name in (variants.FLOOR, variants.FACTORED):
        options += ["--only", name]
    for _ in range(2):
        result = CliRunner().invoke(app, options, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    (run,) = report.read(path)
    assert run["rank"] == 2
    assert run["machine"]["threads"] == 1
    assert {"torch", "transformers", "peft", "python", "cpu", "device"} < set(run["machine"])
    assert {name: len(times) for name, times in run["seconds"].items()} == {variants.FLOOR: 1, variants.FACTORED: 1}
    shown = CliRunner().invoke(app, ["--show", str(path), "--markdown", "--plot", str(picture)], catch_exceptions=False)
    assert shown.output.strip() == report.markdown([run]).strip()
    assert variants.FACTORED in CliRunner().invoke(app, ["--show", str(path)], catch_exceptions=False).output
    assert picture.read_text().count("<svg") == 1


@pytest.mark.parametrize("page", ["benchmarks/README.md", "docs/speed.md"])
def test_pages_show_the_recorded_runs(page):
    text = (BENCHMARKS.parent / page).read_text(encoding="utf-8")
    assert report.markdown(report.read(BENCHMARKS / "results" / "cpu-2-cores.json")).strip() in text


def test_the_ratios_in_the_readme_are_those_of_the_record():
    runs = report.read(BENCHMARKS / "results" / "cpu-2-cores.json")
    text = (BENCHMARKS.parent / "README.md").read_text(encoding="utf-8")

    def low(model, rank, kind, name, peer):
        run = next(run for run in runs if (run["model"], run["rank"], run["kind"]) == (model, rank, kind))
        peak = run["peak_bytes"]
        return f"{report.ratio(run['seconds'], name, peer)[0]:.2f}", f"{peak[name] / peak[peer]:.2f}"

    lora = {
        (model, rank): low(model, rank, "LoRA", variants.LORA, variants.PEFT_LORA)[0]
        for model in ("bert", "llama")
        for rank in (8, 64)
    }
    both = "GIFT and DoRA"
    gift = [low(model, 16, both, variants.GIFT, variants.DENSE_GIFT)[0] for model in ("bert", "llama")]
    dora = [low(model, 16, both, variants.DORA, variants.PEFT_DORA) for model in ("bert", "llama")]
    assert (
        f"a LoRA step takes {lora['bert', 8]} (rank 8) and {lora['bert', 64]} (rank 64) of PEFT's on MiniLM, "
        f"{lora['llama', 8]} and {lora['llama', 64]} on a Llama shape; "
        f"GIFT {gift[0]} and {gift[1]} of forming its update; "
        f"DoRA {dora[0][0]} and {dora[1][0]} of PEFT's with {dora[0][1]} and {dora[1][1]} of its peak memory"
    ) in text

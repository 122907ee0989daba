"""The benchmark of many adapters measures ways that agree, and its tables are its data."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.many import comparisons, curves, minilm, tables
from benchmarks.many.__main__ import app
from benchmarks.variants import DifferentComputationError


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def encoder():
    return minilm.load(4, tiny=True)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_mixed_batch_is_peft_s(encoder):
    case = comparisons.mixed_batch(encoder, 4, 2, 5)
    assert list(case.calls) == [
        comparisons.PLAIN, comparisons.ONE, comparisons.PEFT_MIXED, comparisons.ROUTE, comparisons.SORTED
    ]  # fmt: skip
    plain, _, theirs, ours, in_order = (call() for call in case.calls.values())
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours, plain, atol=1e-3)
    assert not torch.allclose(ours, in_order, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_training_compares_the_same_gradients(encoder):
    case = comparisons.training(encoder, 3, 2, 5)
    folded, mapped = case.calls[comparisons.FOLD](), case.calls[comparisons.VMAP]()
    for path, leaf in folded["lora"].items():
        torch.testing.assert_close(leaf["A"], mapped["lora"][path]["A"])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_other_adapters_are_noticed(encoder):
    other = minilm.Encoder(
        encoder.net, encoder.model, encoder.adapter, encoder.frozen, encoder.trees[::-1], encoder.stacked
    )
    case = comparisons.mixed_batch(encoder, 4, 2, 5)
    with pytest.raises(DifferentComputationError):
        comparisons._agree(
            case.calls[comparisons.ROUTE](), comparisons.mixed_batch(other, 4, 2, 5).calls[comparisons.PEFT_MIXED]()
        )


@pytest.mark.slow
def test_the_command_writes_what_it_shows(tmp_path):
    file, picture = tmp_path / "many.json", tmp_path / "many.svg"
    options = ["--tiny", "--rounds", "1", "--threads", "1", "--banks", "--json", str(file), "--plot", str(picture)]
    measured = CliRunner().invoke(app, [*options, "--markdown"], catch_exceptions=False)
    assert measured.exit_code == 0
    record = json.loads(file.read_text())
    assert len(record["comparisons"]) == 7
    assert record["curves"]["counts"] == list(curves.COUNTS)
    assert picture.read_text().count("<svg") == 1
    shown = CliRunner().invoke(app, ["--show", str(file), "--markdown"], catch_exceptions=False)
    assert shown.output.strip() in measured.output
    assert all(tables.markdown(entry) in measured.output for entry in record["comparisons"])
    table = CliRunner().invoke(app, ["--show", str(file)], catch_exceptions=False)
    assert "A mixed batch: 8 adapters" in table.output


def test_readme_shows_the_recorded_tables():
    folder = Path(tables.__file__).parents[1]
    text = (folder / "README.md").read_text(encoding="utf-8")
    record = json.loads((folder / "results" / "many-cpu-2-cores.json").read_text(encoding="utf-8"))
    for entry in record["comparisons"]:
        assert tables.markdown(entry) in text

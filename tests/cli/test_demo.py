"""The demo from end to end, with few steps, and what it says to bad values."""

import re
import sys

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import peft_func as pf
from peft_func.cli import demo as demo_module
from peft_func.cli.app import app
from peft_func.cli.digits import load_digits
from peft_func.cli.export import Comparison
from peft_func.cli.main import run
from peft_func.cli.vit import VisionTransformer, vision_transformer


@pytest.fixture(autouse=True)
def short_pretraining(monkeypatch):
    monkeypatch.setattr(demo_module, "PRETRAINING_STEPS", 5)


def invoke(*args):
    return CliRunner().invoke(app, ["demo", *map(str, args)])


def without_time(text):
    return re.sub(r"Total time.*", "", text)


def test_files_and_predictions(tmp_path):
    out, state = tmp_path / "new" / "folder", torch.get_rng_state()
    result = invoke("--members", 3, "--steps", 4, "--out", out, "--seed", 7)
    assert result.exit_code == 0, result.output
    assert torch.equal(state, torch.get_rng_state())
    assert sorted(path.name for path in out.iterdir()) == ["adapter.safetensors", "demo.png", "merged.safetensors"]
    assert (out / "demo.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (out / "demo.png").stat().st_size > 20_000
    for said in ("lora.blocks.0.q_proj.weight.A", "gift.fc1.phi", "base, not adapted", "ensemble of 3", "kB"):
        assert said in result.output
    assert "846 of 846" in " ".join(result.output.split())

    # What the files hold agree: the plain checkpoint, and the adapter on the base that it was trained for.
    fresh = VisionTransformer(5)
    fresh.load_state_dict(load_file(out / "merged.safetensors"), strict=True)
    data, base = load_digits(pf.split(7, "data")), vision_transformer(pf.split(7, "net"), 5)
    demo_module.pretrain(base, data.old, pf.split(7, "pretrain"), steps=5)
    model = pf.functionalize(base)
    adapter, frozen, trainable = pf.load(out / "adapter.safetensors", model)
    with torch.no_grad():
        adapted = model(adapter.apply(frozen, trainable), data.new_test.images)
        plain = fresh(data.new_test.images)
    assert torch.equal(plain.argmax(-1), adapted.argmax(-1))
    torch.testing.assert_close(plain, adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("method", "other"), [("lora", "gift"), ("gift", "lora")])
def test_one_member_with_one_method(tmp_path, method, other):
    result = invoke("--members", 1, "--steps", 1, "--method", method, "--out", tmp_path / "out", "--seed", 2**70)
    assert result.exit_code == 0, result.output
    assert f"{method}." in result.output
    assert f"{other}." not in result.output


def test_the_same_seed_gives_the_same_numbers_and_files(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_module, "write_figure", lambda path, story: None)
    results, files = [], []
    for _ in range(2):  # over the files of the first time
        results.append(invoke("--members", 2, "--steps", 2, "--out", tmp_path))
        files.append([(tmp_path / name).read_bytes() for name in ("adapter.safetensors", "merged.safetensors")])
    assert without_time(results[0].output) == without_time(results[1].output)
    assert files[0] == files[1]


@pytest.mark.parametrize("option", ["--members", "--steps"])
@pytest.mark.parametrize("value", ["0", "-3", "many"])
def test_bad_numbers(tmp_path, option, value):
    result = invoke(option, value, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert option in result.output
    assert value in result.output
    assert not (tmp_path / "out").exists()


def test_bad_method(tmp_path):
    result = invoke("--method", "magic", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "magic" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_out_is_a_file(tmp_path, below):
    taken = tmp_path / "taken"
    taken.write_text("mine")
    result = invoke("--out", taken / below)
    assert result.exit_code == 2
    assert str(taken) in result.output
    assert taken.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [taken]


def test_a_wrong_merge_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_module, "compare_merged", lambda *args: Comparison(846, 845, 0.5))
    monkeypatch.setattr(demo_module, "write_figure", lambda path, story: None)
    monkeypatch.setattr(sys, "argv", ["peft-func", "demo", "--members", "1", "--steps", "1", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 1
    assert "only 845 of 846 answers are the same" in capsys.readouterr().err

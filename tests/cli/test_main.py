"""The entry point: help, and what is said where an extra is missing."""

import subprocess
import sys

import pytest

import peft_func as pf
from peft_func.cli.extras import require
from peft_func.cli.main import run

EXTRAS = ("typer", "rich", "tqdm", "matplotlib", "sklearn")


@pytest.mark.parametrize("package", EXTRAS)
def test_a_missing_extra_is_one_line(package, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(sys, "argv", ["peft-func", "demo", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert package in err
    assert "pip install 'peft_func[demo]'" in err
    assert not (tmp_path / "out").exists()


def test_require():
    with pytest.raises(pf.MissingExtraError, match=r"peft_func\[other\]"):
        require("no_such_package_here.part", "other")
    assert require("json.decoder").JSONDecoder


def test_the_entry_point_needs_the_core_only():
    code = (
        "import sys\n"
        f"for name in {EXTRAS!r}: sys.modules[name] = None\n"
        "import peft_func.cli.main\n"
        "peft_func.cli.main.run()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("peft-func: error: typer is needed")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("args", "text"), [(["--version"], pf.__version__), (["--help"], "demo")])
def test_help_and_version(args, text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["peft-func", *args])
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 0
    assert text in capsys.readouterr().out

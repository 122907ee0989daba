"""torchvision and timm, in a folder of their own: the wheel of torchvision breaks its import with the CPU torch."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".vision"
PINS = ["torchvision==0.29.2", "timm==1.0.31"]


@pytest.fixture(scope="session")
def vision():
    """Install the two packages once, without their dependencies, and return the folder that they are in."""
    with FileLock(ROOT / ".vision.lock"):  # one of the processes that share the tests installs, the others wait
        if not all((FOLDER / name).is_dir() for name in ("torchvision", "timm")):
            with tempfile.TemporaryDirectory(dir=ROOT, prefix=".vision-") as made:
                target = Path(made) / "new"
                pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), *PINS]
                done = subprocess.run(pip, check=False, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
                shutil.rmtree(FOLDER, ignore_errors=True)
                target.rename(FOLDER)
    return FOLDER


@pytest.fixture(scope="session")
def report(vision):
    """Run every check in one subprocess; return `{name of check: what went wrong, or ok}`."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "VISION": str(vision)}
    command = [sys.executable, "-W", "error::UserWarning:peft_func", "-m", "tests.vision.checks"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    blocks = done.stdout.split("\n=== ")[1:]
    return {block.partition("\n")[0]: block.partition("\n")[2] for block in blocks}

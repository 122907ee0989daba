"""torchvision and timm, in a folder of their own: the wheel of torchvision breaks its import with the CPU torch."""

import os
import subprocess
import sys

import pytest

from tests.packages import ROOT, installed

PINS = ["torchvision==0.29.2", "timm==1.0.31"]


@pytest.fixture(scope="session")
def vision():
    """Install the two packages once, without their dependencies, and return the folder that they are in."""
    return installed(ROOT / ".vision", PINS, ["torchvision", "timm"])


@pytest.fixture(scope="session")
def report(vision):
    """Run every check in one subprocess; return `{name of check: what went wrong, or ok}`."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "VISION": str(vision)}
    command = [sys.executable, "-W", "error::UserWarning:peft_func", "-m", "tests.vision.checks"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    blocks = done.stdout.split("\n=== ")[1:]
    return {block.partition("\n")[0]: block.partition("\n")[2] for block in blocks}

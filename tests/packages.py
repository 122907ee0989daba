"""Packages that the tests need the files of, each kind in a folder of its own."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).parents[1]


def installed(folder: Path, pins: Iterable[str], names: Iterable[str]) -> Path:
    """Install packages once, without their dependencies, and return the folder that they are in.

    Args:
        folder: where; it and a few files beside it are made.
        pins: what pip is to install.
        names: of the packages that are then there.
    """
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # one of the processes that share the tests installs, the others wait
        if not all((folder / name).is_dir() for name in names):
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as made:
                target = Path(made) / "new"
                pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), *pins]
                done = subprocess.run(pip, check=False, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
                shutil.rmtree(folder, ignore_errors=True)
                target.rename(folder)
    return folder

"""Writing files so that none is ever half there."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def renamed_into(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, and rename it into place when the block has succeeded.

    Args:
        path: the file to write; its folder must exist.

    Raises:
        OSError: the file cannot be written; what was there before is still there.
    """
    # A folder, so that nothing is left when the block fails, whatever it did.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".peft_func-") as folder:
        temporary = Path(folder) / path.name
        temporary.touch()
        mode = temporary.stat().st_mode  # what the user's umask gives; libraries may write through files of mode 600
        yield temporary
        temporary.chmod(mode)
        temporary.replace(path)

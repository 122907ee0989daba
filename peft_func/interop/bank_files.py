"""The files of a bank: its own, for rows that memory has no room for, and those that adapters are added from."""

import os
import re
import shutil
import tempfile
import weakref
from itertools import count
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from peft_func.errors import FileFormatError, OptionError, PeftFuncError
from peft_func.interop.bank_rows import Row, RowLayout
from peft_func.interop.bank_store import File
from peft_func.interop.files import load, save
from peft_func.interop.peft_folder import load_peft
from peft_func.transforms.bind import Adapter
from peft_func.trees.paths import from_leaves, join


class BankFiles:
    """Rows as files.

    Args:
        adapter: the bound method.
        layout: of the rows.
        folder: where a folder of its own is made, which is deleted with this object; None for no files.

    Raises:
        OptionError: no folder can be made there.
    """

    def __init__(self, adapter: Adapter, layout: RowLayout, folder: str | os.PathLike[str] | None) -> None:
        self._adapter = adapter
        self._layout = layout
        self._numbers = count()
        self._folder: Path | None = None
        if folder is not None:
            try:
                self._folder = Path(tempfile.mkdtemp(prefix="bank-", dir=Path(folder).absolute()))
            except OSError as error:
                raise OptionError(f"folder={folder!r} cannot take files ({error}); it must exist already") from None
            weakref.finalize(self, _delete, self._folder, os.getpid())

    def write(self, name: str, row: Row) -> File:
        """Write a row to a new file, as `pf.save` does.

        Raises:
            FileFormatError: it cannot be written.
        """
        assert self._folder is not None
        # The number makes it unique; of the name only what is harmless is kept, for human readers.
        path = self._folder / f"{next(self._numbers)}-{re.sub(r'[^A-Za-z0-9_-]', '_', name)[:64]}.safetensors"
        save(path, self._adapter, self._layout.tree(row))
        return File(path)

    def read(self, file: File) -> Row:
        """Read a row again, from a file that this object wrote, or has fetched once.

        Raises:
            FileFormatError: the file is gone, broken or changed.
        """
        file.check()
        try:
            found = load_file(file.path)
            return self._layout.flatten(from_leaves((keys, found[join(keys)]) for keys in self._adapter.spec))
        except (SafetensorError, OSError, RuntimeError, KeyError, ValueError) as error:
            # A RuntimeError is torch's, when the file goes away between its header and its values.
            raise FileFormatError(f"{file.path} cannot be read again: {error!r}") from error

    def fetch(self, name: str, path: Path, *, allow_nonfinite: bool) -> tuple[Row, File | None]:
        """Read a file of `pf.save`, or a folder in PEFT's format, which is not trusted.

        Returns:
            the row, and the file where it can be read again; None if it is in PEFT's format.

        Raises:
            FileFormatError: it cannot be read, or is of another method or model; the message starts with the name.
            TreeError: it is of a wider dtype than the rows.
        """
        model, own = self._adapter.model, self._adapter
        try:
            if path.is_dir():
                return self._layout.flatten(
                    load_peft(path, model, adapter=own, allow_nonfinite=allow_nonfinite)[2]
                ), None
            file = File.of_others(path.absolute())
            return self._layout.flatten(load(path, model, method=own.method, allow_nonfinite=allow_nonfinite)[2]), file
        except PeftFuncError as error:
            raise type(error)(f"{name!r}: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileFormatError(f"{name!r}: {path} is not what pf.save writes: {error!r}") from error


def _delete(path: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked process has a copy of the bank, and must not delete its files
        shutil.rmtree(path, ignore_errors=True)

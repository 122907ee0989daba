"""Rows by name, for any number of threads; beyond a limit the least recently used ones live in files.

Rows are immutable, and a name is only ever given another one, so whoever holds a row can read it without a lock. The
lock is held for bookkeeping alone; files are read and written outside of it.
"""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from peft_func.errors import FileFormatError, NameMismatchError, OptionError
from peft_func.interop.bank_rows import Row
from peft_func.trees.select import nearest

T = TypeVar("T")


@dataclass(frozen=True)
class File:
    """Where a row can be read again.

    Attributes:
        path: the file.
        stamp: of a file that belongs to somebody else, what tells that it has changed; None for the bank's own.
    """

    path: Path
    stamp: tuple[int, ...] | None = None

    @classmethod
    def of_others(cls, path: Path) -> "File":
        """Note a file as it is now.

        Raises:
            FileFormatError: there is none.
        """
        return cls(path, _stamp(path))

    def check(self) -> None:
        """Check that it is the file that it was.

        Raises:
            FileFormatError: it has changed, or is gone.
        """
        if self.stamp is not None and self.stamp != _stamp(self.path):
            raise FileFormatError(
                f"{self.path} has changed since it was added to the bank; replace the adapter by what it holds now: "
                "bank.replace(name, pf.load(path, model)[2])"
            )

    def drop(self) -> None:
        """Delete it, if it is the bank's own; a file that cannot be deleted stays until the folder goes."""
        if self.stamp is None:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError as error:
        raise FileFormatError(f"{path} cannot be read: {error}") from error
    return found.st_ino, found.st_size, found.st_mtime_ns


@dataclass(eq=False)
class Entry:
    """One adapter; what it is never changes, only where it is.

    Attributes:
        row: None if it is in a file only.
        file: None if it is in memory only.
        saving: whether a thread is writing its file.
    """

    row: Row | None
    file: File | None = None
    saving: bool = False


class Store:
    """Rows by name.

    Args:
        capacity: the most rows in memory; None for any number.
        write: writes a row to a new file of the bank's own, given the name; None if there may be no files.
        read: reads such a file.
    """

    def __init__(
        self, capacity: int | None, write: Callable[[str, Row], File] | None, read: Callable[[File], Row]
    ) -> None:
        self._capacity = capacity
        self._write = write
        self._read = read
        self._lock = threading.Lock()
        self._saved = threading.Condition(self._lock)
        self._entries: dict[str, Entry] = {}
        self._resident: OrderedDict[str, Entry] = OrderedDict()  # those in memory, the least recently used first

    def names(self) -> list[str]:
        """Return all names, in the order of adding."""
        with self._lock:
            return list(self._entries)

    def in_memory(self) -> list[str]:
        """Return the names of the rows in memory, the least recently used first."""
        with self._lock:
            return list(self._resident)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def check_new(self, names: Sequence[str]) -> None:
        """Raise NameMismatchError if one of the names is there, and OptionError if so many more have no room."""
        with self._lock:
            self._new(names)

    def add(self, name: str, row: Row) -> None:
        """Put a row under a new name; it counts as used.

        Raises:
            NameMismatchError: the name is there.
            OptionError: there is no room, and may be no files.
            FileFormatError: a file cannot be written; nothing is added then.
        """
        self._put(name, row, lambda: self._new([name]))

    def replace(self, name: str, row: Row) -> None:
        """Put another row under a name; it counts as used. Raises as `add` does, but if the name is not there."""
        self._put(name, row, lambda: self._known(name))

    def add_all(self, entries: Mapping[str, Entry]) -> None:
        """Add many at once, or none. Where there may be files, they are in files only. Raises as `add` does."""
        with self._lock:
            self._new(list(entries))
            for name, entry in entries.items():
                self._set(name, entry)

    def remove(self, name: str) -> None:
        """Remove a row.

        Raises:
            NameMismatchError: there is none.
        """
        with self._lock:
            entry = self._known(name)
            del self._entries[name]
            self._resident.pop(name, None)
            file = entry.file
        if file is not None:
            file.drop()

    def get(self, names: Sequence[str]) -> list[Row]:
        """Return the rows of distinct names; they count as used: in this order, those read from files after the others.

        Raises:
            NameMismatchError: a name is not there.
            FileFormatError: a file cannot be read.
        """
        with self._lock:
            found = {name: self._known(name) for name in names}
            rows = {name: entry.row for name, entry in found.items()}
            for name, row in rows.items():
                if row is not None:
                    self._resident.move_to_end(name)
        return [row if row is not None else self._load(name, found[name]) for name, row in rows.items()]

    def _load(self, name: str, entry: Entry) -> Row:
        while True:
            with self._lock:
                row, file = entry.row, entry.file
            if row is not None:
                return row
            assert file is not None
            try:
                row = self._read(file)
            except FileFormatError:
                with self._lock:
                    now = self._known(name)
                if now is entry:
                    raise
                entry = now  # it was replaced, and its file deleted, after we had found it
            else:
                self._keep(name, entry, row)
                return row

    def _keep(self, name: str, entry: Entry, row: Row) -> None:
        """Have a row in memory that was read from its file."""

        def settle() -> None:
            if self._entries.get(name) is entry and entry.row is None:
                entry.row = row
                self._resident[name] = entry

        self._with_room(name, settle)

    def _put(self, name: str, row: Row, check: Callable[[], object]) -> None:
        file = self._with_room(name, lambda: self._set(name, Entry(row)), check)
        if file is not None:
            file.drop()

    def _set(self, name: str, entry: Entry) -> File | None:
        """Make an entry the one of its name, and return the file of the one before. The lock is held."""
        old = self._entries.get(name)
        self._entries[name] = entry
        self._resident.pop(name, None)
        if entry.row is not None:
            self._resident[name] = entry
        return None if old is None else old.file

    def _with_room(self, name: str, act: Callable[[], T], check: Callable[[], object] = lambda: None) -> T:
        """Run `act` under the lock once one more row has a place in memory; `check` comes before rows make room."""
        while True:
            with self._lock:
                check()
                while not (self._capacity is None or name in self._resident or len(self._resident) < self._capacity):
                    oldest = next((other for other, entry in self._resident.items() if not entry.saving), None)
                    if oldest is None:
                        self._saved.wait()  # for threads that write files, and wait for nobody
                        check()
                        continue
                    entry = self._resident[oldest]
                    if entry.file is None:
                        entry.saving = True
                        break
                    entry.row = None
                    del self._resident[oldest]
                else:
                    return act()
            self._save(oldest, entry)

    def _save(self, name: str, entry: Entry) -> None:
        """Write the file of a row; who has seen to it that `saving` is set has the file for himself."""
        assert self._write is not None
        assert entry.row is not None  # without a file, it is in memory
        file = None
        try:
            file = self._write(name, entry.row)
        finally:
            with self._lock:
                entry.saving, entry.file = False, file
                gone = self._entries.get(name) is not entry
                self._saved.notify_all()
        if gone:
            file.drop()

    def _known(self, name: str) -> Entry:
        entry = self._entries.get(name)
        if entry is None:
            close = ", ".join(map(repr, nearest(name, self._entries, 3)))
            raise NameMismatchError(
                f"the bank has no adapter {name!r} among its {len(self._entries)}"
                + (f"; the nearest names: {close}" if close else "")
                + f"; bank.add({name!r}, tree) adds one"
            )
        return entry

    def _new(self, names: Sequence[str]) -> None:
        for name in names:
            if name in self._entries:
                raise NameMismatchError(
                    f"the bank has an adapter {name!r} already; bank.replace({name!r}, tree) puts another in its place"
                )
        count = len(self._resident) + len(names)
        if self._write is None and self._capacity is not None and count > self._capacity:
            raise OptionError(
                f"memory_limit has room for {self._capacity} adapters, and {names[-1]!r} would be number {count}; give "
                "the bank a folder for those least recently used, pf.AdapterBank(..., folder=...), or a higher limit, "
                "or remove one first"
            )

"""Thousands of adapters of one method, by name, ready for batches in which every sample has its own.

Serving many low-rank adapters over one base model: S-LoRA (arXiv 2311.03285), Punica (arXiv 2310.18547).
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_func.ensemble.route import BASE, route
from peft_func.errors import OptionError, RouteError
from peft_func.interop.bank_files import BankFiles
from peft_func.interop.bank_order import order_by_adapter, put_back, take
from peft_func.interop.bank_rows import Row, RowLayout
from peft_func.interop.bank_store import Entry, Store
from peft_func.transforms.bind import Adapter
from peft_func.trees.paths import Tree, leaves
from peft_func.weights.mapping import Weights

AnyPath = str | os.PathLike[str]


class AdapterBank:
    """Adapters of one bound method, by name. All methods may be called by any number of threads at the same time.

    Every tree is copied into rows of numbers, so adding one costs the same whatever is there, and what `gather` returns
    is a copy too: nothing changes it later. A `gather` sees each adapter before or after a `replace`, never in between.

    Args:
        adapter: the bound method.
        frozen: the base weights; by default those of the model that do not train.
        dtype: keep every leaf in this dtype, rounded; by default in that of `adapter.init`, and a tree of a wider one
            is refused. Leaves are kept on the devices of the base weights.
        memory_limit: the most bytes of adapters in memory. Without `folder`, adding more is an error.
        folder: where those least recently used are kept beyond the limit, each as a file that `pf.save` wrote, in a
            folder of this bank's own, which is deleted with the bank. It must exist.

    Raises:
        OptionError: the options do not fit together, or the limit is below one adapter.
        NameMismatchError, TreeError: `frozen` is not of this adapter.

    Example:
        >>> import torch, peft_func as pf
        >>> model = pf.functionalize(torch.nn.Linear(4, 3))
        >>> adapter = pf.bind(pf.lora("weight", rank=2), model)
        >>> bank = pf.AdapterBank(adapter)
        >>> for key, user in enumerate(["ann", "bob", "eve"]):
        ...     bank.add(user, adapter.init(key)[1])
        >>> x = torch.ones(4, 4)
        >>> model(bank.route(["eve", "ann", None, "eve"]), x).shape  # None is the plain base
        torch.Size([4, 3])
        >>> bank.gather(["eve", "ann", None, "eve"])[1]
        tensor([ 0,  1, -1,  0])
    """

    def __init__(
        self,
        adapter: Adapter,
        frozen: Mapping[str, Tensor] | None = None,
        *,
        dtype: torch.dtype | None = None,
        memory_limit: int | None = None,
        folder: AnyPath | None = None,
    ) -> None:
        if not isinstance(adapter, Adapter):
            raise OptionError(
                f"AdapterBank takes a bound adapter, not a {type(adapter).__name__}; call pf.bind(method, model)"
            )
        if not adapter.spec:
            raise OptionError(f"{adapter!r} has nothing that trains, so there is nothing to keep for each adapter")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise OptionError(f"dtype={dtype!r} is no floating-point dtype, such as torch.bfloat16")
        own, start = adapter.init(0)
        self.adapter = adapter
        self.frozen = dict(own if frozen is None else frozen)
        params = adapter.model.params
        moved = {params[name].device: weight.device for name, weight in self.frozen.items() if name in params}
        found = dict(leaves(start))
        kinds = {k: (dtype or leaf.dtype, moved.get(leaf.device, leaf.device)) for k, leaf in found.items()}
        self._layout = RowLayout(
            kinds, {keys: tuple(leaf.shape) for keys, leaf in found.items()}, rounds=dtype is not None
        )
        # Stands where a sample of the plain base needs some adapter: finite in every method, unlike zeros.
        self._neutral = self._layout.flatten(start)
        adapter.apply(self.frozen, self._layout.tree(self._neutral))  # raises if the base weights are others
        capacity = self._capacity(memory_limit, folder)
        self._files = BankFiles(adapter, self._layout, folder)
        self._on_disk = folder is not None
        self._store = Store(capacity, self._files.write if self._on_disk else None, self._files.read)
        self._sorts = True

    @property
    def memory(self) -> int:
        """The bytes of the adapters in memory."""
        return self._layout.bytes * len(self._store.in_memory())

    def in_memory(self) -> list[str]:
        """Return the names of the adapters in memory, the least recently used first."""
        return self._store.in_memory()

    def names(self) -> list[str]:
        """Return the names of all adapters, in the order of adding."""
        return self._store.names()

    def __contains__(self, name: object) -> bool:
        return name in self._store

    def __len__(self) -> int:
        return len(self._store)

    def add(self, name: str, tree: Mapping[str, Any]) -> None:
        """Add a copy of a tree.

        Raises:
            NameMismatchError: the name is there already.
            TreeError: the tree is not one of this adapter's, or of a wider dtype than the bank's.
            OptionError: the memory limit is reached, and there is no folder.
            FileFormatError: another adapter that must make room cannot be written.
        """
        self._store.add(_checked(name), self._layout.flatten(tree))

    def replace(self, name: str, tree: Mapping[str, Any]) -> None:
        """Put a copy of a tree in the place of another; raises as `add` does, but if the name is not there."""
        self._store.replace(_checked(name), self._layout.flatten(tree))

    def remove(self, name: str) -> None:
        """Remove an adapter; files that the bank did not write stay.

        Raises:
            NameMismatchError: there is none of this name.
        """
        self._store.remove(_checked(name))

    def tree(self, name: str) -> Tree:
        """Return a copy of an adapter's tree; it counts as used.

        Raises:
            NameMismatchError: there is none of this name.
            FileFormatError: its file cannot be read.
        """
        return self._layout.tree(self._store.get([_checked(name)])[0])

    def add_files(self, paths: Mapping[str, AnyPath], *, workers: int = 1, allow_nonfinite: bool = False) -> None:
        """Add adapters from files of `pf.save` and folders in HF PEFT's format: all of them, or none if one is bad.

        With `folder`, they stay on disk until they are used; a file of `pf.save` is not written again, and must not
        change meanwhile (that is noticed).

        Args:
            paths: a file or a folder for each name.
            workers: threads that read; more than one pays where the disk is slow.
            allow_nonfinite: accept infinities and NaN.

        Raises:
            NameMismatchError: a name is there already.
            FileFormatError: a file cannot be read, or holds another method than the bank's, or another base model's;
                the message starts with the name, the first bad one in the order of `paths`.
            TreeError: a tree is of a wider dtype than the bank's.
            OptionError: the memory limit is reached, and there is no folder; or `workers` is no number of threads.
        """
        if not isinstance(paths, Mapping):
            raise OptionError(f"add_files takes a dict of paths by name, not a {type(paths).__name__}")
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
            raise OptionError(f"workers={workers!r} is no number of threads; it is 1 or more")
        wanted = {_checked(name): Path(path) for name, path in paths.items()}
        self._store.check_new(list(wanted))
        entries: dict[str, Entry] = {}

        def fetch(name: str, path: Path) -> None:
            row, file = self._files.fetch(name, path, allow_nonfinite=allow_nonfinite)
            entries[name] = Entry(None, file or self._files.write(name, row)) if self._on_disk else Entry(row)

        try:
            with ThreadPoolExecutor(workers) as pool:
                futures = [pool.submit(fetch, name, path) for name, path in wanted.items()]
                try:
                    for future in futures:
                        future.result()
                finally:
                    pool.shutdown(cancel_futures=True)
            self._store.add_all({name: entries[name] for name in wanted})
        except BaseException:
            for entry in entries.values():
                if entry.file is not None:
                    entry.file.drop()
            raise

    def gather(self, names: Sequence[str | None], *, static: bool = False) -> tuple[Tree, Tensor]:
        """Return what `pf.route` takes for a batch.

        Args:
            names: the adapter of each sample; None for the plain base.
            static: one row for each sample, so that all shapes depend on the size of the batch only, and a compiled
                function is not compiled again for other names.

        Returns:
            `(stacked, index)`: a tree whose leaves are `[K, *shape]`, with a row for each distinct name, in the order
            of their first appearance (`static=True`: for each sample), and an int64 `[batch]` on the CPU, -1 for None.
            The leaves are views of one new tensor for each dtype.

        Raises:
            NameMismatchError: a name is not there; the message has the nearest ones.
            FileFormatError: a file cannot be read.
            OptionError: the batch is empty, or no list of names.
        """
        batch = _batch(names)
        distinct = list(dict.fromkeys(name for name in batch if name is not None))
        rows: dict[str | None, Row] = dict(zip(distinct, self._store.get(distinct), strict=True))
        place: dict[str | None, int] = {name: number for number, name in enumerate(distinct)}
        index = torch.tensor([place.get(name, BASE) for name in batch], device="cpu")
        if static:
            index = torch.where(index == BASE, BASE, torch.arange(len(batch), device="cpu"))
            return self._layout.stack([rows.get(name, self._neutral) for name in batch]), index
        return self._layout.stack(list(rows.values()) or [self._neutral]), index

    def route(self, names: Sequence[str | None]) -> Weights:
        """Return weights with which sample `i` of a batch goes through the adapter `names[i]`; raises as `gather`."""
        return route(self.adapter, self.frozen, *self.gather(names))

    def __call__(self, names: Sequence[str | None], *args: Any, **kwargs: Any) -> Any:
        """Call the model on a batch in which sample `i` goes through the adapter `names[i]`.

        The value is that of `model(bank.route(names), *args, **kwargs)`. Where samples of one adapter would share more
        side by side, the batch is sorted for the call, and its output put back in order. A tensor whose leading axis
        is as long as the batch is taken to be of the batch. Nothing is sorted where that could be wrong: if an argument
        is neither tensor nor plain value, a vector as long as the batch, or that long on a further axis. If the output
        has something besides tensors of one row for each sample, such as a cache, the model is called again in the
        order given, and this bank sorts no more.

        Args:
            names: the adapter of each sample; None for the plain base.
            *args: what the model takes.
            **kwargs: likewise.
        """
        batch = _batch(names)
        order = order_by_adapter(batch, (*args, *kwargs.values())) if self._sorts else None
        if order is not None:
            positional = [take(value, order) for value in args]
            named = {name: take(value, order) for name, value in kwargs.items()}
            output = self.adapter.model(self.route([batch[sample] for sample in order]), *positional, **named)
            try:
                return put_back(output, order)
            except RouteError:
                self._sorts = False
        return self.adapter.model(self.route(batch), *args, **kwargs)

    def __repr__(self) -> str:
        names, resident = len(self), len(self.in_memory())
        return (
            f"AdapterBank({names} of {self.adapter!r}, {resident} in memory: {resident * self._layout.bytes:,} bytes)"
        )

    def _capacity(self, memory_limit: int | None, folder: AnyPath | None) -> int | None:
        if memory_limit is None:
            if folder is not None:
                raise OptionError(f"folder={folder!r} is for adapters beyond a memory_limit; give one, in bytes")
            return None
        if isinstance(memory_limit, bool) or not isinstance(memory_limit, int) or memory_limit < self._layout.bytes:
            raise OptionError(
                f"memory_limit={memory_limit!r} is no number of bytes with room for one adapter, {self._layout.bytes:,}"
            )
        return memory_limit // self._layout.bytes


def _checked(name: object) -> str:
    if not isinstance(name, str):
        raise OptionError(f"the name of an adapter is a str, not {name!r}")
    return name


def _batch(names: object) -> list[str | None]:
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise OptionError(f"a batch is a list of names, one for each sample, such as ['ann', None]; it got {names!r}")
    return [None if name is None else _checked(name) for name in names]

"""One folder in HF PEFT's format becomes a tree: the names and shapes first, then the values."""

import json
import os
from collections.abc import Collection
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from peft_func.errors import FileFormatError, OptionError
from peft_func.functional.model import FunctionalModel
from peft_func.interop.peft_config import CONFIG, describe, read_config
from peft_func.interop.peft_plan import Plan, plan_for
from peft_func.transforms.bind import Adapter
from peft_func.trees.paths import Tree

WEIGHTS = "adapter_model.safetensors"
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_PICKLE = "adapter_model.bin"


def load_folder(
    folder: Path,
    model: FunctionalModel,
    plan: Plan | None,
    adapter: Adapter | None,
    *,
    allow_nonfinite: bool,
    allow_tied: bool,
    ignore: Collection[str],
) -> tuple[Plan, Tree]:
    """Read a folder.

    Args:
        folder: the folder.
        model: whom it is for.
        plan: that of an earlier folder, which is used again if this one is alike.
        adapter: a bound adapter that it must be of; None binds one.
        allow_nonfinite: accept infinities and NaN.
        allow_tied: accept adapters of weights with several names.
        ignore: fields of the config to ignore.

    Returns:
        the plan, and the tree.

    Raises:
        FileFormatError: see `load_peft`.
    """
    described = describe(read_config(folder), f"{folder / CONFIG}", ignore)
    path = folder / WEIGHTS
    if not path.is_file():
        raise FileFormatError(f"{folder} holds no {WEIGHTS}. {_advice(folder)}")
    try:
        tensors = TensorFile(path)
        if plan is None or plan.described != described or plan.header != tensors.shapes:
            plan = plan_for(path, tensors.shapes, described, model, adapter, allow_tied=allow_tied)
        for name, dtype in tensors.dtypes.items():
            if dtype not in DTYPES:
                raise FileFormatError(f"{path}: {name!r} is {dtype}; leaves are {', '.join(DTYPES)}")
        tensors.read()
        return plan, _tree(path, tensors, plan, allow_nonfinite=allow_nonfinite)
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, FileFormatError | OptionError):
            raise
        raise FileFormatError(f"{path} cannot be read as a safetensors file: {error}") from error


def _advice(folder: Path) -> str:
    if not (folder / _PICKLE).exists():
        return "A PEFT adapter is a folder with both files; one that is not called default is in a folder of its own"
    source, target = str(folder / _PICKLE), str(folder / WEIGHTS)
    return (
        f"{_PICKLE} is a pickle, which can run code, and is not read. If you trust it: python -c "
        f'"import torch; from safetensors.torch import save_file; save_file({{k: v.contiguous() for k, v in '
        f"torch.load({source!r}, weights_only=True).items()}}, {target!r}, {{'format': 'pt'}})\""
    )


def _tree(path: Path, tensors: "TensorFile", plan: Plan, *, allow_nonfinite: bool) -> Tree:
    for name, own in plan.unchanged.items():
        weight = plan.adapter.model.params[own]
        if not torch.equal(tensors[name].to(weight.device, weight.dtype), weight):
            raise FileFormatError(
                f"{path}: {name!r} is a base weight, and another one than this model's {own!r}; the adapter was "
                "trained on other base weights (a resized embedding, say): functionalize a model that has them"
            )
    if not allow_nonfinite and not tensors.isfinite():
        for leaf in plan.leaves:  # a base weight may hold what it likes
            if not tensors[leaf.name].isfinite().all():
                raise FileFormatError(
                    f"{path}: {leaf.name!r} holds values that are not finite; pass allow_nonfinite=True if meant"
                )
    tree: Tree = {}
    for name, keys, transposed, device in plan.leaves:
        tensor = tensors[name]
        # A copy: each leaf is its own, and torch's own alignment makes sums round alike.
        tensor = (tensor.T if transposed else tensor).clone(memory_format=torch.contiguous_format)
        branch = tree
        for key in keys[:-1]:
            branch = branch.setdefault(key, {})
        branch[keys[-1]] = tensor if device.type == "cpu" else tensor.to(device)
    return tree


class TensorFile:
    """A safetensors file, checked by the library's own reader, and then read in one piece.

    An adapter has hundreds of small tensors: to ask for them one by one takes several times as long.

    Attributes:
        shapes: by name.
        dtypes: likewise, as the format calls them.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with safe_open(os.fspath(path), framework="pt"):
            pass  # refuses whatever is truncated, overlaps, has holes, or is no header
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        self._start = 8 + length
        self._offsets = {name: entry["data_offsets"][0] for name, entry in header.items()}
        self._size = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        self.shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        self.dtypes = {name: entry["dtype"] for name, entry in header.items()}

    def read(self) -> None:
        """Read the values.

        Raises:
            FileFormatError: the file is not what it was when it was opened.
        """
        self._data = bytearray(self._size)
        with self._path.open("rb") as file:
            file.seek(self._start)
            if file.readinto(self._data) != self._size:
                raise FileFormatError(f"{self._path} has changed while it was read")

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor, a view of what was read."""
        shape = self.shapes[name]
        count = prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=DTYPES[self.dtypes[name]])
        dtype = DTYPES[self.dtypes[name]]
        return torch.frombuffer(self._data, dtype=dtype, count=count, offset=self._offsets[name]).view(shape)

    def isfinite(self) -> bool:
        """Say whether all values are finite."""
        kinds = set(self.dtypes.values())
        if len(kinds) == 1 and self._data:
            low, high = torch.frombuffer(self._data, dtype=DTYPES[kinds.pop()]).aminmax()  # NaN comes through
            return bool(low.isfinite() & high.isfinite())
        return all(bool(self[name].isfinite().all()) for name in self.shapes)

"""Files that `torch.save` wrote, if they hold a dict of tensors and nothing else.

Such a file is a pickle in a zip archive. Even `torch.load(weights_only=True)` builds some objects of any size that a
file asks for, so the names in the pickle are read first, without running it: they must be those of tensors.
"""

import os
import pickle
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from peft_func.errors import FileFormatError
from peft_func.interop.atomic import renamed_into

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What leaves may be."""

_TENSORS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch HalfStorage",
    "torch BFloat16Storage",
    "torch FloatStorage",
    "torch DoubleStorage",
}
_LARGEST_PICKLE = 2**24


def read_tensors(path: str | os.PathLike[str], *, largest: int) -> dict[str, Tensor]:
    """Read the tensors of a file, which is not trusted.

    Args:
        path: the file.
        largest: the bytes that it may have.

    Returns:
        Tensors on the CPU that lie in the file (mapped, not read) until they are copied; their shapes are the file's
        word.

    Raises:
        FileFormatError: it is missing, too large, compressed, no zip archive, or holds anything but float tensors by
            name.
    """
    try:
        values = _loaded(path, largest)
    except FileFormatError:
        raise
    except _UNREADABLE as error:
        raise FileFormatError(f"{path} cannot be read as a file of torch.save: {str(error)[:200]}") from error
    if not isinstance(values, dict):
        raise FileFormatError(f"{path} holds a {type(values).__name__}, not a dict of tensors by name")
    for name, value in values.items():
        plain = type(value) in (Tensor, torch.nn.Parameter) and value.layout is torch.strided and not value.is_meta
        if not isinstance(name, str) or not plain or value.dtype not in DTYPES:
            what = str(value.dtype) if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise FileFormatError(f"{path} holds {what} at {name!r}, not a tensor of floats by its name")
    return {name: value.detach() for name, value in values.items()}


_UNREADABLE = (
    OSError, zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, ValueError, KeyError, IndexError, TypeError,
    AttributeError, AssertionError, EOFError, OverflowError, MemoryError,
)  # fmt: skip


def _loaded(path: str | os.PathLike[str], largest: int) -> object:
    size = Path(path).stat().st_size
    if size > largest:
        raise FileFormatError(f"{path} has {size:,} bytes, more than the {largest:,} that this model could need")
    if not zipfile.is_zipfile(path):
        raise FileFormatError(f"{path} is no zip archive, as torch.save writes since torch 1.6; save it anew")
    stored = _check_archive(path)
    values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if isinstance(values, dict):
        storages = [value.untyped_storage() for value in values.values() if isinstance(value, Tensor)]
        claimed = {storage.data_ptr(): storage.nbytes() for storage in storages}
        if sum(claimed.values()) > stored:  # torch would read on into whatever follows
            raise FileFormatError(
                f"{path} holds {stored:,} bytes of values, and claims to hold {sum(claimed.values()):,}"
            )
    return values


def _check_archive(path: str | os.PathLike[str]) -> int:
    """Check what is in the archive before it is read, and return the bytes of its values."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise FileFormatError(f"{path} is compressed, which no file of torch.save is")
        pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > _LARGEST_PICKLE:
            raise FileFormatError(f"{path} has not one list of tensors of a sensible size, as torch.save writes it")
        for opcode, argument, _ in pickletools.genops(archive.read(pickles[0])):
            if "GLOBAL" in opcode.name and argument not in _TENSORS:
                raise FileFormatError(
                    f"{path} holds something else than tensors ({argument or opcode.name}), which is not read. If you "
                    "trust it, load it with torch.load and save the dict of its tensors alone"
                )
        return sum(entry.file_size for entry in entries if "/data/" in entry.filename)


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name as `torch.save` does, beside the place and then renamed into it.

    Raises:
        FileFormatError: the file cannot be written; what was there before is still there.
    """
    try:
        with renamed_into(Path(path)) as temporary:
            torch.save(dict(tensors), temporary)
    except (OSError, RuntimeError) as error:
        raise FileFormatError(f"{path} cannot be written: {error}") from error

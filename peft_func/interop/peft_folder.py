"""A plain LoRA in HF PEFT's on-disk format: a folder with `adapter_config.json` and `adapter_model.safetensors`.

PEFT 0.21, Mangrulkar et al., https://github.com/huggingface/peft.
"""

import os
import tempfile
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from peft_func.errors import FileFormatError, OptionError, TreeError
from peft_func.functional.model import FunctionalModel
from peft_func.interop.atomic import renamed_into
from peft_func.interop.peft_config import CONFIG, as_bytes, read_config
from peft_func.interop.peft_export import export
from peft_func.interop.peft_read import DTYPES, WEIGHTS, load_folder
from peft_func.transforms.bind import Adapter, check_tree
from peft_func.trees.paths import Keys, Tree, join, leaves


def load_peft(
    folder: str | os.PathLike[str],
    model: FunctionalModel,
    *,
    adapter: Adapter | None = None,
    allow_nonfinite: bool = False,
    allow_tied: bool = False,
    ignore: Collection[str] = (),
) -> tuple[Adapter, dict[str, Tensor], Tree]:
    """Read a LoRA adapter that HF PEFT (or `save_peft`) saved; the folder is not trusted.

    Linear, HF Conv1D, Embedding and convolutions; `rank_pattern`, `alpha_pattern`, `use_rslora`, `bias`, and
    `modules_to_save` as a `pf.train` part. Where the adapters are and their ranks is told by the tensors;
    `target_modules` is not looked at. Regexes in the config are matched in bounded time, or refused.

    Args:
        folder: the folder.
        model: a functional model of the module that PEFT adapted: its names are PEFT's, without `base_model.model.`.
        adapter: the bound adapter that an earlier folder gave: it is not bound again, which is what takes long.
        allow_nonfinite: accept infinities and NaN.
        allow_tied: accept an adapter of a weight that has several names (tied weights, shared modules). PEFT changes
            what one of them does; here the weight changes wherever it is used, as after PEFT's merge.
        ignore: fields of the config that this version does not know and that change nothing.

    Returns:
        `(adapter, frozen, trainable)`, with the parts `"lora"` and, where whole weights were saved, `"train"` (or those
        of the given adapter); the tensors are on the model's devices, in the dtypes of the file.

    Raises:
        FileFormatError: a file is missing, truncated, too large or malformed; names or shapes are not those of the
            model and of the config; values are not finite; the method is no plain LoRA, or not the adapter's.
        OptionError: `model` is no functional model, or the given adapter is not bound to it.

    Example:
        >>> import os, tempfile, torch, peft_func as pf
        >>> model = pf.functionalize(torch.nn.Sequential(torch.nn.Linear(4, 3)))
        >>> adapter = pf.bind(pf.lora("0", rank=2, alpha=4), model)
        >>> frozen, trainable = adapter.init(0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pf.save_peft(os.path.join(folder, "mine"), adapter, trainable)
        ...     again, frozen, loaded = pf.load_peft(os.path.join(folder, "mine"), model)
        >>> torch.equal(loaded["lora"]["0.weight"]["A"], trainable["lora"]["0.weight"]["A"])
        True
    """
    _check_arguments(model, adapter, ignore)
    plan, trainable = load_folder(
        Path(folder), model, None, adapter, allow_nonfinite=allow_nonfinite, allow_tied=allow_tied, ignore=ignore
    )
    return plan.adapter, plan.adapter.frozen, trainable


def load_peft_many(
    folders: Iterable[str | os.PathLike[str]],
    model: FunctionalModel,
    *,
    adapter: Adapter | None = None,
    workers: int = 1,
    allow_nonfinite: bool = False,
    allow_tied: bool = False,
    ignore: Collection[str] = (),
) -> tuple[Adapter, dict[str, Tensor], list[Tree]]:
    """Read many folders of one method at once: it is bound and checked once.

    Args:
        folders: at least one.
        model: as for `load_peft`.
        adapter: likewise; None binds that of the first folder.
        workers: threads that read; more than one pays where the disk is slow.
        allow_nonfinite: as for `load_peft`.
        allow_tied: likewise.
        ignore: likewise.

    Returns:
        `(adapter, frozen, trees)`; the trees are in the order of the folders, and `pf.stack(trees)` makes them one.

    Raises:
        FileFormatError: as for `load_peft`; the message names the folder, the first one that is bad.
        OptionError: there is no folder, or an option is wrong.

    Example:
        >>> import os, tempfile, torch, peft_func as pf
        >>> model = pf.functionalize(torch.nn.Sequential(torch.nn.Linear(4, 3)))
        >>> adapter = pf.bind(pf.lora("0", rank=2), model)
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     folders = [os.path.join(parent, str(key)) for key in range(3)]
        ...     for key, folder in enumerate(folders):
        ...         pf.save_peft(folder, adapter, adapter.init(key)[1])
        ...     adapter, frozen, trees = pf.load_peft_many(folders, model)
        >>> pf.stack(trees)["lora"]["0.weight"]["A"].shape
        torch.Size([3, 2, 4])
    """
    _check_arguments(model, adapter, ignore)
    if isinstance(folders, str | os.PathLike):
        raise OptionError(f"load_peft_many takes a list of folders; for one, write pf.load_peft({folders!r}, model)")
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise OptionError("load_peft_many takes at least one folder")
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise OptionError(f"workers={workers!r} is no number of threads; it is 1 or more")
    load = partial(load_folder, allow_nonfinite=allow_nonfinite, allow_tied=allow_tied, ignore=ignore)
    plan, first = load(paths[0], model, None, adapter)

    def read(path: Path) -> Tree:
        return load(path, model, plan, plan.adapter)[1]

    if workers == 1:
        rest = [read(path) for path in paths[1:]]
    else:
        with ThreadPoolExecutor(workers) as pool:
            rest = list(pool.map(read, paths[1:]))
    return plan.adapter, plan.adapter.frozen, [first, *rest]


def save_peft(
    folder: str | os.PathLike[str],
    adapter: Adapter,
    trainable: Mapping[str, Any],
    *,
    config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a LoRA adapter as HF PEFT does, for `PeftModel.from_pretrained` and whatever else reads that format.

    The adapter is one `pf.lora`, and `pf.train` of whole modules (`modules_to_save`) or of all biases. Both files are
    written beside their place and then renamed into it; the same tree gives the same bytes.

    Args:
        folder: the folder to make; the one that it is in must exist.
        adapter: the bound method.
        trainable: its second tree.
        config: fields of `adapter_config.json` to write too, such as `{"task_type": "CAUSAL_LM"}`, or the whole of one
            that was loaded (`pf.peft_config(folder)`): where it says this adapter, it is written as it is; what says
            otherwise is replaced.
        overwrite: write into a folder that holds something; other files in it stay.

    Raises:
        OptionError: PEFT's format cannot hold this adapter, or the config cannot go with it.
        TreeError: the tree is not one of this adapter's, or of a dtype that files do not hold.
        FileFormatError: the folder holds something, or cannot be written.

    Example:
        >>> import os, tempfile, torch, peft_func as pf
        >>> model = pf.functionalize(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)))
        >>> adapter = pf.bind(pf.chain(pf.lora("0", rank=2), pf.train("1")), model)
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     pf.save_peft(os.path.join(parent, "mine"), adapter, adapter.init(0)[1])
        ...     config = pf.peft_config(os.path.join(parent, "mine"))
        >>> config["target_modules"], config["modules_to_save"]
        (['0'], ['1'])
    """
    if config is not None and not isinstance(config, Mapping):
        raise OptionError(f"config is the JSON object of {CONFIG}, as pf.peft_config(folder) gives it, not {config!r}")
    check_tree(trainable, adapter.spec)
    names, written = export(adapter, config)
    tensors = {names[keys][0]: _storable(keys, tensor, names[keys][1]) for keys, tensor in leaves(trainable)}
    try:
        text = as_bytes(written)
    except (TypeError, ValueError) as error:
        raise OptionError(f"the config holds what is no JSON: {error}") from None
    path = Path(folder)
    full = path.is_dir() and any(path.iterdir())
    if full and not overwrite:
        raise FileFormatError(f"{folder} holds something already; give a new folder, or pass overwrite=True")
    try:
        if full:
            # No reader finds the weights of one adapter beside the config of another: without a config, none loads.
            (path / CONFIG).unlink(missing_ok=True)
            _write(path, tensors, text)
        else:
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".peft_func-") as beside:
                made = Path(beside) / "adapter"
                made.mkdir()  # with the rights that the user's umask gives
                _write(made, tensors, text)
                if path.is_dir():
                    path.rmdir()
                made.rename(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise FileFormatError(f"{folder} cannot be written: {error}") from error


def peft_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the `adapter_config.json` of a folder, for `save_peft(..., config=...)`.

    Raises:
        FileFormatError: there is none, or it is too large or no JSON object.
    """
    return read_config(Path(folder))


def _check_arguments(model: FunctionalModel, adapter: Adapter | None, ignore: Collection[str]) -> None:
    if not isinstance(model, FunctionalModel):
        raise OptionError(
            f"load_peft takes a functional model, not a {type(model).__name__}; call pf.functionalize(net) first"
        )
    if adapter is not None and (not isinstance(adapter, Adapter) or adapter.model is not model):
        raise OptionError("adapter= is an adapter that is bound to this very model, such as load_peft returns")
    if isinstance(ignore, str):
        raise OptionError(f"ignore is a list of fields; write ignore=[{ignore!r}]")


def _write(folder: Path, tensors: dict[str, Tensor], config: bytes) -> None:
    with renamed_into(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary, {"format": "pt"})
    with renamed_into(folder / CONFIG) as temporary:
        temporary.write_bytes(config)


def _storable(keys: Keys, tensor: Tensor, transposed: bool) -> Tensor:
    """Return a leaf as a file holds it: a copy, for leaves may share storage, be views, or lie on another device."""
    if tensor.is_meta or tensor.dtype not in DTYPES.values():
        raise TreeError(f"the leaf {join(keys)!r} is {tensor.dtype} on {tensor.device}; files hold {list(DTYPES)}")
    tensor = tensor.detach().cpu()
    return (tensor.T if transposed else tensor).clone(memory_format=torch.contiguous_format)

"""An adapter as one safetensors file: its tensors by path, and its method as JSON in the metadata."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from peft_func.addins.adaptformer import adaptformer
from peft_func.addins.adaption_prompt import adaption_prompt
from peft_func.addins.compose import MIXABLE
from peft_func.addins.convpass import convpass
from peft_func.addins.parallel import parallel_adapter
from peft_func.addins.prefix import prefix_tuning
from peft_func.addins.prompts import prompt_tuning
from peft_func.addins.reft import direft, loreft, noreft
from peft_func.addins.ssf import ssf
from peft_func.addins.vpt import vpt
from peft_func.addins.vqt import vqt
from peft_func.errors import FileFormatError, OptionError, TreeError
from peft_func.functional.model import FunctionalModel
from peft_func.interop.atomic import renamed_into
from peft_func.transforms.bind import Adapter, bind, check_tree
from peft_func.transforms.dora import dora
from peft_func.transforms.fact import fact
from peft_func.transforms.gift import gift
from peft_func.transforms.ia3 import ia3
from peft_func.transforms.lora import lora
from peft_func.transforms.magnitude import magnitude
from peft_func.transforms.options import ByPath
from peft_func.transforms.svdiff import svdiff
from peft_func.transforms.train import train
from peft_func.transforms.transform import Chain, Method, Part, chain
from peft_func.transforms.wegeft import wegeft
from peft_func.trees.paths import Keys, Tree, from_leaves, join, leaves
from peft_func.trees.select import exact, nearest

FORMAT = "peft_func"
VERSION = 1

_DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}

# Only these can be built from a file; nothing in a file is imported or executed.
KINDS: dict[str, Callable[..., Part]] = {
    **MIXABLE,  # bottleneck, compacter, and what mixes them
    "adaptformer": adaptformer,
    "adaption_prompt": adaption_prompt,
    "convpass": convpass,
    "direft": direft,
    "dora": dora,
    "fact": fact,
    "gift": gift,
    "ia3": ia3,
    "lora": lora,
    "loreft": loreft,
    "magnitude": magnitude,
    "noreft": noreft,
    "parallel_adapter": parallel_adapter,
    "prefix_tuning": prefix_tuning,
    "prompt_tuning": prompt_tuning,
    "ssf": ssf,
    "svdiff": svdiff,
    "train": train,
    "vpt": vpt,
    "vqt": vqt,
    "wegeft": wegeft,
}


def save(path: str | os.PathLike[str], adapter: Adapter, trainable: Mapping[str, Any]) -> None:
    """Write what trains to one safetensors file; the same tree gives the same bytes.

    The file also holds the method (every option, and the names of the parameters that it was bound to) and a
    fingerprint of the base model's names and shapes. It is written beside its place and then renamed into it.

    Args:
        path: the file, by custom `*.safetensors`; its folder must exist.
        adapter: the bound method.
        trainable: its second tree.

    Raises:
        TreeError: the tree is not one of this adapter's, or of a dtype that files do not hold.
        FileFormatError: the file cannot be written; what was there before is still there.

    Example:
        >>> import os, tempfile, torch, peft_func as pf
        >>> model = pf.functionalize(torch.nn.Linear(4, 3))
        >>> adapter = pf.bind(pf.lora("weight", rank=2, alpha=4), model)
        >>> frozen, trainable = adapter.init(0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pf.save(os.path.join(folder, "adapter.safetensors"), adapter, trainable)
        ...     again, frozen, loaded = pf.load(os.path.join(folder, "adapter.safetensors"), model)
        >>> torch.equal(loaded["lora"]["weight"]["A"], trainable["lora"]["weight"]["A"])
        True
    """
    check_tree(trainable, adapter.spec)
    names = _names(adapter.spec)
    tensors = {names[keys]: _storable(names[keys], tensor) for keys, tensor in leaves(trainable)}
    meta = {
        "version": VERSION,
        "method": method_as_data(adapter.method, adapter),
        "base": fingerprint(adapter.model),
    }
    # One key only: safetensors does not keep the order of several, and the bytes would differ between two runs.
    try:
        with renamed_into(Path(path)) as temporary:
            save_file(tensors, temporary, {FORMAT: json.dumps(meta, sort_keys=True)})
    except (OSError, ValueError, SafetensorError) as error:
        raise FileFormatError(f"{path} cannot be written: {error}") from error


def load(
    path: str | os.PathLike[str],
    model: FunctionalModel,
    *,
    method: Method | None = None,
    allow_nonfinite: bool = False,
) -> tuple[Adapter, dict[str, Tensor], Tree]:
    """Read an adapter for a model; the file is not trusted.

    Args:
        path: a file that `save` wrote.
        model: a functional model with the names and shapes of the one it was saved for.
        method: the method, if it is your own (`pf.on`), which a file cannot hold.
        allow_nonfinite: accept infinities and NaN.

    Returns:
        `(adapter, frozen, trainable)`; the tensors are on the model's devices, in the dtypes of the file.

    Raises:
        FileFormatError: the file is missing, truncated, not one of ours, from a newer version, for another model, or
            holds values that are not finite.
        OptionError: the method is a user's own, and was not given.
    """
    if not isinstance(model, FunctionalModel):
        raise OptionError(
            f"load takes a functional model, not a {type(model).__name__}; call pf.functionalize(net) first"
        )
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            meta = _read_meta(path, file.metadata() or {})
            adapter = _rebind(path, meta, model, method)
            trainable = _read(path, file, adapter, allow_nonfinite=allow_nonfinite)
    except (SafetensorError, OSError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise FileFormatError(f"{path} cannot be read as a safetensors file: {error}") from error
    return adapter, adapter.frozen, trainable


def fingerprint(model: FunctionalModel) -> dict[str, str]:
    """Return digests of the names and shapes of a model's parameters, and of its ties."""
    lines = {
        "parameters": [f"{name}:{list(tensor.shape)}" for name, tensor in model.params.items()],
        "ties": [f"{alias}={name}" for alias, name in model.ties.items()],
    }
    return {what: hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest() for what, rows in lines.items()}


def method_as_data(method: Method, adapter: Adapter, prefix: Keys = ()) -> Any:
    """Return a bound adapter's method as JSON; its selectors are replaced by the names that they chose."""
    if isinstance(method, Chain):
        inner = prefix if method.name is None else (*prefix, method.name)
        return {"chain": [method_as_data(part, adapter, inner) for part in method.parts], "name": method.name}
    (bound,) = (part for part in adapter.parts if part.keys == (*prefix, method.name))
    places: dict[str, Any] = {path: list(adapter.model.params[path].shape) for path in bound.paths}
    root = adapter.model._skeleton.root
    places |= {path: type(root.get_submodule(path)).__name__ for path in bound.modules}
    return {"kind": method.kind, "name": method.name, "options": bound.options, "places": places}


def method_of_data(path: object, described: Any, model: FunctionalModel) -> Method:
    """Return the method that `method_as_data` described, for the same model.

    Raises:
        FileFormatError: it is not for this model, or unknown; the message begins with `path`.
        OptionError: it is a user's own.
    """
    if "chain" in described:
        return chain(*(method_of_data(path, part, model) for part in described["chain"]), name=described["name"])
    kind, name, places = described["kind"], described["name"], described["places"]
    modules = {name: type(module).__name__ for name, module in model._skeleton.root.named_modules()}
    for place, wanted in places.items():
        known: Mapping[str, Any] = modules if isinstance(wanted, str) else model.params
        if place not in known:
            close = ", ".join(nearest(place, known, 2))
            raise FileFormatError(f"{path} adapts {place!r}, which this model has not; the nearest names: {close}")
        own = known[place] if isinstance(wanted, str) else list(known[place].shape)
        if own != wanted:
            what = "class" if isinstance(wanted, str) else "shape"
            raise FileFormatError(f"{path} adapts {place!r} of {what} {wanted}; this model's is {own}")
    if kind is None:
        raise OptionError(
            f"{path} holds a method of its writer's own ({name!r}), which a file cannot rebuild; "
            "give it: pf.load(path, model, method=...)"
        )
    if kind not in KINDS:
        raise FileFormatError(f"{path} holds a method {kind!r}; this version knows {', '.join(KINDS)}")
    options = dict(described["options"])
    # A file speaks of parameters by name: no regex of a stranger's is ever compiled.
    if isinstance(options.get("share"), dict):
        options["share"] = {group: exact(paths) for group, paths in options["share"].items()}
    for pattern in ("rank_pattern", "alpha_pattern"):
        if pattern in options:
            options[pattern] = ByPath(options[pattern])
    return KINDS[kind](exact(places), **options, name=name)


def _read_meta(path: object, metadata: Mapping[str, str]) -> dict[str, Any]:
    if FORMAT not in metadata:
        raise FileFormatError(f"{path} is a safetensors file, but not an adapter that pf.save wrote")
    try:
        meta = json.loads(metadata[FORMAT])
        version = meta["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FileFormatError(f"{path} has metadata that is not what pf.save writes: {error!r}") from error
    if version != VERSION:
        raise FileFormatError(f"{path} has format version {version}; this version of peft_func reads {VERSION}")
    return dict(meta)


def _rebind(path: object, meta: Mapping[str, Any], model: FunctionalModel, method: Method | None) -> Adapter:
    try:
        rebuilt = method_of_data(path, meta["method"], model) if method is None else method
        adapter = bind(rebuilt, model)
        described, base = method_as_data(adapter.method, adapter), dict(meta["base"])
    except FileFormatError:
        raise
    except _MALFORMED as error:
        if method is not None or "method=" in str(error):
            raise  # the user's method does not fit, or is needed
        raise FileFormatError(f"{path} is not for this model: {error}") from error
    for what, digest in fingerprint(model).items():
        if base.get(what) != digest:
            raise FileFormatError(
                f"{path} was saved for a model with other {what} (names and shapes) than {model!r}, though the places "
                "that it adapts are alike; load it with a model of the same architecture"
            )
    if json.dumps(described, sort_keys=True) != json.dumps(meta["method"], sort_keys=True):
        raise FileFormatError(f"{path} was saved with other options or at other places than those of this method")
    return adapter


# What a malformed description can make the constructors raise.
_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)


def _read(path: object, file: Any, adapter: Adapter, *, allow_nonfinite: bool) -> Tree:
    names = _names(adapter.spec)
    found = set(file.keys())
    for odd in sorted(found.symmetric_difference(names.values())):
        where = "has a tensor this method does not know" if odd in found else "lacks the tensor"
        raise FileFormatError(f"{path} {where}: {odd!r}")
    tensors: dict[Keys, Tensor] = {}
    for keys, name in names.items():
        shape = tuple(file.get_slice(name).get_shape())  # from the header: nothing is allocated yet
        if shape != adapter.spec[keys]:
            raise FileFormatError(f"{path}: {name!r} is {shape}, the method's is {adapter.spec[keys]}")
        if file.get_slice(name).get_dtype() not in _DTYPES.values():
            raise FileFormatError(
                f"{path}: {name!r} is {file.get_slice(name).get_dtype()}; leaves are {', '.join(_DTYPES.values())}"
            )
        tensor = file.get_tensor(name).clone()  # aligned as torch's own tensors are, so that sums round alike
        if not allow_nonfinite and not torch.isfinite(tensor).all():
            raise FileFormatError(
                f"{path}: {name!r} holds values that are not finite; pass allow_nonfinite=True if meant"
            )
        tensors[keys] = tensor.to(_device(keys, adapter.model))
    return from_leaves(iter(tensors.items()))


def _device(keys: Keys, model: FunctionalModel) -> torch.device:
    """Return the device of the weight that a leaf belongs to; of any weight for a leaf that several share."""
    own = (model.params[key].device for key in keys if key in model.params)
    return next(own, next(iter(model.params.values())).device)


def _storable(name: str, tensor: Tensor) -> Tensor:
    """Return a leaf as a file holds it: a copy, for leaves may share storage, be views, or lie on another device."""
    if tensor.is_meta or tensor.dtype not in _DTYPES:
        raise TreeError(f"the leaf {name!r} is {tensor.dtype} on {tensor.device}; files hold values in {list(_DTYPES)}")
    return tensor.detach().cpu().contiguous().clone()


def _names(spec: Mapping[Keys, object]) -> dict[Keys, str]:
    """Return the name of every leaf in the file: its path."""
    names = {keys: join(keys) for keys in spec}
    if len(set(names.values())) != len(names):
        raise TreeError("two leaves of this tree have one path; give the parts of the chain other names")
    return names

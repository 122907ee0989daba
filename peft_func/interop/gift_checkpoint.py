"""The checkpoints of the original GIFT (https://github.com/savadikarc/gift): `checkpoint.pth`.

They are state dicts of its wrapper around a backbone, which `torch.save` wrote; `gift_names` has their names.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_func.errors import FileFormatError, OptionError
from peft_func.functional.model import FunctionalModel
from peft_func.interop.gift_names import SHARED, heads_of, names_of, parts_of, places_of, targets_of
from peft_func.interop.torch_file import DTYPES, read_tensors, write_tensors
from peft_func.transforms.bind import Adapter, bind, check_tree
from peft_func.transforms.gift import gift
from peft_func.transforms.train import train
from peft_func.transforms.transform import Method, chain
from peft_func.trees.paths import Keys, Tree, from_leaves, leaves
from peft_func.trees.select import Selector, exact, index, nearest

# A file has fewer numbers than the backbone, in floats of 8 bytes at most; a tiny model's has more of everything else.
_SLACK = 2**26
_HINT = "; block=... tells which block the file has"


def load_gift(
    path: str | os.PathLike[str],
    model: FunctionalModel,
    *,
    targets: Iterable[str] | None = None,
    layers: int | Iterable[int] | None = None,
    block: str | Mapping[str, Any] = "simple_block",
    allow_nonfinite: bool = False,
) -> tuple[Adapter, dict[str, Tensor], Tree]:
    """Read a checkpoint of the original GIFT for a model; the file is not trusted.

    The file has no configuration in it. The rank is told from the shapes, the targets and the biases from the names;
    `layers` and `block` are for its caller to know (`layers_to_transform` and `gift_parameters` in `config.json`).

    Args:
        path: the file, or the folder that it is in as `checkpoint.pth`.
        model: the functional model of the backbone.
        targets: the `target_modules`; needed where all share one projection, which the file has not the targets of.
        layers: the `layers_to_transform`: numbers of layers, the first number in a path; None for all.
        block: the block, as `pf.gift` takes it: its name, or a dict with its `block_type` and options.
        allow_nonfinite: accept infinities and NaN.

    Returns:
        `(adapter, frozen, trainable)` of `pf.gift`, with a group for each target, by its name with dots; followed by
        `pf.train` if the file holds a head. The tensors are on the model's devices, in the dtypes of the file.

    Raises:
        FileFormatError: the file is missing, truncated, no state dict of tensors, for another model, block or layers,
            holds a name that is not known or lacks one, or values that are not finite.
        OptionError: a block that does not exist, or targets that are not told.

    Example:
        >>> import os, tempfile, torch, peft_func as pf
        >>> net = torch.nn.ModuleDict({"attn": torch.nn.ModuleDict({"proj": torch.nn.Linear(8, 8)})})
        >>> model = pf.functionalize(net)
        >>> adapter = pf.bind(pf.gift(["proj"], rank=2), model)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pf.save_gift(os.path.join(folder, "checkpoint.pth"), adapter, adapter.init(0)[1])
        ...     list(torch.load(os.path.join(folder, "checkpoint.pth")))
        ...     again, frozen, trainable = pf.load_gift(folder, model)
        ['in_projections.proj.weight', 'out_projections.proj.weight']
        >>> list(trainable["gift"])
        ['proj']
    """
    if not isinstance(model, FunctionalModel):
        raise OptionError(f"load_gift takes a functional model, not a {type(model).__name__}: pf.functionalize(net)")
    path = Path(path, "checkpoint.pth") if Path(path).is_dir() else Path(path)
    tensors = read_tensors(path, largest=_SLACK + 8 * sum(tensor.numel() for tensor in model.params.values()))
    heads = _heads_in(path, tensors, model)
    method = _method(path, tensors, model, targets, _layers(layers), block, heads)
    try:
        adapter = bind(method, model)
    except OptionError as error:
        raise FileFormatError(f"{path} is not for this model, block and layers: {error}") from error
    trainable = _read(path, tensors, adapter, heads, allow_nonfinite=allow_nonfinite)
    return adapter, adapter.frozen, trainable


def save_gift(
    path: str | os.PathLike[str],
    adapter: Adapter,
    trainable: Mapping[str, Any],
    *,
    layers: int | Iterable[int] | None = None,
) -> None:
    """Write what trains as a checkpoint of the original GIFT, which its wrappers' `load_state_dict` takes.

    The file says neither the block nor the layers: `load_gift`, and their configuration, must be told again. Groups
    come back under the names of their targets.

    Args:
        path: the file, by custom `checkpoint.pth`; its folder must exist.
        adapter: `pf.gift` on the weights of `nn.Linear` modules, alone or with one `pf.train` of a head.
        trainable: its second tree.
        layers: the numbers of the layers that it adapts, if not all.

    Raises:
        OptionError: the adapter is something that their wrappers cannot hold: other parts, chunks, other modules, a
            group that is not all modules whose paths end alike, or a head of which only some parameters train.
        TreeError: the tree is not one of this adapter's.
        FileFormatError: the file cannot be written; what was there before is still there.
    """
    check_tree(trainable, adapter.spec)
    part, held = parts_of(adapter)
    keys = targets_of(part, adapter.model, _layers(layers))
    written: dict[str, Tensor] = {}
    for path_of_leaf, tensor in leaves(trainable):
        for name, turned in names_of(path_of_leaf, part.keys, keys, adapter.model, held):
            value = tensor.mT if turned else tensor
            if tensor.is_meta or tensor.dtype not in DTYPES:
                raise OptionError(f"{name} is {tensor.dtype} on {tensor.device}; files hold values in {DTYPES}")
            written[name] = value.detach().cpu().contiguous().clone()
    order = ("backbone", "in_projections", "hypernets", "out_projections")  # that of their wrapper's modules
    write_tensors(path, dict(sorted(written.items(), key=lambda item: order.index(item[0].partition(".")[0]))))


def _layers(layers: int | Iterable[int] | None) -> Selector | None:
    return None if layers is None else index(layers)


def _heads_in(path: Path, tensors: Mapping[str, Tensor], model: FunctionalModel) -> dict[str, str]:
    """Return the parameters of the backbone that a file holds, by their names in it."""
    given = [name.partition(".")[2] for name in tensors if name.startswith("backbone.")]
    if not given:
        return {}
    known = max(heads_of(model), key=lambda names: len(names.keys() & set(given)))
    for name in given:
        if name not in known:
            raise FileFormatError(f"{path} holds 'backbone.{name}', which is no parameter of this model's head")
    for name in known.keys() - set(given):
        raise FileFormatError(f"{path} holds a head, but not 'backbone.{name}', which this model has")
    return known


def _method(
    path: Path,
    tensors: Mapping[str, Tensor],
    model: FunctionalModel,
    targets: Iterable[str] | None,
    layers: Selector | None,
    block: str | Mapping[str, Any],
    heads: Mapping[str, str],
) -> Method:
    """Return the method that a file's names and shapes speak of."""
    found = {
        name.split(".")[1]: tensor
        for name, tensor in tensors.items()
        if name.startswith("in_projections.") and name.endswith(".weight") and name.count(".") == 2
    }
    ranks = {tensor.shape[0] for tensor in found.values() if tensor.dim() == 2}
    if not found or len(ranks) != 1:
        raise FileFormatError(f"{path} is no checkpoint of GIFT: in_projections.<target>.weight are of ranks {ranks}")
    if isinstance(targets, str):
        raise OptionError(f"targets={targets!r} is a list of the ends of module paths: [{targets!r}]")
    told = None if targets is None else {str(target).replace(":", ".") for target in targets}
    named = {key.replace(":", ".") for key in found}
    if SHARED in found:
        if told is None or len(found) > 1:
            raise OptionError(f"{path} has one projection for all targets; say which: load_gift(..., targets=[...])")
        named = told
    elif told is not None and told != named:
        raise FileFormatError(f"{path} is for the targets {', '.join(sorted(named))}, not {', '.join(sorted(told))}")
    places = {target: places_of(target, model, layers) for target in sorted(named)}
    for target, own in places.items():
        if not own:
            close = ", ".join(nearest(target, model.params, 3))
            raise FileFormatError(f"{path} adapts {target!r}, which no linear module of these layers is; near: {close}")
    method = gift(
        exact(name for own in places.values() for name in own),
        rank=ranks.pop(),
        share="all" if SHARED in found else {target: exact(own) for target, own in places.items()},
        block=block,
        in_projection_bias=any(name.startswith("in_projections.") and name.endswith(".bias") for name in tensors),
        out_projection_bias=any(name.startswith("out_projections.") and name.endswith(".bias") for name in tensors),
    )
    return chain(method, train(exact(heads.values()))) if heads else method


def _read(
    path: Path, tensors: Mapping[str, Tensor], adapter: Adapter, heads: Mapping[str, str], *, allow_nonfinite: bool
) -> Tree:
    part, held = parts_of(adapter)
    groups = {keys[1] for keys in adapter.spec if keys[:1] == part.keys}
    targets = {group: group.replace(".", ":") for group in groups}
    if (part.options or {}).get("share") == "all":
        targets = {"all": SHARED}
    named = {keys: names_of(keys, part.keys, targets, adapter.model, held) for keys in adapter.spec}
    unknown = tensors.keys() - {name for names in named.values() for name, _ in names}
    if unknown:
        raise FileFormatError(f"{path} has a tensor {min(unknown)!r} that this method does not know{_HINT}")
    read: dict[Keys, Tensor] = {}
    for keys, names in named.items():
        for name, turned in names:
            if name not in tensors:
                raise FileFormatError(f"{path} lacks the tensor {name!r}{_HINT if 'hypernets' in name else ''}")
            shape = adapter.spec[keys][::-1] if turned else adapter.spec[keys]
            if tensors[name].shape != shape:
                raise FileFormatError(f"{path}: {name!r} is {tuple(tensors[name].shape)}, and {shape} for this model")
            stored = tensors[name].mT if turned else tensors[name]
            value = stored.clone(memory_format=torch.contiguous_format)
            if not allow_nonfinite and not torch.isfinite(value).all():
                raise FileFormatError(
                    f"{path}: {name!r} holds values that are not finite; pass allow_nonfinite=True if meant"
                )
            if keys in read and not torch.equal(read[keys], value):
                raise FileFormatError(f"{path}: {name!r} is tied in this model, but has another value than its twin")
            read[keys] = value
    place = adapter.model.params[part.paths[0]].device
    return from_leaves(
        (keys, value.to(adapter.model.params[keys[-1]].device if keys[-1] in heads.values() else place))
        for keys, value in read.items()
    )

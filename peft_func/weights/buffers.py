"""Buffers that are to receive merged weights: whether they can, and may, before anything is written."""

import itertools
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from peft_func.errors import OptionError
from peft_func.weights.chunks import is_plain_tensor, outside_transforms
from peft_func.weights.mapping import Weights
from peft_func.weights.operator import Operator


def check_buffers(
    weights: Mapping[str, Tensor | Operator], into: Mapping[str, Tensor], needed: Collection[str]
) -> None:
    """Refuse buffers that cannot receive these weights, or must not.

    Args:
        weights: what is to be written.
        into: the buffers, by the same names.
        needed: the names that have to be there.

    Raises:
        OptionError: names the first buffer that does not do, and says why.
    """
    if not isinstance(into, Mapping):
        raise OptionError(
            f"into is a mapping of names to tensors, such as dict(net.named_parameters()), not {_a(into)}"
        )
    if not outside_transforms():
        raise OptionError(
            "into is written in place, which torch.func and torch.compile cannot follow: merge without it"
        )
    unknown, missing = [path for path in into if path not in weights], [path for path in needed if path not in into]
    if unknown:
        raise OptionError(f"into has {_names(unknown)}, which the weights have not; they have {_names(list(weights))}")
    if missing:
        raise OptionError(f"into lacks {_names(missing)}, which the transforms changed; it needs {_names(needed)}")
    for path, buffer in into.items():
        _check_one(path, buffer, weights[path])
    _check_memory(weights, into)


def _check_one(path: str, buffer: Any, value: Tensor | Operator) -> None:
    if not is_plain_tensor(buffer):
        raise OptionError(f"into: {path!r} is {_a(buffer)}; it has to be a plain tensor, or a parameter, with memory")
    for what, found, wanted in (
        ("shape", tuple(buffer.shape), tuple(value.shape)),
        ("dtype", buffer.dtype, value.dtype),
        ("device", buffer.device, value.device),
    ):
        if found != wanted:
            raise OptionError(f"into: {path!r} has the {what} {found}; the parameter has {wanted}")
    if buffer.requires_grad and not buffer.is_leaf:
        raise OptionError(f"into: {path!r} is the result of a graph, which writing would break; give tensor.detach()")
    if buffer.is_inference() and not torch.is_inference_mode_enabled():
        raise OptionError(f"into: {path!r} was made in inference mode, and can be written only there")
    if _folds(buffer):
        raise OptionError(
            f"into: {path!r} has entries that share memory with each other (strides {buffer.stride()}); "
            "give tensor.contiguous()"
        )


def _folds(tensor: Tensor) -> bool:
    # Each stride must step over all that the smaller ones reach.
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _check_memory(weights: Mapping[str, Tensor | Operator], into: Mapping[str, Tensor]) -> None:
    read = {_storage(tensor): path for path, tensor in _read_by(weights) if is_plain_tensor(tensor)}
    for path, buffer in into.items():
        if buffer.numel() and _storage(buffer) in read:
            raise OptionError(
                f"into: {path!r} shares memory with a tensor of the weight {read[_storage(buffer)]!r}, and neither a "
                f"base nor an adapter is ever written; give torch.empty_like(weights[{path!r}]), or another model's"
            )
    spans = sorted(
        (buffer.device.type, buffer.device.index or 0, *_span(buffer), path) for path, buffer in into.items()
    )
    for (*device, _, end, path), (*other_device, start, _, other) in itertools.pairwise(spans):
        if device == other_device and start < end:
            raise OptionError(f"into: {path!r} and {other!r} share memory; every parameter needs a buffer of its own")


def _read_by(weights: Mapping[str, Tensor | Operator]) -> Iterator[tuple[str, Tensor]]:
    for path, value in weights.items():
        for tensor in value.tensors() if isinstance(value, Operator) else (value,):
            yield path, tensor
    if isinstance(weights, Weights):
        yield from weights.base.items()


def _storage(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _span(tensor: Tensor) -> tuple[int, int]:
    # Models keep parameters side by side in one storage, so here it is the bytes that count.
    start = tensor.data_ptr()
    if not tensor.numel():
        return start, start
    last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return start, start + (last + 1) * tensor.itemsize


def _a(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {type(value).__name__} on {value.device.type} ({value.layout})"
    return f"a {type(value).__name__}"


def _names(paths: Collection[str]) -> str:
    first = ", ".join(repr(path) for path in list(paths)[:3])
    return first if len(paths) <= 3 else f"{first} and {len(paths) - 3} more"

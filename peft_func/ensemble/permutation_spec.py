"""Which units of a network can be permuted, read off its structure.

Sequential networks of linear layers, convolutions, norms, pooling and elementwise activations; and residual networks
of torchvision's kind, whose blocks have `conv1`, `bn1`, `conv2`, ... and perhaps `downsample`. Units between two layers
have a permutation of their own; all that adds to one residual stream shares one.
"""

import re
from collections.abc import Iterable, Iterator

from torch import nn

from peft_func.ensemble.permutation import Place
from peft_func.errors import OptionError

# Functions of one unit at a time, in train mode too. (Exactly these: a subclass may do anything.)
ELEMENTWISE = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh,
    nn.Sigmoid, nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softshrink,
    nn.Hardshrink, nn.Tanhshrink, nn.Threshold, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
)  # fmt: skip
POOLING = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
VECTOR_NORMS = (nn.LayerNorm, nn.RMSNorm)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

Places = dict[str, list[Place]]


def permutation_spec(net: nn.Module) -> tuple[Places, Places]:
    """Return the permutations that a network has: their places in its parameters, and in its buffers.

    Permutations are named after the module that makes the units. Inputs and outputs of the network keep their order,
    and so do channels next to a grouped convolution.

    Args:
        net: an `nn.Sequential` (nested ones too), or a ResNet whose modules are called as torchvision's are: `conv1`,
            `bn1`, `layer1`, `layer2`, ..., `fc`, with pooling over all pixels before `fc`; its blocks normalise after
            each convolution.

    Returns:
        `(spec, state_spec)`, for `pf.align` and `pf.permute` of `model.params`, and for `pf.permute` of `model.state`.

    Raises:
        OptionError: the structure is not understood; it names the module. Write the specification by hand then.

    Example:
        >>> import torch, peft_func as pf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> pf.permutation_spec(net)
        ({'0': [('0.weight', 0), ('0.bias', 0), ('2.weight', 1)]}, {})
    """
    if not isinstance(net, nn.Module):
        raise OptionError(
            f"permutation_spec reads the structure of a module, not of a {type(net).__name__}; give it net"
        )
    tensors = [tensor for _, tensor in net.named_parameters(remove_duplicate=False)]
    if len({*map(id, tensors)}) < len(tensors):
        raise OptionError(f"{type(net).__name__} uses a parameter twice{_BY_HAND}")
    found = _resnet(net) if _has(net, "layer1") and _has(net, "conv1") and _has(net, "fc") else _sequential(net)
    buffers = dict(net.named_buffers())
    free = {name: places for name, places in found.places.items() if name not in found.fixed}
    spec = {name: [place for place in places if place[0] not in buffers] for name, places in free.items()}
    state = {name: [place for place in places if place[0] in buffers] for name, places in free.items()}
    return spec, {name: places for name, places in state.items() if places}


_BY_HAND = "; write the specification by hand: {name: [(parameter, axis), ...]}"


class _Builder:
    """The places found so far.

    Attributes:
        places: those of each permutation; the units of the input are made by nobody, "".
        fixed: the permutations that must be the identity.
    """

    def __init__(self) -> None:
        self.places: Places = {"": []}
        self.fixed = {""}
        self.units = {"": 0}

    def make(self, maker: str, path: str, module: nn.Module) -> None:
        """Note that a layer makes the units of `maker`, or that a norm handles them one by one."""
        own = [name for name in ("weight", "bias", "running_mean", "running_var") if _has(module, name)]
        count = _outputs(path, module)
        if self.units.setdefault(maker, count) != count and maker:
            raise OptionError(f"{path}: {count} units where {maker} makes {self.units[maker]}{_BY_HAND}")
        self.places.setdefault(maker, []).extend((f"{path}.{name}", 0) for name in own)

    def read(self, maker: str, path: str, module: nn.Module) -> None:
        """Note that a layer reads the units of `maker`, each of them as a block if they were flattened."""
        grouped = getattr(module, "groups", 1) > 1
        if grouped:
            self.fixed |= {maker, path}
        elif maker:
            inputs, units = _inputs(path, module), self.units[maker]
            if inputs % units:
                raise OptionError(f"{path} reads {inputs} units where {maker} makes {units}{_BY_HAND}")
            place: Place = (f"{path}.weight", 1) if inputs == units else (f"{path}.weight", 1, inputs // units)
            self.places[maker].append(place)


def _sequential(net: nn.Module) -> _Builder:
    found = _Builder()
    maker, kind = "", "input"  # then "channels" of a convolution, "flat" when flattened, "last" of a Linear
    for path, module in _steps(net, ""):
        spatial = kind in ("input", "channels")
        norms = (BATCH_NORMS if kind != "flat" else ()) + (VECTOR_NORMS if kind == "last" else ())
        if (isinstance(module, CONVOLUTIONS) and spatial) or (isinstance(module, nn.Linear) and kind != "channels"):
            if kind == "last" and _inputs(path, module) != found.units[maker]:
                raise _not_understood(path, module)
            found.read(maker, path, module)
            maker, kind = path, "last" if isinstance(module, nn.Linear) else "channels"
            found.make(maker, path, module)
        elif isinstance(module, norms):
            found.make(maker, path, module)
        elif isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            kind = "flat" if kind == "channels" else kind
        elif type(module) not in (ELEMENTWISE + POOLING if spatial else ELEMENTWISE):
            raise _not_understood(path, module)
    found.fixed.add(maker)  # the outputs keep their order
    return found


def _steps(net: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of nested Sequentials in the order in which they run."""
    if type(net).forward is not nn.Sequential.forward:
        raise _not_understood(prefix, net)
    for name, child in net._modules.items():
        path = f"{prefix}.{name}" if prefix else name
        if child is None:
            continue
        if isinstance(child, nn.Sequential):
            yield from _steps(child, path)
        else:
            yield path, child


def _resnet(net: nn.Module) -> _Builder:
    found = _Builder()
    layers = sorted(
        (name for name, _ in net.named_children() if re.fullmatch(r"layer\d+", name)), key=lambda n: int(n[5:])
    )
    _check_children(net, "", ("conv1", "bn1", "fc", *layers), (*ELEMENTWISE, *POOLING, nn.Flatten))
    stream = "conv1"
    found.read("", "conv1", net.get_submodule("conv1"))
    _make_with_norm(found, stream, net, "", "1")
    for layer in layers:
        for path, block in _blocks(net.get_submodule(layer), layer):
            stream = _block(found, stream, path, block)
    found.read(stream, "fc", net.get_submodule("fc"))
    return found


def _block(found: _Builder, stream: str, path: str, block: nn.Module) -> str:
    """Add a residual block that reads a stream; return the stream that it adds to."""
    numbers = [number for number in "123" if _has(block, f"conv{number}")]
    known = [name + number for name in ("conv", "bn") for number in numbers]
    _check_children(block, path, (*known, "downsample"), ELEMENTWISE)
    shortcut = getattr(block, "downsample", None)
    result = stream
    if shortcut is not None:
        steps = [
            (p, m) for p, m in _steps(shortcut, f"{path}.downsample") if not isinstance(m, (*POOLING, nn.Identity))
        ]
        if [isinstance(m, CONVOLUTIONS) for _, m in steps] not in ([True], [True, False]):
            raise _not_understood(f"{path}.downsample", shortcut)
        result = steps[0][0]
        found.read(stream, *steps[0])
        for step in steps:
            found.make(result, *step)
    reads = stream
    for number in numbers:
        name = f"{path}.conv{number}"
        found.read(reads, name, block.get_submodule(f"conv{number}"))
        reads = result if number == numbers[-1] else name
        if name in found.fixed:
            found.fixed.add(reads)  # what a grouped convolution makes, under whatever name
        _make_with_norm(found, reads, block, path, number)
    return result


def _make_with_norm(found: _Builder, maker: str, owner: nn.Module, path: str, number: str) -> None:
    prefix = f"{path}." if path else ""
    for name in ("conv" + number, "bn" + number):
        if _has(owner, name):
            found.make(maker, prefix + name, owner.get_submodule(name))


def _blocks(layer: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    for block_path, block in _steps(layer, path):
        if not (_has(block, "conv1") and _has(block, "conv2")):
            raise _not_understood(block_path, block)
        yield block_path, block


def _check_children(owner: nn.Module, path: str, known: Iterable[str], harmless: tuple[type[nn.Module], ...]) -> None:
    for name, child in owner.named_children():
        if name not in known and type(child) not in harmless:
            raise _not_understood(f"{path}.{name}" if path else name, child)
    if owner._parameters:
        raise _not_understood(path, owner)


def _has(module: nn.Module, name: str) -> bool:
    return getattr(module, name, None) is not None


def _inputs(path: str, module: nn.Module) -> int:
    match module:
        case nn.Linear():
            return module.in_features
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            return module.in_channels
    raise OptionError(f"{path}: a {type(module).__name__} stands where a Linear or a convolution is expected{_BY_HAND}")


def _outputs(path: str, module: nn.Module) -> int:
    match module:
        case nn.Linear():
            return module.out_features
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            return module.out_channels
        case nn.LayerNorm() | nn.RMSNorm() if len(module.normalized_shape) == 1:
            return int(module.normalized_shape[0])
    if isinstance(module, BATCH_NORMS):
        return module.num_features
    raise OptionError(f"{path}: a {type(module).__name__} stands where a layer or a norm is expected{_BY_HAND}")


def _not_understood(path: str, module: nn.Module) -> OptionError:
    where = f"{path}: a" if path else "a"
    return OptionError(f"{where} {type(module).__name__} is not understood here{_BY_HAND}")

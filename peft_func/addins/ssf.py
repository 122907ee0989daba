"""SSF: scale and shift of features, y = gamma * M(x) + beta, behind any module M.

Lian et al., "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", 2022, arXiv 2210.08823.
Behind a linear map, a convolution or a norm it is a change of weights, W' = diag(gamma) W and b' = gamma * b + beta;
that form costs nothing in a call, and merges. gamma is 1 and beta 0 at the start, so nothing changes at first (the
authors draw them near to that).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_func.addins.around import as_it_is, surrounding
from peft_func.addins.bottleneck import check_size
from peft_func.addins.place import Place
from peft_func.addins.values import main, with_main
from peft_func.addins.width import widths
from peft_func.errors import OptionError
from peft_func.functional.model import FunctionalModel
from peft_func.functional.surround import Inner
from peft_func.transforms.options import biases, check_choice
from peft_func.transforms.transform import Changes, Part, Transform, check_name
from peft_func.trees.keys import uniform
from peft_func.trees.paths import Tree
from peft_func.trees.select import Where
from peft_func.weights.layout import Storage
from peft_func.weights.mapping import Weights
from peft_func.weights.matrix import Diagonal, Matrix, Product

_CHANNELS_SECOND = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)


def ssf(where: Where, *, form: str = "weights", width: int | None = None, name: str = "ssf") -> Part:
    """Scale and shift what modules give.

    Leaves of `trainable[name][module path]`: `scale` [features], ones at the start, and `shift` [features], zeros. In
    both forms they are the same leaves with the same meaning.

    Args:
        where: a selector. `pf.of_type(nn.Linear, nn.LayerNorm)`, a regex or names mean the same in both forms: the
            modules, or the parameters in them.
        form: `"weights"` for modules with a weight and a bias, where it is a change of these and `pf.merge` works;
            `"activations"` for any module: it acts on the first tensor that the module gives, along its last axis, or
            along its second for convolutions and the norms of channels.
        width: the number of features, where the weights of a module cannot tell it; for `form="activations"`.
        name: the sub-tree.

    Raises:
        OptionError: at `bind`, a module has no bias that could hold the shift, or its width is unknown.

    Example:
        >>> import torch, peft_func as pf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
        >>> model = pf.functionalize(net)
        >>> adapter = pf.bind(pf.ssf(".*"), model)
        >>> frozen, trainable = adapter.init(0)
        >>> {path: list(leaves) for path, leaves in trainable["ssf"].items()}
        {'0': ['scale', 'shift'], '1': ['scale', 'shift']}
        >>> sorted(pf.merge(adapter.apply(frozen, trainable)))
        ['0.bias', '0.weight', '1.bias', '1.weight']
    """
    check_choice(name, "form", form, ("weights", "activations"))
    check_size(name, "width", width)
    options = {"form": form, "width": width}
    if form == "weights":
        return Part(where, _scaling(name), check_name(name), "ssf", options, matrices=False, also=_partners)

    def draw(place: Place, key: int) -> Tree:
        return _start(_features(place, name, width), place.like)

    return surrounding(where, scaled, draw, as_it_is, name=name, kind="ssf", options=options)


def scaled(tree: Mapping[str, Any], inner: Inner, *args: Any, **kwargs: Any) -> Any:
    """Run a module, then scale and shift what it gives."""
    output = inner(*args, **kwargs)
    y = main(output)
    scale, shift = tree["scale"].to(y.dtype), tree["shift"].to(y.dtype)
    if isinstance(inner.module, _CHANNELS_SECOND):
        kernel = len(getattr(inner.module, "kernel_size", ())) or y.dim() - 2
        shape = (-1, *[1] * kernel)  # an unbatched convolution has its channels first
        scale, shift = scale.reshape(shape), shift.reshape(shape)
    return with_main(output, y * scale + shift)


def _start(features: int, like: Tensor) -> Tree:
    shift = torch.zeros_like(uniform((features,), 0.0, 0, like))
    return {"scale": torch.ones_like(shift), "shift": shift}


def _features(place: Place, name: str, width: int | None) -> int:
    if width is None and isinstance(place.module, _CHANNELS_SECOND):
        bias, weight = place.module._parameters.get("bias"), place.module._parameters.get("weight")
        own = getattr(place.module, "out_channels", None)
        return int(own) if own is not None else len(bias if bias is not None else _known(weight, place, name))
    return widths(place, name, width)[1]


def _known(weight: Tensor | None, place: Place, name: str) -> Tensor:
    if weight is None:
        raise OptionError(f"{name}: {place.path!r} has no weight that tells its features; give width=...")
    return weight


def _scaling(name: str) -> Any:
    def make(paths: tuple[str, ...], model: FunctionalModel) -> Transform:
        places = _places(paths, model, name)

        def init(weights: Weights, key: int) -> Tree:
            return {at: _start(len(weights.base[bias]), weights.base[bias]) for at, (_, bias) in places.items()}

        def apply(tree: Tree, weights: Weights) -> Changes:
            changes: dict[str, Tensor | Matrix] = {}
            for at, (weight, bias) in places.items():
                scale, shift = (_wide(tree[at][leaf]) for leaf in ("scale", "shift"))
                vector = model.layouts[weight].storage is Storage.VECTOR
                if vector:
                    changes[weight] = torch.mul(weights[weight], scale)  # type: ignore[arg-type]
                else:
                    changes[weight] = Product(Diagonal(scale), weights.matrix(weight))
                changes[bias] = torch.mul(weights[bias], scale) + shift  # type: ignore[arg-type]  # or an Operator
            return changes

        return Transform(init, apply)

    return make


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 at least, so that a product is rounded once."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def _partners(paths: tuple[str, ...], model: FunctionalModel) -> tuple[str, ...]:
    """Return the weights and biases that go with these."""
    return tuple(name for pair in _places(paths, model, "ssf").values() for name in pair)


def _places(paths: tuple[str, ...], model: FunctionalModel, name: str) -> dict[str, tuple[str, str]]:
    """Return the weight and the bias of every module that one of them was chosen of, by its path."""
    found: dict[str, tuple[str, str]] = {}
    for path in paths:
        module, dot, last = path.rpartition(".")
        if not last.endswith(("weight", "bias")):
            raise OptionError(
                f"{name}: {path!r} is neither the weight nor the bias of a module; leave it out, e.g. by "
                "pf.of_type(nn.Linear, nn.LayerNorm)"
            )
        stem = last.removesuffix("weight").removesuffix("bias")
        weight = module + dot + stem + "weight"
        bias = next(iter(biases((weight,), model)), None)
        layout = model.layouts.get(weight)
        rows = 0 if layout is None else layout.shape[0] if layout.storage is Storage.VECTOR else layout.matrix_shape[-2]
        if bias is None or layout is None or layout.batch or model.params[bias].shape != (rows,):
            raise OptionError(
                f"{name}: {module!r} has no weight and bias of one length that could hold a scale and a shift; leave "
                "it out, or use form='activations'"
            )
        found[module if not stem else module + dot + stem.rstrip("_")] = (weight, bias)
    return found

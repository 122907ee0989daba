"""Bottleneck adapters: d(h) = s * Up(act(Down(h))), added to what a module gives, or to what it makes of its input.

    sequential:  y = M(x) + d(M(x))     Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", 2019,
                                        arXiv 1902.00751
    parallel:    y = M(x) + d(x)        He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning",
                                        2022, arXiv 2110.04366
    norm:        y = M(x + d(M(x)))     Pfeiffer et al., "AdapterFusion", 2021, arXiv 2005.00247: M is the layer norm
                                        behind a feed-forward, x the sum that it gets

Down maps to few features and Up back. Up is zero at the start, so nothing changes at first; Houlsby et al. draw both
from N(0, 0.01^2), which is near to that.

The `adapters` library (1.3) differs in three things: by default it draws both from N(0, 0.02^2) (its
`init_weights="mam_adapter"` is the start here); its dropout is on what the adapter adds, not on the features between
Down and Up; and its layer norm behind Up is behind s, too.
"""

import functools
from collections.abc import Callable, Mapping
from math import sqrt
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_func.addins.added import FORMS, adding, check_features
from peft_func.addins.place import Place
from peft_func.addins.width import widths
from peft_func.errors import OptionError
from peft_func.functional.surround import Inner
from peft_func.transforms.options import check_choice, check_number, check_probability
from peft_func.transforms.transform import Part
from peft_func.trees.keys import split, uniform
from peft_func.trees.paths import Tree
from peft_func.trees.select import Where

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "gelu": F.gelu,
    "identity": lambda h: h,
    "leaky_relu": F.leaky_relu,
    "mish": F.mish,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "tanh": torch.tanh,
}

LAYER_NORMS = ("in", "out")

Linear: TypeAlias = Callable[[Mapping[str, Any], str, Tensor, Inner], Tensor]
"""How `"down"` and `"up"` act on the last axis: `(tree, which, h, inner) -> h`."""


def bottleneck(
    where: Where,
    *,
    form: str = "sequential",
    reduction: float = 16,
    rank: int | None = None,
    activation: str = "relu",
    scale: float | str = 1.0,
    layer_norm: str | None = None,
    dropout: float = 0.0,
    width: int | None = None,
    name: str = "bottleneck",
) -> Part:
    """Add a small two-layer network to modules; with `form="sequential"` it stands behind them, with a skip of its own.

    Leaves of `trainable[name][path]`: `down` [rank, in], `down_bias` [rank], `up` [out, rank], `up_bias` [out]; `scale`
    [] if it is learned; `norm` and `norm_bias` [in], or [out], with a layer norm. They have the dtype and device of the
    module, float32 for a half-precision one, and act in the dtype of the activation. Where a module gives a tuple, its
    first tensor is changed.

    Args:
        where: a selector over modules. `pf.houlsby` and `pf.pfeiffer` know the places of the papers.
        form: `"sequential"`, `"parallel"` or `"norm"`: the equations of this file.
        reduction: the rank is `width / reduction`, rounded down, but at least 1.
        rank: the width of the bottleneck itself, up to four times the features; `reduction` does not count then.
        activation: `"relu"`, `"gelu"` (exact), `"silu"`, `"tanh"`, `"sigmoid"`, `"leaky_relu"`, `"elu"`, `"mish"` or
            `"identity"`.
        scale: s, or `"learned"`: it starts at 1.
        layer_norm: `"in"` for one on what Down gets, `"out"` for one on what Up gives (before s).
        dropout: the probability of dropping a feature of the bottleneck, behind the activation, in train mode.
        width: the number of features, where the module's weights cannot tell it.
        name: the sub-tree.

    Raises:
        OptionError: an option is out of range; at `bind`, if the number of features is unknown.
        AddinError: in a call, if an activation has another number of features.

    Example:
        >>> import torch, peft_func as pf
        >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        >>> model = pf.functionalize(layer)
        >>> adapter = pf.bind(pf.bottleneck(["linear2"], reduction=4, activation="gelu"), model)
        >>> frozen, trainable = adapter.init(0)
        >>> {leaf: list(tensor.shape) for leaf, tensor in trainable["bottleneck"]["linear2"].items()}
        {'down': [4, 16], 'down_bias': [4], 'up': [16, 4], 'up_bias': [16]}
        >>> x = torch.randn(2, 3, 16)
        >>> torch.allclose(model(adapter.apply(frozen, trainable), x), layer(x), atol=1e-6)
        True
    """
    options: dict[str, Any] = {
        "form": form,
        "reduction": reduction,
        "rank": rank,
        "activation": activation,
        "scale": scale,
        "layer_norm": layer_norm,
        "dropout": dropout,
        "width": width,
    }
    acting = checked(name, options)

    def init(place: Place, key: int) -> Tree:
        inputs, outputs = ends(place, name, form, width)
        return first_values(options, rank_at(place, name, options, inputs, outputs), inputs, outputs, key, place.like)

    change = functools.partial(bottleneck_change, dense, acting)
    return adding(where, change, init, form, name=name, kind="bottleneck", options=options)


def checked(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Check the options of a bottleneck, and return those that say how it acts.

    Raises:
        OptionError: one is out of range.
    """
    check_choice(name, "form", options["form"], FORMS)
    check_choice(name, "activation", options["activation"], tuple(ACTIVATIONS))
    if options["layer_norm"] is not None:
        check_choice(name, "layer_norm", options["layer_norm"], LAYER_NORMS)
    if isinstance(options["scale"], str):
        check_choice(name, "scale", options["scale"], ("learned",))
    else:
        check_number(name, "scale", options["scale"])
    check_probability(name, "dropout", options["dropout"])
    if check_number(name, "reduction", options["reduction"]) <= 0:
        raise OptionError(f"{name}: reduction={options['reduction']!r} is not above 0: the rank is width / reduction")
    check_size(name, "width", options["width"])
    check_size(name, "rank", options["rank"])
    return {key: options[key] for key in ("activation", "scale", "layer_norm", "dropout")}


def refuse_form(name: str, options: Mapping[str, Any]) -> None:
    """Refuse the form as an option of what places bottlenecks in one form.

    Raises:
        OptionError: names the call that takes it.
    """
    if "form" in options:
        raise OptionError(f"{name} knows its form; for another one, pf.bottleneck(where, form=...)")


LARGEST = 2**20
"""No size of an add-in is above this one: a file may ask for anything."""


def check_size(name: str, option: str, value: object, *, optional: bool = True) -> None:
    """Refuse a size that is no whole number from 1 to 2**20 (nor None, where it is optional).

    Raises:
        OptionError: names the option.
    """
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
        raise OptionError(f"{name}: {option}={value!r} is no whole number from 1 to {LARGEST:,}")


def ends(place: Place, name: str, form: str, width: int | None) -> tuple[int, int]:
    """Return the number of features that a change gets and gives at a place."""
    inputs, outputs = widths(place, name, width)
    return (inputs if form == "parallel" else outputs), (inputs if form == "norm" else outputs)


def rank_at(place: Place, name: str, options: Mapping[str, Any], inputs: int, outputs: int, multiple: int = 1) -> int:
    """Return the width of the bottleneck at a place, a multiple of a number where it follows from `reduction`.

    Raises:
        OptionError: it is more than four times the features, the width of a feed-forward part.
    """
    wanted = options["rank"] or inputs / options["reduction"]
    highest = 4 * max(inputs, outputs)
    if wanted > highest:
        raise OptionError(
            f"{name}: a rank of {wanted:.0f} at {place.path!r}, for {inputs} features; the highest is {highest}; "
            "give rank= or reduction="
        )
    return int(wanted) if options["rank"] else max(multiple, int(wanted) // multiple * multiple)


def first_values(options: Mapping[str, Any], rank: int, inputs: int, outputs: int, key: int, like: Tensor) -> Tree:
    """Return the first values of the tree of a place: Down as `nn.Linear` draws it, Up and the biases zero."""
    down = uniform((rank, inputs), 1 / sqrt(inputs), split(key, "down"), like)
    zeros = functools.partial(torch.zeros, dtype=down.dtype, device=down.device)
    matrices = {"down": down, "down_bias": zeros(rank), "up": zeros(outputs, rank), "up_bias": zeros(outputs)}
    return matrices | extras(options, inputs, outputs, down)


def extras(options: Mapping[str, Any], inputs: int, outputs: int, like: Tensor) -> Tree:
    """Return the first values of the leaves that some options add to the matrices."""
    tree = {}
    if options["scale"] == "learned":
        tree["scale"] = torch.ones((), dtype=like.dtype, device=like.device)
    if options["layer_norm"] is not None:
        width = inputs if options["layer_norm"] == "in" else outputs
        tree["norm"] = torch.ones(width, dtype=like.dtype, device=like.device)
        tree["norm_bias"] = torch.zeros(width, dtype=like.dtype, device=like.device)
    return tree


def bottleneck_change(linear: Linear, options: Mapping[str, Any], tree: Tree, h: Tensor, inner: Inner) -> Tensor:
    """Return s * Up(act(Down(h))), for linear maps of any kind."""
    own = {key: leaf.to(h.dtype) for key, leaf in tree.items()}
    normed = options["layer_norm"]
    if normed == "in":
        h = F.layer_norm(h, h.shape[-1:], own["norm"], own["norm_bias"])
    h = ACTIVATIONS[options["activation"]](linear(own, "down", h, inner))
    if options["dropout"]:
        h = F.dropout(h, options["dropout"], inner.training)
    h = linear(own, "up", h, inner)
    if normed == "out":
        h = F.layer_norm(h, h.shape[-1:], own["norm"], own["norm_bias"])
    scaled: Tensor = h * (own["scale"] if options["scale"] == "learned" else options["scale"])
    return scaled


def dense(tree: Mapping[str, Any], which: str, h: Tensor, inner: Inner) -> Tensor:
    """Apply an affine map whose matrix is a leaf."""
    check_features(h, tree[which].shape[-1], inner)
    return F.linear(h, tree[which], tree[f"{which}_bias"])

"""What the clusters of GIFT look at: maps = C^T Y^T.

GIFT generates its update from C = g(W phi) `[out, rank]`: W' = W + C psi. The rows of C are the output neurons of a
module, and so are the columns of its token features Y `[tokens, out]`: Y C `[tokens, rank]` says how much each token
belongs to each column of C, a cluster. Over the patches of an image that is a segmentation in `rank` soft segments,
drawn from the adapter alone (Savadikar, Song and Wu, arXiv 2312.00700). Y is the module's output either without the
update, x W^T + b, or with it.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peft_func.errors import OptionError
from peft_func.functional.model import FunctionalModel
from peft_func.functional.observe import Observed, module_at, observe
from peft_func.report.cluster_report import Clusters
from peft_func.report.maps import ClusterMaps, TokenMaps, is_images
from peft_func.report.patches import check_grid, patch_grid
from peft_func.transforms.bind import Adapter, BoundPart
from peft_func.trees.keys import Key, normal, split
from peft_func.trees.paths import join
from peft_func.trees.select import Where, resolve
from peft_func.weights.absorb import absorb
from peft_func.weights.layout import Storage
from peft_func.weights.mapping import Weights
from peft_func.weights.matrix import IdentityPlus, LowRank, Matrix, Product, Sum
from peft_func.weights.operator import full_precision

CHANCES = 8  # draws of as many random directions as there are clusters


def cluster_maps(
    adapter: Adapter,
    frozen: Mapping[str, Tensor],
    trainable: Mapping[str, Any],
    /,
    *inputs: Any,
    part: str = "gift",
    where: Where | None = None,
    grid: tuple[int, int] | None = None,
    extra_tokens: int | None = None,
    key: Key = 0,
    **kwargs: Any,
) -> Clusters:
    """Return what the clusters of a GIFT part look at: a map for each cluster of each place.

    The model is run once, in eval mode. The first tensor among the inputs tells what it is given: floating-point images
    `[batch, height, width]` or `[batch, channels, height, width]`, or integer numbers of tokens `[batch, tokens]`, of
    which an `attention_mask` among the inputs marks the padding.

    For images, `tokens = extra_tokens + h * w`, the extra ones (class token, registers) first. If neither `grid` nor
    `extra_tokens` is given, patches are squares that fill the image, and there is one extra token or none; where that
    does not tell one grid, it is an error. Feature maps of convolutions, and outputs `[batch, h, w, features]`, are
    grids as they are. With `chunks`, the clusters of the parts follow one another.

    Args:
        adapter: a bound method with a part of `pf.gift` at linear layers or convolutions.
        frozen: its first tree.
        trainable: its second tree.
        *inputs: what the model takes.
        part: the name of the part; of one in a named chain, the path.
        where: a selector, for some of its places only.
        grid: `(h, w)` of the patches.
        extra_tokens: how many tokens come before those of the patches.
        key: of the random directions that the maps of `chance` are along.
        **kwargs: what else the model takes.

    Returns:
        Maps by the path of the module: for images `before` and `after` are `[batch, rank, h, w]`, for text `[batch,
        tokens, rank]`; in float32 at least, raw, and differentiable. `before` takes the weight as the part receives it.
        Under `torch.func.vmap` the random directions need `randomness="same"`.

    Raises:
        OptionError: there is no such part, a place has no tokens, or the grid cannot be told.
        SelectorError: `where` selects none of the places.

    Example:
        >>> import torch, peft_func as pf
        >>> net = torch.nn.Sequential(torch.nn.Unflatten(1, (16, 4)), torch.nn.Linear(4, 6))  # "patches" of 2 x 2
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), net)
        >>> adapter = pf.bind(pf.gift("1.1", rank=3), pf.functionalize(net))
        >>> maps = pf.cluster_maps(adapter, *adapter.init(0), torch.rand(5, 8, 8))
        >>> maps["1.1"]
        ClusterMaps('1.1': 5 images, 3 clusters, 4 x 4)
        >>> maps["1.1"].scaled(size=(8, 8)).shape
        torch.Size([5, 3, 8, 8])
    """
    if not isinstance(adapter, Adapter):
        raise OptionError(f"cluster_maps takes a bound adapter, not a {type(adapter).__name__}; see pf.bind")
    check_grid(grid, extra_tokens)
    index, bound = _part(adapter, part)
    model = adapter.model.eval()
    subject = _subject(inputs, kwargs)
    infos = [model.infos[path] for path in bound.paths]
    paths = bound.paths if where is None else resolve(where, infos, f"cluster_maps, of the places of {part!r}")
    places = {path: _place(model, path) for path in paths}
    old = _without(adapter, index).apply(frozen, trainable)
    new = _without(adapter, index + 1).apply(frozen, trainable)
    weights = adapter.apply(frozen, trainable)
    names = "|".join(map(re.escape, places.values()))
    _, seen = observe(model, weights, names, *inputs, **kwargs)
    result: dict[str, ClusterMaps | TokenMaps] = {}
    for path, place in places.items():
        calls = seen[place]
        if not calls:
            raise OptionError(
                f"{place} is not called: another module uses its weight, as nn.MultiheadAttention does. "
                "Leave it out with where="
            )
        C = _generated(new.matrix(path).deterministic(), path, bound)
        for number, call in enumerate(calls, 1):
            name = place if len(calls) == 1 else f"{place}#{number}"
            before, after = (_features(Y, model, path, subject) for Y in (_again(model, place, old, call), call.output))
            if subject.is_floating_point() or grid is not None:
                size = tuple(subject.shape[-2:]) if is_images(subject) else None
                h, w, extra = patch_grid(name, tuple(after.shape[1:-1]), size, grid, extra_tokens)
                random = normal((len(C), CHANCES * C.shape[1]), 1.0, split(key, name), C)
                maps = [
                    _along(columns, Y, extra).mT.reshape(len(Y), -1, h, w)
                    for Y, columns in ((before, C), (after, C), (after, random))
                ]
                result[name] = ClusterMaps(name, *maps)
            else:
                extra = extra_tokens or 0
                present = _present(kwargs.get("attention_mask"), after)[:, extra:]
                result[name] = TokenMaps(name, _along(C, before, extra), _along(C, after, extra), present)
    return Clusters(result, subject)


def _part(adapter: Adapter, name: str) -> tuple[int, BoundPart]:
    """Return the part of this name, and its number in the chain."""
    every = {join(part.keys): part for part in adapter.parts}
    gifts = [name for name, part in every.items() if part.part.kind == "gift"]
    if name not in gifts:
        what = f"the part {name!r} is no pf.gift" if name in every else f"there is no part {name!r}"
        raise OptionError(
            f"{what}; "
            + (f"write part={gifts[0]!r}" if gifts else "clusters are those of a pf.gift part in the method")
        )
    return adapter.parts.index(every[name]), every[name]


def _without(adapter: Adapter, count: int) -> Adapter:
    """Return the adapter with the parts from number `count` on changing nothing; trees and names stay as they are."""
    twin = copy.copy(adapter)
    quiet = [
        replace(part, transform=replace(part.transform, apply=lambda tree, weights: {}))
        for part in adapter.parts[count:]
    ]
    twin.parts = (*adapter.parts[:count], *quiet)
    return twin


def _generated(matrix: Matrix, path: str, bound: BoundPart) -> Tensor:
    """Return C `[out, rank]`, from which the update of an effective weight was generated."""
    options = bound.options or {}
    match matrix:
        case Product(left=left, right=IdentityPlus(inner=LowRank() as low)):
            with full_precision(low.B.device):
                C = absorb(left, low).B
        case Sum(right=LowRank(B=C)):
            if options.get("out_projection_bias"):  # after the clusters of each generator, a column of ones
                C = C.reshape(len(C), -1, options["rank"] + 1)[..., :-1].flatten(-2)
        case _:
            raise OptionError(f"{path}: its update is no product of clusters and psi")
    if C.dim() != 2:
        raise OptionError(f"{path} is a batch of matrices; leave it out with where=")
    return C.to(torch.promote_types(C.dtype, torch.float32))


def _along(columns: Tensor, Y: Tensor, extra: int) -> Tensor:
    """Return features `[batch, *tokens, out]` along columns `[out, n]`, less the extra tokens: `[batch, tokens, n]`."""
    with full_precision(Y.device):
        return Y.flatten(1, -2)[:, extra:].to(columns.dtype) @ columns


def _present(mask: Any, Y: Tensor) -> Tensor:
    """Return which tokens are no padding, by an attention mask if there is one that fits: bool `[batch, tokens]`."""
    shape = (len(Y), Y.shape[1:-1].numel())
    if isinstance(mask, Tensor) and mask.shape == shape:
        return mask.bool()
    return torch.ones(shape, dtype=torch.bool, device=Y.device)


def _place(model: FunctionalModel, path: str) -> str:
    """Return the path of the module whose outputs are the products of a weight."""
    place, _, name = path.rpartition(".")
    layout, modules = model.layouts[path], model.infos[path].modules
    plain = layout.storage is Storage.TRANSPOSED or all(
        issubclass(m, nn.Linear | nn.modules.conv._ConvNd) for m in modules
    )
    if name != "weight" or not plain:
        raise OptionError(
            f"{path} is no weight of a linear layer or of a convolution, so its clusters have no features of tokens; "
            "leave it out with where="
        )
    return place


def _subject(inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Return what the model looks at: images or token numbers."""
    for value in (*inputs, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() >= 1:
            return value
    raise OptionError("cluster_maps(adapter, frozen, trainable, images) takes what the model takes; it got no tensor")


def _again(model: FunctionalModel, place: str, weights: Weights, call: Observed) -> Tensor:
    """Return what a module would have returned with other weights."""
    module, names = module_at(model, place)
    output: Tensor = module({own: weights[name] for own, name in names.items()}, *call.args, **call.kwargs)
    return output


def _features(Y: Any, model: FunctionalModel, path: str, subject: Tensor) -> Tensor:
    """Return the features of a module's output with the tokens between batch and features: `[batch, *tokens, out]`."""
    layout = model.layouts[path]
    if layout.is_conv:
        Y = Y.movedim(1, -1)
    features: Tensor = Y
    shape = list(features.shape)
    if features.dim() not in (3, 4) or shape[0] != len(subject):
        raise OptionError(
            f"{path}: the module returns {shape} for a batch of {len(subject)}; clusters need tokens, "
            "[batch, tokens, features]. Leave it out with where="
        )
    if not layout.is_conv and model.batch_second is not None and shape[0] == shape[1]:
        raise OptionError(
            f"{path}: the module returns {shape}, and {model.batch_second} has the batch on the second axis: which "
            "axis holds the tokens cannot be told; give a batch of another size"
        )
    return features

"""Compacter: a bottleneck whose matrices are sums of Kronecker products, W = sum_i A_i (x) B_i with B_i = s_i t_i^T.

Karimi Mahabadi et al., "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", 2021, arXiv 2106.04647. The n
matrices A_i [n, n] (the rule) serve all places, and Down and Up alike; without the low rank of B_i these are the PHM
adapters of the same paper, after Zhang et al., 2021, arXiv 2102.08597. The rule acts on blocks of features, so that no
matrix [out, in] is ever formed.

The authors draw A_i from N(0, 0.0001^2), to be near the identity at the start. Here s_i of Up is zero, which is the
identity, and A_i is drawn from N(0, 1/n): Down begins with the spread of a plain bottleneck's. The `adapters` library
(1.3) begins as the authors do, and holds its factors with the features in before those out.
"""

import functools
from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from peft_func.addins.added import adding, check_features
from peft_func.addins.bottleneck import bottleneck_change, check_size, checked, ends, extras, rank_at
from peft_func.addins.place import Place
from peft_func.errors import OptionError
from peft_func.functional.surround import Inner
from peft_func.transforms.options import check_flag
from peft_func.transforms.transform import Part
from peft_func.trees.keys import normal, split, uniform
from peft_func.trees.paths import Tree
from peft_func.trees.select import Where

HIGHEST = 64
"""The largest n; the paper has up to 12."""


def compacter(
    where: Where,
    *,
    n: int = 4,
    low_rank: int | None = 1,
    share_rule: bool = True,
    form: str = "sequential",
    reduction: float = 32,
    rank: int | None = None,
    activation: str = "gelu",
    scale: float | str = 1.0,
    layer_norm: str | None = None,
    dropout: float = 0.0,
    width: int | None = None,
    name: str = "compacter",
) -> Part:
    """Add bottlenecks of few parameters to modules.

    Leaves: `trainable[name]["shared"]["rule"]` [n, n, n], the A_i, or `down_rule` and `up_rule` at each place; and in
    `trainable[name][path]`: `down_s` [n, rank / n, low_rank], `down_t` [n, low_rank, in / n], `down_bias` [rank],
    `up_s` [n, out / n, low_rank] (zero at the start), `up_t` [n, low_rank, rank / n], `up_bias` [out]; with
    `low_rank=None` the B_i themselves, `down` [n, rank / n, in / n] and `up` [n, out / n, rank / n]; what `scale` and
    `layer_norm` add is as in `pf.bottleneck`.

    Args:
        where: a selector over modules; `pf.houlsby` and `pf.pfeiffer` know the places of the papers.
        n: the number of Kronecker products, and the size of A_i, 64 at most; it divides the numbers of features and the
            rank.
        low_rank: the rank of B_i; None for full ones.
        share_rule: one rule for all places.
        form: as in `pf.bottleneck`.
        reduction: the rank is `width / reduction`, rounded down to a multiple of n, but at least n.
        rank: the width of the bottleneck itself, a multiple of n.
        activation: as in `pf.bottleneck`.
        scale: as in `pf.bottleneck`.
        layer_norm: as in `pf.bottleneck`.
        dropout: as in `pf.bottleneck`.
        width: as in `pf.bottleneck`.
        name: the sub-tree.

    Raises:
        OptionError: an option is out of range; at `bind`, if n does not divide a number of features.

    Example:
        >>> import torch, peft_func as pf
        >>> model = pf.functionalize(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 16)))
        >>> frozen, trainable = pf.bind(pf.compacter(["0", "1"], n=4, rank=8), model).init(0)
        >>> {leaf: list(tensor.shape) for leaf, tensor in trainable["compacter"]["1"].items()}
        {'down_s': [4, 2, 1], 'down_t': [4, 1, 4], 'down_bias': [8], 'up_s': [4, 4, 1], 'up_t': [4, 1, 2], \
'up_bias': [16]}
        >>> list(trainable["compacter"]["shared"]["rule"].shape)
        [4, 4, 4]
    """
    options: dict[str, Any] = {
        "n": n,
        "low_rank": low_rank,
        "share_rule": share_rule,
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
    check_flag(name, "share_rule", share_rule)
    check_size(name, "n", n, optional=False)
    check_size(name, "low_rank", low_rank)
    if n > HIGHEST:
        raise OptionError(f"{name}: n={n}; the rule has n^3 values, and n is {HIGHEST} at most")

    def init(place: Place, key: int) -> Tree:
        inputs, outputs = ends(place, name, form, width)
        r = rank_at(place, name, options, inputs, outputs, n)
        for what, size in (("features in", inputs), ("features out", outputs), ("features of the bottleneck", r)):
            if size % n:
                raise OptionError(
                    f"{name}: n={n} does not divide the {size} {what} at {place.path!r}; choose another n"
                )
        if low_rank is not None and low_rank > min(inputs, outputs, r) // n:
            highest = min(inputs, outputs, r) // n
            raise OptionError(
                f"{name}: low_rank={low_rank} at {place.path!r}, where the B_i of a matrix have a rank of {highest} at "
                "most; give that, or low_rank=None"
            )
        rules = {} if share_rule else {f"{end}_rule": _rule(n, split(key, f"{end}_rule"), place.like) for end in ENDS}
        tree = rules | _blocks("down", n, low_rank, inputs, r, key, place.like)
        tree |= _blocks("up", n, low_rank, r, outputs, key, place.like)
        return tree | extras(options, inputs, outputs, tree["down_bias"])

    def shared(places: Sequence[Place], key: int) -> Tree:
        return {"rule": _rule(n, key, places[0].like)}

    change = functools.partial(bottleneck_change, hypercomplex, acting)
    common = shared if share_rule else None
    return adding(where, change, init, form, name=name, kind="compacter", options=options, shared=common)


ENDS = ("down", "up")


def _rule(n: int, key: int, like: Tensor) -> Tensor:
    return normal((n, n, n), 1 / sqrt(n), key, like)


def _blocks(end: str, n: int, low_rank: int | None, inputs: int, outputs: int, key: int, like: Tensor) -> Tree:
    """Return the first values of the B_i of one matrix, or of their factors, and of its bias; those of Up are zero."""
    left = (n, outputs // n, low_rank or inputs // n)
    if low_rank is None:
        first = uniform(left, 1 / sqrt(inputs), split(key, end), like)
        tree = {end: first}
    else:
        first = normal(left, 1 / sqrt(low_rank), split(key, f"{end}_s"), like)
        tree = {end + "_s": first}
        tree[end + "_t"] = uniform((n, low_rank, inputs // n), 1 / sqrt(inputs), split(key, f"{end}_t"), like)
    if end == "up":
        tree[next(iter(tree))] = torch.zeros_like(first)
    tree[f"{end}_bias"] = torch.zeros(outputs, dtype=first.dtype, device=first.device)
    return tree


def hypercomplex(tree: Mapping[str, Any], end: str, h: Tensor, inner: Inner) -> Tensor:
    """Apply an affine map whose matrix is a sum of Kronecker products, by blocks of features."""
    rule = tree["rule"] if "rule" in tree else tree[f"{end}_rule"]
    factored = f"{end}_t" in tree
    right = tree[f"{end}_t" if factored else end]
    n = len(rule)
    check_features(h, n * right.shape[-1], inner)
    h = torch.einsum("...jc,ikc->...ijk", h.reshape(*h.shape[:-1], n, h.shape[-1] // n), right)
    h = torch.einsum("iaj,...ijk->...iak", rule, h)
    out = torch.einsum("...iak,iok->...ao", h, tree[f"{end}_s"]) if factored else h.sum(-3)
    bias: Tensor = tree[f"{end}_bias"]
    return out.flatten(-2) + bias

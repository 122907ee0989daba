"""Representation fine-tuning (ReFT): hidden states are edited in a low-rank subspace, at chosen positions.

    LoReFT:  h + R^T (W h + b - R h)         the rows of R [rank, width] are orthonormal
    NoReFT:  h + W2^T (W1 h + b - W2 h)
    DiReFT:  h + W2^T (W1 h + b)

Wu et al., "ReFT: Representation Finetuning for Language Models", 2024, arXiv 2404.03592. R is the orthonormal factor of
its leaf (QR with a positive diagonal), so it stays orthonormal whatever an optimizer does; a leaf with orthonormal rows
stands for itself. As in the paper, edits are there from the start; `init="identity"` starts without any.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_func.addins.added import check_features
from peft_func.addins.around import nothing
from peft_func.addins.place import Place, place_at
from peft_func.addins.positions import MASK, Positions, Tokens, has_two_ends, read_positions
from peft_func.addins.values import main, with_main
from peft_func.addins.width import widths
from peft_func.errors import OptionError
from peft_func.functional.model import FunctionalModel
from peft_func.functional.surround import Inner
from peft_func.transforms.options import check_choice, check_flag, check_probability, check_rank
from peft_func.transforms.transform import Part, Transform, check_name
from peft_func.trees.keys import normal, split, uniform
from peft_func.trees.paths import Tree
from peft_func.trees.select import Where
from peft_func.weights.around import Site, at
from peft_func.weights.mapping import Weights

INITS = ("default", "identity")
ENDS = ("first", "last")
"""The keys of untied leaves."""


def loreft(
    where: Where,
    *,
    rank: int = 4,
    positions: Positions = "f1+l1",
    tied: bool = True,
    dropout: float = 0.0,
    init: str = "default",
    mask: str = MASK,
    width: int | None = None,
    name: str = "loreft",
) -> Part:
    """Edit hidden states in a subspace with an orthonormal basis: h + R^T (W h + b - R h).

    Leaves of `trainable[name][path]`: `R` [rank, width], `W` [rank, width], `b` [rank]; with `tied=False` and both
    first and last positions, these under `first` and under `last`.

    Positions count the tokens that are there, as the `attention_mask` [batch, tokens] of the call says (padding is on
    either side); of "f3+l5" no more than half of a short sequence is first or last, as in pyreft. While tokens are
    generated, only those of the prompt are edited, unless positions are "all". In training on prompts with answers,
    `mask="prompt_mask"` says where the prompt is: `model(weights, ids, attention_mask=..., prompt_mask=...)`; an
    argument that the net does not know goes to the add-in only. A call without it counts by its `attention_mask`.

    Args:
        where: a selector over modules, such as `pf.blocks()`: their outputs `[batch, tokens, width]` are edited.
        rank: the dimension of the subspace.
        positions: `"all"`, `"f3+l2"` (first three and last two), `"f1"`, `"l1"`, a slice or its text `"2:8"`, a list of
            numbers (negative ones from the end), or a function `(rank, count) -> bool` of the number of each token
            `[batch, tokens]` and how many there are `[batch, 1]`; a file cannot hold a function.
        tied: whether first and last positions share their leaves.
        dropout: the probability of dropping a feature of an edited state, in train mode.
        init: `"default"`, the paper's: R random orthonormal, W and b as `nn.Linear` draws them. Or `"identity"`: W = R
            and b = 0, so that nothing is edited at first.
        mask: the name of the argument that says which tokens count.
        width: the number of features, where the module's weights cannot tell it.
        name: the sub-tree.

    Raises:
        OptionError: an option is out of range, or the width is unknown.
        AddinError: in a call, if an activation is not `[batch, tokens, features]`, or the mask does not fit it.

    Example:
        >>> import torch, peft_func as pf
        >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        >>> net = torch.nn.TransformerEncoder(layer, 2).eval()
        >>> model, x = pf.functionalize(net), torch.randn(2, 5, 16)
        >>> adapter = pf.bind(pf.loreft(pf.blocks(-1), rank=2, positions="f1"), model)
        >>> frozen, trainable = adapter.init(0)
        >>> {leaf: list(tensor.shape) for leaf, tensor in trainable["loreft"]["layers.1"].items()}
        {'R': [2, 16], 'W': [2, 16], 'b': [2]}
        >>> edited = (model(adapter.apply(frozen, trainable), x) - net(x)).abs().amax((0, 2)) > 1e-4
        >>> edited.tolist()
        [True, False, False, False, False]
    """
    options = _options(rank, positions, tied, dropout, init, mask, width)
    return _reft(where, _loreft_edit, _loreft_leaves, options, name, "loreft")


def noreft(
    where: Where,
    *,
    rank: int = 4,
    positions: Positions = "f1+l1",
    tied: bool = True,
    dropout: float = 0.0,
    init: str = "default",
    mask: str = MASK,
    width: int | None = None,
    name: str = "noreft",
) -> Part:
    """Edit hidden states as LoReFT does, in a subspace without an orthonormal basis: h + W2^T (W1 h + b - W2 h).

    Leaves: `W1` [rank, width], `W2` [rank, width], `b` [rank]. Options and errors are those of `pf.loreft`; with
    `init="identity"`, W1 = W2 and b = 0 at the start.

    Example:
        >>> import torch, peft_func as pf
        >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        >>> model = pf.functionalize(torch.nn.TransformerEncoder(layer, 2))
        >>> adapter = pf.bind(pf.noreft(pf.blocks(), rank=2, tied=False), model)
        >>> list(adapter.init(0)[1]["noreft"]["layers.0"]["first"])
        ['W1', 'W2', 'b']
    """
    options = _options(rank, positions, tied, dropout, init, mask, width)
    return _reft(where, _noreft_edit, _noreft_leaves, options, name, "noreft")


def direft(
    where: Where,
    *,
    rank: int = 4,
    positions: Positions = "f1+l1",
    tied: bool = True,
    dropout: float = 0.0,
    init: str = "default",
    mask: str = MASK,
    width: int | None = None,
    name: str = "direft",
) -> Part:
    """Add a low-rank affine map of hidden states to them: h + W2^T (W1 h + b).

    Leaves: `W1` [rank, width], `W2` [rank, width], `b` [rank]. Options and errors are those of `pf.loreft`; with
    `init="identity"`, W2 = 0 at the start.

    Example:
        >>> import torch, peft_func as pf
        >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        >>> model = pf.functionalize(torch.nn.TransformerEncoder(layer, 2))
        >>> adapter = pf.bind(pf.direft(pf.blocks(), rank=2, positions="l2"), model)
        >>> list(adapter.init(0)[1]["direft"]["layers.0"])
        ['W1', 'W2', 'b']
    """
    options = _options(rank, positions, tied, dropout, init, mask, width)
    return _reft(where, _direft_edit, _direft_leaves, options, name, "direft")


def _options(
    rank: int, positions: Positions, tied: bool, dropout: float, init: str, mask: str, width: int | None
) -> dict[str, Any]:
    return {
        "rank": rank, "positions": positions, "tied": tied, "dropout": dropout, "init": init, "mask": mask,
        "width": width,
    }  # fmt: skip


Edit = Callable[[Mapping[str, Tensor], Tensor], Tensor]
Leaves = Callable[[int, int, str, int, Tensor], dict[str, Tensor]]


def _reft(where: Where, edit: Edit, leaves: Leaves, options: dict[str, Any], name: str, kind: str) -> Part:
    check_name(name)
    positions = options["positions"] = read_positions(name, options["positions"])
    check_flag(name, "tied", options["tied"])
    check_choice(name, "init", options["init"], INITS)
    check_probability(name, "dropout", options["dropout"])
    if not isinstance(options["mask"], str) or not options["mask"].isidentifier():
        raise OptionError(f"{name}: mask={options['mask']!r} is no name of an argument, such as 'attention_mask'")
    split_ends = has_two_ends(positions) and not options["tied"]

    def make(paths: tuple[str, ...], model: FunctionalModel) -> Transform:
        places = [place_at(model, path) for path in paths]
        sizes = {place.path: widths(place, name, options["width"])[1] for place in places}
        for path, size in sizes.items():
            check_rank(name, path, options["rank"], (size, size))
        tokens = Tokens(positions, options["mask"], name, model._skeleton.root, paths)

        def draw(place: Place, key: int) -> Tree:
            return dict(leaves(options["rank"], sizes[place.path], options["init"], key, place.like))

        def first_values(weights: Weights, key: int) -> Tree:
            tree: Tree = {}
            for place in places:
                own = split(key, place.path)
                tree[place.path] = (
                    {end: draw(place, split(own, end)) for end in ENDS} if split_ends else draw(place, own)
                )
            return tree

        edits = (
            Site(path, functools.partial(edited, edit, tokens.at(path), options["dropout"]), name, at(path))
            for path in paths
        )
        return Transform(first_values, nothing, sites=(*edits, *tokens.noting))

    own = not callable(positions)
    return Part(where, make, name, kind if own else None, options if own else None, modules=True)


def edited(
    edit: Edit, masks: Callable[..., Sequence[Tensor]], dropout: float, tree: Tree, inner: Inner, *args: Any, **kw: Any
) -> Any:
    """Run a module and edit its output at the positions that the masks tell."""
    output = inner(*args, **kw)
    h = main(output)
    trees = [tree[end] for end in ENDS] if ENDS[0] in tree else [tree]
    groups = masks(h, inner)
    if len(groups) > len(trees):
        groups = [groups[0] | groups[1]]
    new = h
    for own, group in zip(trees, groups, strict=True):
        check_features(h, max(leaf.shape[-1] for leaf in own.values()), inner)
        changed = h + edit(own, h)
        if dropout:
            changed = F.dropout(changed, dropout, inner.training)
        new = torch.where(group, changed, new)
    return with_main(output, new)


def _loreft_edit(tree: Mapping[str, Tensor], h: Tensor) -> Tensor:
    basis = orthonormal(tree["R"]).to(h.dtype)
    return (F.linear(h, tree["W"].to(h.dtype), tree["b"].to(h.dtype)) - F.linear(h, basis)) @ basis


def _noreft_edit(tree: Mapping[str, Tensor], h: Tensor) -> Tensor:
    one, two, b = (tree[leaf].to(h.dtype) for leaf in ("W1", "W2", "b"))
    return (F.linear(h, one, b) - F.linear(h, two)) @ two


def _direft_edit(tree: Mapping[str, Tensor], h: Tensor) -> Tensor:
    one, two, b = (tree[leaf].to(h.dtype) for leaf in ("W1", "W2", "b"))
    return F.linear(h, one, b) @ two


def orthonormal(rows: Tensor) -> Tensor:
    """Return the orthonormal rows that span what these do: Q of their QR decomposition, with a positive diagonal.

    Args:
        rows: `[rank, width]`, independent; half precision is computed in float32.
    """
    if rows.dtype.itemsize < 4:
        rows = rows.float()
    q, r = torch.linalg.qr(rows.mT)
    basis: Tensor = (q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]).mT
    return basis


def _affine(rank: int, width: int, key: int, like: Tensor) -> tuple[Tensor, Tensor]:
    bound = 1 / sqrt(width)
    return uniform((rank, width), bound, split(key, "W"), like), uniform((rank,), bound, split(key, "b"), like)


def _loreft_leaves(rank: int, width: int, init: str, key: int, like: Tensor) -> dict[str, Tensor]:
    basis = orthonormal(normal((rank, width), 1.0, split(key, "R"), like))
    if init == "identity":
        return {"R": basis, "W": basis.clone(), "b": basis.new_zeros(rank)}
    weight, b = _affine(rank, width, key, like)
    return {"R": basis, "W": weight, "b": b}


def _noreft_leaves(rank: int, width: int, init: str, key: int, like: Tensor) -> dict[str, Tensor]:
    two = uniform((rank, width), 1 / sqrt(width), split(key, "W2"), like)
    if init == "identity":
        return {"W1": two.clone(), "W2": two, "b": two.new_zeros(rank)}
    one, b = _affine(rank, width, key, like)
    return {"W1": one, "W2": two, "b": b}


def _direft_leaves(rank: int, width: int, init: str, key: int, like: Tensor) -> dict[str, Tensor]:
    one, b = _affine(rank, width, key, like)
    two = uniform((rank, width), 1 / sqrt(width), split(key, "W2"), like)
    return {"W1": one, "W2": two * (init != "identity"), "b": b}

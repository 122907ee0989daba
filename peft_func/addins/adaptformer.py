"""AdaptFormer: a bottleneck beside the feed-forward part of every block, or behind it.

    parallel:    y = MLP(LN(x)) + s Up(ReLU(Down(x))) + x         x what the block adds the feed-forward part to
    sequential:  y = h + s Up(ReLU(Down(h))) + x,  h = MLP(LN(x))

Chen et al., "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition", 2022, arXiv 2205.13535.

Where a block begins with a norm, the parallel branch takes what the second norm takes, and is added to what the block
gives, so layer scales do not act on it. Where norms come last, it takes what the feed-forward part takes, and is added
to what that gives. Which it is shows in the call: whether a norm ran before the attention.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from peft_func.addins.across import Key, note_keys, noted
from peft_func.addins.added import Adds, Change
from peft_func.addins.around import nothing
from peft_func.addins.bottleneck import bottleneck_change, check_size, checked, dense, ends, first_values
from peft_func.addins.parts import blocks
from peft_func.addins.place import Place, place_at
from peft_func.addins.structure import Block, blocks_at
from peft_func.addins.values import main, main_argument, with_main
from peft_func.errors import OptionError
from peft_func.functional.model import FunctionalModel
from peft_func.functional.surround import Inner
from peft_func.transforms.options import check_choice
from peft_func.transforms.transform import Part, Transform, check_name
from peft_func.trees.keys import split
from peft_func.trees.paths import Tree
from peft_func.trees.select import Where
from peft_func.weights.around import Site, at
from peft_func.weights.mapping import Weights


def adaptformer(
    where: Where | None = None,
    *,
    form: str = "parallel",
    rank: int = 64,
    scale: float | str = 0.1,
    layer_norm: str | None = None,
    dropout: float = 0.1,
    activation: str = "relu",
    width: int | None = None,
    name: str = "adaptformer",
) -> Part:
    """Add a bottleneck to the feed-forward part of blocks.

    Leaves of `trainable[name][path]`: `down` [rank, width], `down_bias` [rank], `up` [width, rank], `up_bias` [width];
    `scale` [], `norm`, `norm_bias` [width] where asked for. `up` is zero at the start, so nothing changes at first.

    Args:
        where: a selector over modules: blocks, by default all; or feed-forward modules, which the bottleneck is then
            put around as they are, with their own input.
        form: `"parallel"` or `"sequential"`.
        rank: the width of the bottleneck.
        scale: s, or `"learned"`: it starts at 1.
        layer_norm: `"in"` for one on what Down gets, `"out"` for one on what Up gives, before s.
        dropout: the probability of dropping a feature behind the activation, in train mode.
        activation: as for `pf.bottleneck`.
        width: the number of features, where the weights cannot tell it.
        name: the sub-tree.

    Raises:
        SelectorError: at `bind`, nothing is selected; by default, if the model has no blocks.
        OptionError: an option is out of range; at `bind`, a block has no feed-forward part that shapes tell.

    Example:
        >>> import torch, peft_func as pf
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = pf.functionalize(torch.nn.TransformerEncoder(layer, 2)).eval()
        >>> adapter = pf.bind(pf.adaptformer(rank=4), model)
        >>> frozen, trainable = adapter.init(0)
        >>> list(trainable["adaptformer"]), list(trainable["adaptformer"]["layers.0"])
        (['layers.0', 'layers.1'], ['down', 'down_bias', 'up', 'up_bias'])
        >>> model(adapter.apply(frozen, trainable), torch.ones(1, 3, 8)).shape
        torch.Size([1, 3, 8])
    """
    check_choice(name, "form", form, ("parallel", "sequential"))
    options: dict[str, Any] = {
        "form": form,
        "rank": rank,
        "activation": activation,
        "scale": scale,
        "layer_norm": layer_norm,
        "dropout": dropout,
        "width": width,
    }
    acting = checked(name, options | {"reduction": 1})
    check_size(name, "rank", rank, optional=False)
    change = functools.partial(bottleneck_change, dense, acting)

    def make(paths: tuple[str, ...], model: FunctionalModel) -> Transform:
        known = blocks_at(model, paths)
        places = [place_at(model, path) for path in paths]
        sizes = {place.path: _ends(name, form, place, known.get(place.path), width) for place in places}

        def draw(weights: Weights, key: int) -> Tree:
            return {
                place.path: first_values(options, rank, *sizes[place.path], split(key, place.path), place.like)
                for place in places
            }

        sites = (site for path in paths for site in _sites(name, form, change, path, known.get(path)))
        return Transform(draw, nothing, sites=tuple(sites))

    return Part(blocks() if where is None else where, make, check_name(name), "adaptformer", options, modules=True)


def _ends(name: str, form: str, place: Place, block: Block | None, width: int | None) -> tuple[int, int]:
    if block is None:
        return ends(place, name, form, width)
    if block.first is None:
        raise OptionError(
            f"{name}: no two linear maps of {block.path!r} go from its {block.width} features and back, so its "
            "feed-forward part is unknown; select the feed-forward modules themselves"
        )
    return block.width, block.width


def _sites(name: str, form: str, change: Change, path: str, block: Block | None) -> list[Site]:
    """Return what is around which modules."""
    if block is None or form == "sequential":
        place = path if block is None else block.mlp or block.last or path
        return [Site(place, Adds(form, change), name, at(path))]
    watched = [(place, "norm") for place in block.norms] + [(place, "attention") for place in block.attentions]
    begins, ends = block.mlp or block.first or path, block.mlp or block.last or path
    key = note_keys(name)
    normed, added = key(path, "norm"), key(path, "added")
    joining = functools.partial(_join, path, added)
    return [
        *(
            Site(place, functools.partial(_watch, path, normed, what), name, at(), changes=False)
            for place, what in watched
        ),
        Site(begins, functools.partial(_branch_off, path, normed, added, change), name, at(path), changes=False),
        Site(ends, functools.partial(joining, "attention"), name, at()),
        Site(path, functools.partial(joining, "norm"), name, at()),
    ]


def _watch(block: str, normed: Key, what: str, tree: Tree, inner: Inner, *args: Any, **kwargs: Any) -> Any:
    """Note which comes first in a block, a norm or an attention, and what the last norm so far got."""
    inner.notes.setdefault(("begins", block), what)
    if what == "norm":
        inner.notes[normed] = main_argument(args, kwargs), torch.is_grad_enabled()
    return inner(*args, **kwargs)


def _residual(block: str, normed: Key, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return what the block adds its feed-forward part to."""
    if inner.notes.get(("begins", block)) == "norm":
        return noted(normed, inner)
    return main_argument(args, kwargs)


def _branch_off(
    block: str, normed: Key, added: Key, change: Change, tree: Tree, inner: Inner, *args: Any, **kwargs: Any
) -> Any:
    branch = change(tree, _residual(block, normed, inner, args, kwargs), inner)
    inner.notes[added] = branch, torch.is_grad_enabled()
    return inner(*args, **kwargs)


def _join(block: str, added: Key, begins: str, tree: Tree, inner: Inner, *args: Any, **kwargs: Any) -> Any:
    """Add the branch: to what the block gives if it begins with a norm, else to its feed-forward part."""
    output = inner(*args, **kwargs)
    if inner.notes.get(("begins", block), "attention") != begins:
        return output
    return with_main(output, main(output) + noted(added, inner))

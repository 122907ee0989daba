"""The parallel adapter: y = F(x) + s * Up(act(Down(x))), with F the feed-forward part of a block and x its input.

He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning", 2022, arXiv 2110.04366. F may be one
module or run in pieces, as in BERT: x is what its first linear map gets, and y what its last one gives, before the
dropout that may follow. In nets that normalise before F, the `adapters` library (1.3) gives the adapter what the norm
gets; its defaults are `reduction=2, scale=4.0`.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

from peft_func.addins.across import Key, note, note_keys, noted
from peft_func.addins.added import Change, change_of
from peft_func.addins.bottleneck import bottleneck, refuse_form
from peft_func.addins.parts import Chosen
from peft_func.addins.structure import blocks_of
from peft_func.addins.values import main, with_main
from peft_func.errors import SelectorError
from peft_func.functional.model import FunctionalModel
from peft_func.functional.surround import Inner
from peft_func.functional.walk import Structural
from peft_func.transforms.transform import Part, Transform
from peft_func.trees.paths import Tree
from peft_func.trees.select import Selector, Where, as_selector
from peft_func.weights.around import Site, at


def parallel_adapter(where: Where | None = None, *, name: str = "parallel_adapter", **options: Any) -> Part:
    """Put a bottleneck beside the feed-forward part of every block of a transformer.

    The places, and the keys of the tree, are the last linear maps of the feed-forward parts. The authors take
    `rank=512, scale=4.0`. Beside other modules, `pf.bottleneck(where, form="parallel")` puts one.

    Args:
        where: a selector that narrows the places, such as `pf.index(range(6))` for the first six blocks.
        name: the sub-tree.
        **options: those of `pf.bottleneck`, but for `form`.

    Raises:
        SelectorError: at `bind`, the model has no such places.
        OptionError: an option is out of range.

    Example:
        >>> import torch, peft_func as pf
        >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        >>> model = pf.functionalize(torch.nn.TransformerEncoder(layer, 2))
        >>> frozen, trainable = pf.bind(pf.parallel_adapter(rank=4, scale=4.0), model).init(0)
        >>> list(trainable["parallel_adapter"])
        ['layers.0.linear2', 'layers.1.linear2']
    """
    refuse_form(name, options)
    places = Ends() if where is None else Ends() & as_selector(where)
    part = bottleneck(places, name=name, **options)

    def make(paths: tuple[str, ...], model: FunctionalModel) -> Transform:
        transform = part.make(paths, model)
        sources = {last: first for first, last in _feed_forwards(model)}
        key, sites = note_keys(name), []
        for behind in transform.sites:
            source = sources[behind.path]
            own = key(source, "input")
            sites.append(Site(source, functools.partial(note, own, "input"), name, at(), changes=False))
            sites.append(replace(behind, function=functools.partial(_beside, own, change_of(behind))))
        return Transform(transform.init, transform.apply, sites=tuple(sites))

    described = {option: value for option, value in (part.options or {}).items() if option != "form"}
    return Part(places, make, name, "parallel_adapter", described, modules=True)


@dataclass(frozen=True)
class Ends(Structural):
    """The last linear maps of feed-forward parts."""

    def within(self, model: FunctionalModel) -> Selector:
        """Return a selector of these modules.

        Raises:
            SelectorError: the model has no blocks, or no block of it has one.
        """
        found = frozenset(last for _, last in _feed_forwards(model))
        if not found:
            raise SelectorError(
                f"no block of {model!r} has a feed-forward part of two linear maps that can be told by its shapes; "
                "choose modules yourself: pf.bottleneck(where, form='parallel')"
            )
        return Chosen(found)


def _feed_forwards(model: FunctionalModel) -> list[tuple[str, str]]:
    """Return the first and the last linear map of each."""
    return [(block.first, block.last) for block in blocks_of(model) if block.first and block.last]


def _beside(key: Key, change: Change, tree: Tree, inner: Inner, *args: Any, **kwargs: Any) -> Any:
    output = inner(*args, **kwargs)
    return with_main(output, main(output) + change(tree, noted(key, inner), inner))

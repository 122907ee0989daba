"""Selectors of the parts of a transformer: its blocks, attentions, feed-forward parts, head.

For what acts on modules they choose these modules; for what acts on weights, all parameters in them:

    pf.vpt(pf.blocks(range(6, 12)))
    pf.chain(pf.lora(pf.attentions(), rank=4), pf.train(pf.head()))
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from peft_func.addins.structure import Block, structure_of
from peft_func.errors import SelectorError
from peft_func.functional.model import FunctionalModel
from peft_func.functional.walk import Structural
from peft_func.trees.modules import ModuleInfo
from peft_func.trees.select import Info, Selector


@dataclass(frozen=True)
class Chosen(Selector):
    """These modules; of parameters, those in them."""

    paths: frozenset[str]

    def __call__(self, path: str, info: Info) -> bool:
        if isinstance(info, ModuleInfo):
            return not self.paths.isdisjoint(info.names)
        names = (info.path, *info.aliases)
        return any(name.startswith(f"{path}.") for name in names for path in self.paths)


@dataclass(frozen=True)
class Parts(Structural):
    """Parts of a transformer of one kind, of all layers or of some.

    Attributes:
        kind: `"blocks"`, `"attentions"`, `"mlps"` or `"head"`.
        layers: numbers of layers, negative ones from the end; None for all.
    """

    kind: str
    layers: tuple[int, ...] | None = None

    def within(self, model: FunctionalModel) -> Selector:
        """Return a selector of these modules.

        Raises:
            SelectorError: the model has no such part, or not so many layers.
        """
        structure = structure_of(model)
        if self.kind == "head":
            if structure.head is None:
                raise SelectorError(f"{model!r} has no linear map behind its blocks; select its head by name")
            return Chosen(frozenset((structure.head,)))
        found = [path for block in _layers(structure.blocks, self) for path in _PATHS[self.kind](block)]
        if not found:
            raise SelectorError(f"the blocks of {model!r} have no {self.kind} that can be told by shapes")
        return Chosen(frozenset(found))

    def __repr__(self) -> str:
        return f"{self.kind}({'' if self.layers is None else ', '.join(map(str, self.layers))})"


_PATHS: dict[str, Callable[[Block], tuple[str, ...]]] = {
    "blocks": lambda block: (block.path,),
    "attentions": lambda block: block.attentions,
    "mlps": lambda block: block.pieces,
}


def _layers(blocks: tuple[Block, ...], parts: Parts) -> list[Block]:
    if parts.layers is None:
        return list(blocks)
    for number in parts.layers:
        if not -len(blocks) <= number < len(blocks):
            raise SelectorError(f"{parts!r}: there is no layer {number}; the model has {len(blocks)}")
    chosen = {number % len(blocks) for number in parts.layers}
    return [block for number, block in enumerate(blocks) if number in chosen]


def blocks(*layers: int | Iterable[int]) -> Selector:
    """Select the repeated layers of a transformer, by what they are and not by name.

    Args:
        *layers: their numbers, `pf.blocks(0, 1)`, `pf.blocks(range(6, 12))`, `pf.blocks(-1)`; all by default. Those
            of a decoder are counted on from those of its encoder.

    Raises:
        SelectorError: at `bind`, the model has no such layers.

    Example:
        >>> import torch, peft_func as pf
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = pf.functionalize(torch.nn.TransformerEncoder(layer, 3))
        >>> method = pf.train(pf.blocks(-1) & pf.named("norm*"))
        >>> list(pf.bind(method, model).init(0)[1]["train"])[:2]
        ['layers.2.norm1.weight', 'layers.2.norm1.bias']
    """
    return Parts("blocks", _numbers("blocks", layers))


def attentions(*layers: int | Iterable[int]) -> Selector:
    """Select the modules that own the projections of queries, keys and values; layers as for `pf.blocks`."""
    return Parts("attentions", _numbers("attentions", layers))


def mlps(*layers: int | Iterable[int]) -> Selector:
    """Select the feed-forward parts; layers as for `pf.blocks`.

    Where a block runs it in pieces, as BERT's does, these are its first piece and its last.
    """
    return Parts("mlps", _numbers("mlps", layers))


def head() -> Selector:
    """Select the head of a model: the last linear map that is registered behind its blocks.

    Raises:
        SelectorError: at `bind`, there is none.
    """
    return Parts("head")


def _numbers(name: str, layers: tuple[int | Iterable[int], ...]) -> tuple[int, ...] | None:
    flat = [number for item in layers for number in (item if isinstance(item, Iterable) else [item])]
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in flat):
        raise SelectorError(f"{name} takes numbers of layers, such as pf.{name}(range(6, 12)); it got {layers!r}")
    return tuple(flat) if layers else None

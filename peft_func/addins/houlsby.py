"""The places where bottleneck adapters stand in a transformer, by what its modules are.

Houlsby et al., 2019, arXiv 1902.00751: one behind each sub-layer, "directly after the projection back to the input
size, but before adding the skip connection", and before the layer norm of a net that normalises behind its sums.
These projections are the last linear map of the attention and of the feed-forward part:

    y = P(x) + d(P(x))

Pfeiffer et al., "AdapterFusion", 2021, arXiv 2005.00247: one in each block, behind the feed-forward part. Where the
block ends with a layer norm N of the sum z of feed-forward and skip (BERT), the adapter gets N(z), and what it gives is
added to z, which is normalised again; elsewhere (GPT-2, Llama, ViT) it gets the output z of the block:

    y = N(z + d(N(z)))          y = z + d(z)

Both are where the `adapters` library (1.3) has them, with one difference: there an adapter of Houlsby's stands behind
the dropout of the sub-layer, here before it, which train mode alone can tell. Its default there is
`activation="silu"`; what differs within an adapter is said in `bottleneck`.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from peft_func.addins.bottleneck import bottleneck, refuse_form
from peft_func.addins.parts import Chosen
from peft_func.addins.structure import Block, blocks_of, linear_widths, projections_of
from peft_func.errors import SelectorError
from peft_func.functional.model import FunctionalModel
from peft_func.functional.walk import Structural, resolve_modules
from peft_func.transforms.options import check_flag
from peft_func.transforms.transform import Chain, Deferred, Part, chain, check_name
from peft_func.trees.select import Selector, Where, as_selector, exact


@dataclass(frozen=True)
class Projections(Structural):
    """The last linear maps of attentions and of feed-forward parts."""

    def within(self, model: FunctionalModel) -> Selector:
        """Return a selector of these modules.

        Raises:
            SelectorError: the model has no blocks, or one is of another make.
        """
        root = model._skeleton.root
        return Chosen(frozenset(path for block in blocks_of(model) for path in _projections(root, block)))

    def __repr__(self) -> str:
        return "projections()"


def projections() -> Selector:
    """Select, in every block of a transformer, the projections back to its width: where Houlsby's adapters stand.

    They are the last linear map of each attention (the attention itself, if it is an `nn.MultiheadAttention`) and of
    the feed-forward part.

    Raises:
        SelectorError: at `bind`, the model has no blocks, or the projections cannot be told.

    Example:
        >>> import torch, peft_func as pf
        >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        >>> model = pf.functionalize(torch.nn.TransformerEncoder(layer, 2))
        >>> adapter = pf.bind(pf.compacter(pf.projections() & pf.index(0), n=2), model)
        >>> adapter.parts[0].modules
        ('layers.0.self_attn', 'layers.0.linear2')
    """
    return Projections()


def houlsby(where: Where | None = None, *, name: str = "houlsby", **options: Any) -> Part:
    """Put a bottleneck behind the attention and behind the feed-forward part of every block of a transformer.

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
        >>> frozen, trainable = pf.bind(pf.houlsby(rank=4), model).init(0)
        >>> list(trainable["houlsby"])
        ['layers.0.self_attn', 'layers.0.linear2', 'layers.1.self_attn', 'layers.1.linear2']
    """
    refuse_form(name, options)
    places = projections() if where is None else projections() & as_selector(where)
    return bottleneck(places, name=name, **options)


@dataclass(frozen=True)
class Pfeiffer(Deferred):
    """Bottlenecks at the ends of blocks; made by `pf.pfeiffer`."""

    where: Where | None = None
    post_norm: bool | None = None
    part: str = "pfeiffer"
    options: Any = None

    def expand(self, model: FunctionalModel) -> Chain:
        """Return the bottlenecks in a model."""
        root, blocks = model._skeleton.root, blocks_of(model)
        norms = [last_norm(root, block, self.post_norm) for block in blocks]
        if any(norms) and not all(norms):
            raise SelectorError(
                f"{self.part}: some blocks end with a layer norm and some do not; give post_norm=True or False"
            )
        ends = [norm or block.path for norm, block in zip(norms, blocks, strict=True)]
        if self.where is not None:
            chosen = as_selector(self.where) & exact(ends)
            ends = list(resolve_modules(chosen, model, self.part))
        form = "norm" if all(norms) else "sequential"
        widths = {block.width for block in blocks}
        known = {"width": widths.pop()} if len(widths) == 1 else {}  # which tells more than the weights in a block
        return chain(bottleneck(exact(ends), form=form, name=self.part, **known | self.options))


def pfeiffer(
    where: Where | None = None, *, post_norm: bool | None = None, name: str = "pfeiffer", **options: Any
) -> Pfeiffer:
    """Put a bottleneck behind the feed-forward part of every block of a transformer.

    Args:
        where: a selector that narrows the places, such as `pf.index(range(6))` for the first six blocks.
        post_norm: whether the blocks end with a layer norm, as BERT's do. None finds it where the structure tells: in
            `nn.TransformerEncoderLayer`, and where the norm is beside the last linear map of the feed-forward part in
            a module of their own (BERT, RoBERTa, ELECTRA, DeBERTa). Elsewhere (DistilBERT, BART) say True.
        name: the sub-tree.
        **options: those of `pf.bottleneck`, but for `form`.

    Raises:
        SelectorError: at `bind`, the model has no such places.
        OptionError: an option is out of range.

    Example:
        >>> import torch, peft_func as pf
        >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        >>> model = pf.functionalize(torch.nn.TransformerEncoder(layer, 2))
        >>> frozen, trainable = pf.bind(pf.pfeiffer(rank=4), model).init(0)
        >>> list(trainable["pfeiffer"])
        ['layers.0.norm2', 'layers.1.norm2']
    """
    refuse_form(name, options)
    if post_norm is not None:
        check_flag(name, "post_norm", post_norm)
    bottleneck("", name=name, **options)  # options are checked here and not only at bind
    return Pfeiffer((), None, where, post_norm, check_name(name), options)


def last_norm(root: nn.Module, block: Block, post_norm: bool | None) -> str | None:
    """Return the path of the layer norm that a block ends with, or None.

    Raises:
        SelectorError: it must have one, and has none.
    """
    if post_norm:
        if not block.norms:
            raise SelectorError(f"{block.path!r} has no layer norm outside of its attention; give post_norm=False")
        return block.norms[-1]
    if post_norm is not None:
        return None
    first = getattr(root.get_submodule(block.path), "norm_first", None)
    if first is not None:
        return None if first or not block.norms else block.norms[-1]
    holder = (block.last or "").rpartition(".")[0]
    if holder == block.path or block.last is None:
        return None
    names = [f"{holder}.{name}" for name, _ in root.get_submodule(holder).named_children()]
    behind = names[names.index(block.last) + 1 :]
    return next((norm for norm in block.norms if norm in behind), None)


def _projections(root: nn.Module, block: Block) -> list[str]:
    """Return the last linear maps of the sub-layers of a block."""
    if block.last is None:
        raise SelectorError(
            f"{block.path!r} has no feed-forward part of two linear maps that can be told by its shapes; "
            "choose modules yourself: pf.bottleneck(where)"
        )
    return [*(_output(root, block, path) for path in block.attentions), block.last]


def _output(root: nn.Module, block: Block, attention: str) -> str:
    """Return the linear map behind an attention: in it, or, as in BERT, next to it."""
    module = root.get_submodule(attention)
    if isinstance(module, nn.MultiheadAttention):
        return attention  # it reads the weights of its last linear map, and never calls it
    inside = set(projections_of(module))
    own = [name for name, child in module.named_modules() if name not in inside and _gives(child, block.width)]
    if own:
        return f"{attention}.{own[-1]}"
    holder = attention.rpartition(".")[0]
    inside_holder = [(f"{holder}.{name}", child) for name, child in root.get_submodule(holder).named_modules() if name]
    paths = [path for path, _ in inside_holder]
    behind = inside_holder[paths.index(attention) + 1 :]
    for path, child in behind:
        if not path.startswith(f"{attention}.") and _gives(child, block.width):
            return path
    raise SelectorError(f"no linear map back to {block.width} features was found behind {attention!r}")


def _gives(module: nn.Module, width: int) -> bool:
    widths = linear_widths(module)
    return widths is not None and widths[1] == width

"""The parts of a transformer, found by what its modules are: repeated blocks, attention, feed-forward, norms, head.

A block is one of several modules of one class in a list, each of which holds an attention. An attention owns the
projections of queries, keys and values: three linear maps from one width, or one of three times the width. A
feed-forward part is two linear maps, from the width of the block and back. Class names are asked for norms only;
names of projections help only where shapes leave it open.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

from torch import nn

from peft_func.errors import SelectorError
from peft_func.functional.model import FunctionalModel

_FUSED = re.compile(r"(?i).*(qkv|query_key_value|c_attn|in_proj)")
_TOKEN = re.compile(r"(?i)(cls|class|dist|distillation|reg|register)_?(tokens?|embedding)")


@dataclass(frozen=True)
class Block:
    """One of the repeated layers of a transformer; all paths are full ones.

    Attributes:
        path: its path.
        width: of the activations between blocks.
        attentions: the modules that own projections of queries, keys and values: the first is the self-attention.
        first: the linear map that the feed-forward part begins with; None if none was found, as with experts.
        last: the linear map that it ends with.
        mlp: the module that is the feed-forward part; None if the block runs it in pieces, as BERT's does.
        pieces: those pieces, or the one module.
        norms: its normalisations, in order of registration, without those inside of attentions.
        batch_first: whether the batch is the first axis of its activations, as far as its attention says.
    """

    path: str
    width: int
    attentions: tuple[str, ...]
    first: str | None
    last: str | None
    mlp: str | None
    pieces: tuple[str, ...]
    norms: tuple[str, ...]
    batch_first: bool

    @property
    def attention(self) -> str:
        """The self-attention."""
        return self.attentions[0]


@dataclass(frozen=True)
class Structure:
    """The parts of a model.

    Attributes:
        blocks: in order; those of an encoder come before those of its decoder.
        norms: the normalisations behind the blocks, beside them or beside what holds them.
        head: the last linear map behind the blocks; None if there is none.
        prefix: how many tokens come before those of the patches (class token, registers); None for other models than
            those of images.
        patch: how many values of an image make a patch; None likewise.
    """

    blocks: tuple[Block, ...]
    norms: tuple[str, ...]
    head: str | None
    prefix: int | None
    patch: int | None


def structure_of(model: FunctionalModel) -> Structure:
    """Return the parts of a transformer.

    Raises:
        SelectorError: no repeated blocks with attentions were found.
    """
    structure = parts_of(model)
    if not structure.blocks:
        raise SelectorError(
            f"{type(model._skeleton.root).__name__} has no list of modules of one class that each hold an attention "
            "(projections of queries, keys and values); select modules by name, by pf.of_type or by a regex"
        )
    return structure


def parts_of(model: FunctionalModel) -> Structure:
    """Return the parts of a transformer; of another model, a structure without any."""
    root = model._skeleton.root
    lists = _lists_of_blocks(root)
    if not lists:
        return Structure((), (), None, None, None)
    blocks = tuple(_block(root, path) for paths in lists for path in paths)
    behind = _behind(root, lists[-1])
    linear = [path for path in behind if linear_widths(root.get_submodule(path))]
    holders = {"", *(path.rsplit(".", n)[0] for path in lists[-1][:1] for n in range(1, path.count(".") + 1))}
    norms = [path for path in behind if path.rpartition(".")[0] in holders and is_norm(root.get_submodule(path))]
    patch = _patch(root, blocks)
    prefix = None if patch is None else _prefix(root, blocks)
    return Structure(blocks, tuple(norms), linear[-1] if linear else None, prefix, patch)


def blocks_of(model: FunctionalModel) -> list[Block]:
    """Return the repeated layers of a transformer, in order.

    Raises:
        SelectorError: there are none.

    Example:
        >>> import torch, peft_func as pf
        >>> from peft_func.addins.structure import blocks_of
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> first, second = blocks_of(pf.functionalize(torch.nn.TransformerEncoder(layer, 2)))
        >>> first.path, first.attention, first.first, first.width
        ('layers.0', 'layers.0.self_attn', 'layers.0.linear1', 8)
    """
    return list(structure_of(model).blocks)


def linear_widths(module: nn.Module) -> tuple[int, int] | None:
    """Return the widths `(in, out)` of a linear map, Hugging Face's Conv1D included; None for another module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = module._parameters.get("weight")
    if type(module).__name__ == "Conv1D" and weight is not None and weight.dim() == 2:
        return int(weight.shape[0]), int(weight.shape[1])
    return None


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises activations, with a scale of its own at most."""
    own = list(module.parameters(recurse=False))
    named = "norm" in type(module).__name__.lower()
    return named and not list(module.children()) and all(tensor.dim() == 1 for tensor in own)


def projections_of(module: nn.Module) -> tuple[str, ...]:
    """Return the names, in an attention, of the projections of queries, keys and values, or of the one for all three.

    They are empty for a module that is no attention, and for `nn.MultiheadAttention`, whose projections are parameters.
    """
    own = {name: widths for name, child in module.named_children() if (widths := linear_widths(child))}
    inputs = {widths[0] for widths in own.values()}
    heads = any("head" in key and isinstance(value, int) for key, value in vars(module).items())
    for name, (width, out) in own.items():
        fused = _FUSED.fullmatch(name) is not None or (heads and out == 3 * width)
        if fused and width < out and out not in inputs:
            return (name,)
    letters = {letter: _starting(letter, own) for letter in "qkv"}
    if all(letters.values()):
        found = tuple(name for name in letters.values() if name is not None)
        return found if len({own[name][0] for name in found}) == 1 else ()
    by_width = [[name for name in own if own[name][0] == width] for width in sorted(inputs)]
    same = next((tuple(names[:3]) for names in by_width if len(names) >= 3), ())
    return same if heads and same and own[same[1]] == own[same[2]] else ()


def is_attention(module: nn.Module) -> bool:
    """Whether a module owns the projections of an attention."""
    return isinstance(module, nn.MultiheadAttention) or bool(projections_of(module))


def _starting(letter: str, names: dict[str, tuple[int, int]]) -> str | None:
    word = {"q": "query", "k": "key", "v": "value"}[letter]
    fits = re.compile(rf"(?i)(?:to_|w|c_|linear_)?{letter}(?![a-z])|{word}")
    return next((name for name in names if fits.match(name)), None)


def _lists_of_blocks(root: nn.Module) -> list[list[str]]:
    """Return the paths of the blocks of every list of them; of nested lists, the inner."""
    attentions = [path for path, module in root.named_modules() if is_attention(module)]
    found: list[list[str]] = []
    for path, module in root.named_modules():
        children = [(f"{path}.{name}".lstrip("."), child) for name, child in module.named_children()]
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len({type(child) for _, child in children}) != 1:
            continue
        if all(any(at.startswith(child + ".") for at in attentions) for child, _ in children):
            found.append([child for child, _ in children])
    return [paths for paths in found if not any(_holds(paths, other) for other in found if other is not paths)]


def _holds(paths: list[str], others: list[str]) -> bool:
    return any(other.startswith(path + ".") for path in paths for other in others)


def _block(root: nn.Module, path: str) -> Block:
    block = root.get_submodule(path)
    inside = dict(block.named_modules())
    attentions = [at for at, module in inside.items() if is_attention(module)]
    attentions = [at for at in attentions if not any(at.startswith(outer + ".") for outer in attentions)]
    attention = inside[attentions[0]]
    width = _width(attention)
    rest = {at: module for at, module in inside.items() if not any(_within(at, outer) for outer in attentions)}
    linears = {at: widths for at, module in rest.items() if (widths := linear_widths(module))}
    beside = attentions[0].rpartition(".")[0]  # what else is there belongs to the attention, such as its output
    apart = {at: widths for at, widths in linears.items() if not beside or not _within(at, beside)}
    pair = _feed_forward(apart, width) or _feed_forward(linears, width)
    mlp: str | None = None
    pieces: tuple[str, ...] = ()
    if pair is not None:
        common = _common(*pair)
        mlp = f"{path}.{common}" if common else None
        pieces = (mlp,) if mlp else tuple(f"{path}.{at.partition('.')[0]}" for at in pair)
    first, last = (None, None) if pair is None else (f"{path}.{at}" for at in pair)
    return Block(
        path=path,
        width=width,
        attentions=tuple(f"{path}.{at}" for at in attentions),
        first=first,
        last=last,
        mlp=mlp,
        pieces=pieces,
        norms=tuple(f"{path}.{at}" for at, module in rest.items() if is_norm(module)),
        batch_first=all(inside[at].batch_first for at in attentions if isinstance(inside[at], nn.MultiheadAttention)),
    )


def _width(attention: nn.Module) -> int:
    if isinstance(attention, nn.MultiheadAttention):
        return int(attention.embed_dim)
    widths = linear_widths(attention.get_submodule(projections_of(attention)[0]))
    return widths[0] if widths else 0


def _feed_forward(linears: dict[str, tuple[int, int]], width: int) -> tuple[str, str] | None:
    """Return the first and the last linear map of a feed-forward part: from the width to another one, and back."""
    names = list(linears)
    pairs = [
        (first, last)
        for i, first in enumerate(names)
        for last in names[i + 1 :]
        if linears[first][0] == width == linears[last][1] and linears[first][1] == linears[last][0]
    ]

    def fitness(pair: tuple[str, str]) -> tuple[int, ...]:
        # Maps of one module go together; where two maps begin (gate and up), the one back is the last.
        first, last = pair
        return linears[first][1] != width, len(_common(first, last)), -names.index(first), names.index(last)

    return max(pairs, key=fitness, default=None)


def _common(one: str, other: str) -> str:
    """Return the path of the module that holds both."""
    shared = []
    for a, b in zip(one.split(".")[:-1], other.split(".")[:-1], strict=False):
        if a != b:
            break
        shared.append(a)
    return ".".join(shared)


def _within(path: str, outer: str) -> bool:
    return path == outer or path.startswith(outer + ".")


def _behind(root: nn.Module, blocks: list[str]) -> list[str]:
    """Return the paths of the modules that are registered behind the blocks."""
    paths = [path for path, _ in root.named_modules()]
    last = max(i for i, path in enumerate(paths) if _within(path, blocks[-1]))
    return paths[last + 1 :]


def _outside(root: nn.Module, blocks: tuple[Block, ...]) -> Iterator[tuple[str, nn.Module]]:
    for path, module in root.named_modules():
        if not any(_within(path, block.path) for block in blocks):
            yield path, module


def _patch(root: nn.Module, blocks: tuple[Block, ...]) -> int | None:
    for _, module in _outside(root, blocks):
        if isinstance(module, nn.Conv2d) and module.out_channels == blocks[0].width:
            return module.in_channels * prod(module.kernel_size)
    return None


def _prefix(root: nn.Module, blocks: tuple[Block, ...]) -> int:
    for _, module in _outside(root, blocks):
        known = vars(module).get("num_prefix_tokens")
        if isinstance(known, int):
            return known
    width, count = blocks[0].width, 0
    for _, module in _outside(root, blocks):
        for name, tensor in module.named_parameters(recurse=False):
            if _TOKEN.fullmatch(name) and tensor.shape[-1] == width:
                count += tensor.numel() // width
    return count


def blocks_at(model: FunctionalModel, paths: Iterable[str]) -> dict[str, Block]:
    """Return, of these paths, those of blocks, with the blocks; a model without any is no error."""
    known = {block.path: block for block in parts_of(model).blocks}
    return {path: known[path] for path in paths if path in known}

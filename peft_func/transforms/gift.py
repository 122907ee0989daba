"""GIFT: W' = W + g(W phi) psi, which for the identity g is W (I + phi psi).

Savadikar, Song and Wu, "Generative Parameter-Efficient Fine-Tuning", arXiv 2312.00700. The update is generated from
the weight itself, so one small generator (phi, g, psi) serves every layer of a depth: each sees another update, because
W differs. For the identity g it acts on the input side: y = (x + (x psi^T) phi^T) W^T, one product with W and no dW.
Otherwise B = g(W phi + 1 b_phi^T) is computed once in each `apply`, and W + B psi acts as a low-rank update does; the
bias of psi is one more column of ones in B, and the parts of a fused weight are rows of B, zero elsewhere.
"""

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_func.errors import OptionError
from peft_func.functional.model import FunctionalModel
from peft_func.transforms import gift_blocks
from peft_func.transforms.gift_groups import (
    Chunks,
    Share,
    Site,
    base_groups,
    check_chunks,
    check_share,
    groups_of,
    sites_of,
)
from peft_func.transforms.gift_schema import Schema, schema_of
from peft_func.transforms.options import check_flag
from peft_func.transforms.transform import Changes, Part, Transform, check_name
from peft_func.trees.keys import split, uniform
from peft_func.trees.paths import Keys, Tree, from_leaves, leaves, map_leaves
from peft_func.trees.select import Where
from peft_func.weights.absorb import absorb
from peft_func.weights.mapping import Weights
from peft_func.weights.matrix import IdentityPlus, LowRank, Matrix, Product
from peft_func.weights.operator import full_precision
from peft_func.weights.sampled import Sampled


def gift(
    where: Where,
    *,
    rank: int = 16,
    share: Share = "target",
    block: str | Mapping[str, Any] = "simple_block",
    in_projection_bias: bool = False,
    out_projection_bias: bool = False,
    chunks: Chunks | None = None,
    dtype: torch.dtype | str | None = None,
    name: str = "gift",
    **options: Any,
) -> Part:
    r"""Generate the update of every selected weight from the weight itself.

    Leaves of `trainable[name][group]`: `phi` [in, rank], drawn from U(-1/sqrt(in), 1/sqrt(in)), and `psi` [rank, in],
    zero at init, so that nothing changes at first; `in` counts a convolution's kernel. With biases, `phi_bias` [rank],
    drawn likewise, and `psi_bias` [in], zero at init. Below `blocks`, those of the block by the names of the authors'
    checkpoints, such as `blocks.0.mlp.fc1.weight`.

    Some layers only: `where=pf.suffix("q_proj") & pf.index(range(8, 16))`.

    Args:
        where: a selector; only parameters of two dimensions or more are looked at.
        rank: the rank, from 1 to that of the matrices.
        share: which places share one generator: `"target"`, those whose modules have the same last name, over depth;
            `"all"`; `"none"`, one for each place, under its path; or `{group: selector}`.
        block: the generator g: `"simple_block"`, `"mlp"`, `"mlp_mixer"`, `"transformer"`, `"pamcat_transformer"` or
            `"pamcat_attn"` (equations: `peft_func.transforms.gift_blocks`); or a dict of it and its options:
            `{"block_type": "mlp", "mlp_ratio": 2}`.
        in_projection_bias: add a bias to W phi.
        out_projection_bias: add a bias to g(..) psi, the same in every row.
        chunks: for fused weights, the names of their equal parts along the outputs, and None for a part that stays as
            it is: `("q", None, "v")` for all places, or `{"qkv": ("q", None, "v")}` for those of this name. Every
            name has a generator of its own, in the group `<group>.q`; with `share="all"`, all have one.
        dtype: that of the leaves, and of the generator's arithmetic: float16, bfloat16, float32, float64, or its name.
            None: leaves as the weight, float32 for a half-precision one, and arithmetic in their dtype, float32 at
            least.
        name: the sub-tree.
        **options: of the block, by default:

            * `activation="identity"` of `simple_block`, or `"sigmoid"`, `"standard_sigmoid"` (the same), `"hsigmoid"`
              (relu6(x + 3) / 6), `"softmax"` (over the rank), `"gelu"`;
            * `num_blocks=1`, `norm="l2"` (or `"none"`, `"ln"`) of all others;
            * `mlp_ratio=2`, of `mlp_mixer` `num_mixed_tokens=64` and `channel_mixing_ratio=2`;
            * `num_heads=1` of attention, which divides the rank;
            * `num_clusters=64`, `cluster_activation="sigmoid"` of the pamcat blocks: any activation; a softmax is over
              the tokens, `"sigmoid"` and `"hsigmoid"` are divided by their number, the others are not;
            * `drop_path=0`, stochastic depth: rises from 0 in the first block to this in the last, so a single block
              has none. Drawn by torch's own generator whenever the weight acts in a model in train mode; `merge`, and a
              model in eval mode, have none.

    Raises:
        OptionError: an option is unknown or out of range; at `bind`, a rank above that of a matrix, places of
            different width in one group (for `mlp_mixer`, of different height too), a place in no group or in two, or
            a weight that has no such equal parts.

    Example:
        >>> import torch, peft_func as pf
        >>> net = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(8, 8)) for _ in range(3)])
        >>> frozen, trainable = pf.bind(pf.gift(r".*weight", rank=2), pf.functionalize(net)).init(0)
        >>> {group: list(leaf["phi"].shape) for group, leaf in trainable["gift"].items()}
        {'0': [8, 2]}
        >>> qkv = pf.functionalize(torch.nn.ModuleDict({"qkv": torch.nn.Linear(8, 24)}))
        >>> tree = pf.bind(pf.gift("qkv", rank=2, chunks=("q", None, "v"), block="mlp"), qkv).init(0)[1]["gift"]
        >>> list(tree), list(tree["qkv.q"]["blocks"]["0"]["mlp"])
        (['qkv.q', 'qkv.v'], ['fc1', 'fc2'])
    """
    schema = schema_of(block, options)
    check_share("gift", share)
    check_flag("gift", "in_projection_bias", in_projection_bias)
    check_flag("gift", "out_projection_bias", out_projection_bias)
    kind = _dtype(dtype)
    described: dict[str, Any] = {"rank": rank, "share": share, "block": schema.options}
    further = {
        "in_projection_bias": in_projection_bias,
        "out_projection_bias": out_projection_bias,
        "chunks": check_chunks(chunks),
        "dtype": None if kind is None else str(kind).removeprefix("torch."),
    }
    described |= {option: value for option, value in further.items() if value}

    def make(paths: tuple[str, ...], model: FunctionalModel) -> Transform:
        places = base_groups("gift", paths, share, model)
        sites = sites_of(places, share, described.get("chunks"), model)
        groups = groups_of(sites, rank, model, mixes_tokens=schema.mixes_tokens)
        schema.check_rank(rank)
        simple = schema.is_identity and not (in_projection_bias or out_projection_bias or chunks)

        def init(weights: Weights, key: int) -> Tree:
            tree: Tree = {}
            for group, first in groups.items():
                draw = _drawing(split(key, group), weights.base[first.path], kind)
                phi = draw("", (first.width, rank), 1 / sqrt(first.width))
                tree[group] = {"phi": phi, "psi": phi.new_zeros(rank, first.width)}
                if in_projection_bias:
                    tree[group]["phi_bias"] = draw("phi_bias", (rank,), 1 / sqrt(first.width))
                if out_projection_bias:
                    tree[group]["psi_bias"] = phi.new_zeros(first.width)
                blocks = gift_blocks.init(schema, rank, first.rows, draw)
                tree[group] |= {"blocks": blocks} if blocks else {}
            return tree

        def apply(tree: Tree, weights: Weights) -> Changes:
            if simple:
                shared = {group: IdentityPlus(LowRank(leaf["phi"], leaf["psi"])) for group, leaf in tree.items()}
                return {path: Product(weights.matrix(path), shared[site.group]) for path, (site,) in sites.items()}
            own = {group: map_leaves(lambda t: t.to(_arithmetic(t, kind)), leaf) for group, leaf in tree.items()}
            changes = {}
            for path, rows in sites.items():
                matrix = weights.matrix(path)
                mine = {site.group: own[site.group] for site in rows}
                changes[path] = matrix + _change(schema, matrix, rows, mine)
            return changes

        if isinstance(share, str):
            return Transform(init, apply)
        chosen: dict[str, list[str]] = {}
        for path, group in places.items():
            chosen.setdefault(group, []).append(path)
        return Transform(init, apply, options=described | {"share": chosen})

    return Part(where, make, check_name(name), "gift", described)


def _drawing(key: int, like: Tensor, dtype: torch.dtype | None) -> gift_blocks.Draw:
    """Return what draws the leaves of one group, each by its own path; phi is at the group's."""

    def draw(path: str, shape: tuple[int, ...], bound: float) -> Tensor:
        values = uniform(shape, bound, split(key, path) if path else key, like)
        return values if dtype is None else values.to(dtype)

    return draw


def _arithmetic(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32) if dtype is None else dtype


def _change(schema: Schema, matrix: Matrix, sites: Sequence[Site], tree: Tree) -> Matrix:
    """Return the change of a weight as a low-rank matrix, or as a random one of such where the schema drops blocks."""
    if not any(schema.rates):
        return _generated(schema, matrix, sites, tree, drop=False)
    keys: tuple[Keys, ...]
    keys, tensors = zip(*leaves(tree), strict=True)

    def draw(base: Matrix, parts: Sequence[Tensor], drop: bool) -> Matrix:
        return _generated(schema, base, sites, from_leaves(zip(keys, parts, strict=True)), drop=drop)

    return Sampled(draw, matrix, tensors)


def _generated(schema: Schema, matrix: Matrix, sites: Sequence[Site], tree: Tree, *, drop: bool) -> LowRank:
    """Return `g(W phi + b_phi) psi + b_psi`, on the rows that have a generator."""
    rows = matrix.shape[-2]
    Bs, As = [], []
    with full_precision(matrix.tensors()[0].device):
        for site in sites:
            leaf = tree[site.group]
            part = matrix if site.stop - site.start == rows else matrix.take(slice(site.start, site.stop))
            B, A = absorb(part, LowRank(leaf["phi"], leaf["psi"])).B, leaf["psi"]
            if "phi_bias" in leaf:
                B = B + leaf["phi_bias"].unsqueeze(-2)
            B = gift_blocks.apply(schema, leaf.get("blocks", {}), B, drop=drop)
            if "psi_bias" in leaf:
                B = torch.cat([B, torch.ones_like(B[..., :1])], -1)
                A = torch.cat([A, leaf["psi_bias"].unsqueeze(-2)], -2)
            Bs.append(F.pad(B, (0, 0, site.start, rows - site.stop)))
            As.append(A)
        return LowRank(torch.cat(Bs, -1), torch.cat(As, -2))


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    known = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
    found = known.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in known.values():
        raise OptionError(f"gift: dtype={dtype!r} is not one of {', '.join(known)}, or None: that of the weights")
    return found

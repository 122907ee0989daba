"""The schema blocks of GIFT: what g does to C = W phi, of shape [out, rank]: its rows are tokens, its columns channels.

Every block but `simple_block`, which is an activation alone, is a stack of `num_blocks` times

    C <- C + f(n(C))        once for each f of the block, with n one of: none, l2 (rows of length 1), ln (layer norm)

    mlp                  f: two linear maps over channels, rank -> mlp_ratio * rank -> rank, with a GELU between
    mlp_mixer            f: two over tokens, out -> num_mixed_tokens -> out; then the mlp, with channel_mixing_ratio
    transformer          f: attention of the tokens among themselves, with num_heads; then the mlp
    pamcat_transformer   f: attention of the tokens to num_clusters clusters of them; then the mlp
    pamcat_attn          f: attention of the tokens to clusters alone

The clusters of x are Z = l2(S x), [clusters, rank], with S = cluster_activation(Linear(x)^T), [clusters, out]: the
sigmoids over `out`, so that they average, or a softmax over the tokens. Attention of N tokens to M is
softmax(q k^T / sqrt(rank / heads)) v, of N x M numbers a head: `out` x `out` in `transformer`, `out` x num_clusters in
the pamcat blocks.

Savadikar, Song and Wu, arXiv 2312.00700. The leaves have the names of the authors' checkpoints:

    in_projections.<target>.weight [rank, in]    phi, transposed         in_projections.<target>.bias    phi_bias
    out_projections.<target>.weight [in, rank]   psi, transposed         out_projections.<target>.bias   psi_bias
    hypernets.<target>.blocks.0.mlp.fc1.weight   blocks.0.mlp.fc1.weight, and so on:

    mlp                  norm1 mlp.fc1 mlp.fc2
    mlp_mixer            norm1 mlp1.fc1 mlp1.fc2 norm2 mlp2.fc1 mlp2.fc2
    transformer          norm1 attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2
    pamcat_transformer   norm1 attn.q attn.k attn.v attn.cluster.cluster attn.proj norm2 mlp.fc1 mlp.fc2
    pamcat_attn          norm attn.q attn.k attn.v attn.cluster.cluster attn.proj

each with a `weight` and a `bias`; norms have leaves for `ln` only. A `:` in a target is a dot here.
"""

from collections.abc import Callable, Mapping
from math import sqrt
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_func.transforms.gift_schema import ACTIVATIONS, LAYERS, Schema
from peft_func.trees.paths import Tree

Draw: TypeAlias = Callable[[str, tuple[int, ...], float], Tensor]
"""Gives the first value of a leaf, from its path, its shape and the bound of a uniform distribution."""


def init(schema: Schema, rank: int, tokens: int, draw: Draw) -> Tree:
    """Return the first leaves of all blocks, by the block's number; linear maps as torch's own are drawn.

    Args:
        schema: the block.
        rank: the channels.
        tokens: the rows of C, which only `mlp_mixer` must know.
        draw: gives each leaf.
    """
    tree: Tree = {}
    for i in range(schema.num_blocks if LAYERS[schema.block_type] else 0):
        block: Tree = {}
        for norm, layer in LAYERS[schema.block_type]:
            if schema.norm == "ln":
                like = draw(f"blocks.{i}.{norm}", (rank,), 1.0)
                block[norm] = {"weight": torch.ones_like(like), "bias": torch.zeros_like(like)}
            block[layer] = _init_layer(
                schema, layer, rank, tokens, lambda path, *how, i=i: draw(f"blocks.{i}.{path}", *how)
            )
        tree[str(i)] = block
    return tree


def apply(schema: Schema, tree: Mapping[str, Any], C: Tensor, *, drop: bool = False) -> Tensor:
    """Return g(C): `[*, out, rank]` to the same.

    Args:
        schema: the block.
        tree: the leaves, as `init` gives them; each may have further axes in front, as C has.
        C: the tokens.
        drop: drop the functions of a block, both or each alone, with the block's probability (stochastic depth); the
            draw is from torch's own generator, one for each [out, rank].
    """
    if schema.block_type == "simple_block":
        return ACTIVATIONS[schema.activation](C)
    for i, rate in enumerate(schema.rates):
        block = tree[str(i)]
        for norm, layer in LAYERS[schema.block_type]:
            change = _layer(schema, layer, block[layer], _normalise(schema.norm, block.get(norm, {}), C))
            if drop and rate > 0.0:
                change = change * F.dropout(C.new_ones(*C.shape[:-2], 1, 1), rate)
            C = C + change
    return C


def _init_layer(schema: Schema, name: str, rank: int, tokens: int, draw: Draw) -> Tree:
    def linear(path: str, inputs: int, outputs: int) -> Tree:
        shapes = {"weight": (outputs, inputs), "bias": (outputs,)}
        return {leaf: draw(f"{name}.{path}.{leaf}", shape, 1 / sqrt(inputs)) for leaf, shape in shapes.items()}

    if name != "attn":
        size, hidden = (tokens, schema.num_mixed_tokens) if name == "mlp1" else (rank, schema.hidden(rank))
        return {"fc1": linear("fc1", size, hidden), "fc2": linear("fc2", hidden, size)}
    if schema.block_type == "transformer":
        return {"qkv": linear("qkv", rank, 3 * rank), "proj": linear("proj", rank, rank)}
    attention: Tree = {path: linear(path, rank, rank) for path in ("q", "k", "v")}
    attention["cluster"] = {"cluster": linear("cluster.cluster", rank, schema.num_clusters)}
    return attention | {"proj": linear("proj", rank, rank)}


def _layer(schema: Schema, name: str, leaf: Mapping[str, Any], x: Tensor) -> Tensor:
    match name:
        case "attn":
            return _attention(schema, leaf, x)
        case "mlp1":
            return _mlp(leaf, x.mT).mT
        case _:
            return _mlp(leaf, x)


def _linear(leaf: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return x @ leaf["weight"].mT + leaf["bias"].unsqueeze(-2)


def _mlp(leaf: Mapping[str, Any], x: Tensor) -> Tensor:
    return _linear(leaf["fc2"], F.gelu(_linear(leaf["fc1"], x)))


def _normalise(norm: str, leaf: Mapping[str, Tensor], x: Tensor) -> Tensor:
    match norm:
        case "l2":
            return F.normalize(x, dim=-1)
        case "ln":
            return F.layer_norm(x, x.shape[-1:]) * leaf["weight"].unsqueeze(-2) + leaf["bias"].unsqueeze(-2)
        case _:
            return x


def _attention(schema: Schema, leaf: Mapping[str, Any], x: Tensor) -> Tensor:
    if schema.block_type == "transformer":
        queries, keys, values = _linear(leaf["qkv"], x).chunk(3, -1)
    else:
        clusters = _clusters(schema, leaf["cluster"]["cluster"], x)
        queries, keys, values = _linear(leaf["q"], x), _linear(leaf["k"], clusters), _linear(leaf["v"], clusters)
    size = x.shape[-1] // schema.num_heads
    q, k, v = (t.reshape(*t.shape[:-1], -1, size).transpose(-2, -3) for t in (queries, keys, values))
    # Written out: torch's own has no derivative of its derivative, and no batching rule on the CPU.
    y = (q @ k.mT / sqrt(size)).softmax(-1) @ v
    return _linear(leaf["proj"], y.transpose(-2, -3).flatten(-2))


def _clusters(schema: Schema, leaf: Mapping[str, Tensor], x: Tensor) -> Tensor:
    shares = ACTIVATIONS[schema.cluster_activation](_linear(leaf, x).mT)
    if schema.cluster_activation in ("sigmoid", "hsigmoid"):
        shares = shares / x.shape[-2]
    return F.normalize(shares @ x, dim=-1)

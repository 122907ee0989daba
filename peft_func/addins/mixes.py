"""How what several adapters add at a place becomes one: by fixed weights, by a gate, or by attention.

The equations and their paper are those of `compose`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_func.errors import OptionError
from peft_func.functional.surround import Inner
from peft_func.transforms.options import check_number, check_probability
from peft_func.trees.keys import normal, split
from peft_func.trees.paths import Tree

Add: TypeAlias = Callable[[Mapping[str, Any], Tree, Tensor, Tensor, Inner], Tensor]
"""`(options, own tree, h, added [..., adapters, out], inner) -> [..., out]`."""


@dataclass(frozen=True)
class Mix:
    """A way to mix.

    Attributes:
        check: `(name, adapters, **options) -> options`, checked, as JSON.
        own: `(adapters, in, out, key, like) -> tree`: the first values of its own tree at a place.
        add: what it makes of what the adapters add.
    """

    check: Callable[..., dict[str, Any]]
    own: Callable[[int, int, int, int, Tensor], Tree]
    add: Add


def average_options(name: str, count: int, *, weights: Sequence[object]) -> dict[str, Any]:
    """Check the options of `pf.average`.

    Raises:
        OptionError: there are more or fewer numbers than adapters, or one is none.
    """
    if len(weights) != count:
        raise OptionError(f"{name}: {len(weights)} weights for {count} adapters; give one for each")
    return {"weights": [check_number(name, "weights", number) for number in weights]}


def gated_options(name: str, count: int) -> dict[str, Any]:
    """Check the options of `pf.gated`, which has none."""
    return {}


def fusion_options(name: str, count: int, *, dropout: object) -> dict[str, Any]:
    """Check the options of `pf.fusion`.

    Raises:
        OptionError: the dropout is no probability.
    """
    return {"dropout": check_probability(name, "dropout", dropout)}


def _averaged(options: Mapping[str, Any], own: Tree, h: Tensor, added: Tensor, inner: Inner) -> Tensor:
    terms = [number * added[..., i, :] for i, number in enumerate(options["weights"])]
    return torch.stack(terms).sum(0)


def _gated(options: Mapping[str, Any], own: Tree, h: Tensor, added: Tensor, inner: Inner) -> Tensor:
    return (F.softmax(F.linear(h, own["gate"]), -1).unsqueeze(-1) * added).sum(-2)


def _fused(options: Mapping[str, Any], own: Tree, h: Tensor, added: Tensor, inner: Inner) -> Tensor:
    query = F.linear(h, own["query"], own["query_bias"])
    scores = (F.linear(added, own["key"], own["key_bias"]) * query.unsqueeze(-2)).sum(-1)
    if options["dropout"]:
        scores = F.dropout(scores, options["dropout"], inner.training)
    return (F.softmax(scores, -1).unsqueeze(-1) * F.linear(added, own["value"])).sum(-2)


def _nothing(count: int, inputs: int, outputs: int, key: int, like: Tensor) -> Tree:
    return {}


def _gate(count: int, inputs: int, outputs: int, key: int, like: Tensor) -> Tree:
    return {"gate": normal((count, inputs), 0.0, key, like)}


def _attention(count: int, inputs: int, outputs: int, key: int, like: Tensor) -> Tree:
    query = normal((outputs, inputs), 0.02, split(key, "query"), like)
    key_matrix = normal((outputs, outputs), 0.02, split(key, "key"), like)
    zeros, eye = query.new_zeros(outputs), torch.eye(outputs, dtype=query.dtype, device=query.device)
    return {
        "query": query,
        "query_bias": zeros,
        "key": key_matrix,
        "key_bias": zeros,
        "value": eye + 1e-6 * (1 - eye),
    }


MIXES = {
    "average": Mix(average_options, _nothing, _averaged),
    "gated": Mix(gated_options, _gate, _gated),
    "fusion": Mix(fusion_options, _attention, _fused),
}

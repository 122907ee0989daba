"""Which block generates GIFT's updates, with its options: checked, and as JSON.

The equations of the blocks are those of `gift_blocks`; their options and defaults, those of the authors' configuration.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_func.errors import OptionError
from peft_func.transforms.options import check_choice, check_number, check_probability

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "sigmoid": torch.sigmoid,
    "standard_sigmoid": torch.sigmoid,
    "hsigmoid": lambda x: ((x + 3) / 6).clamp(0, 1),
    "softmax": lambda x: x.softmax(-1),
    "gelu": F.gelu,
}
"""Pointwise, but for the softmax, which is over the last axis."""

NORMS = ("none", "l2", "ln")
_LARGEST = 2**16  # options may come from a file

LAYERS: dict[str, tuple[tuple[str, str], ...]] = {
    "simple_block": (),
    "mlp": (("norm1", "mlp"),),
    "mlp_mixer": (("norm1", "mlp1"), ("norm2", "mlp2")),
    "transformer": (("norm1", "attn"), ("norm2", "mlp")),
    "pamcat_transformer": (("norm1", "attn"), ("norm2", "mlp")),
    "pamcat_attn": (("norm", "attn"),),
}
"""The norms and functions of a block, in order, by their names in its tree."""
_STACK = ("num_blocks", "norm")
_CLUSTERS = ("num_heads", "num_clusters", "cluster_activation")
# The options that each block has.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "simple_block": ("activation",),
    "mlp": (*_STACK, "mlp_ratio", "drop_path"),
    "mlp_mixer": (*_STACK, "num_mixed_tokens", "channel_mixing_ratio", "drop_path"),
    "transformer": (*_STACK, "num_heads", "mlp_ratio", "drop_path"),
    "pamcat_transformer": (*_STACK, *_CLUSTERS, "mlp_ratio", "drop_path"),
    "pamcat_attn": (*_STACK, *_CLUSTERS),
}
# What the authors' configuration calls them.
_ALIASES = {"act_layer": "activation", "norm_layer": "norm"}


@dataclass(frozen=True)
class Schema:
    """A block and its options, which `pf.gift` describes; those that the block has not stay at their defaults."""

    block_type: str = "simple_block"
    activation: str = "identity"
    num_blocks: int = 1
    norm: str = "l2"
    mlp_ratio: float = 2.0
    num_heads: int = 1
    num_clusters: int = 64
    cluster_activation: str = "sigmoid"
    num_mixed_tokens: int = 64
    channel_mixing_ratio: float = 2.0
    drop_path: float = 0.0

    @property
    def is_identity(self) -> bool:
        """Whether g(C) = C."""
        return self.block_type == "simple_block" and self.activation == "identity"

    @property
    def mixes_tokens(self) -> bool:
        """Whether its leaves have shapes that depend on the number of tokens."""
        return self.block_type == "mlp_mixer"

    @property
    def rates(self) -> list[float]:
        """The probability of dropping the functions of each block: from 0 in the first to `drop_path` in the last."""
        last = max(self.num_blocks - 1, 1)
        return [self.drop_path * i / last for i in range(self.num_blocks)]

    @property
    def options(self) -> str | dict[str, Any]:
        """The block as JSON that `schema_of` takes: its name, or a dict where an option is not the default."""
        own = {name: value for name, value in asdict(self).items() if name in _OPTIONS[self.block_type]}
        return self.block_type if self == Schema(self.block_type) else {"block_type": self.block_type, **own}

    def hidden(self, rank: int) -> int:
        """Return the channels between the two linear maps over channels."""
        return int(rank * (self.channel_mixing_ratio if self.mixes_tokens else self.mlp_ratio))

    def check_rank(self, rank: int) -> None:
        """Check what the options and the rank must have in common.

        Raises:
            OptionError: `num_heads` does not divide the rank, or a layer would have no channel.
        """
        if rank % self.num_heads:
            raise OptionError(f"gift: num_heads={self.num_heads} must divide rank={rank}, the channels of the tokens")
        if self.hidden(rank) < 1:
            name = "channel_mixing_ratio" if self.mixes_tokens else "mlp_ratio"
            raise OptionError(f"gift: {name}={getattr(self, name)!r} leaves no channel of rank={rank}")


def schema_of(block: str | Mapping[str, Any], options: Mapping[str, Any]) -> Schema:
    """Return the schema of a block's name, or of a dict with its `block_type`, and of further options.

    Raises:
        OptionError: the block is unknown, an option is not one of its own, or is out of range.

    Example:
        >>> schema_of({"block_type": "mlp", "mlp_ratio": 4}, {"norm": "ln"}).options["mlp_ratio"]
        4
    """
    given: dict[str, Any] = {}
    kind: Any = block
    if isinstance(block, Mapping):
        given = {_ALIASES.get(name, name): value for name, value in block.items()}
        kind = given.pop("block_type", "simple_block")
    check_choice("gift", "block", kind, tuple(LAYERS))
    for name in given.keys() & options.keys():
        raise OptionError(f"gift: {name} is given twice, as {given[name]!r} in block and as {options[name]!r}")
    given |= options
    known = _OPTIONS[kind]
    for name in given:
        if name not in known:
            raise OptionError(f"gift: {name!r} is no option of the block {kind!r}, which has {', '.join(known)}")
    schema = Schema(kind, **given)
    for name in known:
        _check_option(name, getattr(schema, name))
    return schema


def _check_option(name: str, value: Any) -> None:
    match name:
        case "activation" | "cluster_activation":
            check_choice("gift", name, value, tuple(ACTIVATIONS))
        case "norm":
            check_choice("gift", name, value, NORMS)
        case "drop_path":
            check_probability("gift", name, value)
        case "mlp_ratio" | "channel_mixing_ratio":
            if not 0.0 < check_number("gift", name, value) <= _LARGEST:
                raise OptionError(f"gift: {name}={value!r} is a ratio above 0, up to {_LARGEST}")
        case _:
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST:
                raise OptionError(f"gift: {name}={value!r} is a number from 1 to {_LARGEST}")

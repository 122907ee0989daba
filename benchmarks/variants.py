"""The ways to take one training step, all from the same starting values, and which of them must agree.

Every variant is a loss as a function of named leaves. Leaves have the same names in each library: the path of the
adapted module (GIFT: the name of the group of modules that share) and the field's letter.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import peft_func as pf
from benchmarks import peers, values
from benchmarks.models import Case, group
from benchmarks.peers import Made

FLOOR = "floor"
LORA, LORA_COMPILED, LORA_REMAT = "peft_func LoRA", "peft_func LoRA, compiled", "peft_func LoRA, remat"
PEFT_LORA, PEFT_COMPILED, PEFT_REMAT = "PEFT LoRA", "PEFT LoRA, compiled", "PEFT LoRA, checkpointing"
LORALIB, TORCHTUNE, FACTORED = "loralib", "torchtune", "factored by hand"
GIFT, DENSE_GIFT = "peft_func GIFT", "GIFT dense delta"
DORA, PEFT_DORA = "peft_func DoRA", "PEFT DoRA"

PEERS = {
    LORA: (PEFT_LORA, LORALIB, TORCHTUNE, FACTORED),
    FACTORED: (PEFT_LORA,),
    LORA_REMAT: (PEFT_REMAT,),
    LORA_COMPILED: (PEFT_COMPILED,),
    GIFT: (DENSE_GIFT, LORA, PEFT_LORA),
    DORA: (PEFT_DORA,),
}
"""What each variant is compared with, besides the floor; the first is the one that a picture shows."""

EQUAL = (
    (PEFT_LORA, PEFT_REMAT, PEFT_COMPILED, LORA, LORA_REMAT, LORA_COMPILED, LORALIB, TORCHTUNE, FACTORED),
    (DENSE_GIFT, GIFT),
    (PEFT_DORA, DORA),
)
"""Variants that compute the same function of the same leaves."""


@dataclass(frozen=True)
class Variant:
    """One way to take a step.

    Attributes:
        name: as in the table.
        leaves: what gets a gradient.
        loss: forward; returns the loss, a scalar.
    """

    name: str
    leaves: Mapping[str, Tensor]
    loss: Callable[[], Tensor]

    def step(self) -> tuple[Tensor, ...]:
        """Take a training step, up to the optimizer: `(loss, one gradient for each leaf)`."""
        loss = self.loss()
        return (loss.detach(), *torch.autograd.grad(loss, list(self.leaves.values())))


class DifferentComputationError(AssertionError):
    """Two variants that should compute the same do not: their times say nothing about each other."""


def check_equal(ours: Variant, theirs: Variant, tolerance: tuple[float, float] = (1e-5, 1e-4)) -> None:
    """Compare the leaves, the loss and every gradient of two variants.

    Args:
        ours: a variant.
        theirs: another, of the same function.
        tolerance: the largest difference allowed of the loss, and of gradients, relative to the largest entry of the
            tensor; float32 sums of some thousand terms, in another order and through several layers, differ by some
            1e-6.

    Raises:
        DifferentComputationError: names what differs first, and by how much.
    """
    pair = f"{ours.name} and {theirs.name}"
    if ours.leaves.keys() != theirs.leaves.keys():
        odd = sorted(ours.leaves.keys() ^ theirs.leaves.keys())
        raise DifferentComputationError(f"{pair} train different tensors: {', '.join(odd[:4])}")
    for name, leaf in ours.leaves.items():
        if not torch.equal(leaf, theirs.leaves[name]):
            raise DifferentComputationError(f"{pair} start from different values of {name}")
    found = dict(zip(["loss", *ours.leaves], ours.step(), strict=True))
    wanted = dict(zip(["loss", *theirs.leaves], theirs.step(), strict=True))
    for name, value in found.items():
        error = ((value - wanted[name]).abs().max() / wanted[name].abs().max().clamp_min(1e-20)).item()
        if not error <= tolerance[name != "loss"]:
            what = "loss" if name == "loss" else f"gradient of {name}"
            raise DifferentComputationError(f"{pair} compute different things: the {what} differs by {error:.1e}")


def verify(variants: Mapping[str, Variant]) -> None:
    """Check the variants of every line of `EQUAL` against the first of it that is there.

    Raises:
        DifferentComputationError: see `check_equal`.
    """
    for names in EQUAL:
        first, *others = [variants[name] for name in names if name in variants] or [None]
        for other in others:
            low = next(iter(other.leaves.values())).dtype == torch.bfloat16
            # bfloat16 keeps 8 bits, and libraries round at different places: this only tells wrong from right.
            check_equal(other, first, (0.02, 0.2) if low else (1e-5, 1e-4))


def build(case: Case, rank: int, names: Iterable[str] = ()) -> dict[str, Variant]:
    """Build variants for a model; they share its weights.

    Args:
        case: the model.
        rank: of every method; LoRA's and DoRA's alpha is twice the rank.
        names: of the variants; empty for all whose library is installed, without the compiled ones.
    """
    chosen = tuple(names) or tuple(name for name in available() if name not in (LORA_COMPILED, PEFT_COMPILED))
    return {name: Variant(name, *make(case, rank)) for name, make in VARIANTS.items() if name in chosen}


def available() -> tuple[str, ...]:
    """Return the names of all variants whose library is installed."""
    missing = peers.missing()
    return tuple(name for name in VARIANTS if name not in missing)


def _ours(
    case: Case,
    method: pf.Part,
    start: Mapping[str, Tensor],
    suffix: str = "",
    *,
    compiled: bool = False,
    remat: bool = False,
) -> Made:
    model = pf.functionalize(case.net)
    if remat:
        model = pf.remat(model, case.blocks)
    adapter = pf.bind(method, model)
    frozen, trainable = adapter.init(0)
    # A tree is plain dicts: put the common values where init drew its own.
    names = {place: place.removesuffix(suffix) for place in trainable[method.name]}
    leaves = values.leaves(start, [f"{names[place]}.{letter}" for place, leaf in trainable[method.name].items()
                                   for letter in leaf])  # fmt: skip
    trainable = {
        method.name: {
            place: {letter: leaves[f"{names[place]}.{letter}"] for letter in leaf}
            for place, leaf in trainable[method.name].items()
        }
    }

    def loss(trainable: pf.Tree) -> Tensor:
        return peers.loss_of(partial(model, adapter.apply(frozen, trainable)), case)

    call = torch.compile(loss) if compiled else loss
    return leaves, lambda: call(trainable)


def _lora(case: Case, rank: int, *, compiled: bool = False, remat: bool = False) -> Made:
    method = pf.lora(case.pattern, rank=rank, alpha=2 * rank)
    return _ours(case, method, values.low_rank(case, rank), ".weight", compiled=compiled, remat=remat)


def _dora(case: Case, rank: int) -> Made:
    return _ours(case, pf.dora(case.pattern, rank=rank, alpha=2 * rank), values.dora(case, rank), ".weight")


def _gift(case: Case, rank: int) -> Made:
    groups = dict.fromkeys(group(path) for path in case.places)
    share = {name: rf".*\.\d+\.{re.escape(name)}" for name in groups}
    return _ours(case, pf.gift(case.pattern, rank=rank, share=share), values.gift(case, rank))


VARIANTS: dict[str, Callable[[Case, int], Made]] = {
    FLOOR: peers.floor,
    PEFT_LORA: peers.with_peft,
    LORA: _lora,
    LORALIB: peers.with_loralib,
    TORCHTUNE: peers.with_torchtune,
    FACTORED: peers.factored,
    PEFT_REMAT: partial(peers.with_peft, checkpointed=True),
    LORA_REMAT: partial(_lora, remat=True),
    PEFT_COMPILED: partial(peers.with_peft, compiled=True),
    LORA_COMPILED: partial(_lora, compiled=True),
    DENSE_GIFT: peers.dense_gift,
    GIFT: _gift,
    PEFT_DORA: partial(peers.with_peft, dora=True),
    DORA: _dora,
}
"""How to build each: `(case, rank) -> (leaves, loss)`."""

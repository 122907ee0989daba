"""The ways to take one training step, all from the same starting values, and which of them must agree.

Every variant is a loss as a function of named leaves. Leaves have the same names in each library: the path of the
adapted module (GIFT: the name of the group of modules that share) and the field's letter.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peft_func as pf
from benchmarks.models import Case, group

FLOOR = "floor"
PEFT_LORA = "PEFT LoRA"
LORA = "peft_func LoRA"
GIFT = "peft_func GIFT"
DENSE_GIFT = "GIFT dense delta"
PEFT_DORA = "PEFT DoRA"
DORA = "peft_func DoRA"

PEERS = {LORA: (PEFT_LORA,), GIFT: (DENSE_GIFT, PEFT_LORA), DORA: (PEFT_DORA,)}
"""What each variant is compared with, besides the floor."""

EQUAL = ((LORA, PEFT_LORA), (GIFT, DENSE_GIFT), (DORA, PEFT_DORA))
"""Pairs that compute the same function of the same leaves."""


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


def check_equal(ours: Variant, theirs: Variant, tolerance: float = 1e-4) -> None:
    """Compare the leaves, the loss and every gradient of two variants.

    Args:
        ours: a variant.
        theirs: another, of the same function.
        tolerance: the largest difference allowed, relative to the largest entry of the tensor; float32 sums of some
            thousand terms, in another order and through several layers, differ by some 1e-6.

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
        if not error <= (1e-5 if name == "loss" else tolerance):
            what = "loss" if name == "loss" else f"gradient of {name}"
            raise DifferentComputationError(f"{pair} compute different things: the {what} differs by {error:.1e}")


def verify(variants: Mapping[str, Variant]) -> None:
    """Check every pair of `EQUAL` of which both are there.

    Raises:
        DifferentComputationError: see `check_equal`.
    """
    for ours, theirs in EQUAL:
        if ours in variants and theirs in variants:
            check_equal(variants[ours], variants[theirs])


def build(case: Case, rank: int, only: tuple[str, ...] = ()) -> dict[str, Variant]:
    """Build the variants for a model; they share its weights.

    Args:
        case: the model.
        rank: of every method; LoRA's and DoRA's alpha is twice the rank.
        only: names of variants; empty for all.
    """
    return {name: Variant(name, *make(case, rank)) for name, make in VARIANTS.items() if not only or name in only}


def low_rank_values(case: Case, rank: int) -> dict[str, Tensor]:
    """Draw A and B for every place: those of an adapter that has trained a little, so B is not zero."""
    draw = torch.Generator().manual_seed(1)
    values = {}
    for path, module in case.places.items():
        rows, columns = module.weight.shape
        values[f"{path}.A"] = torch.empty(rank, columns).uniform_(-1, 1, generator=draw) / sqrt(columns)
        values[f"{path}.B"] = torch.randn(rows, rank, generator=draw) * 0.02
    return values


def dora_values(case: Case, rank: int) -> dict[str, Tensor]:
    """Draw A and B, and magnitudes near the norms of the rows."""
    draw = torch.Generator().manual_seed(2)
    values = low_rank_values(case, rank)
    for path, module in case.places.items():
        norms = torch.linalg.vector_norm(module.weight, dim=1)
        values[f"{path}.magnitude"] = norms * (1 + 0.1 * torch.randn(norms.shape, generator=draw))
    return values


def gift_values(case: Case, rank: int) -> dict[str, Tensor]:
    """Draw phi and psi for every group of places."""
    draw = torch.Generator().manual_seed(3)
    values = {}
    for name, columns in {group(path): module.in_features for path, module in case.places.items()}.items():
        values[f"{name}.phi"] = torch.empty(columns, rank).uniform_(-1, 1, generator=draw) / sqrt(columns)
        values[f"{name}.psi"] = torch.randn(rank, columns, generator=draw) * 0.02
    return values


def _loss_of(call: Callable[..., Any], case: Case) -> Tensor:
    return call(input_ids=case.inputs, labels=case.labels).loss


def _floor(case: Case, rank: int) -> tuple[Mapping[str, Tensor], Callable[[], Tensor]]:
    net = case.net
    embedded = net.get_input_embeddings()(case.inputs).requires_grad_()
    return {"inputs": embedded}, lambda: net(inputs_embeds=embedded, labels=case.labels).loss


def peft_model(net: nn.Module, config: peft.LoraConfig) -> nn.Module:
    """Wrap a module as PEFT does, in train mode; it draws from the global generator, which is put back."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT reads an attribute that newer versions of transformers have renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return peft.get_peft_model(net, config).train()


def _peft(case: Case, rank: int, *, dora: bool) -> tuple[Mapping[str, Tensor], Callable[[], Tensor]]:
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=case.pattern, use_dora=dora, bias="none"
    )
    net = peft_model(case.twin(), config)
    letters = {"lora_A.default.weight": "A", "lora_B.default.weight": "B"}
    letters["lora_magnitude_vector.default.weight"] = "magnitude"
    leaves = {}
    for name, leaf in net.named_parameters():
        if leaf.requires_grad:
            path, tail = re.fullmatch(r"base_model\.model\.(.*)\.(lora_.*)", name).groups()
            leaves[f"{path}.{letters[tail]}"] = leaf
    values = dora_values(case, rank) if dora else low_rank_values(case, rank)
    for name, value in values.items():
        leaves[name].data.copy_(value)
    return leaves, lambda: _loss_of(net, case)


def _ours(
    case: Case, method: pf.Part, values: Mapping[str, Tensor], suffix: str = ""
) -> tuple[Mapping[str, Tensor], Callable[[], Tensor]]:
    model = pf.functionalize(case.net)
    adapter = pf.bind(method, model)
    frozen, trainable = adapter.init(0)
    # A tree is plain dicts: put the common values where init drew its own.
    trainable = {
        method.name: {
            place: {letter: _leaf(values[f"{place.removesuffix(suffix)}.{letter}"]) for letter in leaf}
            for place, leaf in trainable[method.name].items()
        }
    }
    leaves = {
        f"{place.removesuffix(suffix)}.{letter}": tensor
        for place, leaf in trainable[method.name].items()
        for letter, tensor in leaf.items()
    }

    def loss() -> Tensor:
        weights = adapter.apply(frozen, trainable)
        return model(weights, input_ids=case.inputs, labels=case.labels).loss

    return leaves, loss


def _leaf(value: Tensor) -> Tensor:
    return value.clone().requires_grad_()


def _gift(case: Case, rank: int) -> tuple[Mapping[str, Tensor], Callable[[], Tensor]]:
    groups = dict.fromkeys(group(path) for path in case.places)
    share = {name: rf".*\.\d+\.{re.escape(name)}" for name in groups}
    return _ours(case, pf.gift(case.pattern, rank=rank, share=share), gift_values(case, rank))


class DenseDelta(nn.Module):
    """A linear layer with GIFT's update as it was first published: dW = (W phi) psi is formed, and multiplied too."""

    def __init__(self, linear: nn.Linear, phi: Tensor, psi: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.phi, self.psi = phi, psi

    def forward(self, x: Tensor) -> Tensor:
        """Return `x W^T + b + x dW^T`."""
        delta = (self.weight @ self.phi) @ self.psi
        return F.linear(x, self.weight, self.bias) + F.linear(x, delta)


def _dense_gift(case: Case, rank: int) -> tuple[Mapping[str, Tensor], Callable[[], Tensor]]:
    leaves = {name: _leaf(value) for name, value in gift_values(case, rank).items()}
    net = case.twin()
    for path, linear in case.places.items():
        name = group(path)
        net.set_submodule(path, DenseDelta(linear, leaves[f"{name}.phi"], leaves[f"{name}.psi"]))
    return leaves, lambda: _loss_of(net, case)


VARIANTS: dict[str, Callable[[Case, int], tuple[Mapping[str, Tensor], Callable[[], Tensor]]]] = {
    FLOOR: _floor,
    PEFT_LORA: lambda case, rank: _peft(case, rank, dora=False),
    LORA: lambda case, rank: _ours(
        case, pf.lora(case.pattern, rank=rank, alpha=2 * rank), low_rank_values(case, rank), ".weight"
    ),
    GIFT: _gift,
    DENSE_GIFT: _dense_gift,
    PEFT_DORA: lambda case, rank: _peft(case, rank, dora=True),
    DORA: lambda case, rank: _ours(
        case, pf.dora(case.pattern, rank=rank, alpha=2 * rank), dora_values(case, rank), ".weight"
    ),
}
"""How to build each: `(case, rank) -> (leaves, loss)`."""

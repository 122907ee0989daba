"""Merging in memory: the weights of a served model, from a base and one LoRA, without a change to the base."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn

import peft_func as pf
from benchmarks.peers import peft_model

FLOOR = "one read and one write"
FLOOR_NEW = "one read and one write, new tensors"
INTO = "peft_func merge, into buffers"
MERGE = "peft_func merge"
PEFT = "PEFT get_delta_weight + clone of the base"

TITLE = "linear layers of 1024 x 1024 and 1024 x 2816, rank 16"
BASE = FLOOR
"""What costs are counted above."""

PEERS = {INTO: (PEFT,), MERGE: (FLOOR_NEW, PEFT)}
"""What each is compared with, besides the floor; tensors that are new cost the system their pages."""


def build(
    layers: int = 24, rank: int = 16, dtype: torch.dtype = torch.float32, device: str = "cpu", width: int = 1024
) -> dict[str, Callable[[], Any]]:
    """Return the calls; none records a graph, and none writes to the base.

    PEFT merges in place, so its out-of-place form is what its `merge` does in "safe" mode: the change of each layer,
    added to a clone of the base weight.

    Args:
        layers: in turn `[width, width]`, `[2.75 width, width]` and `[width, 2.75 width]`.
        rank: of LoRA, on every weight.
        dtype: of the weights; factors are float32, as PEFT makes them for training.
        device: where all of it lies.
        width: see `layers`.

    Raises:
        AssertionError: they compute different weights.
    """
    wide = width * 11 // 4
    shapes = [(width, width), (width, wide), (wide, width)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        linears = (nn.Linear(*shapes[i % 3], bias=False) for i in range(layers))
        net = nn.Sequential(*linears).to(device, dtype).requires_grad_(False)
        twin = copy.deepcopy(net)
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=r"\d+")
        theirs = [layer for layer in peft_model(twin, config).modules() if isinstance(layer, peft.tuners.lora.Linear)]
        for layer in theirs:
            nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
    model = pf.functionalize(net)
    adapter = pf.bind(pf.lora(r"\d+", rank=rank, alpha=2 * rank), model)
    frozen, trainable = adapter.init(0)
    (name,) = trainable
    trainable = {
        name: {
            path: {"A": layer.lora_A["default"].weight.detach(), "B": layer.lora_B["default"].weight.detach()}
            for path, layer in zip(trainable[name], theirs, strict=True)
        }
    }
    weights = adapter.apply(frozen, trainable)
    base = list(net.parameters())
    buffers = [torch.empty_like(weight) for weight in base]
    served = {path: torch.empty_like(weight) for path, weight in net.named_parameters()}

    def floor() -> None:
        for weight, buffer in zip(base, buffers, strict=True):
            torch.add(weight, 1.0, out=buffer)

    @torch.no_grad()
    def cloned() -> list[Tensor]:
        return [layer.base_layer.weight.clone().add_(layer.get_delta_weight("default")) for layer in theirs]

    calls: dict[str, Callable[[], Any]] = {
        FLOOR: floor,
        FLOOR_NEW: lambda: [weight + 1.0 for weight in base],
        INTO: lambda: pf.merge(weights, into=served),
        MERGE: lambda: pf.merge(weights),
        PEFT: cloned,
    }
    for ours in (INTO, MERGE):
        # PEFT rounds the change before it adds it, and then the sum: two roundings of the dtype.
        close = {"atol": 1e-6, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 1e-3, "rtol": 2e-2}
        for value, expected in zip(calls[ours]().values(), cloned(), strict=True):
            torch.testing.assert_close(value, expected, **close, msg=lambda text, ours=ours: f"{ours} differs: {text}")
    return calls

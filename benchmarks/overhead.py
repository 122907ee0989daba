"""What a call costs besides arithmetic: 150 linear layers so small that only the Python around them counts."""

from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn

import peft_func as pf
from benchmarks.peers import peft_model

PLAIN = "plain call"
FUNCTIONAL = "functional_call"
GIVEN = "peft_func, call"
APPLY = "peft_func LoRA, apply"
APPLY_CALL = "peft_func LoRA, apply + call"
PEFT = "PEFT LoRA, call"

TITLE = "300 tensors of 8 x 8, rank 4"
BASE = PLAIN
"""What costs are counted above."""

PEERS = {GIVEN: (FUNCTIONAL,), APPLY_CALL: (PEFT, FUNCTIONAL)}
"""What each is compared with, besides the plain call."""


def build(layers: int = 150, rank: int = 4, device: str = "cpu") -> dict[str, Callable[[], Any]]:
    """Return the calls, forward only; adapters require gradients, so their graphs are built.

    Args:
        layers: each has a weight of 8 x 8 and a bias.
        rank: of LoRA, on every weight.
        device: where all of it lies.

    Raises:
        AssertionError: they compute different things.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers))).to(device).requires_grad_(False)
        x = torch.randn(4, 8).to(device)
        theirs = _peft_net(layers, net, rank).to(device)
    model = pf.functionalize(net)
    adapter = pf.bind(pf.lora(r"\d+", rank=rank), model)
    frozen, trainable = adapter.init(0)
    trainable = pf.map_leaves(lambda leaf: leaf.requires_grad_(), trainable)
    calls: dict[str, Callable[[], Any]] = {
        PLAIN: lambda: net(x),
        FUNCTIONAL: lambda: torch.func.functional_call(net, model.params, x),
        GIVEN: lambda: model(model.params, x),
        APPLY: lambda: adapter.apply(frozen, trainable),
        APPLY_CALL: lambda: model(adapter.apply(frozen, trainable), x),
        PEFT: lambda: theirs(x),
    }
    expected: Tensor = calls[PLAIN]()
    for name, call in calls.items():
        if name != APPLY:
            torch.testing.assert_close(call(), expected, msg=lambda text, name=name: f"{name} differs: {text}")
    return calls


def _peft_net(layers: int, net: nn.Module, rank: int) -> nn.Module:
    twin = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
    twin.load_state_dict(net.state_dict())
    config = peft.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=r"\d+")
    return peft_model(twin, config)

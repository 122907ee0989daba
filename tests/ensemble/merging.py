"""A module with every kind of weight, and sums of low-rank changes written without the library."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peft_func as pf
from tests.transforms.plain import random_like


class Every(nn.Module):
    """Every kind of matrix; it is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.up = nn.ConvTranspose2d(4, 3, 2)
        self.embed = nn.Embedding(7, 4)
        self.gpt = Conv1D(5, 6)
        self.experts = nn.Parameter(torch.randn(3, 5, 4))
        self.norm = nn.LayerNorm(4)


def every() -> tuple[nn.Module, pf.FunctionalModel]:
    net = Every().double()
    return net, pf.functionalize(net)


def trees_of(adapter: pf.Adapter, count: int) -> list[dict]:
    return [random_like(adapter.init(0)[1], seed) for seed in range(count)]


def deltas(adapter: pf.Adapter, tree: dict) -> dict[str, Tensor]:
    return pf.delta(adapter.apply(adapter.init(0)[0], tree))


def weighted(adapter: pf.Adapter, trees: list[dict], weights: list[float]) -> dict[str, Tensor]:
    """The exact sum, through `pf.delta` of each tree."""
    each = [deltas(adapter, tree) for tree in trees]
    return {path: sum(w * d[path] for w, d in zip(weights, each, strict=True)) for path in each[0]}

"""What adding an adapter to a bank costs, and gathering a batch, with few and with many adapters there."""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

import peft_func as pf
from benchmarks import models
from benchmarks.measure import timed

ADD = "add one adapter"
GATHER = "gather a batch"


def measure(
    model: str = "bert",
    *,
    rank: int = 8,
    sizes: Sequence[int] = (10, 1000),
    rounds: int = 101,
    samples: int = 32,
    distinct: int = 8,
) -> dict[str, dict[int, float]]:
    """Measure banks of several sizes in turn, so that a load from outside falls on all of them alike.

    Args:
        model: a name of `models.MODELS`; LoRA adapts the linear layers of its blocks.
        rank: of LoRA.
        sizes: how many adapters are in a bank.
        rounds: how many times each is timed, after one that does not count.
        samples: in a batch to gather.
        distinct: adapters in such a batch.

    Returns:
        The median seconds, by what is done and by size.
    """
    case = models.build(model)
    adapter = pf.bind(pf.lora(case.pattern, rank=rank), pf.functionalize(case.net))
    tree = adapter.init(0)[1]
    banks = {size: _filled(adapter, size) for size in sizes}
    draw = torch.Generator().manual_seed(0)
    seconds: dict[str, dict[int, list[float]]] = {what: {size: [] for size in sizes} for what in (ADD, GATHER)}
    for number in range(-1, rounds):
        for size in sizes[number % len(sizes) :] + sizes[: number % len(sizes)]:
            bank = banks[size]
            names = _batch(bank, samples, distinct, draw)
            calls: dict[str, Callable[[], Any]] = {
                ADD: lambda bank=bank: bank.add("one more", tree),  # type: ignore[misc]
                GATHER: lambda bank=bank, names=names: bank.gather(names),  # type: ignore[misc]
            }
            for what, call in calls.items():
                elapsed = timed(call)
                if number >= 0:
                    seconds[what][size].append(elapsed)
            bank.remove("one more")
    return {what: {size: median(some) for size, some in by_size.items()} for what, by_size in seconds.items()}


def _filled(adapter: pf.Adapter, size: int) -> pf.AdapterBank:
    bank = pf.AdapterBank(adapter)
    for key in range(size):
        bank.add(str(key), adapter.init(key)[1])
    return bank


def _batch(bank: pf.AdapterBank, samples: int, distinct: int, draw: torch.Generator) -> list[str | None]:
    chosen = torch.randperm(len(bank), generator=draw)[:distinct].tolist()
    return [str(chosen[place]) for place in torch.randint(len(chosen), (samples,), generator=draw).tolist()]

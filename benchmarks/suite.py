"""What a run measures: groups of rows, each for one model and one rank, and how a group becomes a record."""

import gc
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

import peft_func as pf
from benchmarks import devices, measure, memory, merging, models, overhead, report
from benchmarks import variants as v

KINDS = {
    "LoRA": (v.FLOOR, v.PEFT_LORA, v.LORA, v.LORALIB, v.TORCHTUNE, v.FACTORED),
    "remat": (v.FLOOR, v.PEFT_REMAT, v.LORA_REMAT),
    "GIFT and DoRA": (v.FLOOR, v.PEFT_LORA, v.LORA, v.DENSE_GIFT, v.GIFT, v.PEFT_DORA, v.DORA),
    "compiled": (v.FLOOR, v.PEFT_COMPILED, v.LORA_COMPILED),
    "LoRA and compiled": (v.FLOOR, v.PEFT_LORA, v.LORA, v.FACTORED, v.PEFT_COMPILED, v.LORA_COMPILED),
}
"""Which variants of a training step are measured in turn."""

CALLS = {"overhead": overhead, "merging": merging}
"""Measurements that are no training step: modules with `build`, `PEERS`, `BASE` and `TITLE`."""

CHOICES = (*models.MODELS, *CALLS)


@dataclass(frozen=True)
class Group:
    """Rows that are measured in turn.

    Attributes:
        model: a name of `models.MODELS`, or of `CALLS`.
        rank: of every method.
        kind: a name of `KINDS`; for `CALLS`, the same as the model.
        names: of the rows; empty for all.
    """

    model: str
    rank: int
    kind: str
    names: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The heading of the group."""
        if self.model in CALLS:
            return CALLS[self.model].TITLE
        title = f"{models.TITLES[self.model]}, rank {self.rank}"
        return title if self.kind in ("LoRA", "GIFT and DoRA", "LoRA and compiled") else f"{title}, {self.kind}"


def groups(
    device: torch.device,
    chosen: Sequence[str] = (),
    ranks: Sequence[int] = (),
    only: Sequence[str] = (),
    *,
    compiled: bool = False,
) -> list[Group]:
    """Return what to measure.

    Args:
        device: on CUDA the models and rows are others: those that need one.
        chosen: names of `CHOICES`; empty for the device's own.
        ranks: of the adapters; empty for 8 and 64, for 16 where GIFT and DoRA are, and for 16 and 64 on CUDA.
        only: names of variants; empty for all. A group with no other row than the floor is left out.
        compiled: measure `torch.compile` of the LoRA step, too; on CUDA it always is.
    """
    there = v.available()
    cuda = device.type == "cuda"
    found = []
    for model in chosen or (("llama-1b", "llama-8b") if cuda else ("bert", "llama", *CALLS)):
        if model in CALLS:
            rank = inspect.signature(CALLS[model].build).parameters["rank"].default
            found.append(Group(model, rank, model))
            continue
        if cuda:
            some = [("LoRA and compiled", rank) for rank in ranks or (16, 64)]
        else:
            some = [("LoRA", rank) for rank in ranks or (8, 64)]
            some += [("remat", rank) for rank in ranks or (8,)]
            some += [("GIFT and DoRA", rank) for rank in ranks or (16,)]
            some += [("compiled", rank) for rank in ranks or (8, 64) if compiled]
        for kind, rank in some:
            names = tuple(name for name in KINDS[kind] if name in there and (not only or name in only))
            if set(names) - {v.FLOOR} or set(only) == {v.FLOOR}:
                found.append(Group(model, rank, kind, names))
    return found


def run(group: Group, rounds: int, device: torch.device, threads: int, *, with_memory: bool = True) -> report.Run:
    """Check that the variants of a group agree, and measure them.

    Args:
        group: what to measure.
        rounds: how often each row is timed; the short calls of "overhead" twenty times as often.
        device: where.
        threads: of torch, for the record and for the processes that measure memory.
        with_memory: measure peak memory, too.

    Raises:
        DifferentComputationError: two variants that should agree do not.
    """
    record = {
        "model": group.model, "rank": group.rank, "kind": group.kind, "title": group.title,
        "machine": report.machine(threads, devices.title(device)),
    }  # fmt: skip
    if group.model in CALLS:
        module = CALLS[group.model]
        rounds *= 20 if module is overhead else 1
        calls = module.build(device=str(device))
        seconds = measure.interleave(calls, rounds, title=group.title, warmup=3, wait=lambda: devices.wait(device))
        return record | _found(seconds, module.PEERS, module.BASE) | {"weights": models.RANDOM, "peak_bytes": {}}
    torch.compiler.reset()
    gc.collect()  # the models of the group before hold each other: two of 16 GB need not be there at once
    case = models.build(group.model, device)
    built = v.build(case, group.rank, group.names)
    v.verify(built)
    calls = {name: variant.step for name, variant in built.items()}
    seconds = measure.interleave(calls, rounds, title=group.title, wait=lambda: devices.wait(device))
    peak: dict[str, int] = {}
    if with_memory and device.type == "cuda":
        peak = {name: pf.peak_memory(call, device=device).peak for name, call in calls.items()}
    elif with_memory:
        peak = memory.peaks(group.model, calls, group.rank, threads)
    return record | _found(seconds, v.PEERS, v.FLOOR) | {"weights": case.weights, "peak_bytes": peak}


def _found(seconds: Mapping[str, list[float]], peers: Mapping[str, Sequence[str]], base: str) -> report.Run:
    """Return times and what each row is compared with: its peers that are there, or the base."""
    against = {}
    for name in seconds:
        there = [peer for peer in peers.get(name, ()) if peer in seconds]
        against[name] = there or [other for other in (base,) if other in seconds and other != name]
    return {"base": base, "against": against, "seconds": report.rounded(seconds)}

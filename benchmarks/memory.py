"""The peak memory of a step: what torch allocates above what is there when the step starts (weights excluded)."""

import json
import multiprocessing
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

from benchmarks import models, variants


def peak_of(call: Callable[[], Any]) -> int:
    """Return the most bytes that a call holds at once, counted from torch's own allocations on the CPU.

    The resident set of a process would say something else: it includes the interpreter, the freed pages that the
    allocator keeps, and in a child process at first the size of its parent.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
        del result
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    live = peak = 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


def peak_of_step(model: str, variant: str, rank: int, threads: int) -> int:
    """Return the peak bytes of the second step of one variant; the first one sets up what stays."""
    torch.set_num_threads(threads)
    (built,) = variants.build(models.build(model), rank, (variant,)).values()
    built.step()
    return peak_of(built.step)


def peaks(model: str, names: Iterable[str], rank: int, threads: int) -> dict[str, int]:
    """Return the peak bytes of a step of each variant, every one in a process of its own."""
    context = multiprocessing.get_context("spawn")
    found = {}
    for name in tqdm(list(names), desc=f"{model}, rank {rank}: memory", disable=None, leave=False):
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            found[name] = pool.submit(peak_of_step, model, name, rank, threads).result()
    return found

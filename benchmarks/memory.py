"""The peak memory of a step: each variant in a process of its own."""

import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor

import torch
from tqdm.auto import tqdm

import peft_func as pf
from benchmarks import models, variants


def peak_of_step(model: str, variant: str, rank: int, threads: int) -> int:
    """Return the peak bytes of the second step of one variant; the first one sets up what stays."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would print a line for each start and stop
    torch.set_num_threads(threads)
    (built,) = variants.build(models.build(model), rank, (variant,)).values()
    built.step()
    return pf.peak_memory(built.step, device="cpu").peak


def peaks(model: str, names: Iterable[str], rank: int, threads: int) -> dict[str, int]:
    """Return the peak bytes of a step of each variant, every one in a process of its own."""
    # A server that has imported the libraries, and run nothing, forks each process: seconds less than a bare start.
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(["benchmarks.variants"])
    found = {}
    for name in tqdm(list(names), desc=f"{model}, rank {rank}: memory", disable=None, leave=False):
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            found[name] = pool.submit(peak_of_step, model, name, rank, threads).result()
    return found

"""The peak memory of a call: what torch allocates above what is there when the call starts."""

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._C._autograd import _profiler_enabled
from torch._C._profiler import _EventType
from torch.autograd.profiler import profile

from peft_func.errors import OptionError


class PeakMemory(NamedTuple):
    """The memory of one call, in bytes (1 MiB is `2**20`), above what was held when it started.

    Attributes:
        peak: the most that was held at once.
        kept: what was still held at its end, by its result or by what it wrote to (gradients, states of an optimizer).
        device: of whose memory.
    """

    peak: int
    kept: int
    device: torch.device


def peak_memory(call: Callable[[], Any], *, device: torch.device | str | int | None = None) -> PeakMemory:
    """Call a function once, and count what torch holds meanwhile.

    On the CPU the call runs under torch's profiler, which sees every allocation of a tensor's memory by this thread and
    by its backward, to the byte; the call is slower for it. What the call frees of what was there before is not
    subtracted. On CUDA it is, for there the caching allocator's own statistics are read, which round each tensor up to
    512 bytes; its peak statistics are reset. What NumPy, other libraries or other
    processes allocate, and kernels and libraries for themselves (cuBLAS's workspaces), is not seen, nor what an
    allocator keeps in reserve.

    A first step also allocates what stays (gradients, the states of an optimizer) and what is set up once: call the
    function once before, or read `kept` beside `peak`.

    Args:
        call: takes nothing; for example `lambda: loss(leaves).backward()`.
        device: the CPU or a CUDA device; None for the current CUDA device if the process uses CUDA, else the CPU.

    Raises:
        OptionError: another kind of device, CUDA where there is none, or a profiler is running already.

    Example:
        >>> import torch, peft_func as pf
        >>> def twice():
        ...     return torch.ones(1000) + torch.ones(1000)  # float32: three tensors of 4000 bytes, of which one is kept
        >>> pf.peak_memory(twice, device="cpu")
        PeakMemory(peak=12000, kept=4000, device=device(type='cpu'))
    """
    if device is None:
        device = "cuda" if torch.cuda.is_initialized() else "cpu"  # type: ignore[no-untyped-call]
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    gc.collect()  # garbage of before that is freed meanwhile would make the call look smaller
    if device.type == "cpu":
        return _on_cpu(call, device)
    if device.type != "cuda" or not torch.cuda.is_available():
        raise OptionError(f"peak_memory counts on the CPU and on CUDA devices that are there; {device} is neither")
    return _on_cuda(call, device)


def _on_cpu(call: Callable[[], Any], device: torch.device) -> PeakMemory:
    if _profiler_enabled():
        raise OptionError("peak_memory uses torch's profiler, and one is running already; call it outside")
    with profile(use_cpu=True, use_kineto=True, profile_memory=True) as profiler:
        result = call()
    assert profiler.kineto_results is not None  # it is there once the profiler has stopped
    changes, ahead = [], list(profiler.kineto_results.experimental_event_tree())
    while ahead:
        event = ahead.pop()
        ahead += event.children
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == device.type:
            changes.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    del result  # held until here: what it holds is kept, not freed
    held: dict[int, int] = {}
    live = peak = 0
    for _, block, size in sorted(changes, key=lambda change: change[0]):
        if size > 0:
            held[block] = size
            live += size
            peak = max(peak, live)
        else:  # a block from before the call, of which torch may remember a size that it had once, is not in the dict
            live -= held.pop(block, 0)
    return PeakMemory(peak, live, device)


def _on_cuda(call: Callable[[], Any], device: torch.device) -> PeakMemory:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    found = torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before
    del result
    return PeakMemory(*found, device)

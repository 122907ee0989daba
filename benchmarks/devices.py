"""The device that a measurement is for: found, named, waited for, and its random state put back."""

import contextlib
from collections.abc import Iterator

import torch

from benchmarks.report import cpu_name


def find(name: str) -> torch.device:
    """Return a device that is there.

    Raises:
        ValueError: torch does not see it; says what it sees.
    """
    there = ["cpu", *(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count()))]
    found = name == "cpu" or (name.partition(":")[0] == "cuda" and torch.cuda.is_available())
    if not found or (":" in name and name not in (line.partition(" ")[0] for line in there)):
        raise ValueError(f"there is no device {name!r} here: torch {torch.__version__} sees {', '.join(there)}")
    return torch.device(name)


def title(device: torch.device) -> str:
    """Return the device's own name."""
    return cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device)


def wait(device: torch.device) -> None:
    """Return once the device has done what it was given; the CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def forked(device: torch.device, seed: int = 0) -> Iterator[None]:
    """Seed the generators of the CPU and of the device, and put them back at the end."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield

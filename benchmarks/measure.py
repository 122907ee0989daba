"""Timing in turn: in every round each variant runs once, and the order rotates from round to round."""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tqdm.auto import tqdm


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    title: str = "",
    warmup: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Time functions side by side in one process.

    A load from outside then falls on all of them alike, and a ratio within a round is free of what changes between
    rounds.

    Args:
        calls: what to time, by name; the results are dropped outside the timed part.
        rounds: how many times each is timed.
        title: for the progress bar, which shows on a terminal only.
        warmup: rounds before the first that counts.
        wait: returns once the device is done; called before and after each call.

    Returns:
        Seconds, one for each round, by name.
    """
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with _tidy(), tqdm(total=(warmup + rounds) * len(names), desc=title, disable=None, leave=False) as bar:
        for i in range(-warmup, rounds):
            start = i % len(names)
            for name in names[start:] + names[:start]:
                bar.set_postfix_str(name)
                elapsed = timed(calls[name], wait)
                if i >= 0:
                    seconds[name].append(elapsed)
                bar.update()
    return seconds


def timed(call: Callable[[], Any], wait: Callable[[], None] = lambda: None) -> float:
    """Return the seconds that a call takes, without the garbage of the calls before it, until `wait` returns."""
    gc.collect()
    wait()
    start = time.perf_counter()
    result = call()
    wait()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


@contextlib.contextmanager
def _tidy() -> Iterator[None]:
    """Set the objects that are there aside: collecting before each call need not look at whole libraries again."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()

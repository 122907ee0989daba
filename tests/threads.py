"""Calls from several threads at once, which must give what they give alone."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def wrong_answers(
    call: Callable[[int], Tensor],
    expected: Sequence[Tensor],
    times: int,
    same: Callable[[Tensor, Tensor], bool] = torch.equal,
) -> list[int]:
    """Call `call(i)` so many times in a thread for each expected answer, and return the `i` of those that differ.

    What a thread raises is raised here.
    """
    together = threading.Barrier(len(expected))

    def work(i: int) -> list[int]:
        together.wait()
        return [i for _ in range(times) if not same(call(i), expected[i])]

    with ThreadPoolExecutor(len(expected)) as pool:
        return [i for found in pool.map(work, range(len(expected))) for i in found]

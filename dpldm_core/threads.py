"""How torch should use the cores, the memory and the instructions of a CPU. Cannot change the guarantee.

On a core that another process keeps busy, every short parallel region waits for the scheduler: two threads were then
ten times slower than one (measured). So the number is chosen by trying, a few times: a process that only just ends, or
the first start of the threads, must not decide for the half hour of a stage. And glibc gives large blocks back to the
kernel as soon as they are free, which clears them again for the next forward pass: a process that computes keeps them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import nn

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST_BLOCK = 2**25  # bytes; the most that glibc takes for the second
_ROUNDS, _PAUSE = 5, 0.04  # tries of each number of threads, and seconds between them

Item = TypeVar("Item")
Result = TypeVar("Result")


def settle_on_cpu() -> int:
    """Called by every stage that computes: :func:`choose_threads` and :func:`keep_freed_memory`.

    Returns:
        The number of threads.
    """
    keep_freed_memory()
    return choose_threads()


def keep_freed_memory() -> None:
    """Let the process keep what it frees, for the next tensor of that size; does nothing without glibc."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK)


def choose_threads() -> int:
    """Set torch's threads to one, or to all cores of this process, whichever runs a small network faster in the median.

    Returns:
        The number chosen.
    """
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores == 1 or torch.cuda.is_available():
        return torch.get_num_threads()
    x, w = torch.ones(1024, 256), torch.ones(256, 256)
    seconds: dict[int, list[float]] = {1: [], cores: []}
    for _ in range(_ROUNDS):
        for threads, taken in seconds.items():
            torch.set_num_threads(threads)
            start = time.perf_counter()
            for _ in range(12):
                torch.nn.functional.gelu(x @ w).sum(1)
            taken.append(time.perf_counter() - start)
        time.sleep(_PAUSE)
    best = min(seconds, key=lambda threads: statistics.median(seconds[threads]))
    torch.set_num_threads(best)
    return best


def multiply_in_bfloat16(network: nn.Module) -> None:
    """Let a network's convolutions take bfloat16 where the processor multiplies it natively: twice as fast there.

    For networks that meet no private record. The prior's Gaussians keep float32: how likely a class is, is a small
    difference of large numbers.

    Args:
        network: On a CPU without AVX-512 BF16, and on a GPU, it stays as it is; elsewhere later calls are changed.
    """
    import torch

    if not torch.cuda.is_available() and torch.cpu._is_avx512_bf16_supported():
        network.forward = torch.autocast("cpu", torch.bfloat16)(network.forward)


@contextlib.contextmanager
def multiplying_in_bfloat16(network: nn.Module) -> Iterator[None]:
    """:func:`multiply_in_bfloat16`, taken back before the network meets a private record."""
    multiply_in_bfloat16(network)
    try:
        yield
    finally:
        vars(network).pop("forward", None)


def map_on_cores(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Apply a function to each item, as many at a time as torch has threads, each of them on one.

    So a result does not depend on the number of threads. A twentieth faster than all threads on one (measured).

    Args:
        function: Of one item, in a thread of its own: torch's modes, such as ``no_grad``, must be set within.
        items: What it is applied to.

    Returns:
        The results, in the order of the items.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(threads)

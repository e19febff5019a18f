"""How many threads torch should use. Cannot change the guarantee.

On a core that another process keeps busy, every short parallel region waits for the scheduler: two threads were then
ten times slower than one (measured). So the number is chosen by trying.
"""

from __future__ import annotations

import os
import time


def choose_threads() -> int:
    """Set torch's threads to one, or to all cores of this process, whichever just ran a small network faster.

    Returns:
        The number chosen.
    """
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores == 1 or torch.cuda.is_available():
        return torch.get_num_threads()
    x, w = torch.ones(1024, 256), torch.ones(256, 256)
    seconds = {}
    for threads in (1, cores):
        torch.set_num_threads(threads)
        start = time.perf_counter()
        for _ in range(12):
            torch.nn.functional.gelu(x @ w).sum(1)
        seconds[threads] = time.perf_counter() - start
    best = min(seconds, key=lambda threads: seconds[threads])
    torch.set_num_threads(best)
    return best

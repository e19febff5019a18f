import os
import subprocess
import sys
import threading

import pytest

from dpldm_core import threads
from dpldm_core.threads import choose_threads, map_on_cores, settle_on_cpu

FAULTS = """
import resource
from dpldm_core.threads import keep_freed_memory
{call}
import numpy as np
def a_forward_pass():
    [np.ones(1_000_000) for _ in range(8)]  # held together, then freed together
a_forward_pass()  # the first time, every page is new
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    a_forward_pass()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(call):
    """In a process of its own: the setting lasts as long as a process."""
    command = [sys.executable, "-c", FAULTS.format(call=call)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_a_block_that_was_freed_is_used_again():
    assert page_faults("keep_freed_memory()") < 100 < page_faults("")


def test_the_number_of_threads_is_one_or_all():
    import torch

    before = torch.get_num_threads()
    try:
        assert settle_on_cpu() == torch.get_num_threads()
        assert choose_threads() == torch.get_num_threads()
        assert torch.get_num_threads() in (1, before, len(os.sched_getaffinity(0)))
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def two_threads():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield torch
    torch.set_num_threads(before)


@pytest.mark.parametrize(("disturbed", "expected"), [({0, 1}, 2), ({0, 1, 2}, 1)])
def test_a_passing_disturbance_does_not_choose_the_number_of_threads(monkeypatch, two_threads, disturbed, expected):
    def clock():
        now = 0.0
        for i in range(5):
            for seconds in (1.0, 10.0 if i in disturbed else 0.6):  # with one thread, with two
                yield now
                now += seconds
                yield now

    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(two_threads.cuda, "is_available", lambda: False)
    monkeypatch.setattr(threads.time, "perf_counter", clock().__next__)
    assert choose_threads() == expected == two_threads.get_num_threads()


def test_items_are_done_side_by_side_on_a_thread_each_and_come_back_in_order(two_threads):
    both = threading.Barrier(2, timeout=30)  # nobody passes alone

    def work(item):
        both.wait()
        return item, two_threads.get_num_threads()

    assert map_on_cores(work, range(4)) == [(item, 1) for item in range(4)]
    assert two_threads.get_num_threads() == 2


def test_a_failure_of_one_item_is_raised_and_the_threads_come_back(two_threads):
    with pytest.raises(ZeroDivisionError):
        map_on_cores(lambda item: 1 // item, [1, 0])
    assert two_threads.get_num_threads() == 2

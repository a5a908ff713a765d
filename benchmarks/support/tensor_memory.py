"""The most memory that tensors hold at once, as the profiler of torch counts it.

The resident memory of a process says what the system lends to it: it depends on what the process freed before, on pages
of code and on what else runs. What tensors hold is the same in every run.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import accumulate
from typing import TypeVar

from torch.profiler import ProfilerActivity, profile

Result = TypeVar("Result")


def tensor_peak(run: Callable[[], Result]) -> tuple[Result, float]:
    """Return what ``run`` returns, and the most MiB that its tensors on the CPU hold beyond those at the start."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return result, max(accumulate(size for _, size in changes), default=0) / 2**20

"""CPU seconds and peak memory: how the benchmarks measure."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

from torch.profiler import ProfilerActivity, profile

Result = TypeVar("Result")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def cpu_seconds(run: Callable[[], Any]) -> float:
    """Return the CPU time that this process spends on one call: other processes do not count."""
    began = time.process_time()
    run()
    return time.process_time() - began


def turns(contenders: Mapping[str, Callable[[], float]]) -> Iterator[dict[str, float]]:
    """Let contenders take turns without end; yield the least that each has returned, after every turn of all."""
    names, best = list(contenders), dict.fromkeys(contenders, float("inf"))
    while True:
        for name in names:
            gc.collect()  # or one contender pays for what another has left behind
            best[name] = min(best[name], contenders[name]())
        names.append(names.pop(0))  # whoever comes first finds the caches as nobody else does
        yield best


def least_seconds(
    contenders: Mapping[str, Callable[[], Any]], repeats: int = 5, at_least: float = 0.0, warm_up: bool = True
) -> dict[str, float]:
    """Return the CPU seconds of the fastest call of each; the contenders take turns.

    Args:
        contenders: what is compared, by name.
        repeats: turns.
        at_least: CPU seconds that the turns take together, with more turns where they are short.
        warm_up: call each once before.
    """
    if warm_up:
        for run in contenders.values():
            run()
    spent: list[float] = []

    def timed(run: Callable[[], Any]) -> float:
        spent.append(cpu_seconds(run))
        return spent[-1]

    gc.collect()
    gc.freeze()  # the collections between the calls need not look at what is there already
    found = turns({name: partial(timed, run) for name, run in contenders.items()})
    best = next(found)
    while len(spent) < repeats * len(contenders) or sum(spent) < at_least:
        best = next(found)
    return best


def peak(run: Callable[[], Any], warm_up: Callable[[], Any] = lambda: None) -> float:
    """Return what ``run`` adds to the resident memory at most, in MiB, in a process forked for it.

    Best before anything is timed: what this process has freed by then is used again there, and not given back.

    Args:
        run: what is measured.
        warm_up: is called there before. A smaller run brings in the pages of the libraries, about 20 MiB.

    Raises:
        RuntimeError: ``run`` failed there.
    """
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(M_MMAP_THRESHOLD, 2**16)  # what is freed goes back to the system at once; glibc keeps much
            libc.mallopt(M_TRIM_THRESHOLD, 2**16)
            warm_up()
            libc.malloc_trim(0)  # and nothing is left to be used again
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            run()
            os.write(sender, repr(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(sender)
    with os.fdopen(receiver) as pipe:
        text = pipe.read()
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("The estimate failed: run it without a fork to see why.")
    return float(text) / 1024  # Linux counts in KiB


def tensor_peak(run: Callable[[], Result]) -> tuple[Result, float]:
    """Return what ``run`` returns, and the most MiB that its tensors on the CPU hold beyond those at the start.

    The resident memory of a process says what the system lends to it: it depends on what the process freed before, on
    pages of code and on what else runs. What tensors hold, as the profiler counts it, is the same in every run.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return result, max(accumulate(size for _, size in changes), default=0) / 2**20

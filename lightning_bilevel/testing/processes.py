"""Properties of a strategy in two processes, which Lightning starts; only ``check_strategy(..., ddp=True)`` asks."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import distributed

from lightning_bilevel.host import NAMESPACE
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.testing.base import accepted, rounding, same, strategy_property
from lightning_bilevel.testing.fits import Ended, assert_fit, by_hand, fitted, moving, still

TIMEOUT = 600
"""Seconds after which processes count as hanging; they take ten, and many times that on a busy machine."""

_SCRIPT = """
import {namespace}
from lightning_bilevel.testing.processes import main
main({folder!r})
"""


@strategy_property
def trains_in_two_processes(strategy: HypergradientStrategy) -> None:
    """Under ``ddp`` the ranks agree bit for bit, and do what one process does with the mean over their episodes.

    Under ``ddp_directions``, for a strategy whose directions can be shared out, they do what one process does alone.
    """
    first, second = _ran(strategy)
    for parallel, end in first.items():
        assert same(end, second[parallel]), f"the two ranks end in other states under `{parallel}`"
        module = accepted(strategy, moving, still)
        episodes = [module.episode(seed) for seed in range(4)]
        shared = [[episode] for episode in episodes]
        steps = [episodes[:2], episodes[2:]] if parallel == "ddp" else shared
        result = by_hand(module, copy.deepcopy(strategy), steps)
        assert_fit(f"a fit under `{parallel}`", end, module, result, rounding(strategy))


def main(folder: str) -> None:
    """Fit the strategy in ``folder``, in each of two processes, and write there how that ended."""
    torch.set_num_threads(1)
    strategy = pickle.loads(Path(folder, "strategy.pkl").read_bytes())
    found: dict[str, Ended] = {}
    for parallel in ("ddp", "ddp_directions") if strategy.direction_parallel else ("ddp",):
        module = accepted(strategy, moving, still)
        episodes = [module.episode(seed) for seed in range(4)]
        # Lightning starts the other process, which comes here too, at the first fit.
        rank = int(os.environ.get("LOCAL_RANK", 0))
        own = episodes[rank::2] if parallel == "ddp" else episodes
        options: dict[str, Any] = {"strategy": parallel, "devices": 2, "use_distributed_sampler": False}
        fitted(module, copy.deepcopy(strategy), own, max_epochs=1, **options)
        found[parallel] = Ended.of(module)
    Path(folder, f"{distributed.get_rank()}.pkl").write_bytes(pickle.dumps(found))


def _ran(strategy: HypergradientStrategy) -> list[dict[str, Ended]]:
    """Run :func:`main` and return what each rank wrote."""
    try:
        pickled = pickle.dumps(strategy)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise AssertionError(
            f"other processes cannot import it ({error}); define its class at the top of a module"
        ) from error
    # What Lightning leaves in the environment would make it think that this is one of several processes already.
    lightnings = ("PL_", "MASTER_", "LOCAL_", "NODE_RANK", "WORLD_SIZE")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(lightnings)}
    with TemporaryDirectory() as folder:
        Path(folder, "strategy.pkl").write_bytes(pickled)
        Path(folder, "script.py").write_text(_SCRIPT.format(namespace=NAMESPACE, folder=folder), encoding="utf-8")
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(Path(folder, "script.py"))],
            env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its session: the process and the one that it started
            output, _ = process.communicate()
            raise AssertionError(f"the processes hang:\n{output[-3000:]}") from None
        assert process.returncode == 0, f"the processes fail:\n{output[-3000:]}"
        return [pickle.loads(Path(folder, f"{rank}.pkl").read_bytes()) for rank in (0, 1)]

"""Task sets of learn2learn as tasks of ours."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_bilevel import Episode
from lightning_bilevel.few_shot import TaskDataset


class Learn2LearnTasks(TaskDataset):
    """Splits what a task set of learn2learn samples into support and query examples.

    learn2learn draws from the global generators of `random` and NumPy. They are seeded for a task, and put back.

    Args:
        taskset: a `learn2learn.data.Taskset` whose tasks have at least one example of each class more than
            `shots`: with `KShots(dataset, k)`, K is `shots` and k − K queries of each class are left.
        shots: support examples of each class.
        **options: of :class:`TaskDataset`.
    """

    def __init__(self, taskset: Any, shots: int, **options: Any) -> None:
        super().__init__(**options)
        self.taskset, self.shots = taskset, shots

    def draw(self, generator: torch.Generator) -> Episode:
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        seed = generator.initial_seed()
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            x, y = self.taskset.sample()
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])
        y = torch.as_tensor(y)
        order = y.argsort(stable=True)
        place = torch.arange(len(y)) - torch.searchsorted(
            y[order].contiguous(), y[order].contiguous()
        )  # within its class
        support, query = order[place < self.shots], order[place >= self.shots]
        return Episode([(x[support], y[support])], (x[query], y[query]))


def load_taskset(name: str, part: str, folder: str | Path, ways: int, shots: int, queries: int) -> Any:
    """Return a named task set, `"train"`, `"validation"` or `"test"`, with `shots` + `queries` examples of each class.

    Raises:
        SystemExit: learn2learn, or what it needs for its data sets, is not installed.
    """
    try:
        from learn2learn.vision.benchmarks import get_tasksets
    except ImportError as error:
        raise SystemExit(
            f"`--data learn2learn:{name}` needs learn2learn with torchvision: {error}. CONTRIBUTING.md says how to "
            "install learn2learn on Python 3.11 and newer."
        ) from error
    size = shots + queries
    tasksets = get_tasksets(name, ways, size, ways, size, root=str(folder))
    return getattr(tasksets, part)

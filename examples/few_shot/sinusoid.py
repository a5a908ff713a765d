"""Sinusoid regression, generated."""

from __future__ import annotations

import math

import torch

from lightning_bilevel import Episode
from lightning_bilevel.few_shot import TaskDataset


class Sinusoids(TaskDataset):
    """y = a sin(x − p) with a from [0.1, 5], p from [0, π] and x from [−5, 5] (Finn et al., ICML 2017, section 5.1).

    Args:
        shots: support points.
        queries: query points.
        **options: of :class:`TaskDataset`.
    """

    def __init__(self, shots: int = 10, queries: int = 10, **options) -> None:
        super().__init__(**options)
        self.shots, self.queries = shots, queries

    def draw(self, generator: torch.Generator) -> Episode:
        amplitude, phase = torch.rand(2, generator=generator).tolist()
        x = 10 * torch.rand(self.shots + self.queries, 1, generator=generator) - 5
        y = (0.1 + 4.9 * amplitude) * torch.sin(x - math.pi * phase)
        return Episode([(x[: self.shots], y[: self.shots])], (x[self.shots :], y[self.shots :]))

"""MAML and ANIL with the learners of the examples."""

from __future__ import annotations

import torch

from few_shot.learners import FewShotClassifier, FewShotRegressor, MetaLearner
from few_shot.nets import cnn, mlp
from few_shot.sinusoid import Sinusoids
from lightning_bilevel.few_shot import FewShotTasks, TaskLoader


def sinusoids() -> tuple[MetaLearner, TaskLoader]:
    """Return MAML on sinusoids: a perceptron 1-40-40-1, 25 tasks of 10 + 10 points, 5 inner steps."""
    return FewShotRegressor(mlp(), inner_steps=5, inner_lr=0.01), TaskLoader(Sinusoids(num_tasks=2500), 25)


def images(inner: str = "all") -> tuple[MetaLearner, TaskLoader]:
    """Return MAML, or ANIL, on 28×28 images: 4 blocks of 32 channels, 4 tasks of 5 ways and 5 + 3 examples, 5 steps."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(400, 1, 28, 28, generator=generator), torch.arange(400) % 50
    tasks = FewShotTasks(x, y, ways=5, shots=5, queries=3, num_tasks=400)
    net = cnn(5, channels=32)
    return FewShotClassifier(net, inner=inner, inner_steps=5, inner_lr=0.1), TaskLoader(tasks, 4)

"""The meta-gradients of learn2learn's MAML and FOMAML, to float64 rounding; its tasks as ours."""

from __future__ import annotations

import importlib
import importlib.util
import random
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from few_shot.learn2learn_tasks import Learn2LearnTasks
from few_shot.learners import FewShotClassifier, FewShotRegressor, MetaLearner
from few_shot.nets import cnn, mlp
from few_shot.sinusoid import Sinusoids
from lightning_bilevel import Episode, FirstOrder, HypergradientStrategy, ReverseUnroll, hypergradient
from lightning_bilevel.few_shot import FewShotTasks, TaskLoader
from tests.support.problems import assert_close
from tests.support.stubs import NOT_USED, Stubs


@pytest.fixture(scope="module")
def learn2learn() -> Iterator[ModuleType]:
    if importlib.util.find_spec("learn2learn") is None:
        pytest.skip("learn2learn is not installed: `make learn2learn` shows why its installation fails")
    before, stubs = set(sys.modules), Stubs()
    sys.meta_path.append(stubs)  # at the end: what is installed is found first
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield importlib.import_module("learn2learn")
    finally:
        sys.meta_path.remove(stubs)
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("learn2learn", *NOT_USED):
                del sys.modules[name]


def regression() -> tuple[MetaLearner, list[Episode]]:
    tasks = Sinusoids(shots=5, queries=7, num_tasks=3)
    return FewShotRegressor(mlp(), inner_steps=4, inner_lr=0.02), [tasks[index] for index in range(3)]


def classification() -> tuple[MetaLearner, list[Episode]]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(48, 1, 8, 8, generator=generator), torch.arange(48) % 8
    tasks = FewShotTasks(x, y, ways=3, shots=2, queries=4, num_tasks=2)
    return FewShotClassifier(cnn(3, channels=4, blocks=2), inner_steps=3, inner_lr=0.3), [tasks[0], tasks[1]]


PROBLEMS = {"sinusoids": regression, "convolutions with BatchNorm": classification}
STRATEGIES = {"MAML": (ReverseUnroll(), False), "FOMAML": (FirstOrder(), True)}


def in_float64(episodes: list[Episode]) -> list[Episode]:
    def pair(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return tuple(each.double() if each.is_floating_point() else each for each in batch)

    return [Episode([pair(batch) for batch in episode.inner], pair(episode.outer)) for episode in episodes]


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize(("strategy", "first_order"), STRATEGIES.values(), ids=STRATEGIES)
def test_meta_gradients_are_those_of_learn2learn(
    learn2learn: ModuleType, problem: Any, strategy: HypergradientStrategy, first_order: bool
) -> None:
    torch.manual_seed(0)
    module, episodes = problem()
    module, episodes = module.double(), in_float64(episodes)
    ours = hypergradient(module, strategy, episodes)

    maml = learn2learn.algorithms.MAML(module.net, lr=module.hparams.inner_lr, first_order=first_order)
    value = torch.zeros((), dtype=torch.float64)
    for episode in episodes:
        learner = maml.clone()
        for _ in range(module.inner_steps):
            x, y = episode.inner[0]
            learner.adapt(module.loss(learner(x), y))
        x, y = episode.outer
        value = value + module.loss(learner(x), y) / len(episodes)
    value.backward()
    grads = {f"net.{name}": parameter.grad for name, parameter in module.net.named_parameters()}
    assert_close(ours.grads, grads, 1e-12)
    torch.testing.assert_close(ours.value, value.detach(), rtol=1e-14, atol=0)


def test_its_tasks(learn2learn: ModuleType) -> None:
    """A task set of learn2learn gives the same task for the same number, and leaves the generators alone."""
    data, labels = torch.arange(60.0).view(30, 2), torch.arange(30) % 6
    meta = learn2learn.data.MetaDataset(torch.utils.data.TensorDataset(data, labels))
    transforms = learn2learn.data.transforms
    taskset = learn2learn.data.Taskset(
        meta,
        task_transforms=[
            transforms.NWays(meta, 3),
            transforms.KShots(meta, 5),
            transforms.LoadData(meta),
            transforms.RemapLabels(meta),
            transforms.ConsecutiveLabels(meta),
        ],
        num_tasks=-1,
    )
    tasks = Learn2LearnTasks(taskset, shots=2, num_tasks=20, seed=3)
    states = torch.get_rng_state(), random.getstate()
    assert tasks[4].inner[0][0].shape == (6, 2)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    episodes = [episode for batch in TaskLoader(tasks, batch_size=10) for episode in batch]
    assert len({str(episode) for episode in episodes}) > 10
    for number, episode in enumerate(episodes):
        (x, y), (query_x, query_y) = episode.inner[0], episode.outer
        assert torch.equal(x, tasks[number].inner[0][0])
        assert y.tolist() == [0, 0, 1, 1, 2, 2]
        assert query_y.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert len({*map(tuple, torch.cat([x, query_x]).tolist())}) == 15
        classes = [(batch[:, 0] / 2 % 6).tolist() for batch in (x, query_x)]
        assert len(set(classes[0])) == len(set(classes[1])) == 3
        assert classes[0][::2] == classes[1][::3]

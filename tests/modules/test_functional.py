"""A module as pure functions: how many copies of it go into one vectorized call, and what is looped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bilevel import SGD, BilevelModule, Episode, EpisodeLoader, ImplicitGradient, ReverseUnroll
from lightning_bilevel.linear_solvers import Dense
from lightning_bilevel.modules import functional
from lightning_bilevel.modules.functional import FEWEST_COPIES, STACKED_ENTRIES
from tests.support.modules import Maml, differing, examples, listed, parameters, tasks, trainer
from tests.support.seeds import seeded


@pytest.mark.parametrize(
    ("net", "entries", "copies"),
    [
        (nn.Linear(1, 1), 2, STACKED_ENTRIES // 2),
        (nn.Linear(1, 1), STACKED_ENTRIES // FEWEST_COPIES, FEWEST_COPIES),
        (nn.Linear(1, 1), STACKED_ENTRIES // FEWEST_COPIES + 1, 1),
        (nn.Conv1d(1, 1, 1), 2, 1),
    ],
)
def test_copies_of_a_net(net: nn.Module, entries: int, copies: int) -> None:
    theta = {"w": torch.zeros(1).expand(entries)}
    assert functional._max_copies(net, theta) == copies


class WithoutData(BilevelModule):
    """Its inner minimum is where φ says, whatever the batch."""

    def __init__(self, **options: Any) -> None:
        super().__init__(inner_steps=3, inner_start="reset", **options)
        self.theta, self.phi = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))

    def inner_parameters(self) -> Any:
        return [self.theta]

    def inner_loss(self, batch: None) -> Tensor:
        assert batch is None
        return (self.theta - self.phi).square().sum() / 2

    def outer_loss(self, batch: Any) -> Tensor:
        return (self.theta - batch[0].mean(0)).square().sum()

    def configure_inner_optimizer(self) -> Any:
        return SGD(lr=1.0)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.outer_parameters(), lr=0.1)


class WithoutDataSolved(WithoutData):
    def solve_inner(self, batches: Any) -> Any:
        assert batches == [None]
        return {"theta": self.phi.clone()}


@pytest.mark.parametrize("kind", [WithoutData, WithoutDataSolved])
@pytest.mark.parametrize("strategy", [ReverseUnroll, lambda: ImplicitGradient(Dense())])
def test_an_inner_problem_without_data(kind, strategy):
    module, outer = kind(), [examples(1)[:2]] * 30
    trainer(strategy()).fit(module, EpisodeLoader(inner=[None], outer=outer))
    torch.testing.assert_close(module.phi.detach(), outer[0][0].mean(0), atol=0.01, rtol=0)
    with module.adapted([None]):
        torch.testing.assert_close(module.theta, module.phi)


def test_a_list_of_episodes_of_unequal_shapes_or_with_other_things_in_them():
    class Module(Maml):
        def inner_loss(self, batch):
            assert len(batch) == 2 or batch[2] == "name"
            return super().inner_loss(batch[:2])

        outer_loss = Maml.inner_loss

    def shorter(episode, size):
        return Episode([tuple(x[:size] for x in batch) for batch in episode.inner], episode.outer)

    equal = tasks(4)
    unequal = [shorter(episode, size) for episode, size in zip(equal, (8, 8, 5, 8), strict=True)]
    named = [Episode([(*batch, "name") for batch in episode.inner], episode.outer) for episode in equal]
    results = {}
    for name, episodes in (("equal", equal), ("unequal", unequal), ("named", named)):
        module = seeded(Module)
        trainer(ReverseUnroll()).fit(module, listed([episodes] * 2))
        results[name] = parameters(module)
    for name, value in results["equal"].items():
        torch.testing.assert_close(results["named"][name], value)
    assert differing(results["equal"], results["unequal"])


@pytest.mark.parametrize("sizes", [(3, 3), (1, 3)])
def test_losses_that_cannot_be_vectorized_are_looped(sizes):
    class Branching(Maml):
        def inner_loss(self, batch):
            return super().inner_loss(batch) * (2 if batch[0].sum() > 0 else 1)

    modules = [seeded(Branching), seeded(lambda: Branching(episode_chunk_size=1))]
    batches = [tasks(size) for size in sizes]
    message = "The losses cannot be vectorized over episodes, so the episodes of a batch are looped: "
    with pytest.warns(UserWarning, match=f"^{message}") as caught:
        trainer(ReverseUnroll()).fit(modules[0], listed(batches))
    assert sum(str(warning.message).startswith(message) for warning in caught) == 1
    trainer(ReverseUnroll()).fit(modules[1], listed(batches))
    assert differing(*map(parameters, modules)) == []

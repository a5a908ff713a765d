"""``adapted`` takes its inner steps as a fit does: few-shot learners are validated as they were trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bilevel import SGD, BilevelModule, Episode, ReverseUnroll
from tests.support.modules import listed, trainer
from tests.support.seeds import seeded

pytestmark = [
    pytest.mark.filterwarnings("ignore:Found 1 module"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]

X, QUERY = torch.linspace(-2, 3, 24).sin().view(8, 3), torch.linspace(-1, 1, 12).view(4, 3)
EPISODE = Episode([(X, X.sum(1, keepdim=True))], (QUERY, QUERY.sum(1, keepdim=True)))


class Normed(BilevelModule):
    """MAML with a frozen backbone, batch norm and dropout."""

    def __init__(self, dropout: float = 0.0, **norm: Any) -> None:
        super().__init__(inner_steps=2)
        self.seen: list[Any] = []
        self.backbone = nn.BatchNorm1d(3).eval().requires_grad_(False)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, **norm), nn.Dropout(dropout), nn.Linear(4, 1))

    def outer_parameters(self) -> Any:
        return self.net

    inner_parameters = outer_parameters

    def inner_loss(self, batch: Any) -> Tensor:
        self.seen.append({"backbone": self.backbone.training, "net": self.net.training})
        return (self.net(self.backbone(batch[0])) - batch[1]).square().mean()

    outer_loss = inner_loss

    def configure_inner_optimizer(self) -> Any:
        return SGD(lr=0.1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.outer_parameters(), lr=0.1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        with self.adapted(batch.inner):
            self.last = [parameter.clone() for parameter in self.net.parameters()]
            self.modes = {name: child.training for name, child in self.named_modules()}


def adapted(module: Normed, training: bool, **options: Any) -> Any:
    """Return θ_T from a module in one mode, and what its block ran in."""
    module.train(training)
    with module.adapted(EPISODE.inner, **options):
        theta, modes = [parameter.clone() for parameter in module.net.parameters()], module.net.training
        statistics = module.net[1].running_mean.clone()
    assert module.net.training == modes == training
    return theta, statistics


def by_hand(training: bool) -> list[Tensor]:
    module = seeded(Normed).train(training)
    optimizer = torch.optim.SGD(module.net.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        module.inner_loss(EPISODE.inner[0]).backward()
        optimizer.step()
    return [*module.net.parameters(), module.net[1].running_mean]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"mode": "train"}, {"mode": "eval"}, {"mode": None}], ids=str)
@pytest.mark.filterwarnings("ignore:`adapted` takes its inner steps in evaluation mode")
def test_the_mode_is_that_of_the_inner_steps(options: dict[str, Any], training: bool) -> None:
    theta, statistics = adapted(seeded(Normed), training, **options)
    steps = {"train": True, "eval": False, None: training}[options.get("mode", "train")]
    for mine, theirs in zip([*theta, statistics], by_hand(steps), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_validation_adapts_as_the_fit_has_trained_part_by_part() -> None:
    module = seeded(Normed)
    trainer(ReverseUnroll(), max_steps=2).fit(module, listed([EPISODE] * 2), listed([EPISODE]))
    assert {tuple(seen.items()) for seen in module.seen} == {(("backbone", False), ("net", True))}
    assert not any(module.modes.values())  # the block, as Lightning validates
    before = [parameter.clone() for parameter in module.net.parameters()]
    trainer().validate(module, listed([EPISODE]), verbose=False)
    assert {seen["backbone"] for seen in module.seen} == {False}
    assert all(map(torch.equal, before, module.net.parameters()))


def test_without_a_fit_an_override_of_train_is_asked() -> None:
    class Frozen(Normed):
        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            self.backbone.eval()
            return self

        def inner_loss(self, batch: Any) -> Tensor:
            modes.append((self.backbone.training, self.net.training))
            return super().inner_loss(batch)

    modes: list[Any] = []
    adapted(seeded(Frozen), False)
    assert set(modes) == {(False, True)}


def test_flags_and_generators_are_as_before() -> None:
    module = seeded(lambda: Normed(dropout=0.5)).eval()
    module.net[2].train()
    torch.manual_seed(3)
    before, flags = torch.get_rng_state(), [child.training for child in module.modules()]
    with module.adapted(EPISODE.inner):
        assert torch.equal(torch.get_rng_state(), before)
    assert [child.training for child in module.modules()] == flags


@pytest.mark.parametrize("mode", ["eval", None])
def test_running_statistics_in_evaluation_mode_are_pointed_out(mode: Any) -> None:
    module = seeded(Normed)
    with pytest.warns(UserWarning, match=r"^`adapted` takes its inner steps in evaluation mode, where `\w+`"):
        adapted(module, False, mode=mode)
    adapted(seeded(Normed), False)


def test_statistics_that_a_fit_had_fixed_too_are_no_surprise() -> None:
    class Fixed(Normed):
        def on_train_start(self) -> None:
            self.net[1].eval()

    module = seeded(Fixed)
    trainer(ReverseUnroll(), max_steps=1).fit(module, listed([EPISODE]))
    adapted(module, False, mode="eval")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", ["train", "eval", None])
def test_norms_without_running_statistics_are_alike_in_both(mode: Any) -> None:
    module = seeded(lambda: Normed(track_running_stats=False))
    module.backbone = nn.Identity()
    module.train(False)
    with module.adapted(EPISODE.inner, mode=mode):
        pass


def test_a_mode_of_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^Expected `adapted\(mode=...\)` to be 'train' or 'eval', got 'training'\."):
        with Normed().adapted(EPISODE.inner, mode="training"):  # type: ignore[arg-type]
            pass

"""A memory in fits: from step to step, not from fit to fit, in mixed precision, and after a step that was skipped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from torch import Tensor, nn

from lightning_bilevel import SGD, BilevelModule, Episode, ForwardGradient, TruncatedReverse, hypergradient
from tests.support.fits import fit
from tests.support.modules import identical
from tests.support.seeds import seeded

EPISODES = [
    seeded(lambda: Episode([(torch.randn(12, 3), torch.randn(12, 1))], (torch.randn(8, 3), torch.randn(8, 1))), seed)
    for seed in range(4)
]


class Weighted(BilevelModule):
    """Example weights, and a scale that may be frozen or come later."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"inner_steps": 2, "inner_start": "reset", **options})
        self.net, self.logits = nn.Linear(3, 1), nn.Parameter(torch.zeros(12))
        self.scale = nn.Parameter(torch.ones(1))
        self.bad = False

    def inner_parameters(self) -> Any:
        return self.net

    def inner_loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (self.logits.sigmoid() * (self.scale * self.net(x) - y)[:, 0].square()).mean()

    def outer_loss(self, batch: Any) -> Tensor:
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        return loss * float("nan") if self.bad else loss

    def configure_inner_optimizer(self) -> Any:
        return SGD(lr=0.1)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.outer_parameters(), lr=0.1)


class Seen(Callback):
    """What is carried before each step."""

    def __init__(self, spoil: int = -1) -> None:
        self.kept: list[dict[str, Any]] = []
        self.spoil = spoil

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        module.bad = batch_idx == self.spoil
        memory = module.fit_context.memory.strategy.get("memory", {})
        self.kept.append({name: value.clone() for name, value in memory.items()})


def remembering() -> ForwardGradient:
    return ForwardGradient(4, guide=TruncatedReverse(1), remember=True)


@pytest.mark.parametrize("change", ["frozen", "added", "removed"])
def test_a_fit_begins_without_a_memory_whatever_has_changed_since_the_last(change: str) -> None:
    module, seen = Weighted(), [Seen(), Seen()]
    if change == "added":
        module.scale.requires_grad_(False)
    fit(remembering(), seen[0], module=module, batches=EPISODES)
    if change == "removed":
        del module.scale
        module.scale = 1.0
    else:
        module.scale.requires_grad_(change == "added")
    before = hypergradient(module, remembering(), EPISODES[0])  # what the last fit has left counts where it fits
    assert list(before.known) == ["guide", "memory"]
    fit(remembering(), seen[1], module=module, batches=EPISODES)
    assert [bool(each.kept[0]) for each in seen] == [False, False]
    names = {"logits", "scale"} if change == "added" else {"logits"}
    assert all(set(each) == names for each in seen[1].kept[1:])


def test_a_fit_without_a_memory_forgets_the_one_before() -> None:
    module = Weighted()
    fit(remembering(), module=module, batches=EPISODES)
    fit(TruncatedReverse(1), module=module, batches=EPISODES)
    assert module.fit_context.memory.strategy == {}


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
@pytest.mark.filterwarnings("ignore:.*precision|.*bfloat16")
def test_a_memory_is_kept_in_single_precision(precision: Any) -> None:
    module, seen = Weighted(), Seen()
    fit(remembering(), seen, module=module, batches=EPISODES, precision=precision)
    for kept in seen.kept[1:]:
        assert {value.dtype for value in kept.values()} == {torch.float32}
        assert all(torch.isfinite(value).all() for value in kept.values())
        assert sum(value.abs().sum() for value in kept.values()) > 0


def test_a_skipped_step_leaves_the_memory_as_it_was() -> None:
    module, seen = Weighted(on_nonfinite="skip"), Seen(spoil=2)
    with pytest.warns(UserWarning, match="^Skipped an outer step"):
        fit(ForwardGradient(4, remember=True), seen, module=module, batches=EPISODES)
    assert identical(seen.kept[2], seen.kept[3])
    assert not identical(seen.kept[1], seen.kept[2])
    assert all(torch.isfinite(value).all() for value in module.fit_context.memory.strategy["memory"].values())


def test_a_first_estimate_of_zero_is_pointed_out_with_a_memory_too() -> None:
    class Still(Weighted):
        def inner_loss(self, batch: Any) -> Tensor:
            return super().inner_loss(batch) * 0

    with pytest.warns(UserWarning, match="^The first hypergradient is exactly zero"):
        fit(ForwardGradient(4, remember=True), module=Still(), batches=EPISODES[:1])

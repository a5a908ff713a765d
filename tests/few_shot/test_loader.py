"""Tasks in a Trainer: those of every epoch are its own, and resumed by their number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_bilevel import Episode
from lightning_bilevel.few_shot import TaskLoader
from tests.support.fits import SaveAt
from tests.support.tasks import Numbers, Recorder, fit


def loader(**options: Any) -> TaskLoader:
    return TaskLoader(Numbers(8, seed=3), batch_size=2, **options)


def expected(epochs: int) -> list[list[float]]:
    tasks = Numbers(8, seed=3)
    return [[float(tasks[epoch, i + j].outer) for j in (0, 1)] for epoch in range(epochs) for i in range(0, 8, 2)]


def workers() -> TaskLoader:
    return loader(num_workers=2)


def persistent_workers() -> TaskLoader:
    return loader(num_workers=1, persistent_workers=True)


@pytest.mark.parametrize("make", [loader, workers, persistent_workers])
def test_every_epoch_has_tasks_of_its_own(make: Callable[[], TaskLoader]) -> None:
    assert fit(make(), max_epochs=3).seen == expected(3)


def test_fixed_tasks_validate() -> None:
    fixed = TaskLoader(Numbers(4, seed=3, fixed=True), batch_size=2)
    seen = fit(loader(), val=fixed, max_epochs=2).validated
    assert seen[:2] == seen[2:]


def test_a_loop_of_ones_own() -> None:
    batches = loader()
    assert len(batches) == 4
    seen = []
    for _ in range(2):
        seen += [[float(task.outer) for task in batch] for batch in batches]
    assert seen == expected(2)
    batches.set_epoch(1)
    next(iter(batches))
    assert [float(task.outer) for task in next(iter(batches))] == expected(3)[8]  # a pass was left


@pytest.mark.parametrize("make", [loader, workers, persistent_workers])
@pytest.mark.parametrize("batches", [1, 3, 4, 5, 8, 9])
def test_resume_after_each_batch(tmp_path: Path, make: Callable[[], TaskLoader], batches: int) -> None:
    path = tmp_path / "resume.ckpt"
    whole = fit(make(), callbacks=[SaveAt(path, batches, "on_train_batch_end")], max_epochs=3)
    rest = fit(make(), ckpt_path=path, max_epochs=3)
    assert rest.seen == whole.seen[batches:]
    assert whole.weight.item() == rest.weight.item()


@pytest.mark.parametrize("until", [{"max_epochs": 3}, {"max_steps": 10}], ids=str)
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end", "on_train_epoch_end"])
@pytest.mark.parametrize("validating", [False, True])
def test_resume_at_the_end_of_an_epoch(tmp_path: Path, until: dict[str, int], hook: str, validating: bool) -> None:
    if hook == "on_validation_end" and not validating:
        return
    path = tmp_path / "resume.ckpt"
    val = TaskLoader(Numbers(2, fixed=True)) if validating else None
    whole = fit(loader(), callbacks=[SaveAt(path, 4, hook)], val=val, **until)
    rest = fit(loader(), ckpt_path=path, val=val, **until)
    assert rest.seen == whole.seen[4:]


@pytest.mark.parametrize("options", [{"limit_train_batches": 3}, {"accumulate_grad_batches": 3}], ids=str)
@pytest.mark.parametrize("batches", [2, 3, 4, 5])
def test_resume_under_arguments_of_the_trainer(tmp_path: Path, options: dict[str, int], batches: int) -> None:
    path = tmp_path / "resume.ckpt"
    whole = fit(loader(), callbacks=[SaveAt(path, batches, "on_train_batch_end")], max_epochs=3, **options)
    rest = fit(loader(), ckpt_path=path, max_epochs=3, **options)
    assert rest.seen == whole.seen[batches:]


class Asking(Recorder):
    """Its schedule wants to know the number of steps, for which Lightning makes the loader early."""

    def configure_optimizers(self) -> Any:
        assert self.trainer.estimated_stepping_batches == 12
        return super().configure_optimizers()


@pytest.mark.parametrize("batches", [1, 3, 4, 6])
def test_resume_when_the_scheduler_asks_for_the_number_of_steps(tmp_path: Path, batches: int) -> None:
    path = tmp_path / "resume.ckpt"
    saver = SaveAt(path, batches, "on_train_batch_end")
    whole = fit(loader(), callbacks=[saver], module=Asking(), max_epochs=3)
    assert fit(loader(), ckpt_path=path, module=Asking(), max_epochs=3).seen == whole.seen[batches:]


def test_resuming_draws_no_task_again(tmp_path: Path) -> None:
    class Counting(Numbers):
        drawn = 0

        def draw(self, generator: torch.Generator) -> Episode:
            Counting.drawn += 1
            return super().draw(generator)

    path = tmp_path / "resume.ckpt"
    make = lambda: TaskLoader(Counting(8, seed=3), batch_size=2)  # noqa: E731
    fit(make(), callbacks=[SaveAt(path, 3, "on_train_batch_end")], max_epochs=1)
    Counting.drawn = 0
    fit(make(), ckpt_path=path, max_epochs=1)
    assert Counting.drawn == 2


def test_bad_arguments_of_the_loader() -> None:
    with pytest.raises(ValueError, match=r"^Expected `TaskLoader\(dataset=\.\.\.\)` to be a `TaskDataset`"):
        TaskLoader([1, 2])
    with pytest.raises(
        ValueError, match=r"^Expected `TaskLoader\(batch_size=\.\.\.\)` to be a positive integer, got 0"
    ):
        TaskLoader(Numbers(8), batch_size=0)
    for option in ({"shuffle": True}, {"sampler": [1, 2]}):
        with pytest.raises(ValueError, match=r"^Expected `TaskLoader\(\.\.\.\)` to be without `shuffle` and `sampler`"):
            TaskLoader(Numbers(8), **option)

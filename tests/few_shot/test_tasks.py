"""Tasks go by number: drawn right, alike everywhere, shared out over processes, resumed by position."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from lightning_bilevel import SGD, BilevelModule, Episode, FirstOrder, HypergradientStrategy
from lightning_bilevel.few_shot import FewShotTasks, TaskDataset, TaskLoader


def examples(classes: int = 7, each: int = 6) -> tuple[Tensor, Tensor]:
    """Return images of 3×3 whose every pixel says which example it is, in a mixed order, and their labels."""
    numbers = torch.randperm(classes * each, generator=torch.Generator().manual_seed(0))
    return numbers[:, None, None].expand(-1, 3, 3).float(), numbers % classes


class Numbers(TaskDataset):
    """Tasks that are one drawn number."""

    def draw(self, generator: torch.Generator) -> Episode:
        x = torch.rand(1, generator=generator)
        return Episode([x], x)


# Tasks


def test_support_and_query_are_different_examples_of_the_same_classes() -> None:
    x, y = examples()
    tasks = FewShotTasks(x, y, ways=3, shots=2, queries=4, num_tasks=50)
    for task in tasks:
        ((support, names),), (query, query_names) = task.inner, task.outer
        assert names.tolist() == [0, 0, 1, 1, 2, 2]
        assert query_names.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        numbers = [batch[:, 0, 0].long().tolist() for batch in (support, query)]
        assert len(set(numbers[0] + numbers[1])) == 18
        classes = {
            way: {
                n % 7
                for batch, found in zip(numbers, (names, query_names), strict=True)
                for n, name in zip(batch, found.tolist(), strict=True)
                if name == way
            }
            for way in range(3)
        }
        assert all(len(members) == 1 for members in classes.values())
        assert len(set.union(*classes.values())) == 3


def test_all_classes_and_examples_are_drawn_alike() -> None:
    """Each of 7 classes is in 3 tasks of 7, and each of its 6 examples in the support set of a third of those."""
    x, y = examples()
    tasks = FewShotTasks(x, y, ways=3, shots=2, queries=4, num_tasks=1400, seed=1)
    seen = torch.cat([task.inner[0][0][:, 0, 0].long() for task in tasks]).bincount(minlength=42)
    expected = 1400 * 3 / 7 / 3
    assert (seen - expected).abs().max() < 5 * expected**0.5


def test_turned_classes_are_classes_of_their_own() -> None:
    corner = torch.zeros(4, 1, 2, 2)
    corner[..., 0, 0] = 1
    tasks = FewShotTasks(
        corner, torch.tensor([0, 0, 1, 1]), ways=8, shots=1, queries=1, num_tasks=3, rotations=range(4)
    )
    assert tasks.num_classes == 8
    (x, _), (query, _) = tasks[0].inner[0], tasks[0].outer
    assert torch.equal(x, query)
    turned = x.flatten(1).argmax(1).bincount().tolist()
    assert turned == [2, 2, 2, 2]
    straight = FewShotTasks(corner, torch.tensor([0, 0, 1, 1]), ways=2, queries=1, num_tasks=3)
    assert (straight[0].inner[0][0][..., 0, 0] == 1).all()


class Pairs(Dataset):
    """A data set as torchvision has them, which counts its reads."""

    def __init__(self, targets: Any = None) -> None:
        self.x, self.y = examples()
        self.reads = 0
        if targets:
            self.targets = self.y.tolist()

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.reads += 1
        return self.x[index], int(self.y[index])


def same(a: Episode, b: Episode) -> bool:
    leaves = [torch.cat([each.flatten() for each in (*task.inner[0], *task.outer)]) for task in (a, b)]
    return torch.equal(*leaves)


def test_one_task_from_any_kind_of_data() -> None:
    x, y = examples()
    options = {"ways": 3, "shots": 1, "queries": 2, "num_tasks": 5, "seed": 4}
    task = FewShotTasks(x, y, **options)[2]
    pairs, with_targets = Pairs(), Pairs(targets=True)
    assert same(task, FewShotTasks(x.numpy(), y.numpy().astype(np.int32), **options)[2])
    assert same(task, FewShotTasks(pairs, **options)[2])
    assert same(task, FewShotTasks(with_targets, **options)[2])
    assert same(task, FewShotTasks(TensorDataset(x, y), **options)[2])
    assert same(task, FewShotTasks(TensorDataset(x), y.tolist(), **options)[2])
    assert (pairs.reads, with_targets.reads) == (42 + 9, 9)


def test_labels_are_of_any_kind() -> None:
    x, y = examples()
    options = {"ways": 3, "shots": 1, "queries": 2, "num_tasks": 5, "seed": 4}
    names = [f"class {number}" for number in y.tolist()]
    task = FewShotTasks(x, y, classes=[5, 1, 2], **options)[2]
    chosen = [f"class {number}" for number in (5, 1, 2)]
    pairs = list(zip(x, names, strict=True))
    for found in (
        FewShotTasks(x, names, classes=chosen, **options),
        FewShotTasks(x, np.array(names), classes=np.array(chosen), **options),
        FewShotTasks(pairs, classes=chosen, **options),
        FewShotTasks(x, list(y), classes=torch.tensor([5, 1, 2]), **options),
    ):
        assert same(task, found[2])
    every = FewShotTasks(x, [("digits", number) for number in y.tolist()], **options)
    assert same(FewShotTasks(x, y, **options)[2], every[2])


@pytest.mark.parametrize("labels", [None, ["a", "b"] * 3])
def test_rows_that_are_no_pairs_are_named(labels: Any) -> None:
    rows = [{"image": torch.zeros(3), "label": "a"}] * 6
    message = (
        "Expected `FewShotTasks(data=...)` to be a data set of pairs (example, label), "
        "got \"a `dict` with 'image', 'label'\". Pass the examples as one tensor, with `labels=[...]`, or"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        _ = FewShotTasks(rows, labels, ways=2, queries=1)[0]


def test_classes_leave_the_others_out() -> None:
    x, y = examples()
    tasks = FewShotTasks(x, y, ways=2, queries=1, num_tasks=30, classes=[1, 5])
    assert {int(n) % 7 for task in tasks for n in task.outer[0][:, 0, 0]} == {1, 5}


def test_a_task_goes_by_seed_epoch_and_number() -> None:
    drawn = {
        (seed, epoch, index): float(Numbers(9, seed)[epoch, index].outer)
        for seed in range(3)
        for epoch in range(3)
        for index in range(9)
    }
    assert len(set(drawn.values())) == 81
    assert float(Numbers(20, seed=2)[1, 5].outer) == drawn[2, 1, 5]
    assert float(Numbers(9)[5].outer) == drawn[0, 0, 5]
    fixed = Numbers(9, fixed=True)
    assert same_numbers([fixed[3, 5]], [fixed[5]])


def same_numbers(a: list[Episode], b: list[Episode]) -> bool:
    return [float(task.outer) for task in a] == [float(task.outer) for task in b]


def test_global_generators_are_left_alone() -> None:
    x, y = examples()
    before = torch.get_rng_state()
    FewShotTasks(x, y, ways=3, shots=1, queries=2, num_tasks=5)[0]
    assert torch.equal(before, torch.get_rng_state())


# The loader in a Trainer


class Recorder(BilevelModule):
    """Records the numbers of the tasks it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[float]] = []
        self.validated: list[list[float]] = []

    def inner_parameters(self):
        return [self.weight]

    def outer_parameters(self):
        return [self.weight]

    def inner_loss(self, batch):
        return (self.weight * batch).square().sum()

    def outer_loss(self, batch):
        return ((self.weight - 1) * batch).square().sum()

    def configure_inner_optimizer(self):
        return SGD(lr=0.1)

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=0.1)

    def on_train_batch_start(self, batch, batch_idx):
        self.seen.append([float(task.outer) for task in batch])


class Validated(Recorder):
    """Records those of validation as well."""

    def validation_step(self, batch, batch_idx):
        self.validated.append([float(task.outer) for task in batch])


class SaveAt(pl.Callback):
    """Saves a checkpoint at the given hook once so many batches were seen."""

    def __init__(self, path: Path, batches: int, hook: str) -> None:
        self.path, self.batches = path, batches
        setattr(self, hook, self.save)

    def save(self, trainer: pl.Trainer, pl_module: Recorder, *_: Any) -> None:
        if len(pl_module.seen) == self.batches:
            trainer.save_checkpoint(self.path)


def fit(
    loader: TaskLoader,
    ckpt_path: Path | None = None,
    callbacks: Any = (),
    val: TaskLoader | None = None,
    hypergradient: HypergradientStrategy | None = None,
    module: Recorder | None = None,
    **options: Any,
) -> Recorder:
    trainer = pl.Trainer(
        callbacks=[hypergradient or FirstOrder(), *callbacks],
        accelerator="cpu",
        logger=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    module = module or (Recorder() if val is None else Validated())
    trainer.fit(module, loader, val, ckpt_path=ckpt_path)
    return module


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


# Refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 0}, "Expected `FewShotTasks(ways=...)` to be a positive integer, got 0."),
        ({"shots": True}, "Expected `FewShotTasks(shots=...)` to be a positive integer, got True."),
        ({"queries": 1.5}, "Expected `FewShotTasks(queries=...)` to be a positive integer, got 1.5."),
        ({"num_tasks": -1}, "Expected `FewShotTasks(num_tasks=...)` to be a positive integer, got -1."),
        ({"ways": 8}, "Expected `FewShotTasks(ways=...)` to be at most the 7 classes there are, got 8. Lower"),
        ({"queries": 6}, "Expected `FewShotTasks(data=...)` to be 7 or more examples of each class, got '6 of 0'."),
        ({"classes": [1, 9]}, "Expected `FewShotTasks(classes=...)` to be labels that occur, got [9]."),
        (
            {"rotations": (0, 4)},
            "Expected `FewShotTasks(rotations=...)` to be different integers from 0 to 3, got (0, 4).",
        ),
        (
            {"rotations": (1, 1)},
            "Expected `FewShotTasks(rotations=...)` to be different integers from 0 to 3, got (1, 1).",
        ),
        (
            {"labels": None},
            "Expected `FewShotTasks(labels=...)` to be given where `data` is a tensor or an array, got None.",
        ),
        (
            {"labels": torch.rand(42)},
            "Expected `FewShotTasks(labels=...)` to be 42 integers or strings, one for each example, got '42 of float",
        ),
        (
            {"labels": ["a", "b"]},
            "Expected `FewShotTasks(labels=...)` to be 42 integers or strings, one for each example, got '2 of str'.",
        ),
        ({"classes": ["a"]}, "Expected `FewShotTasks(classes=...)` to be labels that occur, got ['a']."),
    ],
)
def test_bad_arguments_of_tasks(options: dict[str, Any], message: str) -> None:
    x, y = examples()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        FewShotTasks(x, **{"labels": y, "queries": 2, **options})


def test_only_square_images_are_turned_by_a_quarter() -> None:
    x, y = torch.rand(12, 3, 4), torch.arange(12) % 2
    assert FewShotTasks(x, y, ways=2, queries=2, rotations=(0, 2)).num_classes == 4
    message = "Expected `FewShotTasks(rotations=...)` to be 0 and 2 where images are not square, got (0, 1)."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        FewShotTasks(x, y, ways=2, queries=2, rotations=(0, 1))


@pytest.mark.parametrize("index", [-1, 9, (1, 9)])
def test_numbers_of_tasks_are_checked(index: Any) -> None:
    with pytest.raises(IndexError, match="^Expected the number of a task to be from 0 to 8, got"):
        Numbers(9)[index]


def test_what_draw_returns_is_checked() -> None:
    class Wrong(Numbers):
        def draw(self, generator: torch.Generator) -> Any:
            return torch.zeros(1)

    with pytest.raises(ValueError, match=r"^Expected `Wrong\.draw\(generator\)` to be an `Episode`, got tensor"):
        Wrong(1)[0]


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

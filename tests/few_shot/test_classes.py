"""Few-shot tasks: ways, shots and queries drawn right, from any kind of data."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from lightning_bilevel import Episode
from lightning_bilevel.few_shot import FewShotTasks
from tests.support.tasks import examples


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


def test_global_generators_are_left_alone() -> None:
    x, y = examples()
    before = torch.get_rng_state()
    FewShotTasks(x, y, ways=3, shots=1, queries=2, num_tasks=5)[0]
    assert torch.equal(before, torch.get_rng_state())


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

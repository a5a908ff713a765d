"""N-way K-shot classification tasks from labelled examples."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_bilevel.errors import integer, value_error
from lightning_bilevel.few_shot.tasks import TaskDataset
from lightning_bilevel.problem import Episode


class FewShotTasks(TaskDataset):
    """Draws N-way K-shot tasks: N classes, K examples of each as support, others of the same classes as query.

    A task is ``Episode([(x, y)], (x, y))``, the support set and the query set. The classes of a task are numbered
    anew, from 0 to ``ways`` − 1, in the order they were drawn in; examples are sorted by class.

    Args:
        data: examples, ``(n, ...)``, as a tensor or an array; or a map-style data set of pairs (example, label),
            whose examples are tensors of one shape.
        labels: ``(n,)``, integers or strings, or others that can be sorted; by default ``data.targets``,
            ``data.labels``, or what the pairs say, for which all of them are read once.
        ways: N.
        shots: K.
        queries: query examples of each class.
        num_tasks: tasks in an epoch.
        classes: labels to draw from; by default all. Meta-training and evaluation use disjoint ones.
        rotations: quarter turns of the last two dimensions, from 0 to 3; every class turned is a class of its own.
        seed: of all draws.
        fixed: every epoch has the same tasks.

    Raises:
        ValueError: a bad argument, fewer classes than ``ways``, or a class of too few examples.

    >>> images, labels = torch.rand(60, 8, 8), torch.arange(60) % 6
    >>> tasks = FewShotTasks(images, labels, ways=5, shots=1, queries=3, num_tasks=100, rotations=(0, 1, 2, 3))
    >>> (x, y), = tasks[0].inner
    >>> x.shape, y, tasks[0].outer[0].shape, tasks.num_classes
    (torch.Size([5, 8, 8]), tensor([0, 1, 2, 3, 4]), torch.Size([15, 8, 8]), 24)
    """

    def __init__(
        self,
        data: Any,
        labels: Any = None,
        *,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        num_tasks: int = 1000,
        classes: Iterable[Any] | None = None,
        rotations: Sequence[int] = (0,),
        seed: int = 0,
        fixed: bool = False,
    ) -> None:
        super().__init__(num_tasks, seed, fixed)
        self.ways = integer("FewShotTasks(ways=...)", ways)
        self.shots = integer("FewShotTasks(shots=...)", shots)
        self.queries = integer("FewShotTasks(queries=...)", queries)
        self.rotations = tuple(rotations)
        turns = set(self.rotations)
        if not turns or len(turns) < len(self.rotations) or not turns <= {0, 1, 2, 3}:
            raise value_error("FewShotTasks(rotations=...)", "different integers from 0 to 3", rotations)
        self.data = torch.as_tensor(data) if hasattr(data, "__array__") else data
        if turns & {1, 3} and isinstance(self.data, Tensor) and len(set(self.data.shape[-2:])) > 1:
            raise value_error("FewShotTasks(rotations=...)", "0 and 2 where images are not square", rotations)
        self._members = _members(_labels(self.data, labels), classes, self.shots + self.queries)
        if self.num_classes < self.ways:
            hint = "Lower `ways`, or turn images with `rotations=(0, 1, 2, 3)`."
            raise value_error("FewShotTasks(ways=...)", f"at most the {self.num_classes} classes there are", ways, hint)

    @property
    def num_classes(self) -> int:
        """Classes to draw from, turned ones counted."""
        return len(self._members) * len(self.rotations)

    def draw(self, generator: torch.Generator) -> Episode:
        """Return a task; see :meth:`TaskDataset.draw`."""
        support: list[Tensor] = []
        query: list[Tensor] = []
        for number in torch.randperm(self.num_classes, generator=generator)[: self.ways].tolist():
            members = self._members[number // len(self.rotations)]
            order = torch.randperm(len(members), generator=generator)[: self.shots + self.queries]
            examples = self._examples(members[order])
            turn = self.rotations[number % len(self.rotations)]
            if turn:
                examples = examples.rot90(turn, (-2, -1))
            support.append(examples[: self.shots])
            query.append(examples[self.shots :])
        names = torch.arange(self.ways)
        inner = torch.cat(support), names.repeat_interleave(self.shots)
        return Episode([inner], (torch.cat(query), names.repeat_interleave(self.queries)))

    def _examples(self, members: Tensor) -> Tensor:
        if isinstance(self.data, Tensor):
            return self.data[members]
        return torch.stack([torch.as_tensor(_pair(self.data, index)[0]) for index in members.tolist()])


def _pair(data: Any, index: int) -> Sequence[Any]:
    """Return an entry of a data set of pairs; others, as of its labels, may follow the two."""
    entry = data[index]
    if isinstance(entry, (tuple, list)):
        return entry
    got = f"a `{type(entry).__name__}`"
    if isinstance(entry, Mapping):
        got += f" with {', '.join(map(repr, entry))}"
    hint = "Pass the examples as one tensor, with `labels=[...]`, or wrap the data set in one of pairs."
    raise value_error("FewShotTasks(data=...)", "a data set of pairs (example, label)", got, hint)


def _labels(data: Any, labels: Any) -> list[Hashable]:
    """Return the labels, given or found."""
    if labels is None:
        labels = next(
            (found for name in ("targets", "labels") if (found := getattr(data, name, None)) is not None), None
        )
    if labels is None and isinstance(data, Tensor):
        raise value_error("FewShotTasks(labels=...)", "given where `data` is a tensor or an array", None)
    if labels is None:
        labels = [_pair(data, index)[1] for index in range(len(data))]
    found = _plain(labels)
    if len(found) != len(data) or any(isinstance(label, (float, list)) for label in found):
        kinds = ", ".join(sorted({type(label).__name__ for label in found}))
        expected = f"{len(data)} integers or strings, one for each example"
        raise value_error("FewShotTasks(labels=...)", expected, f"{len(found)} of {kinds}")
    return found


def _plain(labels: Any) -> list[Any]:
    """Return tensors, arrays and their entries as plain values, which are equal where they are the same class."""
    values = labels.tolist() if hasattr(labels, "tolist") else labels
    return [label.item() if hasattr(label, "item") else label for label in values]


def _members(labels: Sequence[Hashable], classes: Iterable[Any] | None, least: int) -> list[Tensor]:
    """Return the indices of the examples of each class; every class has at least so many."""
    groups: dict[Any, list[int]] = {label: [] for label in sorted(set(labels))}  # type: ignore[type-var]
    for index, label in enumerate(labels):
        groups[label].append(index)
    chosen = list(groups) if classes is None else _plain(classes)
    if absent := [label for label in chosen if label not in groups]:
        raise value_error("FewShotTasks(classes=...)", "labels that occur", absent)
    if scarce := [label for label in chosen if len(groups[label]) < least]:
        got = f"{len(groups[scarce[0]])} of {scarce[0]}"
        hint = "Lower `shots` or `queries`, or leave such classes out of `classes`."
        raise value_error("FewShotTasks(data=...)", f"{least} or more examples of each class", got, hint)
    return [torch.tensor(groups[label]) for label in chosen]

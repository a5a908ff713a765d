"""Few-shot learning: tasks drawn from a data set, and a loader of them that shards and resumes."""

from lightning_bilevel.few_shot.classes import FewShotTasks
from lightning_bilevel.few_shot.loader import TaskLoader
from lightning_bilevel.few_shot.tasks import TaskDataset

__all__ = ["FewShotTasks", "TaskDataset", "TaskLoader"]

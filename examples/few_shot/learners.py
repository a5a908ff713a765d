"""MAML and ANIL as bilevel modules: adapt on the support set (inner), do well on the query set (outer)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import CatMetric
from torchmetrics.functional.classification import multiclass_accuracy

from few_shot.nets import BodyAndHead
from lightning_bilevel import SGD, BilevelModule, Episode

Level = Literal["all", "head", "body"]


class MeanWithInterval(CatMetric):
    """The mean of one number per task, and half of its 95% interval, 1.96 standard errors."""

    def compute(self) -> tuple[Tensor, Tensor]:
        values = super().compute()
        return values.mean(), 1.96 * values.std() / len(values) ** 0.5


class MetaLearner(BilevelModule):
    """Learns the start of an inner run (MAML), or the features that one is run on (ANIL).

    Args:
        net: a body and a head.
        inner: what is adapted to a task: ``"all"`` (MAML) or the ``"head"`` (ANIL).
        outer: what is learned: ``"all"``, or the ``"body"`` alone, under a head that starts from the same values.
        inner_steps: T of a training task.
        test_steps: inner steps of a validation task.
        inner_lr: learning rate of the inner steps.
        inner_momentum: their momentum.
        outer_lr: learning rate of Adam.
        total_steps: outer steps over which the outer learning rate falls to 0, as a cosine; constant if ``None``.
        proximal: λ of the term λ/2 ‖θ − φ‖² of the inner loss (iMAML).
        learn_rates: learn the inner learning rate of every entry of θ, from ``inner_lr`` on (Meta-SGD).
    """

    metric: str
    """Name of the score of a task."""

    def __init__(
        self,
        net: BodyAndHead,
        inner: Level = "all",
        outer: Level = "all",
        inner_steps: int = 1,
        test_steps: int | None = None,
        inner_lr: float = 0.4,
        inner_momentum: float = 0.0,
        outer_lr: float = 1e-3,
        total_steps: int | None = None,
        proximal: float = 0.0,
        learn_rates: bool = False,
    ) -> None:
        super().__init__(inner_steps=inner_steps, inner_start="reset", proximal=proximal)
        self.save_hyperparameters(ignore="net")
        self.net = net
        self.test_steps = inner_steps if test_steps is None else test_steps
        adapted = dict(self._part(inner).named_parameters()) if learn_rates else {}
        prefix = "net." if inner == "all" else f"net.{inner}."
        self.rate_names = [prefix + name for name in adapted]
        self.rates = nn.ParameterList(torch.full_like(value, inner_lr) for value in adapted.values())
        self.score_over_tasks = MeanWithInterval()

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    def score(self, output: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    def inner_parameters(self):
        return self._part(self.hparams.inner)

    def outer_parameters(self):
        return [self._part(self.hparams.outer), self.rates]

    def _part(self, level: Level):
        return self.net if level == "all" else getattr(self.net, level)

    def inner_loss(self, batch):
        x, y = batch
        return self.loss(self.net(x), y)

    def outer_loss(self, batch):
        return self.inner_loss(batch)

    def configure_inner_optimizer(self):
        lr = dict(zip(self.rate_names, self.rates, strict=True)) or self.hparams.inner_lr
        return SGD(lr=lr, momentum=self.hparams.inner_momentum)

    def configure_optimizers(self):
        selected = [*self._part(self.hparams.outer).parameters(), *self.rates]
        optimizer = torch.optim.Adam(selected, lr=self.hparams.outer_lr)
        if self.hparams.total_steps is None:
            return optimizer
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.hparams.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}

    def validation_step(self, batch, batch_idx):
        for episode in batch:
            self.score_over_tasks.update(self.score_after(episode, self.test_steps))

    def on_validation_epoch_end(self):
        mean, half = self.score_over_tasks.compute()
        self.log_dict({f"val_{self.metric}": mean.float(), f"val_{self.metric}_95": half.float()}, prog_bar=True)
        self.score_over_tasks.reset()

    def score_after(self, episode: Episode, steps: int) -> Tensor:
        """Return the score on the query set after so many inner steps on the support set."""
        x, y = episode.outer
        with self.adapted(episode.inner, steps=steps):
            return self.score(self.net(x), y)


class FewShotClassifier(MetaLearner):
    """Cross-entropy and accuracy."""

    metric = "accuracy"

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(output, y)

    def score(self, output: Tensor, y: Tensor) -> Tensor:
        return multiclass_accuracy(output, y, num_classes=output.shape[-1], average="micro")


class FewShotRegressor(MetaLearner):
    """Squared error."""

    metric = "mse"

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return (output - y).square().mean()

    def score(self, output: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(output, y)


@torch.no_grad()
def adaptation_curve(module: MetaLearner, tasks: Sequence[Episode], steps: Sequence[int]) -> dict[str, list[float]]:
    """Return the mean score over tasks, and half of its 95% interval, after each of these numbers of inner steps."""
    curve: dict[str, list[float]] = {"steps": list(steps), "mean": [], "95%": []}
    for count in steps:
        scores = MeanWithInterval()
        scores.update(torch.stack([module.score_after(task, count) for task in tasks]))
        for name, value in zip(("mean", "95%"), scores.compute(), strict=True):
            curve[name].append(value.item())
    return curve

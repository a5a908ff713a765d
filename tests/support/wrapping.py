"""Plain LightningModules to wrap, and the subclass by hand that one of them equals."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError

from lightning_bilevel import SGD, BilevelModule, bilevel
from tests.support.modules import EXAMPLES, FEATURES, examples
from tests.support.seeds import seeded


class Parts:
    """What the plain module and the subclass by hand have in common."""

    def build(self) -> None:
        self.net = nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
        self.example_weights = nn.Parameter(torch.zeros(EXAMPLES))
        self.log_lr = nn.Parameter(torch.tensor(-2.0))
        self.val_error = MeanSquaredError()
        self.hooks: list[str] = []

    def weighted(self, batch: Any) -> Tensor:
        x, y, index = batch
        loss = (self.example_weights[index].sigmoid() * (self.net(x) - y).square().mean(1)).mean()
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        prediction = self(batch[0])
        self.val_error(prediction, batch[1])
        self.log("val_error", self.val_error)
        self.log_dict({"val_loss": F.mse_loss(prediction, batch[1])}, prog_bar=True)

    def on_train_epoch_end(self) -> None:
        self.hooks.append(f"epoch {self.current_epoch}, step {self.global_step}, {self.trainer.max_epochs} epochs")
        self.log("epoch_end", float(self.current_epoch))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


class Plain(Parts, LightningModule):
    """As users have it, with all kinds of hooks."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.build()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": self.weighted(batch), "batch_idx": batch_idx}


class ByHand(Parts, BilevelModule):
    """The same problem as a subclass."""

    def __init__(self, **options: Any) -> None:
        super().__init__(inner_steps=3, **options)
        self.build()

    def inner_parameters(self) -> Any:
        return self.net

    def inner_loss(self, batch: Any) -> Tensor:
        return self.weighted(batch)

    def outer_loss(self, batch: Any) -> Tensor:
        return F.mse_loss(self.net(batch[0]), batch[1])

    def configure_inner_optimizer(self) -> Any:
        return SGD(lr=self.log_lr.exp(), momentum=0.9)


class Minimal(LightningModule):
    """Two layers, one loss, nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(FEATURES, 4), nn.Linear(4, 1)

    def loss(self, batch: Any) -> Tensor:
        return (self.head(self.body(batch[0]).tanh()) - batch[1]).square().mean()

    def training_step(self, batch: Any) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.05)


def validation_loss(module: Any, batch: Any) -> Tensor:
    return F.mse_loss(module.net(batch[0]), batch[1])


def wrapped(module: Any = None, **options: Any) -> BilevelModule:
    """Return the wrapper that equals ``ByHand``."""
    defaults = {
        "inner": "net",
        "outer": ["example_weights", "log_lr"],
        "outer_loss": validation_loss,
        "inner_optimizer": lambda module: SGD(lr=module.log_lr.exp(), momentum=0.9),
        "inner_steps": 3,
    }
    return bilevel(module or seeded(Plain), **{**defaults, **options})


def maml(**options: Any) -> BilevelModule:
    defaults = {"inner": "*", "outer": "*", "inner_optimizer": SGD(lr=0.1), "inner_steps": 2}
    return bilevel(seeded(Minimal), **{**defaults, **options})


def named(module: BilevelModule, level: str) -> set[str]:
    chosen = {id(parameter) for parameter in getattr(module, f"{level}_parameters")()}
    return {name.removeprefix("module.") for name, p in module.named_parameters() if id(p) in chosen}


def validation() -> Any:
    return DataLoader(TensorDataset(*examples(3)[:2]), batch_size=4)


class Manual(Minimal):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

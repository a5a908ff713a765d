"""Self-supervised learning, in modules as in the package's Lightning examples."""

from __future__ import annotations

import copy
import sys
from typing import Any
from unittest.mock import MagicMock

import lightning.pytorch as pl
import torch
from torch import nn

sys.modules.update({name: MagicMock() for name in ("torchvision", "torchvision.ops")})  # imported, and not used here

from lightly.loss import BarlowTwinsLoss, NegativeCosineSimilarity, NTXentLoss, VICRegLoss  # noqa: E402
from lightly.models.modules import (  # noqa: E402
    BYOLPredictionHead,
    BYOLProjectionHead,
    SimCLRProjectionHead,
    SimSiamPredictionHead,
)

from published import Row  # noqa: E402

DISTRIBUTION = "lightly"


def views() -> list[Any]:
    """Return two batches of two views of eight small images."""
    images = torch.randn(2, 8, 1, 6, 6)
    return [(x + 0.1 * torch.randn_like(x), x + 0.1 * torch.randn_like(x)) for x in images]


class TwoViews(pl.LightningModule):
    """A backbone and a projection, and a loss between the projections of two views (SimCLR, Barlow Twins, VICReg).

    Args:
        criterion: the loss.
    """

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh())
        self.projection_head = SimCLRProjectionHead(8, 8, 4)
        self.criterion = criterion

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projection_head(self.backbone(x))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x0, x1 = batch
        return self.criterion(self(x0), self(x1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.06)


class SimSiam(TwoViews):
    """SimSiam: a prediction head, and gradients through one of two branches."""

    def __init__(self) -> None:
        super().__init__(NegativeCosineSimilarity())
        self.prediction_head = SimSiamPredictionHead(4, 4, 4)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        z0, z1 = map(self, batch)
        p0, p1 = self.prediction_head(z0), self.prediction_head(z1)
        return (self.criterion(z0.detach(), p1) + self.criterion(z1.detach(), p0)) / 2


class BYOL(pl.LightningModule):
    """BYOL: the target is a momentum encoder, moved by every training step as in the package's example."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh())
        self.projection_head, self.prediction_head = BYOLProjectionHead(8, 8, 4), BYOLPredictionHead(4, 8, 4)
        self.backbone_momentum = copy.deepcopy(self.backbone).requires_grad_(False)
        self.projection_head_momentum = copy.deepcopy(self.projection_head).requires_grad_(False)
        self.criterion = NegativeCosineSimilarity()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        pairs = (self.backbone, self.backbone_momentum), (self.projection_head, self.projection_head_momentum)
        with torch.no_grad():  # `update_momentum` of lightly.models.utils, which imports torchvision
            for online, target in pairs:
                for parameter, slow in zip(online.parameters(), target.parameters(), strict=True):
                    slow.data = 0.99 * slow.data + 0.01 * parameter.data
        x0, x1 = batch
        p0, p1 = (self.prediction_head(self.projection_head(self.backbone(x))) for x in (x0, x1))
        z0, z1 = (self.projection_head_momentum(self.backbone_momentum(x)).detach() for x in (x0, x1))
        return (self.criterion(p0, z1) + self.criterion(p1, z0)) / 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.06)


def simclr() -> Row:
    module = TwoViews(NTXentLoss())
    return Row(module, views(), inner="projection_head", outer="backbone")


def barlow_twins() -> Row:
    module = TwoViews(BarlowTwinsLoss())
    return Row(module, views(), inner="projection_head", outer="backbone")


def vicreg() -> Row:
    module = TwoViews(VICRegLoss())
    return Row(module, views(), inner="projection_head", outer="backbone")


def simsiam() -> Row:
    module = SimSiam()
    return Row(module, views(), inner="prediction_head", outer="backbone", detaches=True)


def byol() -> Row:
    module = BYOL()
    return Row(module, views(), inner="prediction_head", outer="backbone", detaches=True)


ROWS = {"SimCLR": simclr, "Barlow Twins": barlow_twins, "VICReg": vicreg, "SimSiam": simsiam, "BYOL": byol}

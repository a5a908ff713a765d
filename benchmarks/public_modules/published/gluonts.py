"""Probabilistic forecasters, as gluonts' estimators make them."""

from __future__ import annotations

from itertools import islice
from typing import Any

import lightning.pytorch  # noqa: F401 - the package's namespace
import numpy as np
from gluonts.dataset.common import ListDataset
from gluonts.torch import (
    DeepAREstimator,
    DLinearEstimator,
    PatchTSTEstimator,
    SimpleFeedForwardEstimator,
    TemporalFusionTransformerEstimator,
    WaveNetEstimator,
)

from published import Row

DISTRIBUTION = "gluonts"
SERIES = ListDataset([{"start": "2024-01-01", "target": np.sin(np.arange(80) / (2 + i))} for i in range(4)], freq="D")


def made(estimator: Any) -> tuple[Any, list[Any]]:
    """Return the Lightning module of an estimator, and two batches of its loader."""
    transformation = estimator.create_transformation()
    module = estimator.create_lightning_module()
    instances = transformation.apply(SERIES, is_train=True)
    return module, list(islice(estimator.create_training_data_loader(instances, module), 2))


def feed_forward() -> Row:
    module, batches = made(SimpleFeedForwardEstimator(4, 8, hidden_dimensions=[8, 8], batch_size=4))
    # Without the biases: those of padded windows are at the kink of a ReLU, where there is no derivative.
    return Row(module, batches, inner="model.args_proj", outer="model.nn.*.weight")


def deepar() -> Row:
    module, batches = made(DeepAREstimator("D", 4, 8, hidden_size=8, batch_size=4, lags_seq=[1, 2], time_features=[]))
    return Row(module, batches, inner="model.param_proj", outer="model.rnn")


def dlinear() -> Row:
    module, batches = made(DLinearEstimator(4, 8, hidden_dimension=4, kernel_size=3, batch_size=4))
    return Row(module, batches, inner="model.args_proj", outer=["model.linear_seasonal", "model.linear_trend"])


def patch_tst() -> Row:
    module, batches = made(PatchTSTEstimator(4, 4, 8, stride=2, d_model=8, nhead=2, dim_feedforward=8, batch_size=4))
    return Row(module, batches, inner="model.args_proj", outer="model.encoder")


def temporal_fusion() -> Row:
    module, batches = made(TemporalFusionTransformerEstimator("D", 4, 8, hidden_dim=8, variable_dim=8, batch_size=4))
    return Row(module, batches, inner="model.args_proj", outer="model.temporal_encoder")


def wavenet() -> Row:
    module, batches = made(
        WaveNetEstimator("D", 4, num_bins=16, num_residual_channels=4, num_skip_channels=4, batch_size=4)
    )
    return Row(module, batches, inner="model.conv2", outer="model.residuals")


ROWS = {
    "SimpleFeedForwardLightningModule": feed_forward,
    "DeepARLightningModule": deepar,
    "DLinearLightningModule": dlinear,
    "PatchTSTLightningModule": patch_tst,
    "TemporalFusionTransformerLightningModule": temporal_fusion,
    "WaveNetLightningModule": wavenet,
}

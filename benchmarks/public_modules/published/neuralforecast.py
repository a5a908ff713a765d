"""Forecasters, as `NeuralForecast` trains them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytorch_lightning  # noqa: F401 - the package's namespace
from neuralforecast.losses.pytorch import MSE, DistributionLoss
from neuralforecast.models import GRU, MLP, NBEATS, NHITS, DLinear, PatchTST, TSMixer
from neuralforecast.tsdataset import TimeSeriesDataset, TimeSeriesLoader

from published import Row

DISTRIBUTION = "neuralforecast"
SIZE: dict[str, Any] = {"h": 4, "input_size": 8, "windows_batch_size": None, "loss": MSE()}


def series() -> list[Any]:
    """Return two batches of two series of thirty days."""
    days = np.arange(30)
    frames = [
        pd.DataFrame(
            {"unique_id": str(i), "ds": days, "y": np.sin(days / (2 + i)) + 0.1 * np.cos(3.7 * days * (i + 1))}
        )
        for i in range(4)
    ]
    return [
        next(iter(TimeSeriesLoader(TimeSeriesDataset.from_df(pd.concat(part))[0], batch_size=2)))
        for part in (frames[:2], frames[2:])
    ]


def nbeats() -> Row:
    module = NBEATS(**SIZE, mlp_units=[[8, 8]] * 3)
    return Row(module, series(), inner="blocks.2", outer=["blocks.0", "blocks.1"])


def nhits() -> Row:
    module = NHITS(**SIZE, mlp_units=[[8, 8]] * 3)
    return Row(module, series(), inner="blocks.2", outer=["blocks.0", "blocks.1"])


def mlp() -> Row:
    module = MLP(**SIZE, hidden_size=8)
    return Row(module, series(), inner="out", outer="mlp")


def distribution() -> Row:
    module = MLP(**{**SIZE, "loss": DistributionLoss("StudentT")}, hidden_size=8)
    return Row(module, series(), inner="out", outer="mlp")


def dlinear() -> Row:
    module = DLinear(**SIZE, moving_avg_window=3)
    return Row(module, series(), inner="linear_trend", outer="linear_season")


def patchtst() -> Row:
    module = PatchTST(**SIZE, hidden_size=8, n_heads=2, linear_hidden_size=8, encoder_layers=1, patch_len=4, stride=2)
    return Row(module, series(), inner="model.head", outer="model.backbone")


def tsmixer() -> Row:
    module = TSMixer(**SIZE, n_series=2, ff_dim=8)
    return Row(module, series(), inner="out", outer="mixing_layers")


def gru() -> Row:
    module = GRU(**SIZE, encoder_hidden_size=8, decoder_hidden_size=8)
    return Row(module, series(), inner="mlp_decoder", outer="hist_encoder")


ROWS = {
    "NBEATS": nbeats,
    "NHITS": nhits,
    "MLP": mlp,
    "MLP, Student's t": distribution,
    "DLinear": dlinear,
    "PatchTST": patchtst,
    "TSMixer": tsmixer,
    "GRU": gru,
}

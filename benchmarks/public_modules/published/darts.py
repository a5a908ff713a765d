"""Forecasters, as darts' models make them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytorch_lightning  # noqa: F401 - the package's namespace
import torch
from darts import TimeSeries
from darts.models import BlockRNNModel, DLinearModel, NBEATSModel, NHiTSModel, TCNModel, TiDEModel, TransformerModel
from darts.utils.likelihood_models import GaussianLikelihood

from published import Row

DISTRIBUTION = "u8darts"
QUIET = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary"), False)
SIZE: dict[str, Any] = {
    "input_chunk_length": 8,
    "output_chunk_length": 4,
    "n_epochs": 0,
    "pl_trainer_kwargs": {"accelerator": "cpu", **QUIET},
}


def made(model: Any) -> Any:
    """Return the Lightning module that a model makes when it is fitted, here for no epoch."""
    series = TimeSeries.from_values(np.sin(np.arange(30.0) / 2).astype(np.float32))
    return model.fit(series).model


def windows(first: int = 8) -> list[Any]:
    """Return two batches of four windows of sine waves: the past, no covariates, and the target from a time on."""
    times = torch.arange(12.0) / 2 + torch.rand(2, 4, 1)
    return [(x[:, :8], None, None, None, None, None, x[:, first:]) for x in times.sin()[..., None]]


def nbeats() -> Row:
    module = made(NBEATSModel(**SIZE, num_stacks=2, num_layers=2, layer_widths=8))
    return Row(module, windows(), inner="stacks.1", outer="stacks.0")


def nhits() -> Row:
    module = made(NHiTSModel(**SIZE, num_stacks=2, num_layers=2, layer_widths=8))
    return Row(module, windows(), inner="stacks.1", outer="stacks.0")


def dlinear() -> Row:
    module = made(DLinearModel(**SIZE, kernel_size=3))
    return Row(module, windows(), inner="linear_trend", outer="linear_seasonal")


def tcn() -> Row:
    module = made(TCNModel(**SIZE, num_filters=4, kernel_size=2))
    return Row(module, windows(4), inner="res_blocks.2", outer=["res_blocks.0", "res_blocks.1"])


def tide() -> Row:
    module = made(TiDEModel(**SIZE, hidden_size=8))
    return Row(module, windows(), inner="lookback_skip", outer="encoders")


def transformer() -> Row:
    module = made(TransformerModel(**SIZE, d_model=8, nhead=2, dim_feedforward=8))
    return Row(module, windows(), inner="decoder", outer=["encoder", "transformer.encoder"])


def recurrent() -> Row:
    module = made(BlockRNNModel(**SIZE, model="LSTM", hidden_dim=8, likelihood=GaussianLikelihood()))
    return Row(module, windows(), inner="fc", outer="rnn")


ROWS = {
    "_NBEATSModule": nbeats,
    "_NHiTSModule": nhits,
    "_DLinearModule": dlinear,
    "_TCNModule": tcn,
    "_TideModule": tide,
    "_TransformerModule": transformer,
    "_BlockRNNModule, likelihood": recurrent,
}

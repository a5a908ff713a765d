"""Forecasters, as `from_dataset` makes them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch  # noqa: F401 - the package's namespace
import numpy as np
import pandas as pd
from pytorch_forecasting import DeepAR, NBeats, NHiTS, RecurrentNetwork, TemporalFusionTransformer
from pytorch_forecasting.data import EncoderNormalizer, TimeSeriesDataSet

from published import Row

DISTRIBUTION = "pytorch-forecasting"


def series() -> TimeSeriesDataSet:
    """Return four series of thirty days, cut into windows."""
    days = np.arange(30)
    table = pd.concat(pd.DataFrame({"day": days, "series": str(i), "y": np.sin(days / (2 + i)) + 2}) for i in range(4))
    return TimeSeriesDataSet(
        table.reset_index(drop=True),
        time_idx="day",
        target="y",
        group_ids=["series"],
        max_encoder_length=8,
        max_prediction_length=4,
        min_encoder_length=8,
        time_varying_unknown_reals=["y"],
        target_normalizer=EncoderNormalizer(),
    )


def batches(data: TimeSeriesDataSet) -> list[Any]:
    """Return two batches of four windows."""
    loader = iter(data.to_dataloader(batch_size=4, num_workers=0))
    return [next(loader), next(loader)]


def nbeats() -> Row:
    data = series()
    module = NBeats.from_dataset(data, widths=[8, 8], num_blocks=[1, 1], optimizer="adam")
    return Row(module, batches(data), inner="net_blocks.1", outer="net_blocks.0")


def nhits() -> Row:
    data = series()
    module = NHiTS.from_dataset(data, hidden_size=8, optimizer="adam")
    return Row(module, batches(data), inner="model.blocks.2", outer=["model.blocks.0", "model.blocks.1"])


def temporal_fusion() -> Row:
    data = series()
    module = TemporalFusionTransformer.from_dataset(data, hidden_size=8, attention_head_size=2, optimizer="adam")
    return Row(module, batches(data), inner="output_layer", outer="lstm_encoder")


def deepar() -> Row:
    data = series()
    module = DeepAR.from_dataset(data, hidden_size=8, optimizer="adam")
    return Row(module, batches(data), inner="distribution_projector", outer="rnn")


def recurrent() -> Row:
    data = series()
    module = RecurrentNetwork.from_dataset(data, hidden_size=8, optimizer="adam")
    return Row(module, batches(data), inner="output_projector", outer="rnn")


ROWS = {
    "NBeats": nbeats,
    "NHiTS": nhits,
    "TemporalFusionTransformer": temporal_fusion,
    "DeepAR": deepar,
    "RecurrentNetwork": recurrent,
}

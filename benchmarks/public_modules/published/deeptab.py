"""Tables, as the package's estimators build their Lightning module."""

from __future__ import annotations

from typing import Any

import lightning  # noqa: F401 - the package's namespace
import numpy as np
import pandas as pd
from deeptab.models import (
    MLPLSS,
    FTTransformerRegressor,
    MambularRegressor,
    MLPRegressor,
    NODERegressor,
    ResNetRegressor,
    TabMRegressor,
    TabulaRNNRegressor,
)

from published import Row

DISTRIBUTION = "deeptab"


def built(estimator: Any) -> tuple[Any, list[Any]]:
    """Return the module of an estimator, and two batches of eight rows of a table."""
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"x": rng.normal(size=20), "z": rng.normal(size=20), "c": [*"ab"] * 10})
    estimator.build_model(table, rng.normal(size=20), batch_size=8)
    estimator._data_module.setup("fit")
    return estimator._task_model, list(estimator._data_module.train_dataloader())


def mlp() -> Row:
    module, batches = built(MLPRegressor())
    return Row(module, batches, inner="estimator.layers.9", outer="estimator.layers.0")


def distribution() -> Row:
    module, batches = built(MLPLSS())
    return Row(module, batches, inner="estimator.layers.9", outer="estimator.layers.0")


def ft_transformer() -> Row:
    module, batches = built(FTTransformerRegressor())
    return Row(module, batches, inner="estimator.tabular_head", outer="estimator.embedding_layer")


def mambular() -> Row:
    module, batches = built(MambularRegressor())
    return Row(module, batches, inner="estimator.tabular_head", outer="estimator.embedding_layer")


def resnet() -> Row:
    module, batches = built(ResNetRegressor())
    return Row(module, batches, inner="estimator.output_layer", outer="estimator.initial_layer")


def node() -> Row:
    module, batches = built(NODERegressor())
    module(*batches[0][0])  # its thresholds are chosen at the first batch
    # Its own backward pass differs from differences of its loss by a third, without this library too.
    return Row(module, batches, inner="estimator.tabular_head", outer="estimator.block", detaches=True)


def recurrent() -> Row:
    module, batches = built(TabulaRNNRegressor())
    return Row(module, batches, inner="estimator.tabular_head", outer="estimator.embedding_layer")


def ensemble() -> Row:
    module, batches = built(TabMRegressor())
    return Row(module, batches, inner="estimator.final_layer", outer="estimator.layers.0")


ROWS = {
    "TaskModel, MLP": mlp,
    "TaskModel, MLPLSS": distribution,
    "TaskModel, FTTransformer": ft_transformer,
    "TaskModel, Mambular": mambular,
    "TaskModel, ResNet": resnet,
    "TaskModel, NODE": node,
    "TaskModel, TabulaRNN": recurrent,
    "TaskModel, TabM": ensemble,
}

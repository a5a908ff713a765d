"""Tables, as `TabularModel` prepares its modules."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytorch_lightning  # noqa: F401 - the package's namespace
from pytorch_tabular import TabularModel
from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
from pytorch_tabular.models import (
    AutoIntConfig,
    CategoryEmbeddingModelConfig,
    FTTransformerConfig,
    GANDALFConfig,
    TabTransformerConfig,
)

from published import Row

DISTRIBUTION = "pytorch-tabular"


def prepared(config: object) -> tuple:
    """Return the module and two batches of eight rows."""
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {"x": rng.normal(size=16), "z": rng.normal(size=16), "c": [*"ab"] * 8, "y": rng.normal(size=16)}
    )
    data = DataConfig(target=["y"], continuous_cols=["x", "z"], categorical_cols=["c"])
    trainer = TrainerConfig(batch_size=8, accelerator="cpu", progress_bar="none")
    model = TabularModel(
        data_config=data, model_config=config, optimizer_config=OptimizerConfig(), trainer_config=trainer, verbose=False
    )
    datamodule = model.prepare_dataloader(train=table, validation=table, seed=0)
    return model.prepare_model(datamodule), list(datamodule.train_dataloader())


def category_embedding() -> Row:
    module, batches = prepared(CategoryEmbeddingModelConfig("regression", layers="8-4"))
    return Row(module, batches, inner="head", outer="_backbone")


def gandalf() -> Row:
    module, batches = prepared(GANDALFConfig("regression", gflu_stages=2))
    # Its masks start at the kink of their sparse softmax, where there is no derivative to compare with.
    return Row(module, batches, inner="_head", outer=["*.W_in.*", "*.W_out.*"])


def ft_transformer() -> Row:
    module, batches = prepared(FTTransformerConfig("regression", input_embed_dim=8, num_heads=2, num_attn_blocks=1))
    return Row(module, batches, inner="_head", outer="_embedding_layer")


def tab_transformer() -> Row:
    module, batches = prepared(TabTransformerConfig("regression", input_embed_dim=8, num_heads=2, num_attn_blocks=1))
    return Row(module, batches, inner="_head", outer="_backbone")


def autoint() -> Row:
    module, batches = prepared(AutoIntConfig("regression", attn_embed_dim=8, num_heads=2, num_attn_blocks=1))
    return Row(module, batches, inner="_head", outer="_backbone")


ROWS = {
    "CategoryEmbeddingModel": category_embedding,
    "GANDALFModel": gandalf,
    "FTTransformerModel": ft_transformer,
    "TabTransformerModel": tab_transformer,
    "AutoIntModel": autoint,
}

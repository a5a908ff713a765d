"""The demos of Lightning itself."""

from __future__ import annotations

import torch
from lightning.pytorch.demos.boring_classes import BoringModel, ManualOptimBoringModel
from lightning.pytorch.demos.lstm import LightningLSTM
from lightning.pytorch.demos.transformer import LightningTransformer

from published import Row

DISTRIBUTION = "lightning"


def boring() -> Row:
    module = BoringModel()
    return Row(module, torch.randn(2, 4, 32), inner="layer.bias", outer="layer.weight")


def manual() -> Row:
    module = ManualOptimBoringModel()
    losses = {"inner_loss": "step", "outer_loss": "step"}
    return Row(module, torch.randn(2, 4, 32), inner="layer.bias", outer="layer.weight", losses=losses)


def transformer() -> Row:
    module = LightningTransformer(vocab_size=12)
    module.prepare_data = lambda: None  # it fetches WikiText
    batches = [tuple(torch.randint(12, (2, 2, 5))) for _ in range(2)]
    return Row(module, batches, inner="model.decoder", outer="model.embedding")


def lstm() -> Row:
    module = LightningLSTM(vocab_size=12)
    module.prepare_data = lambda: None  # it fetches WikiText
    batches = [tuple(torch.randint(12, (2, 2, 5))) for _ in range(2)]
    losses = {"inner_loss": from_no_hidden_state, "outer_loss": from_no_hidden_state}
    return Row(module, batches, inner="model.decoder", outer="model.encoder", losses=losses)


def from_no_hidden_state(module, batch):
    """Return the training step's loss; it would start from the hidden state of the batch before, detached."""
    module.hidden = None
    return module.training_step(batch, 0)


ROWS = {
    "BoringModel": boring,
    "ManualOptimBoringModel": manual,
    "LightningTransformer": transformer,
    "LightningLSTM": lstm,
}

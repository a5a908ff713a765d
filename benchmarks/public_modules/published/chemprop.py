"""Message passing on molecules."""

from __future__ import annotations

import lightning.pytorch  # noqa: F401 - chemprop's namespace
import torch
from chemprop.data import MoleculeDatapoint, MoleculeDataset, MulticomponentDataset, build_dataloader
from chemprop.models import MPNN, MulticomponentMPNN
from chemprop.nn import (
    AttentiveAggregation,
    BinaryClassificationFFN,
    BondMessagePassing,
    MeanAggregation,
    MulticomponentMessagePassing,
    MveFFN,
    RegressionFFN,
)

from published import Row

DISTRIBUTION = "chemprop"
SMILES = ["CCO", "c1ccccc1", "CC(=O)O", "CCN", "CCCl", "C1CCCCC1", "OCC=C", "CC#N"]


def molecules(values: torch.Tensor, parts: int = 1) -> list:
    """Return two batches of four molecules with their values."""
    data = [
        MoleculeDataset([MoleculeDatapoint.from_smi(smi, [y]) for smi, y in zip(SMILES, values.tolist(), strict=True)])
        for _ in range(parts)
    ]
    dataset = data[0] if parts == 1 else MulticomponentDataset(data)
    return list(build_dataloader(dataset, batch_size=4, shuffle=False))


def regression() -> Row:
    module = MPNN(BondMessagePassing(d_h=8, depth=2), MeanAggregation(), RegressionFFN(input_dim=8, hidden_dim=8))
    return Row(module, molecules(torch.randn(8)), inner="predictor", outer="message_passing")


def classification() -> Row:
    module = MPNN(
        BondMessagePassing(d_h=8, depth=2),
        AttentiveAggregation(output_size=8),
        BinaryClassificationFFN(input_dim=8, hidden_dim=8),
        batch_norm=True,
    )
    return Row(module, molecules(torch.arange(8.0) % 2), inner="predictor", outer=["message_passing", "agg"])


def variance() -> Row:
    module = MPNN(BondMessagePassing(d_h=8, depth=2), MeanAggregation(), MveFFN(input_dim=8, hidden_dim=8))
    return Row(module, molecules(torch.randn(8)), inner="predictor", outer="message_passing")


def components() -> Row:
    module = MulticomponentMPNN(
        MulticomponentMessagePassing([BondMessagePassing(d_h=8, depth=2) for _ in range(2)], n_components=2),
        MeanAggregation(),
        RegressionFFN(input_dim=16, hidden_dim=8),
    )
    return Row(module, molecules(torch.randn(8), parts=2), inner="predictor", outer="message_passing")


ROWS = {
    "MPNN": regression,
    "MPNN, classification": classification,
    "MPNN, mean and variance": variance,
    "MulticomponentMPNN": components,
}

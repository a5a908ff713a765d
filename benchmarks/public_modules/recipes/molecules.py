import lightning.pytorch as pl
import torch
from chemprop.data import MoleculeDatapoint, MoleculeDataset, build_dataloader
from chemprop.models import MPNN
from chemprop.nn import BondMessagePassing, MeanAggregation, RegressionFFN
from rdkit import Chem
from rdkit.Chem import Crippen, Descriptors, rdMolDescriptors

from lightning_bilevel import (
    SGD,
    Episode,
    EpisodeLoader,
    FirstOrder,
    ReverseUnroll,
    bilevel,
    hypergradient,
)

pl.seed_everything(0, verbose=False)
ENDS = ["C", "O", "N", "Cl", "F", "C#N", "C(=O)O", "c1ccccc1"]
SMILES = [
    first + chain + last
    for first in ["C", "O", "N", "F"]
    for chain in ["C", "CC", "C=C"]
    for last in ENDS
]
PROPERTIES = [
    Descriptors.MolWt,
    Crippen.MolMR,
    rdMolDescriptors.CalcTPSA,
    rdMolDescriptors.CalcLabuteASA,
    Crippen.MolLogP,
]


def task(measure):
    """Return 32 molecules to adapt on and 64 others, with a standardized property."""
    order = torch.randperm(len(SMILES)).tolist()
    values = torch.tensor([measure(Chem.MolFromSmiles(SMILES[i])) for i in order])
    values = ((values - values.mean()) / values.std()).tolist()
    data = [
        MoleculeDatapoint.from_smi(SMILES[i], [y])
        for i, y in zip(order, values, strict=True)
    ]
    parts = (MoleculeDataset(part) for part in (data[:32], data[32:]))
    return [
        next(iter(build_dataloader(part, batch_size=64, shuffle=False)))
        for part in parts
    ]


def loss(model, batch):
    """Return the mean squared error."""
    return (model(batch.bmg) - batch.Y).square().mean()


model = MPNN(
    BondMessagePassing(d_h=32),
    MeanAggregation(),
    RegressionFFN(input_dim=32, n_layers=0),
    init_lr=1e-3,
)
levels = {"inner": "predictor", "outer": ["message_passing", "predictor"]}
wrapped = bilevel(
    model,
    **levels,
    inner_loss=loss,
    outer_loss=loss,
    inner_optimizer=SGD(lr=0.3),
    inner_steps=10,
)
*training, last = PROPERTIES
supports, queries = zip(
    *(task(each) for _ in range(5) for each in training), strict=True
)
new = [Episode([support], query) for support, query in (task(last) for _ in range(5))]
before = hypergradient(wrapped, FirstOrder(), new).value.item()
options = dict.fromkeys(
    ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"),
    False,
)
trainer = pl.Trainer(
    max_epochs=15, accelerator="cpu", callbacks=[ReverseUnroll()], **options
)
trainer.fit(wrapped, EpisodeLoader(inner=list(supports), outer=list(queries)))
after = hypergradient(wrapped, FirstOrder(), new).value.item()
print(
    f"squared error of logP, its readout adapted on 32 molecules: {after:.2f}; "
    f"before the fit: {before:.2f}"
)

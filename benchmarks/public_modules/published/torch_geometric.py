"""Graphs: GraphGym's Lightning module, and the package's nets in a module as in its Lightning examples."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch_geometric.data import Batch, Data
from torch_geometric.graphgym.config import cfg, set_cfg
from torch_geometric.graphgym.model_builder import GraphGymModule
from torch_geometric.nn import GAT, GCN, GIN, GraphSAGE, global_mean_pool

from published import Row

DISTRIBUTION = "torch-geometric"


def graphs() -> list[Batch]:
    """Return two batches of four rings of five nodes, of two kinds."""
    ring = torch.arange(5)
    edges = torch.stack([torch.cat([ring, ring.roll(1)]), torch.cat([ring.roll(1), ring])])
    made = [Data(x=torch.randn(5, 6), edge_index=edges, y=torch.tensor([kind])) for kind in (0, 1) * 4]
    return [Batch.from_data_list(made[:4]), Batch.from_data_list(made[4:])]


class Graphs(pl.LightningModule):
    """A net of the package, a pool and a linear classifier.

    Args:
        gnn: the net, with eight outputs.
    """

    def __init__(self, gnn: torch.nn.Module) -> None:
        super().__init__()
        self.gnn, self.classifier = gnn, torch.nn.Linear(8, 2)

    def training_step(self, data: Batch, batch_idx: int) -> torch.Tensor:
        pooled = global_mean_pool(self.gnn(data.x, data.edge_index), data.batch)
        loss = F.cross_entropy(self.classifier(pooled), data.y)
        self.log("train_loss", loss, batch_size=data.num_graphs)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def graphgym() -> Row:
    set_cfg(cfg)
    cfg.dataset.task = cfg.gnn.head = "graph"
    cfg.gnn.dim_inner, cfg.share.num_splits = 8, 1
    cfg.dataset.edge_encoder = cfg.gnn.batchnorm = False
    module = GraphGymModule(dim_in=6, dim_out=2, cfg=cfg)
    losses = {"inner_loss": on_a_copy, "outer_loss": on_a_copy}
    return Row(module, graphs(), inner="model.post_mp", outer="model.mp", losses=losses)


def on_a_copy(module: GraphGymModule, batch: Batch) -> torch.Tensor:
    """Return the training step's loss; its layers write their outputs into the batch."""
    return module.training_step(batch.clone())["loss"]


def gcn() -> Row:
    module = Graphs(GCN(6, 8, num_layers=2))
    return Row(module, graphs(), inner="classifier", outer="gnn")


def gat() -> Row:
    module = Graphs(GAT(6, 8, num_layers=2, heads=2))
    return Row(module, graphs(), inner="classifier", outer="gnn")


def gin() -> Row:
    module = Graphs(GIN(6, 8, num_layers=2, norm="batch_norm"))
    return Row(module, graphs(), inner="classifier", outer="gnn")


def sage() -> Row:
    module = Graphs(GraphSAGE(6, 8, num_layers=2))
    return Row(module, graphs(), inner="classifier", outer="gnn")


ROWS = {"GraphGymModule": graphgym, "GCN": gcn, "GAT": gat, "GIN": gin, "GraphSAGE": sage}

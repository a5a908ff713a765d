"""Single-cell models, in the training plans that the package's Trainer runs."""

from __future__ import annotations

import lightning.pytorch  # noqa: F401 - the package's namespace
import torch
from scvi import REGISTRY_KEYS
from scvi.module import PEAKVAE, SCANVAE, VAE
from scvi.train import SemiSupervisedTrainingPlan, TrainingPlan

from published import Row

DISTRIBUTION = "scvi-tools"


def cells() -> list[dict]:
    """Return two batches of counts of twelve genes in eight cells."""
    return [
        {
            REGISTRY_KEYS.X_KEY: torch.poisson(torch.full((8, 12), 3.0)),
            REGISTRY_KEYS.BATCH_KEY: torch.zeros(8, 1),
            REGISTRY_KEYS.LABELS_KEY: (torch.arange(8) % 2)[:, None],
        }
        for _ in range(2)
    ]


def vae() -> Row:
    module = TrainingPlan(VAE(12, n_hidden=8, n_latent=2, gene_likelihood="nb"), n_epochs_kl_warmup=None)
    return Row(module, cells(), inner="module.decoder", outer="module.z_encoder", lr=1e-3)


def zero_inflated() -> Row:
    module = TrainingPlan(VAE(12, n_hidden=8, n_latent=2), n_epochs_kl_warmup=None)
    return Row(module, cells(), inner="module.z_encoder", outer=["module.px_r", "module.decoder"], lr=1e-3)


def peaks() -> Row:
    module = TrainingPlan(PEAKVAE(12, n_hidden=8, n_latent=2), n_epochs_kl_warmup=None)
    return Row(module, cells(), inner="module.z_decoder", outer="module.z_encoder", lr=1e-3)


def semisupervised() -> Row:
    module = SemiSupervisedTrainingPlan(SCANVAE(12, n_labels=2, n_hidden=8, n_latent=2), n_classes=2)
    return Row(module, cells(), inner="module.classifier", outer="module.z_encoder", lr=1e-3)


ROWS = {
    "TrainingPlan, VAE": vae,
    "TrainingPlan, VAE with zero inflation": zero_inflated,
    "TrainingPlan, PEAKVAE": peaks,
    "SemiSupervisedTrainingPlan, SCANVAE": semisupervised,
}

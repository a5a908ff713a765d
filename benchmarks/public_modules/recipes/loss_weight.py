import lightning.pytorch as pl
import torch
from scvi import REGISTRY_KEYS
from scvi.module import VAE
from scvi.train import TrainingPlan

from lightning_bilevel import Adam, EpisodeLoader, ReverseUnroll, bilevel

pl.seed_everything(0, verbose=False)


def cells(count):
    """Return counts of thirty genes in cells of two kinds."""
    rates = torch.rand(2, 30, generator=torch.Generator().manual_seed(0)) * 8
    x = torch.poisson(rates[torch.randint(2, (count,))])
    return {
        REGISTRY_KEYS.X_KEY: x,
        REGISTRY_KEYS.BATCH_KEY: torch.zeros(count, 1),
        REGISTRY_KEYS.LABELS_KEY: None,
    }


def weighted_elbo(plan, batch):
    """Return the training loss, with the learned weight of the divergence."""
    return plan(batch, loss_kwargs={"kl_weight": plan.module.log_weight.exp()})[2].loss


def held_out_reconstruction(plan, batch):
    """Return what the weight is judged by."""
    return plan(batch, loss_kwargs={"kl_weight": 0.0})[2].loss


model = VAE(30, n_hidden=16, n_latent=5, gene_likelihood="poisson", dropout_rate=0.0)
model.log_weight = torch.nn.Parameter(torch.tensor(0.0))
plan = TrainingPlan(model, lr=0.05)  # its optimizer is of all parameters of the model
wrapped = bilevel(
    plan,
    inner=["module.z_encoder", "module.decoder"],
    outer="module.log_weight",
    inner_loss=weighted_elbo,
    outer_loss=held_out_reconstruction,
    inner_optimizer=Adam(lr=0.01),
    inner_steps=5,
)
options = dict.fromkeys(
    ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"),
    False,
)
trainer = pl.Trainer(
    max_steps=60, accelerator="cpu", callbacks=[ReverseUnroll()], **options
)
trainer.fit(wrapped, EpisodeLoader(inner=[cells(40)], outer=[cells(200)]))
print(f"weight of the KL divergence: {model.log_weight.exp().item():.2f}, from 1.00")

"""A fit in two processes of a module with parameters in neither level, which its author has not frozen."""

from __future__ import annotations

import sys

import torch
from pytorch_lightning import Trainer
from torch import nn

from lightning_bilevel import SGD, BilevelModule, Episode, ForwardGradient, ReverseUnroll


class Headed(BilevelModule):
    def __init__(self) -> None:
        super().__init__(inner_steps=2)
        torch.manual_seed(0)
        self.backbone, self.head, self.weight = nn.Linear(3, 4), nn.Linear(4, 1), nn.Parameter(torch.zeros(()))

    def inner_parameters(self):
        return self.head

    def outer_parameters(self):
        return [self.weight]

    def inner_loss(self, x):
        return self.head(self.backbone(x).tanh()).square().mean() * self.weight.exp()

    def outer_loss(self, x):
        return (self.head(self.backbone(x).tanh()) - 1).square().mean()

    def configure_inner_optimizer(self):
        return SGD(lr=0.1)

    def configure_optimizers(self):
        assert all(parameter.requires_grad for parameter in self.parameters()), "the flags of the author"
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def main(strategy: str) -> None:
    module = Headed()
    before = module.backbone.weight.detach().clone()
    episodes = [Episode([torch.randn(5, 3)], torch.randn(5, 3)) for _ in range(8)]
    trainer = Trainer(
        max_steps=3,
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        callbacks=[ReverseUnroll() if strategy == "ddp" else ForwardGradient(4)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(episodes, batch_size=None))
    assert torch.equal(before, module.backbone.weight)
    assert module.weight.item() != 0
    assert all(parameter.requires_grad for parameter in module.parameters())
    if trainer.global_rank == 0:
        print("trained", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

"""Weights of training examples as a function of a few outer parameters, where one weight each would be too many."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WeightNet(nn.Module):
    """From an example's loss and label to the logit of its weight: a net of one hidden layer.

    It has a few hundred parameters however many examples there are, so that fifty trusted ones can hold it, and it has
    something to say of examples that it was not trained on. (Meta-Weight-Net: Shu et al., NeurIPS 2019, which has no
    label among the inputs.)

    Args:
        num_classes: of the labels.
        width: of the hidden layer.

    >>> WeightNet(num_classes=3)(torch.tensor([0.1, 4.0]), torch.tensor([0, 2])).shape
    torch.Size([2])
    """

    def __init__(self, num_classes: int = 10, width: int = 32) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.layers = nn.Sequential(nn.Linear(1 + num_classes, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, losses: Tensor, y: Tensor) -> Tensor:
        """Return the logits (n,) of the weights of examples with these losses (n,) and labels (n,).

        The losses are taken as numbers: the inner gradient is that of the weighted losses at fixed weights.
        """
        inputs = torch.cat([losses.detach().unsqueeze(1), F.one_hot(y, self.num_classes).to(losses)], 1)
        return self.layers(inputs).squeeze(1)

"""Nets for few-shot learning, all a body and a linear head. BatchNorm uses the statistics of the batch, as in MAML."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class BodyAndHead(nn.Module):
    """A feature extractor (ANIL's outer level) and a linear layer on its features (ANIL's inner level)."""

    def __init__(self, body: nn.Module, features: int, outputs: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(features, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class MeanOverPixels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((-2, -1))


def mlp(sizes: Sequence[int] = (1, 40, 40, 1)) -> BodyAndHead:
    """The sinusoid net of MAML."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip(sizes[:-2], sizes[1:-1], strict=True):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return BodyAndHead(nn.Sequential(*layers), sizes[-2], sizes[-1])


def cnn(outputs: int, in_channels: int = 1, channels: int = 64, blocks: int = 4, pool: bool = False) -> BodyAndHead:
    """Blocks of 3×3 convolution, BatchNorm and ReLU, each of which halves the image, then the mean over pixels.

    With 4 blocks of 64 channels and strided convolutions it is the Omniglot net of MAML. ``pool`` halves by
    max-pooling instead, as MAML does on miniImageNet.
    """
    layers: list[nn.Module] = []
    for block in range(blocks):
        inputs = channels if block else in_channels
        layers += [nn.Conv2d(inputs, channels, 3, stride=1 if pool else 2, padding=1), batch_norm(channels), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pool else []
    return BodyAndHead(nn.Sequential(*layers, MeanOverPixels()), channels, outputs)


def batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, track_running_stats=False)


class Residual(nn.Module):
    """A block of ResNet-12: three 3×3 convolutions beside a 1×1 one, then max-pooling."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for depth in range(3):
            layers += [
                nn.Conv2d(channels if depth else inputs, channels, 3, padding=1, bias=False),
                batch_norm(channels),
            ]
            layers += [nn.LeakyReLU(0.1)] if depth < 2 else []
        self.convolutions = nn.Sequential(*layers)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, channels, 1, bias=False), batch_norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolutions(x) + self.shortcut(x)
        return torch.nn.functional.max_pool2d(torch.nn.functional.leaky_relu(x, 0.1), 2)


def resnet12(outputs: int, in_channels: int = 1, widths: Sequence[int] = (16, 32, 64, 128)) -> BodyAndHead:
    """ResNet-12; its usual widths are (64, 160, 320, 640) for images of 84×84, which a CPU does not carry."""
    blocks = [Residual(inputs, width) for inputs, width in zip((in_channels, *widths[:-1]), widths, strict=True)]
    return BodyAndHead(nn.Sequential(*blocks, MeanOverPixels()), widths[-1], outputs)

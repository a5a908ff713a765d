"""Layers with drawn parameters, and their derivatives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def drawn(make: Callable[[], nn.Module], shape: tuple[int, ...], dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """Return a layer with standard normal parameters, and an input."""
    generator = torch.Generator().manual_seed(0)
    net = make().to(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return net, torch.randn(shape, generator=generator, dtype=dtype)


def derivatives(net: nn.Module, x: Tensor, order: int, inputs: list[Tensor] | None = None) -> list[Tensor]:
    """Return the value, and gradients of gradients up to ``order``, each against random cotangents."""
    generator = torch.Generator().manual_seed(1)
    inputs = [x, *net.parameters()] if inputs is None else inputs
    outputs = [net(x).sin()]  # not linear in the shift
    found = [outputs[0].detach()]
    for _ in range(order):
        scalar = sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outputs)
        outputs = list(torch.autograd.grad(scalar, inputs, create_graph=True))
        found += [output.detach() for output in outputs]
    return found

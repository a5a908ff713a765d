"""The scalar whose gradient is a given hypergradient."""

from __future__ import annotations

import torch

from lightning_bilevel.calculus.surrogate import surrogate_loss


def test_gradients_are_those_given_times_what_the_loss_is_scaled_by() -> None:
    """As accumulation and gradient scalers do; each in the dtype of its parameter."""
    phi = [torch.zeros(2, requires_grad=True), torch.zeros((), dtype=torch.float64, requires_grad=True)]
    grads = [torch.tensor([1e30, -2.0]), torch.tensor(3.0, dtype=torch.float64)]
    loss = surrogate_loss(torch.tensor(0.5), grads, phi)
    assert loss.item() == 0.5
    (loss * 4).backward()
    assert all(torch.equal(parameter.grad, 4 * grad) for parameter, grad in zip(phi, grads, strict=True))

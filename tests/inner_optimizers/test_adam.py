"""What Adam keeps of a step, and its digits near a zero gradient."""

from __future__ import annotations

import pytest
import torch

from lightning_bilevel.inner_optimizers import Adam


@pytest.mark.parametrize("root_over_eps", [1e-12, 1e-6, 1.0, 1e6])
def test_a_root_below_eps_loses_no_digits_that_count(root_over_eps):
    """In float32, θ_1 - θ_0 = -lr g / (|g| + eps) has the derivative -lr eps / (|g| + eps)²."""
    eps = 1e-4
    grad = torch.tensor([root_over_eps * eps], requires_grad=True)
    optimizer, theta = Adam(lr=1.0, eps=eps), {"w": torch.zeros(1)}
    new, _ = optimizer.update(theta, {"w": grad}, optimizer.init(theta), 1)
    (derivative,) = torch.autograd.grad(new["w"], grad)
    error = abs(derivative.item() + eps / (grad.item() + eps) ** 2)
    assert error * (grad.item() + eps) < 1e-6  # of the two terms that are subtracted, which are 1 / (|g| + eps)


def test_what_adam_holds_of_a_step():
    """The gradient, the mean and the denominator: nothing else is of the size of the parameter."""
    size = 1000
    held = set()
    theta = {"w": torch.zeros(size, requires_grad=True)}
    grad = {"w": torch.ones(size).requires_grad_() * 2.0}
    optimizer = Adam()

    def note(tensor):
        if tensor.numel() == size:
            held.add(tensor.data_ptr())
        return tensor

    slots = optimizer.init(theta)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        new = optimizer.update(theta, grad, slots, 1)
    assert len(held) == 3, new

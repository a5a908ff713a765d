"""``.data`` inside function transforms: a constant to all of them, and a place to write to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from lightning_bilevel.kernels.data import data_in_transforms


def loss(x: Tensor) -> Tensor:
    return (x.data * x).sum()


def test_it_is_a_constant_to_every_level() -> None:
    x, one = torch.tensor(3.0), torch.tensor(1.0)
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    assert not first.requires_grad  # reverse over reverse: no second derivative
    with data_in_transforms():
        assert jvp(grad(loss), (x,), (one,)) == (3.0, 0.0)
        assert jvp(loss, (x,), (one,)) == (9.0, 3.0)
        assert vmap(grad(loss))(torch.ones(2)).tolist() == [1.0, 1.0]
    assert jvp(grad(loss), (x,), (one,)) == (3.0, 1.0)  # what PyTorch says: drop this where it is 0


def test_what_is_assigned_is_there() -> None:
    def moved(slow: Tensor, fast: Tensor) -> Tensor:
        slow = slow.clone()
        slow.data = slow.data * 0.5 + fast.data
        return slow * fast

    slow, fast = torch.ones(3), torch.arange(3.0)
    with data_in_transforms():
        assert vmap(moved)(slow, fast).tolist() == [0.0, 1.5, 5.0]
        value, tangent = jvp(lambda fast: moved(slow, fast), (fast,), (torch.ones(3),))
        assert value.tolist() == [0.0, 1.5, 5.0]
        assert tangent.tolist() == [0.5, 1.5, 2.5]
        with data_in_transforms():
            pass
        assert vmap(moved)(slow, fast).tolist() == [0.0, 1.5, 5.0]


def test_outside_of_transforms_and_afterwards_it_is_pytorchs() -> None:
    before = torch.Tensor.data
    with data_in_transforms():
        tensor, other = torch.zeros(2), torch.ones(3)
        tensor.data = other
        assert tensor.data_ptr() == other.data_ptr()
        assert not tensor.requires_grad_().data.requires_grad
    assert torch.Tensor.data is before
    with pytest.raises(RuntimeError, match="^accessing `data` under vmap"):
        vmap(lambda x: x.data)(torch.zeros(2))

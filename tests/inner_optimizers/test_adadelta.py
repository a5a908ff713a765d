"""Adadelta has the units of θ; without eps it does not move, and its derivatives stay finite."""

from __future__ import annotations

import torch

from lightning_bilevel.inner_optimizers import Adadelta
from tests.support.optimizers import run


def test_steps_do_not_depend_on_the_scale_of_the_loss() -> None:
    theta = torch.ones(2, dtype=torch.float64)
    small, large = (
        run(Adadelta(eps=1e-12), {"w": theta}, 5, lambda params, step, scale=scale: {"w": scale * params["w"]})["w"]
        for scale in (1.0, 1e3)
    )
    torch.testing.assert_close(small, large)


def test_derivatives_without_eps_are_finite() -> None:
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    found = run(Adadelta(eps=0.0), {"w": theta}, 3, lambda params, step: {"w": params["w"] + 1e-3})["w"]
    assert torch.isfinite(torch.autograd.grad(found.sum(), theta)[0]).all()

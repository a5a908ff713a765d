"""Lion against the published pseudocode, its derivatives, and its step of one size."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from lightning_bilevel.inner_optimizers import Lion
from tests.support.optimizers import FORMS, gradient, run, start, transform


def published(params, lr, betas, weight_decay, steps, maximize=False):
    """Algorithm 2 of the paper, in place."""
    params = {name: value.clone() for name, value in params.items()}
    moments = {name: torch.zeros_like(value) for name, value in params.items()}
    for step in range(1, steps + 1):
        for name, grad in gradient({n: p.clone() for n, p in params.items()}, step).items():
            grad = -grad if maximize else grad
            update = (betas[0] * moments[name] + (1 - betas[0]) * grad).sign()
            params[name] -= lr * (update + weight_decay * params[name])
            moments[name] = betas[1] * moments[name] + (1 - betas[1]) * grad
    return params


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_is_the_published_rule(form, maximize):
    options = {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.3}
    expected = published(start(), **options, steps=10, maximize=maximize)
    found = run(Lion(**transform(options, form), maximize=maximize), start())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_derivatives_by_rate_and_decay():
    def solve(theta, lr, decay):
        return run(Lion(lr=lr, weight_decay=decay), {"net.0.bias": theta}, 4)["net.0.bias"]

    point = [start()["net.0.bias"], torch.tensor(0.02).double(), torch.tensor(0.3).double()]
    point = [value.requires_grad_() for value in point]
    assert gradcheck(solve, point, check_forward_ad=True, check_batched_forward_grad=True)


def test_nothing_passes_through_a_sign():
    theta = torch.ones(2, dtype=torch.float64, requires_grad=True)
    slope = torch.ones(2, dtype=torch.float64, requires_grad=True)
    found = run(Lion(lr=0.1), {"w": theta}, 3, lambda params, step: {"w": slope * params["w"]})["w"]
    assert torch.equal(torch.autograd.grad(found.sum(), theta, retain_graph=True)[0], torch.ones(2).double())
    assert torch.equal(torch.autograd.grad(found.sum(), slope)[0], torch.zeros(2).double())
    assert Lion().stationary
    assert not Lion(weight_decay=0.1).stationary

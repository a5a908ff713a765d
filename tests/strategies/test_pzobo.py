"""PZOBO: differences of the inner solution along random directions, by plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_bilevel import PZOBO, hypergradient, tree
from lightning_bilevel.directions import Gaussian
from tests.support.differences import FORWARD, Make, UnitPerTensor, along, both_ways, inner_products, plain_gradients
from tests.support.problems import Mlp, Quadratic, assert_close, episodes, perturbed, train
from tests.support.seeds import key_of


@both_ways
def test_pzobo_is_differences_of_plain_responses(shared: bool) -> None:
    mu, module, (episode,) = 0.05, Mlp("Adam", shared), episodes(1)
    u = Gaussian().draw(key_of(seed=3), 0, 3, tree.detach(module.outer_named()))
    theta, d, c = plain_gradients(module, episode)

    def slope(i: int) -> float:
        moved = perturbed(
            module,
            tree.index(u, i),
            mu,
            lambda: tree.detach(train(module, episode).inner_named()),  # type: ignore
        )
        return sum(((moved[name] - value) * d[name]).sum().item() / mu for name, value in theta.items())

    grads = hypergradient(module, PZOBO(3, mu), episode, seed=3).grads
    assert_close(grads, tree.add(c, along([slope(i) for i in range(3)], u)), 1e-10)


def response(module: Quadratic) -> Tensor:
    """Return dθ_T/dφ of gradient descent, lr Σ_k (I − lr H)^k B, preceded by dθ_T/dθ_0 where that is learned."""
    decay = torch.eye(4, dtype=torch.float64) - module.lr * module.hessian
    powers = [torch.linalg.matrix_power(decay, k) for k in range(module.inner_steps + 1)]
    push = module.lr * sum(powers[:-1])
    if not module.shared:
        return push @ module.B
    return torch.cat([powers[-1] + module.proximal * push, push @ module.B], dim=1)


def check_linear_response(make: Make, mu: float, **options: Any) -> None:
    module = Quadratic(**options)
    episode = module.episode()
    phi = tree.detach(module.outer_named())
    u = Gaussian().draw(key_of(seed=2), 0, 4, phi)
    _, d, c = plain_gradients(module, episode)
    slopes = inner_products(tree.unflatten(tree.flatten(d) @ response(module), phi), u)
    assert_close(hypergradient(module, make(4, mu), episode, seed=2).grads, tree.add(c, along(slopes, u)), 1e-9)


@pytest.mark.parametrize("options", [{}, {"shared": True}, {"shared": True, "proximal": 0.4}], ids=str)
@pytest.mark.parametrize("mu", [1e-3, 1.0, 30.0])
def test_pzobo_has_no_bias_where_the_response_is_linear(mu: float, options: dict[str, Any]) -> None:
    check_linear_response(PZOBO, mu, **options)


def test_the_scale_check_rejects_normalized_directions() -> None:
    with pytest.raises(AssertionError, match="^phi: "):
        check_linear_response(lambda *args: PZOBO(*args, directions=UnitPerTensor()), 1e-3)
    with pytest.raises(AssertionError, match="^phi: "):  # nor do derivatives of h replace those of the response
        check_linear_response(FORWARD, 1.0)

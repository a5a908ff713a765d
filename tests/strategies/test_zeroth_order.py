"""ZerothOrder: differences of h along random directions, by plain loops."""

from __future__ import annotations

import pytest

from lightning_bilevel import ZerothOrder, hypergradient, tree
from lightning_bilevel.directions import Gaussian, Rademacher
from tests.support.differences import BOTH, CENTRAL, Make, along, both_ways, inner_products
from tests.support.problems import Mlp, Quadratic, assert_close, episodes, perturbed, plain_value
from tests.support.seeds import key_of


@both_ways
@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
def test_zeroth_order_is_differences_of_plain_loops(make: Make, shared: bool) -> None:
    mu, module, (episode,) = 0.05, Mlp("Adam", shared), episodes(1)
    v = Gaussian().draw(key_of(seed=3), 0, 3, tree.detach(module.outer_named()))

    def value(i: int, scale: float) -> float:
        return perturbed(module, tree.index(v, i), scale, lambda: plain_value(module, episode))

    if make is CENTRAL:
        slopes = [(value(i, mu) - value(i, -mu)) / (2 * mu) for i in range(3)]
    else:
        slopes = [(value(i, mu) - value(i, 0.0)) / mu for i in range(3)]
    result = hypergradient(module, make(3, mu), episode, seed=3)
    assert_close(result.grads, along(slopes, v), 1e-10)
    assert result.value.item() == pytest.approx(value(0, 0.0), rel=1e-12)


@pytest.mark.parametrize("mu", [1e-3, 1.0, 30.0])
def test_central_differences_have_no_bias_on_a_quadratic(mu: float) -> None:
    module = Quadratic(momentum=0.8, shared=True)
    episode = module.episode()
    exact = module.solution(episode).grads
    v = Rademacher().draw(key_of(seed=2), 0, 4, exact)
    result = hypergradient(module, CENTRAL(4, mu, directions=Rademacher()), episode, seed=2)
    assert_close(result.grads, along(inner_products(exact, v), v), 1e-9)


def test_bad_scheme() -> None:
    with pytest.raises(ValueError, match=r"^Expected `ZerothOrder\(scheme=\.\.\.\)` to be 'forward' or 'central', got"):
        ZerothOrder(scheme="backward")  # type: ignore[arg-type]

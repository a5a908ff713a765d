"""FirstOrder is the gradient of the outer loss at the trained parameters."""

from __future__ import annotations

import pytest

from lightning_bilevel import FirstOrder, hypergradient, tree
from tests.support.problems import INNER_OPTIMIZERS, Mlp, assert_close, episodes, train


@pytest.mark.parametrize("inner", INNER_OPTIMIZERS)
def test_first_order_is_the_outer_gradient_of_the_trained_net(inner: str) -> None:
    for shared in (False, True):
        module, (episode,) = Mlp(inner, shared=shared), episodes(1)
        trained = train(module, episode)
        outer = trained.outer_named()
        expected = tree.grad(trained.outer_loss(episode.outer), outer)
        assert_close(hypergradient(module, FirstOrder(), episode).grads, expected)
        assert (expected["net.head.weight"].abs().min() > 1e-4) if shared else "net.head.weight" not in expected

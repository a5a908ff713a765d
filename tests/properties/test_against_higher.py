"""The hypergradients of ``higher``, to float64 rounding, on the same nets and data."""

from __future__ import annotations

import higher
import pytest
import torch
from torch import Tensor

from lightning_bilevel import SGD, Adam, Episode, ReverseUnroll, hypergradient
from tests.support.problems import Mlp, assert_close, episodes


class EarlyEps(Adam):
    """Adam with eps added to √v before the bias correction, as `higher` does; torch adds it after."""

    def rule(self, values, step):
        lr, beta1, beta2, eps, weight_decay = values
        return super().rule((lr, beta1, beta2, eps / (1 - beta2**step) ** 0.5, weight_decay), step)


OPTIMIZERS = {
    "momentum": (SGD, {"momentum": 0.7, "weight_decay": 0.1}),
    "Adam": (Adam, {"betas": (0.7, 0.9), "eps": 1e-30}),  # where to add one so small does not matter
    "Adam, early eps": (EarlyEps, {"betas": (0.7, 0.9), "eps": 1e-2}),
}


class WithRate(Mlp):
    """An MLP whose inner optimizer is one of the above, with a learned rate."""

    def __init__(self, optimizer: str, shared: bool) -> None:
        super().__init__(shared=shared, learned=False)
        self.kind, self.options = OPTIMIZERS[optimizer]
        self.log_lr = torch.nn.Parameter(torch.tensor(-1.5, dtype=torch.float64))

    def configure_inner_optimizer(self):
        return self.kind(lr=self.log_lr.exp(), **self.options)

    def torch_optimizer(self):
        return (torch.optim.SGD if self.kind is SGD else torch.optim.Adam)(
            self.net.parameters(), lr=1.0, **self.options
        )


def with_higher(module: WithRate, episode: Episode) -> tuple[Tensor, dict[str, Tensor]]:
    """Return h and ∇h."""
    net, outer = module.net, module.outer_named()
    options = {"copy_initial_weights": not module.shared, "override": {"lr": [module.log_lr.exp()]}}
    with higher.innerloop_ctx(net, module.torch_optimizer(), **options) as (fast, optimizer):
        module.net = fast
        try:
            for step in range(module.inner_steps):
                optimizer.step(module.inner_loss(episode.inner[step % len(episode.inner)]))
            value = module.outer_loss(episode.outer)
            grads = torch.autograd.grad(value, list(outer.values()))
        finally:
            module.net = net
    return value.detach(), dict(zip(outer, grads, strict=True))


@pytest.mark.parametrize("shared", [False, True], ids=["", "MAML"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_hypergradients_are_those_of_higher(optimizer: str, shared: bool) -> None:
    module, (episode,) = WithRate(optimizer, shared), episodes(1)
    value, grads = with_higher(module, episode)
    result = hypergradient(module, ReverseUnroll(), episode)
    assert_close(result.grads, grads, 1e-12)
    torch.testing.assert_close(result.value, value, rtol=1e-14, atol=0)

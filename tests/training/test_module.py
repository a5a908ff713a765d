"""A fit of a bilevel module in a real Trainer equals a loop by hand, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningDataModule, seed_everything
from torch import Tensor, nn

from lightning_bilevel import SGD, Adam, Episode, ForwardGradient, ReverseUnroll
from tests.support.modules import (
    Cleaning,
    Maml,
    differing,
    episodes_of,
    functional_net,
    listed,
    loader,
    parameters,
    tasks,
    trainer,
)
from tests.support.seeds import seeded

# ---------------------------------------------------------------------------------------------------------------------
# The numbers
# ---------------------------------------------------------------------------------------------------------------------


def cleaning_by_hand(
    module: Cleaning,
    episodes: Iterable[Episode],
    steps: int,
    accumulate: int = 1,
    clip: Callable[[list[Tensor]], Any] = lambda outer: None,
    schedule: Callable[[Any], Any] | None = None,
    every: int = 1,
) -> list[Tensor]:
    """Train as ``Trainer.fit(Cleaning())`` does: warm start, momentum, Adam outside; with torch alone.

    Args:
        module: supplies the starting values and receives the final ones.
        episodes: the data.
        steps: outer steps.
        accumulate: episodes per outer step.
        clip: clips the gradients of the parameters that it gets.
        schedule: from the outer optimizer to a learning rate scheduler.
        every: outer steps per step of the scheduler.
    """
    outer = [module.example_weights.detach().requires_grad_(), module.log_lr.detach().requires_grad_()]
    optimizer = torch.optim.Adam(outer, lr=0.05)
    scheduler = schedule(optimizer) if schedule else None
    theta = [p.detach() for p in module.net.parameters()]
    momentum = [torch.zeros_like(p) for p in theta]
    source, values, first = iter(episodes), [], True
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        for inner, (outer_x, outer_y) in islice(source, accumulate):
            theta = [p.detach().requires_grad_() for p in theta]
            momentum = [m.detach() for m in momentum]
            for t in range(3):
                x, y, index = inner[t % len(inner)]
                loss = (outer[0][index].sigmoid() * (functional_net(theta, x) - y).square().mean(1)).mean()
                grads = torch.autograd.grad(loss, theta, create_graph=True)
                momentum = [g if first else torch.add(g, m, alpha=0.9) for g, m in zip(grads, momentum, strict=True)]
                descent = -outer[1].exp()
                theta = [torch.addcmul(p, m, descent) for p, m in zip(theta, momentum, strict=True)]
                first = False
            value = (functional_net(theta, outer_x) - outer_y).square().mean()
            (value / accumulate).backward()
            values.append(value.detach())
        clip(outer)
        optimizer.step()
        if scheduler and step % every == 0:
            scheduler.step()
    for p, value in zip(module.net.parameters(), theta, strict=True):
        p.data.copy_(value)
    return values


def step_scheduler(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


NORM, VALUE = torch.nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad_value_
EQUALITIES: dict[str, tuple[dict[str, Any], str | None, dict[str, Any]]] = {
    # Trainer arguments, interval of the learning rate scheduler, arguments of the loop by hand
    "plain": ({}, None, {}),
    "accumulate": ({"accumulate_grad_batches": 2}, None, {"accumulate": 2, "steps": 4}),
    "clip norm": ({"gradient_clip_val": 1e-3}, None, {"clip": lambda outer: NORM(outer, 1e-3)}),
    "clip value": (
        {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
        None,
        {"clip": lambda outer: VALUE(outer, 1e-3)},
    ),
    "schedule steps": ({}, "step", {"schedule": step_scheduler}),
    "schedule epochs": ({}, "epoch", {"schedule": step_scheduler, "every": 4}),
    "double": ({"precision": "64-true"}, None, {}),
    "anomaly mode": ({"detect_anomaly": True}, None, {}),
}


@pytest.mark.parametrize("name", EQUALITIES)
def test_fit_equals_a_loop_by_hand_bit_for_bit(name):
    options, interval, by_hand = EQUALITIES[name]

    class Module(Cleaning):
        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.outer_parameters(), lr=0.05)
            if interval is None:
                return optimizer
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": step_scheduler(optimizer), "interval": interval},
            }

    module, expected = seeded(Module), seeded(Module)
    dtype = torch.float64 if name == "double" else torch.float32
    episodes = islice(episodes_of(loader()), 8)
    to = lambda batch: tuple(value.to(dtype) if value.is_floating_point() else value for value in batch)  # noqa: E731
    values = cleaning_by_hand(
        expected.to(dtype),
        (Episode([to(batch) for batch in episode.inner], to(episode.outer)) for episode in episodes),
        **{"steps": 8, **by_hand},
    )
    trainer(ReverseUnroll(), max_epochs=2, **options).fit(module, loader())
    assert module.net[0].weight.dtype == dtype
    assert torch.equal(torch.stack(module.values), torch.stack(values))
    assert differing(parameters(module), parameters(expected)) == []


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_maml_equals_a_loop_by_hand(chunk_size):
    module = seeded(lambda: Maml(episode_chunk_size=chunk_size)).double()
    outer = [p.detach().clone().requires_grad_() for p in module.net.parameters()]
    optimizer = torch.optim.Adam(outer, lr=0.05)
    batches = [tasks(3, dtype=torch.float64)] * 4
    for episodes in batches:
        optimizer.zero_grad()
        for episode in episodes:
            theta = outer
            for _ in range(2):
                loss = (functional_net(theta, episode.inner[0][0]) - episode.inner[0][1]).square().mean()
                grads = torch.autograd.grad(loss, theta, create_graph=True)
                theta = [p - 0.1 * g for p, g in zip(theta, grads, strict=True)]
            ((functional_net(theta, episode.outer[0]) - episode.outer[1]).square().mean() / 3).backward()
        optimizer.step()
    trainer(ReverseUnroll()).fit(module, listed(batches))
    for p, value in zip(module.net.parameters(), outer, strict=True):
        torch.testing.assert_close(p, value, rtol=1e-9, atol=1e-12)


def test_bfloat16_mixed_is_close_to_float32():
    class Module(Cleaning):
        def on_before_optimizer_step(self, optimizer):
            self.gradient = torch.cat([p.grad.reshape(-1) for p in self.outer_parameters()])

    gradients = {}
    for precision in ("32-true", "bf16-mixed"):
        module = seeded(Module)
        fit = trainer(ReverseUnroll(), precision=precision, max_steps=1)
        fit.fit(module, loader())
        assert torch.isfinite(fit.callback_metrics["outer_loss"])
        assert torch.isfinite(fit.callback_metrics["inner_loss"])
        assert module.gradient.dtype == module.net[0].weight.dtype == torch.float32
        gradients[precision] = module.gradient
    assert not torch.equal(*gradients.values())
    assert torch.cosine_similarity(*gradients.values(), dim=0) > 0.99


def test_seed_everything_makes_two_runs_equal_bit_for_bit():
    class Module(Cleaning):
        def __init__(self):
            net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
            super().__init__(net=lambda: net, optimizer=lambda lr: Adam(lr=0.01 * lr))

    def run(seed):
        seed_everything(seed, verbose=False)
        module = Module()
        trainer(ForwardGradient(num_directions=2), max_epochs=2).fit(module, loader(shuffle=True))
        return parameters(module)

    with torch.random.fork_rng():
        first, again, other = run(1), run(1), run(2)
    assert differing(first, again) == []
    assert differing(first, other)


# ---------------------------------------------------------------------------------------------------------------------
# What a user writes
# ---------------------------------------------------------------------------------------------------------------------


def test_the_strategy_may_come_from_configure_callbacks():
    class Module(Cleaning):
        def configure_callbacks(self):
            return [ReverseUnroll()]

    module = Module()
    trainer().fit(module, loader())
    assert len(module.values) == 4


def test_the_loader_may_come_from_hooks_or_a_data_module():
    class Data(LightningDataModule):
        def train_dataloader(self):
            return loader()

    class Module(Cleaning):
        def train_dataloader(self):
            return loader()

    for module, data in ((Module(), None), (Cleaning(), Data())):
        trainer(ReverseUnroll()).fit(module, datamodule=data)
        assert len(module.values) == 4


def test_a_torch_optimizer_inside_equals_the_own_one():
    class Torch(Cleaning):
        def configure_inner_optimizer(self):
            return torch.optim.SGD(self.inner_parameters(), lr=0.1, momentum=0.9)

    class Own(Cleaning):
        def configure_inner_optimizer(self):
            return SGD(lr=0.1, momentum=0.9)

    modules = [seeded(Torch), seeded(Own)]
    for module in modules:
        module.outer_parameters = lambda module=module: [module.example_weights]
        trainer(ReverseUnroll()).fit(module, loader())
    assert differing(*map(parameters, modules)) == []

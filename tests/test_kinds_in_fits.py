"""What a callback changes during a fit is followed at the next step, as a plain loop with the change would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from torch import Tensor, nn

from lightning_bilevel import SGD, ForwardUnroll, ReverseUnroll, hypergradient
from lightning_bilevel.errors import MisconfigurationError
from tests.support.kinds import RATE, Small, Step, episodes, flat, sgd, slope, unrolled
from tests.support.modules import listed, trainer
from tests.test_kinds import Centered, centered, tenth


class Changing(Small):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.BatchNorm1d(4, affine=False).double()
        self.own = SGD(lr=RATE)
        self.scheduled = torch.optim.SGD(self.net.parameters(), lr=RATE)
        self.use_torch = False

    def inner_parameters(self) -> Any:
        return self.net

    def outer_parameters(self) -> Any:
        return [self.p]

    def predicted(self, x: Tensor) -> Tensor:
        return self.net[2](
            self.drop(self.net[1](self.net[0](x))) if self.drop.training else self.net[1](self.net[0](x))
        )

    def configure_inner_optimizer(self) -> Any:
        return self.scheduled if self.use_torch else self.own

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.outer_parameters(), lr=0.0)


def with_options(**options: Any) -> Callable[[Any], None]:
    def change(module: Any) -> None:
        for name, value in options.items():
            setattr(module, name, value)

    return change


def group(**options: Any) -> Callable[[Any], None]:
    return lambda module: module.scheduled.param_groups[0].update(options)


def decayed(module: Any, step: int, theta: list[Tensor], grads: list[Tensor], memory: Any) -> list[Tensor]:
    return sgd(module, step, theta, [g + 0.1 * v for g, v in zip(grads, theta, strict=True)], memory)


def heavy(module: Any, step: int, theta: list[Tensor], grads: list[Tensor], memory: Any) -> list[Tensor]:
    memory["m"] = [g + 0.5 * m for g, m in zip(grads, memory["m"], strict=True)] if "m" in memory else grads
    return sgd(module, step, theta, memory["m"], memory)


def slower(module: Any, step: int, theta: list[Tensor], grads: list[Tensor], memory: Any) -> list[Tensor]:
    return sgd(module, step, theta, [0.5 * g for g in grads], memory)


# name: the change, the step of the plain loop after it, whether torch.optim is used from the start
CHANGES: dict[str, tuple[Callable[[Any], None], Step, bool]] = {
    "inner_steps": (with_options(inner_steps=5), sgd, False),
    "episode_chunk_size": (with_options(episode_chunk_size=1), sgd, False),
    "evaluation mode": (lambda module: module.drop.eval(), sgd, False),
    "another optimizer, not elementwise": (with_options(own=Centered(lr=RATE)), centered, False),
    "rate of torch.optim": (group(lr=RATE / 2), slower, True),
    "momentum of torch.optim": (group(momentum=0.5), heavy, True),
    "decay of torch.optim": (group(weight_decay=0.1), decayed, True),
    "torch.optim instead": (with_options(use_torch=True), sgd, False),
}


class Change(Callback):
    """Changes the module before its second batch, and keeps the gradients of all."""

    def __init__(self, change: Callable[[Any], None]) -> None:
        self.change, self.grads = change, []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.change(pl_module)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.grads.append(pl_module.p.grad.clone())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("strategy", [ReverseUnroll, ForwardUnroll])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_followed(name: str, strategy: Any, count: int) -> None:
    change, step, by_torch = CHANGES[name]
    chosen = episodes(count)

    def before() -> Any:
        module = Changing()
        module.use_torch = by_torch
        return module

    def after() -> Any:
        module = before()
        change(module)
        return module

    watch = Change(change)
    trainer(strategy(), watch).fit(before(), listed([chosen] * 2))
    for made, found, taken in ((before, watch.grads[0], sgd), (after, watch.grads[1], step)):
        torch.testing.assert_close(found, slope(made, chosen, taken), rtol=1e-6, atol=1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [1, 3])
def test_hooks_that_come_later_are_called(count: int) -> None:
    chosen = episodes(count)

    class Plain(Small):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([self.p], lr=0.0)

        def inner_loss(self, batch: Any) -> Tensor:
            return super().inner_loss((batch[0].clone().requires_grad_(), batch[1]))

        def outer_loss(self, batch: Any) -> Tensor:
            return self.net[0].weight.square().sum()

    def hook(module: Any) -> None:
        module.net[1].register_full_backward_hook(tenth)

    def hooked() -> Any:
        module = Plain()
        hook(module)
        return module

    watch = Change(hook)
    trainer(ReverseUnroll(), watch).fit(Plain(), listed([chosen] * 2))
    torch.testing.assert_close(watch.grads[0], unrolled(Plain, chosen), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(watch.grads[1], unrolled(hooked, chosen), rtol=1e-8, atol=1e-12)


def test_hooks_of_inner_parameters_are_told() -> None:
    module = Small()
    module.net[0].weight.register_hook(lambda grad: grad * 0)
    with pytest.warns(UserWarning, match=r"hooks of the inner parameters net\.0\.weight are not called"):
        hypergradient(module, ReverseUnroll(), episodes(1))


class Stopped(Small):
    """A start that stops gradients, in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def initial_inner_parameters(self) -> Any:
        if self.way == "no_grad":
            with torch.no_grad():
                scale = self.p[0].exp()
        elif self.way == "set_grad_enabled":
            torch.set_grad_enabled(False)
            scale = self.p[0].exp()
            torch.set_grad_enabled(True)
        else:
            scale = self.p[0].exp().detach()
        return {"net.2.bias": scale.reshape(1) * self.p[1]}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("mode", ["reverse", "auto", "forward", "double_backward"])
@pytest.mark.parametrize("way", ["no_grad", "set_grad_enabled", "detach"])
def test_starts_stop_gradients_in_every_engine(way: str, mode: str, count: int) -> None:
    chosen = episodes(count)
    right = unrolled(lambda: Stopped(way), chosen)
    strategy = ReverseUnroll() if mode == "reverse" else ForwardUnroll(mode=mode)
    found = hypergradient(Stopped(way), strategy, chosen)
    torch.testing.assert_close(flat(found.grads), right, rtol=1e-8, atol=1e-12)


def frozen(module: Any) -> None:
    module.p.requires_grad_(False)


def thawed(module: Any) -> None:
    module.net[0].weight.requires_grad_(True)


def from_the_start(module: Any) -> None:
    module.inner_start = "reset"


class FrozenLayer(Small):
    def __init__(self) -> None:
        super().__init__(inner_start="warm")
        self.net[0].weight.requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (frozen, r"all outer parameters frozen during the fit"),
        (thawed, r"net\.0\.weight` thawed during the fit"),
        (from_the_start, r"inner_start='reset'` set during the fit"),
    ],
)
def test_a_change_that_cannot_be_followed_is_refused(change: Any, told: str) -> None:
    with pytest.raises(MisconfigurationError, match=told):
        trainer(ReverseUnroll(), Change(change)).fit(FrozenLayer(), listed([episodes(1)] * 2))

"""A start that is computed from the episode's own inner batches: every strategy, stacks, adaptation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bilevel import (
    SGD,
    BilevelModule,
    Episode,
    FirstOrder,
    ForwardUnroll,
    ReverseUnroll,
    TruncatedReverse,
    ZerothOrder,
    audit,
    hypergradient,
)
from lightning_bilevel.directions import Orthogonal
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.inner_optimizers import InnerOptimizer
from tests.support.problems import assert_close, draw
from tests.support.tables import Row, every_exact_strategy, every_strategy_of_several_episodes

T, RATE = 2, 0.1


class Generated(BilevelModule):
    """θ_0 is made by a layer from the means of all inner batches."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"inner_steps": T, "inner_start": "reset", **options})
        self.w, self.maker = nn.Parameter(torch.zeros(3).double()), nn.Linear(3, 3).double()
        with torch.no_grad():
            self.maker.weight.copy_(draw(3, 3, seed=1))
            self.maker.bias.copy_(draw(3, seed=2))

    def inner_parameters(self) -> list[Tensor]:
        return [self.w]

    def initial_inner_parameters(self, batches: Any) -> dict[str, Tensor]:
        return {"w": self.maker(torch.stack([x.mean(0) for x, _ in batches]).mean(0))}

    def inner_loss(self, batch: Any) -> Tensor:
        return (batch[0] @ self.w - batch[1]).square().mean() + self.maker.bias.square().sum() * self.w.square().sum()

    def outer_loss(self, batch: Any) -> Tensor:
        return (batch[0] @ self.w - batch[1]).square().mean()

    def configure_inner_optimizer(self) -> SGD:
        return SGD(lr=RATE)


def episode(seed: int = 10) -> Episode:
    x, y, a, b = draw(5, 3, seed=seed), draw(5, seed=seed + 1), draw(5, 3, seed=seed + 2), draw(5, seed=seed + 3)
    more = draw(5, 3, seed=seed + 4), draw(5, seed=seed + 5)
    return Episode([(x, y), more], (a, b))


def solution(module: Generated, data: Episode) -> tuple[Tensor, dict[str, Tensor]]:
    """Return θ_T and the gradient by a plain loop."""
    theta = module.maker(torch.stack([x.mean(0) for x, _ in data.inner]).mean(0))
    for x, y in data.inner:
        penalty = module.maker.bias.square().sum() * theta.square().sum()
        loss = (x @ theta - y).square().mean() + penalty
        theta = theta - RATE * torch.autograd.grad(loss, theta, create_graph=True)[0]
    x, y = data.outer
    grads = torch.autograd.grad((x @ theta - y).square().mean(), [module.maker.weight, module.maker.bias])
    return theta.detach(), dict(zip(["maker.weight", "maker.bias"], grads, strict=True))


@every_exact_strategy
def test_exact_strategies(row: Row) -> None:
    module, data = Generated(), episode()
    result = hypergradient(module, row.build(module), data)
    theta, grads = solution(module, data)
    assert_close(result.grads, grads, 1e-10)
    assert_close(result.state.params, {"w": theta}, 1e-12)


@every_strategy_of_several_episodes
def test_stack_is_the_mean_of_the_loop(row: Row) -> None:
    data = [episode(), episode(20), episode(30)]
    stacked, looped = (Generated(episode_chunk_size=size) for size in (3, 1))
    result, expected = (hypergradient(module, row.build(module), data) for module in (stacked, looped))
    assert_close(result.grads, expected.grads, max(row.tolerance, 1e-12))
    assert_close(result.state.params, expected.state.params, 1e-12)
    thetas = torch.stack([solution(stacked, each)[0] for each in data])
    assert_close(result.state.params, {"w": thetas}, 1e-12)


class Constant(Generated):
    """Every episode starts from the same numbers; the gradient of a part of the loss is the same number everywhere."""

    def initial_inner_parameters(self, batches: Any) -> dict[str, Tensor]:
        return {"w": 0.1 * torch.ones(3).double()}

    def inner_loss(self, batch: Any) -> Tensor:
        return 0.1 * self.maker.bias.sum() * self.w.sum() + self.maker.weight.square().mean() * self.outer_loss(batch)


@every_strategy_of_several_episodes
def test_a_start_that_is_the_same_for_all(row: Row) -> None:
    data = [episode(), episode(20), episode(30)]
    stacked, looped = (Constant(episode_chunk_size=size) for size in (3, 1))
    result, expected = (hypergradient(module, row.build(module), data) for module in (stacked, looped))
    assert_close(result.grads, expected.grads, max(row.tolerance, 1e-12))


class Heads(Generated):
    """As in Proto-MAML: the net starts as it is learned, its head from what the net makes of the batches."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.encoder, self.own = nn.Linear(3, 3).double(), nn.Parameter(draw(3, seed=3))
        with torch.no_grad():
            self.encoder.weight.copy_(draw(3, 3, seed=4))
            self.encoder.bias.copy_(draw(3, seed=5))

    def inner_parameters(self) -> list[Tensor]:
        return [self.w, *self.encoder.parameters()]

    def outer_parameters(self) -> list[Tensor]:
        return [*self.encoder.parameters(), self.own]

    def initial_inner_parameters(self, batches: Any) -> dict[str, Tensor]:
        return {"w": torch.stack([self.encoder(x).tanh().mean(0) for x, _ in batches]).mean(0)}

    def inner_loss(self, batch: Any) -> Tensor:
        return self.outer_loss(batch) + (self.own * self.w).sum()

    def outer_loss(self, batch: Any) -> Tensor:
        return (self.encoder(batch[0]).tanh() @ self.w - batch[1]).square().mean()


class FromOne(Heads):
    """The head starts as an outer parameter of another name, which the inner loss reads."""

    def initial_inner_parameters(self, batches: Any) -> dict[str, Tensor]:
        return {"w": self.own}


class FromNeither(Heads):
    """The head starts as a parameter of neither level, which the inner loss reads."""

    def __init__(self) -> None:
        super().__init__()
        self.constant = nn.Parameter(draw(3, seed=6))

    def initial_inner_parameters(self, batches: Any) -> dict[str, Tensor]:
        return {"w": self.constant}

    def inner_loss(self, batch: Any) -> Tensor:
        return super().inner_loss(batch) + (self.constant * self.w).sum()


class FromEachOther(Heads):
    """One start is computed from another one."""

    def initial_inner_parameters(self, batches: Any) -> dict[str, Tensor]:
        bias = self.encoder.bias.square()
        return {"encoder.bias": bias, "w": bias + self.own}


class Tying(InnerOptimizer):
    """Gradient descent whose update computes one part of θ from another."""

    def update(self, params: Any, grads: Any, opt_state: Any, step: int) -> Any:
        moved = {name: value - RATE * grads[name] for name, value in params.items()}
        return {**moved, "encoder.bias": moved["encoder.bias"] + 0.1 * moved["w"].sin()}, opt_state


class Tied(Heads):
    def configure_inner_optimizer(self) -> Any:
        return Tying()


def by_hand(module: Heads, data: Episode) -> dict[str, Tensor]:
    """Return the gradient by a plain loop, whose inner gradients are by θ alone."""
    own = module.initial_inner_parameters(data.inner)
    theta = {"encoder.weight": module.encoder.weight, "encoder.bias": module.encoder.bias, **own}

    def loss(theta: dict[str, Tensor], batch: Any) -> Tensor:
        x, y = batch
        hidden = (x @ theta["encoder.weight"].T + theta["encoder.bias"]).tanh()
        return (hidden @ theta["w"] - y).square().mean()

    for batch in data.inner:

        def inner(theta: dict[str, Tensor], batch: Any = batch) -> Tensor:
            constant = module.constant.detach() if isinstance(module, FromNeither) else 0
            return loss(theta, batch) + ((module.own + constant) * theta["w"]).sum()

        grads = torch.func.grad(inner)(theta)
        theta = {name: value - RATE * grads[name] for name, value in theta.items()}
        if isinstance(module, Tied):
            theta["encoder.bias"] = theta["encoder.bias"] + 0.1 * theta["w"].sin()
    names = ["encoder.weight", "encoder.bias", "own"]
    found = torch.autograd.grad(loss(theta, data.outer), [module.get_parameter(name) for name in names])
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("kind", [Heads, FromOne, FromNeither, FromEachOther, Tied])
@every_exact_strategy
def test_an_inner_gradient_is_by_what_stands_there_alone(row: Row, kind: type[Heads]) -> None:
    module, data = kind(), episode()
    strategy = row.build(module)
    found = hypergradient(module, strategy, data).grads
    expected = by_hand(module, data)
    assert_close({name: found[name] for name in expected}, expected, 1e-9)


def test_the_last_steps_and_the_start() -> None:
    """Truncated: through the last step, and the steps before count as the identity."""
    module, data = Generated(inner_steps=1), episode()
    held = hypergradient(module, FirstOrder(), data)
    theta = held.state.params["w"].requires_grad_()
    x, y = data.outer
    (d,) = torch.autograd.grad((x @ theta - y).square().mean(), theta)
    assert_close({"maker.bias": held.grads["maker.bias"]}, {"maker.bias": d}, 1e-12)
    exact = hypergradient(module, ReverseUnroll(), data).grads
    assert_close(hypergradient(module, TruncatedReverse(1), data).grads, exact)


def test_differences() -> None:
    module, data = Generated(), episode()
    strategy = ZerothOrder(12, mu=1e-5, scheme="central", directions=Orthogonal())
    assert_close(hypergradient(module, strategy, data).grads, solution(module, data)[1], 1e-6)


def test_adapted_starts_from_its_batches() -> None:
    module, data = Generated(), episode()
    with module.adapted(data.inner), torch.no_grad():
        found = module.w.clone()
    torch.testing.assert_close(found, solution(module, data)[0])
    with module.adapted(data.inner, steps=0), torch.no_grad():
        start = module.w.clone()
    torch.testing.assert_close(start, module.maker(torch.stack([x.mean(0) for x, _ in data.inner]).mean(0)))


def forms() -> dict[str, type[Generated]]:
    own = Generated.initial_inner_parameters

    class Default(Generated):
        def initial_inner_parameters(self, batches: Any = ()) -> dict[str, Tensor]:
            return own(self, batches)

    class Any_(Generated):
        def initial_inner_parameters(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
            return own(self, *args, **kwargs)

    class Super(Generated):
        def initial_inner_parameters(self, batches: Any) -> dict[str, Tensor]:
            return {**BilevelModule.initial_inner_parameters(self, batches), **own(self, batches)}

    return {"default": Default, "any": Any_, "super": Super}


@pytest.mark.parametrize("kind", forms().values(), ids=forms())
def test_forms_of_the_argument(kind: type[Generated]) -> None:
    module, data = kind(), episode()
    assert_close(hypergradient(module, ReverseUnroll(), data).grads, solution(module, data)[1], 1e-12)


def test_without_an_argument_as_before() -> None:
    class Fixed(Generated):
        def initial_inner_parameters(self) -> dict[str, Tensor]:
            return {"w": self.maker.weight[0] + self.maker.bias}

    module, data = Fixed(inner_steps=1), episode()
    assert not module.starts_from_data
    grads = hypergradient(module, ForwardUnroll(), data).grads
    assert_close(grads, hypergradient(module, ReverseUnroll(), data).grads, 1e-12)


def test_starts_anew_where_the_data_say_all() -> None:
    """No submodule can draw ``w``, and none has to: the hook returns it."""
    module, data = Generated(inner_start="reinit"), episode()
    assert_close(hypergradient(module, ReverseUnroll(), data).grads, solution(module, data)[1], 1e-12)

    class Half(Generated):
        def initial_inner_parameters(self, batches: Any) -> dict[str, Tensor]:
            return {}

    with pytest.raises(MisconfigurationError, match=r"`Half` has no `reset_parameters\(\)`, which"):
        hypergradient(Half(inner_start="reinit", allow_unused=True), ReverseUnroll(), data)


def test_a_draw_in_the_start_is_its_own_in_every_episode() -> None:
    class Noisy(Generated):
        def initial_inner_parameters(self, batches: Any) -> dict[str, Tensor]:
            start = super().initial_inner_parameters(batches)["w"]
            return {"w": start + torch.randn_like(start)}

    module, data = Noisy(), [episode(), episode()]
    theta = hypergradient(module, ReverseUnroll(), data).state.params["w"]
    assert not torch.allclose(theta[0], theta[1])


def test_audit() -> None:
    report = audit(Generated(), episode())
    verdicts = {row.strategy.partition("(")[0]: row.verdict for row in report.rows}
    assert verdicts["ReverseUnroll"] == verdicts["ForwardUnroll"] == "yes"

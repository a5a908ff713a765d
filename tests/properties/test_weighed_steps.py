"""An outer loss at every inner step, h(φ) = Σ_t w_t f(θ_t, φ): against a loop in plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_bilevel import (
    PZOBO,
    SGD,
    BilevelModule,
    Episode,
    EpisodeLoader,
    FirstOrder,
    ForwardGradient,
    ForwardUnroll,
    GammaGreedy,
    HypergradientSchedule,
    HypergradientStrategy,
    ImplicitGradient,
    ReverseUnroll,
    TruncatedReverse,
    ZerothOrder,
    audit,
    hypergradient,
)
from lightning_bilevel.directions import Orthogonal
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.linear_solvers import Neumann
from tests.support.problems import assert_close, draw
from tests.support.seeds import forked, masks

T, RATE, MOMENTUM = 4, 0.1, 0.8
EXACT: dict[str, HypergradientStrategy] = {
    "reverse": ReverseUnroll(),
    "checkpointed": ReverseUnroll(checkpoint=2),
    "every step": ReverseUnroll(checkpoint=1),
    "sqrt": ReverseUnroll(checkpoint="sqrt"),
    "truncated at T": TruncatedReverse(T),
    "forward": ForwardUnroll(),
    "forward in chunks": ForwardUnroll(chunk_size=3),
    "forward AD": ForwardUnroll(mode="forward"),
    "guided by what is exact": ForwardGradient(2, guide=ReverseUnroll()),
}
every_exact = pytest.mark.parametrize("strategy", EXACT.values(), ids=EXACT)


class Weighed(BilevelModule):
    """φ in both losses, in the weights, and, if shared, in the start; dropout in both losses."""

    def __init__(self, shared: bool = False, dropout: float = 0.0, weights: Any = "learned", **options: Any) -> None:
        super().__init__(**{"inner_steps": T, "inner_start": "reset", **options})
        self.w, self.p = nn.Parameter(draw(4, seed=1)), nn.Parameter(draw(6, seed=2))
        self.logits = nn.Parameter(draw(T, seed=3))
        self.shared, self.dropout, self.weights = shared, nn.Dropout(dropout), weights

    def inner_parameters(self) -> list[Tensor]:
        return [self.w]

    def outer_parameters(self) -> list[Tensor]:
        return [self.p, self.logits, *([self.w] if self.shared else [])]

    def outer_loss_weights(self) -> Any:
        return self.logits.softmax(0) if self.weights == "learned" else self.weights

    def inner_loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (self.p.sigmoid() * (self.dropout(x) @ self.w - y).square()).mean()

    def outer_loss(self, batch: Any) -> Tensor:
        x, y = batch
        self.log("outer", (value := (self.dropout(x) @ self.w - y + self.p.mean()).square().mean()))
        return value + self.logits.square().sum() * self.w.square().sum()

    def configure_inner_optimizer(self) -> SGD:
        return SGD(lr=RATE, momentum=MOMENTUM)


def episode(seed: int = 10) -> Episode:
    return Episode(
        [(draw(6, 4, seed=seed), draw(6, seed=seed + 1))], (draw(6, 4, seed=seed + 2), draw(6, seed=seed + 3))
    )


def by_hand(module: Weighed, data: Episode, held: int = 0) -> dict[str, Tensor]:
    """Return the gradient of the plain loop, whose first ``held`` steps count as the identity."""
    names = [
        name for name, parameter in module.named_parameters() if any(parameter is p for p in module.outer_parameters())
    ]
    phi = {name: parameter.detach().clone().requires_grad_() for name, parameter in module.named_parameters()}
    theta, velocity, total = phi["w"], 0.0, torch.zeros(())
    weights = (
        phi["logits"].softmax(0)
        if module.weights == "learned"
        else torch.as_tensor(module.weights, dtype=torch.float64)
    )
    (x, y), (a, b) = data.inner[0], data.outer
    for number in range(T):
        loss = (phi["p"].sigmoid() * (x @ theta - y).square()).mean()
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
        velocity = gradient + MOMENTUM * velocity
        step = (RATE * velocity).detach() if number < held else RATE * velocity
        velocity = velocity.detach() if number < held else velocity
        theta = theta - step
        outer = (a @ theta - b + phi["p"].mean()).square().mean() + phi["logits"].square().sum() * theta.square().sum()
        total = total + weights[number] * outer
    grads = torch.autograd.grad(total, [phi[name] for name in names], allow_unused=True)
    return {name: torch.zeros_like(phi[name]) if g is None else g for name, g in zip(names, grads, strict=True)}


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@every_exact
def test_is_the_gradient_of_the_weighed_sum(strategy: HypergradientStrategy, shared: bool) -> None:
    module = Weighed(shared)
    result = hypergradient(module, strategy, episode())
    assert_close(result.grads, by_hand(module, episode()), 1e-10)
    assert result.state.total is None or result.state.flat().keys() - {":total"} <= {"w", "momentum:w"}


@pytest.mark.parametrize("weights", [[0.1, 0.2, 0.3, 0.4], torch.tensor([0.0, 1.0, 0.0, 0.0]), (0, 0, 0, 1)], ids=str)
@every_exact
def test_constant_weights(strategy: HypergradientStrategy, weights: Any) -> None:
    module = Weighed(weights=weights, allow_unused=True)
    assert_close(hypergradient(module, strategy, episode()).grads, by_hand(module, episode()), 1e-10)


@every_exact
def test_last_weight_alone_is_the_outer_loss_at_the_end(strategy: HypergradientStrategy) -> None:
    plain, weighed = (Weighed(weights=weights, dropout=0.3) for weights in (None, [0.0, 0.0, 0.0, 1.0]))
    expected, result = (hypergradient(module, strategy, episode()) for module in (plain, weighed))
    assert_close(result.grads, expected.grads, 1e-12)
    torch.testing.assert_close(result.value, expected.value)
    assert_close(result.state.params, expected.state.params, 1e-12)


@every_exact
def test_draws_of_the_outer_losses_leave_no_trace(strategy: HypergradientStrategy) -> None:
    """Each f(θ_t) draws where the next step does, in every strategy: they agree under dropout."""
    module = Weighed(dropout=0.4)
    expected = hypergradient(module, ReverseUnroll(), episode())
    assert_close(hypergradient(module, strategy, episode()).grads, expected.grads, 1e-10)
    plain = hypergradient(Weighed(dropout=0.4, weights=None), ReverseUnroll(), episode())
    assert_close(expected.state.params, plain.state.params, 1e-12)


@pytest.mark.parametrize(
    "strategy",
    [
        ReverseUnroll(),
        ReverseUnroll(checkpoint=2),
        TruncatedReverse(2),
        ForwardUnroll(),
        GammaGreedy(0.9),
        FirstOrder(),
    ],
    ids=["reverse", "checkpointed", "truncated", "forward", "gamma", "first"],
)
def test_stack_is_the_mean_of_the_loop(strategy: HypergradientStrategy) -> None:
    data = [episode(), episode(20), episode(30)]
    stacked, looped = (Weighed(episode_chunk_size=size) for size in (3, 1))
    result, expected = (hypergradient(module, strategy, data) for module in (stacked, looped))
    assert_close(result.grads, expected.grads, 1e-12)
    torch.testing.assert_close(result.value, expected.value)
    assert_close(result.state.params, expected.state.params, 1e-12)


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("last", [0, 1, 2, 3])
def test_truncated_holds_the_first_steps(last: int, shared: bool) -> None:
    strategy = TruncatedReverse(last) if last else FirstOrder()
    module = Weighed(shared)
    assert_close(hypergradient(module, strategy, episode()).grads, by_hand(module, episode(), held=T - last), 1e-10)


def test_gamma_greedy_sums_its_estimates_for_every_step() -> None:
    module, weights = Weighed(weights=None), draw(T, seed=3).softmax(0)
    expected: dict[str, Any] = {}
    for steps, weight in zip(range(1, T + 1), weights, strict=True):
        module.inner_steps = steps
        one = hypergradient(module, GammaGreedy(0.7), episode())
        expected["value"] = expected.get("value", 0) + weight * one.value
        expected["p"] = expected.get("p", 0) + weight * one.grads["p"]
    result = hypergradient(Weighed(), GammaGreedy(0.7), episode())
    assert_close({"value": result.value, "p": result.grads["p"]}, expected, 1e-12)


def test_gamma_greedy_follows_learned_weights() -> None:
    module = Weighed()
    result = hypergradient(module, GammaGreedy(0.7), episode())
    assert_close({"logits": result.grads["logits"]}, {"logits": by_hand(module, episode())["logits"]}, 1e-10)


def test_as_many_orthogonal_directions_as_outer_parameters_are_exact() -> None:
    module = Weighed()
    result = hypergradient(module, ForwardGradient(10, Orthogonal()), episode())
    assert_close(result.grads, by_hand(module, episode()), 1e-10)


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_zeroth_order_takes_differences_of_the_sum(chunk_size: int) -> None:
    module = Weighed()
    strategy = ZerothOrder(10, mu=1e-5, scheme="central", directions=Orthogonal(), chunk_size=chunk_size)
    assert_close(hypergradient(module, strategy, episode()).grads, by_hand(module, episode()), 1e-6)


@pytest.mark.parametrize(
    "strategy",
    [
        ImplicitGradient(Neumann(3, step_size=0.1)),
        PZOBO(),
        ForwardGradient(4, guide=ImplicitGradient(Neumann(3, step_size=0.1))),
        HypergradientSchedule([(ReverseUnroll(), 1), (PZOBO(), None)]),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
def test_others_refuse(strategy: HypergradientStrategy) -> None:
    with pytest.raises(MisconfigurationError, match="with `outer_loss_weights`. This is because it judges the end"):
        hypergradient(Weighed(), strategy, episode())


def test_refuses_a_solver() -> None:
    class Solved(Weighed):
        def solve_inner(self, batches: Any) -> dict[str, Tensor]:
            return {"w": self.w + self.p.sum()}

    with pytest.raises(MisconfigurationError, match="Cannot use `outer_loss_weights` with `solve_inner`"):
        hypergradient(Solved(), ReverseUnroll(), episode())


@pytest.mark.parametrize("weights", [[], [1.0], torch.ones(T + 1), torch.ones(T, 1), 1.0, "last"], ids=str)
def test_weights_are_one_a_step(weights: Any) -> None:
    with pytest.raises(ValueError, match=r"Expected `Weighed.outer_loss_weights\(\)` to be `inner_steps` = 4 real"):
        hypergradient(Weighed(weights=weights), ReverseUnroll(), episode())


def test_logs_what_stands_at_the_end_and_the_value_of_the_sum() -> None:
    class Silent(Weighed):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.outer_parameters(), lr=0.0)

    module, data = Silent(weights=[0.25] * T), episode()
    trainer = pl.Trainer(
        max_steps=2, callbacks=[ReverseUnroll(checkpoint=1)], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, EpisodeLoader(data.inner, [data.outer] * 2))
    with forked(masks(0)):
        result = hypergradient(Silent(weights=[0.25] * T), ReverseUnroll(), data)
        theta = result.state.params["w"]
    x, y = data.outer
    at_the_end = (x @ theta - y + module.p.detach().mean()).square().mean()
    torch.testing.assert_close(trainer.callback_metrics["outer"].double(), at_the_end)
    torch.testing.assert_close(trainer.callback_metrics["outer_loss"].double(), result.value)


def test_adapts_without_the_outer_loss() -> None:
    module, data = Weighed(), episode()
    expected = hypergradient(module, ReverseUnroll(), data).state.params["w"]
    with module.adapted(data.inner):
        torch.testing.assert_close(module.w, expected)


def test_audit_looks_at_the_last_weights() -> None:
    report = audit(Weighed(weights=[0.0, 0.0, 0.0, 1.0], allow_unused=True), episode())
    verdicts = {row.strategy.partition("(")[0]: row.verdict for row in report.rows}
    assert verdicts["ReverseUnroll"] == "yes"
    assert verdicts["PZOBO"] == "refused"

"""Exact strategies agree with each other, with closed forms and with differences of loops in plain PyTorch.

Also what every strategy keeps: the module as it was, names and shapes, the outer loss at θ_T, the mean over episodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bilevel import (
    Episode,
    FirstOrder,
    GammaGreedy,
    Hypergradient,
    HypergradientStrategy,
    ImplicitGradient,
    ReverseUnroll,
    TruncatedReverse,
    hypergradient,
    tree,
)
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.inner_optimizers import InnerOptimizer
from lightning_bilevel.linear_solvers import Dense
from lightning_bilevel.tree import Params
from tests.support.problems import (
    DIFFERENCE,
    INNER_OPTIMIZERS,
    InPlace,
    Mlp,
    NoisyMlp,
    Problem,
    Quadratic,
    Ridge,
    RidgeBlackBox,
    RidgeSolver,
    assert_close,
    descend,
    directional_difference,
    draw,
    episodes,
    finite_difference,
    perturbed,
    plain_value,
    train,
)
from tests.support.seeds import call_of, forked
from tests.support.tables import (
    EXACT,
    Row,
    every_exact_strategy,
    every_strategy,
    every_strategy_of_several_episodes,
    every_strategy_with_an_inner_run,
)

both_ways = pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])


def estimate(row: Row, module: Problem, episode: Any) -> Hypergradient:
    return hypergradient(module, row.build(module), episode)


def check_differences(module: Problem, episode: Episode, grads: Params, rtol: float = 1e-6) -> None:
    """Compare with a central difference along one random direction in each outer parameter."""
    expected, actual = {}, {}
    for i, (name, grad) in enumerate(grads.items()):
        v = draw(*grad.shape, seed=500 + i)
        expected[name] = torch.tensor(directional_difference(module, episode, {name: v}), dtype=torch.float64)
        actual[name] = (grad * v).sum()
    assert_close(actual, expected, rtol)


def check_exact(row: Row, module: Problem, episode: Episode) -> Hypergradient:
    """Compare a strategy with a plain unroll, and the plain unroll with differences."""
    result = estimate(row, module, episode)
    if isinstance(row.strategy, ReverseUnroll) and row.strategy.checkpoint is None:
        check_differences(module, episode, result.grads)
    else:
        expected = hypergradient(module, ReverseUnroll(), episode)
        assert_close(result.grads, expected.grads, row.tolerance)
        assert_close(result.state.params, expected.state.params, 1e-12)
        torch.testing.assert_close(result.value, expected.value, rtol=1e-12, atol=0)
    return result


# --- The oracles themselves ---

QUADRATICS = {
    "gradient descent": {},
    "momentum": {"momentum": 0.8},
    "shared": {"momentum": 0.8, "shared": True},
    "proximal": {"momentum": 0.8, "shared": True, "proximal": 0.4},
}
every_quadratic = pytest.mark.parametrize("options", QUADRATICS.values(), ids=QUADRATICS)


@every_quadratic
def test_closed_form_of_the_quadratic_is_that_of_a_plain_loop(options: dict[str, Any]) -> None:
    module = Quadratic(inner_steps=7, **options)
    episode = module.episode()
    solution = module.solution(episode)
    torch.testing.assert_close(train(module, episode).theta.detach(), solution.theta, rtol=1e-12, atol=1e-12)
    assert plain_value(module, episode) == pytest.approx(solution.value.item(), rel=1e-12)
    assert_close(finite_difference(module, episode), solution.grads, 1e-7)


@every_quadratic
def test_quadratic_tends_to_its_optimum(options: dict[str, Any]) -> None:
    module = Quadratic(inner_steps=2**12, **options)
    episode = module.episode()
    limit, optimum = module.solution(episode), module.optimum(episode)
    torch.testing.assert_close(limit.theta, optimum.theta)
    assert_close(limit.grads, optimum.grads)
    assert_close(module.implicit(episode, optimum.theta), optimum.grads)


def test_optimum_of_ridge_regression() -> None:
    module = Ridge()
    episode = module.episode()
    weight, _, grads = module.optimum(episode)
    with torch.no_grad():
        module.weight.copy_(weight)
    assert torch.autograd.grad(module.inner_loss(episode.inner[0]), module.weight)[0].abs().max() < 1e-12
    for unit, expected in zip(torch.eye(3, dtype=torch.float64), grads["log_penalty"], strict=True):
        ahead, behind = (
            perturbed(module, {"log_penalty": unit}, scale, lambda: module.optimum(episode).value.item())
            for scale in (DIFFERENCE, -DIFFERENCE)
        )
        assert (ahead - behind) / (2 * DIFFERENCE) == pytest.approx(expected.item(), rel=1e-7)


def test_differences_leave_the_module_as_it_was() -> None:
    module = Mlp(shared=True)
    before = deepcopy(module.state_dict())
    finite_difference(module, *episodes(1))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_the_checks_reject_a_hypergradient_that_is_slightly_off() -> None:
    module, (episode,) = Mlp(), episodes(1)
    grads = hypergradient(module, ReverseUnroll(), episode).grads
    off = {**grads, "log_penalty": grads["log_penalty"] * (1 + 1e-5)}
    with pytest.raises(AssertionError, match=r"^log_penalty: "):
        check_differences(module, episode, off)
    with pytest.raises(AssertionError, match=r"^log_penalty: "):
        assert_close(tree.scale(off, 1.0), grads)


# --- Exactness ---


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@every_exact_strategy
def test_quadratic_in_closed_form(row: Row, steps: int) -> None:
    for options in [QUADRATICS["proximal"]] if steps == 50 else QUADRATICS.values():
        module = Quadratic(steps, **options)
        episode = module.episode()
        result, solution = estimate(row, module, episode), module.solution(episode)
        assert_close(result.grads, solution.grads, row.tolerance)
        torch.testing.assert_close(result.value, solution.value)
        torch.testing.assert_close(result.state.params["theta"], solution.theta)


@cache
def mlp(inner: str, shared: bool, tied: bool) -> tuple[Mlp, Episode, Hypergradient]:
    """Return a module, an episode and the hypergradient that a plain unroll gives."""
    module, (episode,) = Mlp(inner, shared, tied), episodes(1)
    return module, episode, hypergradient(module, ReverseUnroll(), episode)


every_mlp = [
    pytest.mark.parametrize("tied", [False, True], ids=["", "tied"]),
    both_ways,
    pytest.mark.parametrize("inner", INNER_OPTIMIZERS),
]


def with_every_mlp(test: Any) -> Any:
    for mark in every_mlp:
        test = mark(test)
    return test


@with_every_mlp
def test_plain_unroll_equals_finite_differences_of_a_plain_loop(inner: str, shared: bool, tied: bool) -> None:
    module, episode, result = mlp(inner, shared, tied)
    check_differences(module, episode, result.grads)
    trained = train(module, episode)
    assert_close(result.state.params, tree.detach(trained.inner_named()), 1e-12)
    torch.testing.assert_close(result.value, trained.outer_loss(episode.outer).detach(), rtol=1e-12, atol=0)


@with_every_mlp
@pytest.mark.parametrize(
    "row",
    # Chunks of directions meet the optimizers in the tests below.
    [pytest.param(row, id=name, marks=[pytest.mark.slow] * ("chunks" in name)) for name, row in EXACT.items()],
)
def test_exact_strategies_are_equal(row: Row, inner: str, shared: bool, tied: bool) -> None:
    module, episode, expected = mlp(inner, shared, tied)
    result = estimate(row, module, episode)
    assert_close(result.grads, expected.grads, row.tolerance)
    assert_close(result.state.params, expected.state.params, 1e-12)
    torch.testing.assert_close(result.value, expected.value, rtol=1e-12, atol=0)


@both_ways
@every_exact_strategy
def test_hyperparameters_that_are_numbers(row: Row, shared: bool) -> None:
    check_exact(row, Mlp("Adam", shared, learned=False), *episodes(1))


@every_exact_strategy
def test_a_torch_optimizer_is_taken_as_it_is(row: Row) -> None:
    class Torch(Mlp):
        def configure_inner_optimizer(self):
            return self.torch_optimizer()

    (episode,) = episodes(1)
    ours, theirs = Mlp("nesterov", learned=False), Torch("nesterov", learned=False)
    assert_close(estimate(row, theirs, episode).grads, estimate(row, ours, episode).grads)


@every_exact_strategy
def test_differentiable_solver(row: Row) -> None:
    check_solver(row.build(RidgeSolver()), row.tolerance)


@pytest.mark.parametrize(
    "strategy", [TruncatedReverse(steps=1), GammaGreedy(gamma=0.9), GammaGreedy(gamma=0)], ids=["truncated", "0.9", "0"]
)
def test_a_differentiable_solver_is_one_step_of_which_nothing_is_left_out(strategy: HypergradientStrategy) -> None:
    check_solver(strategy)


def check_solver(strategy: HypergradientStrategy, rtol: float = 1e-9) -> None:
    module = RidgeSolver()
    episode = module.episode()
    result, (weight, value, grads) = hypergradient(module, strategy, episode), module.optimum(episode)
    assert_close(result.grads, grads, rtol)
    assert_close(result.state.params, {"weight": weight})
    torch.testing.assert_close(result.value, value)


@every_strategy
def test_black_box_solver(row: Row) -> None:
    module = RidgeBlackBox(**row.needs)
    episode = module.episode()
    strategy = row.build(module)
    if strategy.needs_steps or "run" in strategy.differentiates:
        with pytest.raises(MisconfigurationError, match="^Cannot use `.*` with `solve_inner`"):
            hypergradient(module, strategy, episode)
        return
    result, (weight, value, _) = hypergradient(module, strategy, episode), module.optimum(episode)
    assert_close(result.state.params, {"weight": weight})
    torch.testing.assert_close(result.value, value)


@every_exact_strategy
def test_proximal_term_in_the_limit(row: Row) -> None:
    module = Quadratic(inner_steps=40, lr=0.6, shared=True, proximal=1.0)
    episode = module.episode()
    assert_close(estimate(row, module, episode).grads, module.optimum(episode).grads)


class Hypernet(Mlp):
    """Part of θ starts at a function of φ, part of it at φ itself if ``shared``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.code = nn.Parameter(draw(2, seed=3))

    def initial_inner_parameters(self):
        return {"net.head.weight": torch.outer(self.code, self.code.sin()), "net.second.bias": self.code.tanh()}


@both_ways
@every_exact_strategy
def test_start_that_depends_on_the_outer_parameters(row: Row, shared: bool) -> None:
    check_exact(row, Hypernet(shared=shared), *episodes(1))


@every_exact_strategy
def test_warm_start_goes_on_as_one_long_run(row: Row) -> None:
    module, (episode,) = Mlp("Adam"), episodes(1)
    functional = module.functional()
    phi, problem = functional.phi(), functional.problem
    first = hypergradient(module, ReverseUnroll(), episode)
    with functional.session():
        result = row.build(module).estimate(problem, first.carry, phi, episode, call_of())
    assert result.state.steps == 2 * module.inner_steps

    trained = deepcopy(module)
    optimizer = trained.torch_optimizer()
    descend(trained, optimizer, episode)

    def value() -> float:
        last, its = deepcopy((trained, optimizer))
        hyperparameters = last.log_hyperparameters.exp().tolist()
        its.param_groups[0].update(last.inner.arguments(hyperparameters))
        descend(last, its, episode)
        return last.outer_loss(episode.outer).item()

    assert result.value.item() == pytest.approx(value(), rel=1e-12)
    for i, (name, grad) in enumerate(result.grads.items()):
        v = draw(*grad.shape, seed=i)
        ahead, behind = (perturbed(trained, {name: v}, scale, value) for scale in (DIFFERENCE, -DIFFERENCE))
        assert (grad * v).sum().item() == pytest.approx((ahead - behind) / (2 * DIFFERENCE), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("start", ["warm", "reset"])
def test_present_values_are_the_start_outside_of_a_fit(start: str) -> None:
    module, (episode,) = Mlp(inner_start=start), episodes(1)
    result = hypergradient(module, ReverseUnroll(), episode)
    assert_close(result.state.params, tree.detach(train(module, episode).inner_named()), 1e-12)


@every_exact_strategy
def test_reinit_starts_at_fresh_values_of_the_modules_own(row: Row) -> None:
    module, (episode,) = Mlp(inner_start="reinit"), episodes(1)
    reset = hypergradient(Mlp(), ReverseUnroll(), episode)
    result = estimate(row, module, episode)
    assert (result.state.params["net.head.weight"] - reset.state.params["net.head.weight"]).abs().min() > 1e-3
    again = hypergradient(module, ReverseUnroll(), episode)
    assert_close(result.grads, again.grads, row.tolerance)
    assert_close(result.state.params, again.state.params, 1e-12)


# --- Learned inner optimizers ---


class Recurrent(InnerOptimizer):
    """An LSTM per entry of θ, as in learning to learn by gradient descent."""

    elementwise = True

    def __init__(self, cell: nn.LSTMCell, head: nn.Linear) -> None:
        self.cell, self.head = cell, head

    def init(self, params):
        return {slot: {name: p.new_zeros(*p.shape, 1) for name, p in params.items()} for slot in ("hidden", "memory")}

    def update(self, params, grads, opt_state, step):
        new, after = {}, {slot: {} for slot in opt_state}
        for name, param in params.items():
            before = [opt_state[slot][name].reshape(-1, 1) for slot in ("hidden", "memory")]
            hidden, memory = self.cell(grads[name].reshape(-1, 1), before)
            new[name] = param - self.head(hidden).reshape(param.shape)
            after["hidden"][name], after["memory"][name] = (x.reshape(*param.shape, 1) for x in (hidden, memory))
        return new, after


class Clipped(InnerOptimizer):
    """Gradient descent with a smooth bound on the norm over all of θ: entries mix."""

    elementwise = False

    def __init__(self, lr: Tensor) -> None:
        self.lr = lr

    def update(self, params, grads, opt_state, step):
        return tree.add(params, grads, alpha=-self.lr / (0.1 + tree.norm(grads))), opt_state


class LearnedOptimizer(Mlp):
    def __init__(self, rule: type[InnerOptimizer], shared: bool = False, **options: Any) -> None:
        super().__init__(shared=shared, inner_steps=2, **options)
        self.rule = rule
        with forked(3):
            self.cell, self.head = nn.LSTMCell(1, 1).double(), nn.Linear(1, 1).double()

    def outer_parameters(self):
        used = {Recurrent: ("cell", "head"), Clipped: ("log_hyperparameters",)}[self.rule]
        used = (*used, "example_weights", "log_penalty", *(["net"] if self.shared else []))
        return [p for name, p in self.named_parameters() if name.startswith(used)]

    def configure_inner_optimizer(self):
        return Recurrent(self.cell, self.head) if self.rule is Recurrent else Clipped(self.log_hyperparameters[0].exp())

    def torch_optimizer(self):
        return InPlace(self, self.configure_inner_optimizer)


learned_rules = pytest.mark.parametrize("rule", [Recurrent, Clipped], ids=["Recurrent", "Clipped"])


@learned_rules
@every_exact_strategy
def test_learned_inner_optimizer(row: Row, rule: type[InnerOptimizer]) -> None:
    grads = check_exact(row, LearnedOptimizer(rule, shared=rule is Clipped), *episodes(1)).grads
    learned = ["log_hyperparameters"] if rule is Clipped else ["cell.weight_ih", "cell.weight_hh", "head.weight"]
    assert all(tree.norm({name: grads[name]}) > 1e-6 for name in learned)


@learned_rules
@every_exact_strategy
def test_learned_inner_optimizer_on_stacked_episodes(row: Row, rule: type[InnerOptimizer]) -> None:
    module, several = LearnedOptimizer(rule), episodes(2)
    assert_close(estimate(row, module, several).grads, mean(row, module, several).grads, row.tolerance)


class ByStep(InnerOptimizer):
    """Descent at a rate for each step, the last one for all that follow."""

    def __init__(self, rates: Sequence[float | Tensor]) -> None:
        self.rates = rates

    def update(self, params, grads, opt_state, step):
        return tree.add(params, grads, alpha=-self.rates[min(step, len(self.rates)) - 1]), opt_state


class Rates(Mlp):
    """Five inner steps, at learned rates."""

    def __init__(self, **options: Any) -> None:
        super().__init__("SGD", inner_steps=5, **options)

    def outer_parameters(self):
        return [p for p in super().outer_parameters() if p is not self.log_hyperparameters]

    def configure_inner_optimizer(self):
        return ByStep(self.rates)

    def torch_optimizer(self):
        return InPlace(self, self.configure_inner_optimizer)


class RateOfEachStep(Rates):
    """As in MAML++."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        rates = torch.linspace(0.3, 0.7, 5, dtype=torch.float64)
        self.rates = nn.ParameterList([nn.Parameter(rate) for rate in rates])


class LateRate(Rates):
    """A warm-up of two steps comes before the learned rate, which the outer loss reads as well."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.late = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    @property
    def rates(self):
        return [0.1, 0.1, self.late]

    def outer_loss(self, batch):
        return super().outer_loss(batch) + 0.01 * self.late


@pytest.mark.parametrize("kind", [RateOfEachStep, LateRate])
@every_exact_strategy
def test_a_rate_that_enters_at_any_step_is_differentiated(row: Row, kind: type[Rates]) -> None:
    module = kind(shared=True)
    grads = check_exact(row, module, *episodes(1)).grads
    learned = [name for name in grads if name.startswith(("rates", "late"))]
    assert len(learned) == (5 if kind is RateOfEachStep else 1)
    by_the_outer_loss = 0.01 if kind is LateRate else 0.0
    assert all((grads[name] - by_the_outer_loss).abs() > 1e-4 for name in learned)


@pytest.mark.parametrize("kind", [RateOfEachStep, LateRate])
def test_a_rate_that_enters_at_any_step_is_refused_where_it_cannot_be_seen(kind: type[Rates]) -> None:
    message = "^Cannot use `ImplicitGradient` with an inner optimizer that depends on the outer parameters"
    with pytest.raises(MisconfigurationError, match=message):
        hypergradient(kind(), ImplicitGradient(Dense()), *episodes(1))


# --- Several episodes ---


class Counting(Mlp):
    """Counts how often its inner loss is called; ``learned`` would be refused by implicit strategies."""

    def __init__(self, **options: Any) -> None:
        super().__init__("SGD", learned=False, **options)
        self.count = SimpleNamespace(calls=0)  # not an attribute of the module's own, which an estimate puts back

    def inner_loss(self, batch):
        self.count.calls += 1
        return super().inner_loss(batch)


def mean(row: Row, module: Problem, several: list[Episode]) -> Hypergradient:
    """Return the mean of single estimates; θ_T and buffers stacked."""
    results = [estimate(row, module, episode) for episode in several]
    return Hypergradient(
        torch.stack([result.value for result in results]).mean(),
        tree.map(lambda *grads: torch.stack(grads).mean(0), *[result.grads for result in results]),
        results[0].state.__class__(tree.stack([result.state.params for result in results])),
        {name: torch.stack([result.metrics[name] for result in results]).mean() for name in results[0].metrics},
    )


@every_strategy_of_several_episodes
def test_several_episodes_give_the_mean_stacked_or_looped(row: Row) -> None:
    several = episodes(3)
    expected = mean(row, Counting(**row.needs), several)
    calls = []
    for chunk_size in (2, None):
        module = Counting(episode_chunk_size=chunk_size, **row.needs)
        result = estimate(row, module, several)
        calls.append(module.count.calls)
        assert_close(result.grads, expected.grads, row.tolerance)
        assert_close(result.state.params, expected.state.params)
        of_all = [name for name in expected.metrics if not name.endswith("residual")]  # these are joint norms
        assert_close({name: result.metrics[name] for name in of_all}, {name: expected.metrics[name] for name in of_all})
        torch.testing.assert_close(result.value, expected.value)
    assert calls[0] > calls[1] or not row.strategy.supports_stacking


class Mixed(FirstOrder):
    """Exact for a problem whose inner loss has half the outer loss in it, as a penalty would."""

    def estimate(self, problem, carry, phi, episode, call):
        def inner_loss(theta: Params, phi: Params, batch: Any, buffers: Params) -> tuple[Tensor, Params]:
            loss, after = problem.inner_loss(theta, phi, batch, buffers)
            return loss + 0.5 * problem.outer_loss(theta, phi, episode.outer, buffers), after

        return ReverseUnroll().estimate(replace(problem, inner_loss=inner_loss), carry, phi, episode, call)


def test_a_strategy_that_mixes_both_losses_gives_the_mean_stacked_or_looped() -> None:
    several = episodes(3)
    stacked, looped = (hypergradient(Counting(episode_chunk_size=size), Mixed(), several) for size in (None, 1))
    assert_close(stacked.grads, looped.grads)
    assert_close(stacked.state.params, looped.state.params)
    torch.testing.assert_close(stacked.value, looped.value)
    plain = hypergradient(Counting(), ReverseUnroll(), several)
    assert (looped.value - plain.value).abs() > 1e-3


@every_strategy_of_several_episodes
def test_episodes_of_unequal_shapes_are_looped(row: Row) -> None:
    module, several = Counting(**row.needs), episodes(3, examples=(3, 2))
    result, expected = estimate(row, module, several), mean(row, module, several)
    assert_close(result.grads, expected.grads, row.tolerance)
    assert_close(result.state.params, expected.state.params)
    torch.testing.assert_close(result.value, expected.value)


@every_exact_strategy
def test_stacked_episodes_of_shared_parameters(row: Row) -> None:
    module, several = Mlp("Adam", shared=True, inner_start="warm"), episodes(2)
    assert_close(estimate(row, module, several).grads, mean(row, module, several).grads, row.tolerance)


@every_exact_strategy
def test_several_episodes_with_a_solver(row: Row) -> None:
    module = RidgeSolver()
    several = [module.episode(seed) for seed in range(3)]
    expected = [module.optimum(episode).grads["log_penalty"] for episode in several]
    assert_close(estimate(row, module, several).grads, {"log_penalty": torch.stack(expected).mean(0)}, row.tolerance)


def test_reinit_draws_the_same_values_whether_stacked_or_looped() -> None:
    several = episodes(3)
    results = [
        hypergradient(Mlp(inner_start="reinit", episode_chunk_size=size), ReverseUnroll(), several)
        for size in (1, 2, None)
    ]
    for result in results[1:]:
        assert_close(result.state.params, results[0].state.params)
        assert_close(result.grads, results[0].grads)


# --- What every estimate keeps ---


class Noisy(NoisyMlp):
    """Counts in a buffer."""

    def __init__(self, **options: Any) -> None:
        super().__init__(learned=False, **options)
        self.register_buffer("outer_calls", torch.zeros(()))

    def outer_loss(self, batch):
        self.outer_calls += 1
        return super().outer_loss(batch)


def snapshot(module: Problem) -> dict[str, Any]:
    """Return all that a module is: what its tensors hold, and which objects they are."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {
        "values": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "objects": {name: id(tensor) for name, tensor in tensors.items()},
        "flags": {name: (tensor.requires_grad, tensor.grad) for name, tensor in tensors.items()},
        "training": [child.training for child in module.modules()],
        "attributes": [sorted(vars(child)) for child in module.modules()],
        "generator": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@every_strategy
def test_nothing_in_the_module_changes(row: Row, training: bool) -> None:
    module = Noisy(**row.needs).train(training)
    before = snapshot(module)
    for count in (1,) if row.single else (1, 2):
        estimate(row, module, episodes(count))
        after = snapshot(module)
        values, generator = after.pop("values"), after.pop("generator")
        assert [name for name, value in values.items() if not torch.equal(value, before["values"][name])] == []
        assert torch.equal(generator, before["generator"])
        assert after == {key: before[key] for key in after}


@every_strategy
def test_grads_are_named_and_shaped_as_the_outer_parameters(row: Row) -> None:
    module, (episode,) = Counting(**row.needs), episodes(1)
    result = estimate(row, module, episode)
    assert list(result.grads) == list(module.outer_named())
    for name, parameter in module.outer_named().items():
        assert result.grads[name].shape == parameter.shape
        assert result.grads[name].dtype == parameter.dtype
        assert not result.grads[name].requires_grad
    assert result.value.shape == ()
    for value in (result.value, *result.metrics.values(), *result.state.flat().values()):
        assert not value.requires_grad
    assert all(value.shape == () for value in result.metrics.values())


@every_strategy_with_an_inner_run
def test_state_and_value_are_those_of_a_plain_loop(row: Row) -> None:
    module, (episode,) = Counting(**row.needs), episodes(1)
    result, trained = estimate(row, module, episode), train(module, episode)
    assert_close(result.state.params, tree.detach(trained.inner_named()), 1e-12)
    torch.testing.assert_close(result.value, trained.outer_loss(episode.outer).detach())
    assert result.state.steps == module.inner_steps


@every_strategy
def test_the_seed_decides(row: Row) -> None:
    module, (episode,) = Noisy(**row.needs), episodes(1)
    strategy = row.build(module)
    first, again, other = (hypergradient(module, strategy, episode, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(value, again.grads[name]) for name, value in first.grads.items())
    assert first.value == again.value != other.value

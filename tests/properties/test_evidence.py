"""What is differentiated, refused and used does not hang on one probe, one strategy or one moment."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_bilevel import (
    PZOBO,
    SGD,
    BilevelModule,
    Carry,
    Episode,
    ForwardGradient,
    ForwardUnroll,
    HypergradientStrategy,
    ImplicitGradient,
    ReverseUnroll,
    TruncatedReverse,
    ZerothOrder,
    hypergradient,
    tree,
)
from lightning_bilevel.calculus import outer_value_and_grads, run
from lightning_bilevel.directions import Orthogonal
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.inner_optimizers import InnerOptimizer
from lightning_bilevel.linear_solvers import Neumann
from lightning_bilevel.problem import Hypergradient, InnerState

EXACT = {
    "reverse": ReverseUnroll(),
    "checkpointed": ReverseUnroll(checkpoint=2),
    "forward unroll": ForwardUnroll(),
    "forward mode": ForwardUnroll(mode="forward"),
    "forward gradient": ForwardGradient(6, Orthogonal()),
}


class Late(InnerOptimizer):
    """A rate that is a number first, and learned from the third step on."""

    def __init__(self, lr):
        self.lr = lr

    def update(self, params, grads, opt_state, step):
        rate = 0.1 if step <= 2 else self.lr
        return {name: value - rate * grads[name] for name, value in params.items()}, {}


class Rates(BilevelModule):
    """θ follows a quadratic; outer parameters are its target, a late rate and one rate per step."""

    def __init__(self, kind="late", **options):
        super().__init__(**{"inner_steps": 5, "inner_start": "reset", **options})
        self.kind = kind
        self.theta = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.lr = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))
        self.rates = nn.ParameterList(torch.tensor(0.1 + 0.02 * t, dtype=torch.float64) for t in range(5))

    def inner_parameters(self):
        return [self.theta]

    def outer_parameters(self):
        return [self.lr] if self.kind == "late" else self.rates

    def inner_loss(self, batch):
        return (self.theta - batch).square().sum()

    def outer_loss(self, batch):
        # The late rate is in the outer loss too, so that leaving it out of the run gives a number all the same.
        return (self.theta - batch).square().sum() + 0.01 * self.lr

    def configure_inner_optimizer(self):
        if self.kind == "late":
            return Late(self.lr)
        return PerStep(list(self.rates))


class PerStep(InnerOptimizer):
    def __init__(self, rates):
        self.rates = rates

    def update(self, params, grads, opt_state, step):
        return {name: value - self.rates[step - 1] * grads[name] for name, value in params.items()}, {}


EPISODE = Episode([torch.tensor([1.0, -2.0], dtype=torch.float64)], torch.tensor([0.5, 1.0], dtype=torch.float64))


def by_hand(module):
    """Return the gradient of h by autograd through a loop in plain PyTorch."""
    theta = torch.zeros(2, dtype=torch.float64)
    lr = module.lr.detach().requires_grad_()
    rates = [rate.detach().requires_grad_() for rate in module.rates]
    for step in range(1, 6):
        grad = 2 * (theta - EPISODE.inner[0])
        rate = (0.1 if step <= 2 else lr) if module.kind == "late" else rates[step - 1]
        theta = theta - rate * grad
    loss = (theta - EPISODE.outer).square().sum() + 0.01 * lr
    wanted = {"lr": lr} if module.kind == "late" else {f"rates.{t}": rate for t, rate in enumerate(rates)}
    return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))


@pytest.mark.parametrize("strategy", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("kind", ["late", "per step"])
def test_rates_that_enter_late_are_differentiated(kind, strategy):
    module = Rates(kind)
    if kind == "late" and isinstance(strategy, ForwardGradient):
        strategy = ForwardGradient(1, Orthogonal())
    if kind == "per step" and isinstance(strategy, ForwardGradient):
        strategy = ForwardGradient(5, Orthogonal())
    found, right = hypergradient(module, strategy, EPISODE).grads, by_hand(module)
    assert max(abs(value) for value in right.values()) > 0.1
    for name, value in right.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["late", "per step"])
def test_the_implicit_gradient_refuses_them(kind):
    with pytest.raises(MisconfigurationError, match="^Cannot use `ImplicitGradient` with an inner optimizer that dep"):
        hypergradient(Rates(kind), ImplicitGradient(Neumann(3, step_size=0.1)), EPISODE)


class Shared(BilevelModule):
    """MAML on a quadratic: θ starts at φ."""

    def __init__(self, **options):
        super().__init__(inner_steps=2, **options)
        self.theta = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))

    def inner_parameters(self):
        return [self.theta]

    def outer_parameters(self):
        return [self.theta]

    def inner_loss(self, batch):
        return (self.theta - batch).square().sum()

    outer_loss = inner_loss

    def configure_inner_optimizer(self):
        return SGD(lr=0.1)

    def configure_optimizers(self):
        return torch.optim.SGD([self.theta], lr=0.1)


class Once(torch.autograd.Function):
    """x², whose backward pass cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class SharedOnce(Shared):
    def inner_loss(self, batch):
        return Once.apply(self.theta - batch).sum()


def refused_in_a_fit(module, running, other, fit_once):
    caught = []

    class Ask(HypergradientStrategy.__mro__[1]):  # a plain callback
        def on_train_batch_end(self, trainer, pl_module, *args):
            try:
                hypergradient(pl_module, other, EPISODE)
            except MisconfigurationError as error:
                caught.append(str(error))

    fit_once(module, [running, Ask()])
    return caught


@pytest.fixture
def fit_once(tmp_path):
    import pytorch_lightning as pl

    def fit(module, callbacks):
        trainer = pl.Trainer(
            max_steps=1,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
            default_root_dir=tmp_path,
        )
        loader = torch.utils.data.DataLoader([EPISODE], batch_size=None)
        trainer.fit(module, loader)

    return fit


def test_a_second_strategy_in_a_running_fit_is_checked(fit_once):
    (message,) = refused_in_a_fit(Shared(), ReverseUnroll(), ImplicitGradient(Neumann(3, step_size=0.1)), fit_once)
    assert message.startswith("Cannot use `ImplicitGradient` with parameters shared by both levels")


def test_a_second_strategy_in_a_running_fit_is_checked_against_the_losses(fit_once):
    running = PZOBO(1, mu=1e-3)
    (message,) = refused_in_a_fit(SharedOnce(), running, ReverseUnroll(), fit_once)
    assert message.startswith("Cannot use `ReverseUnroll` with `Once`")


class Penalty(HypergradientStrategy):
    """The estimate at the solution of another inner problem, g + f/λ, which mixes both losses."""

    exact, unbiased, differentiates = False, False, frozenset({"run"})
    memory = cost = "as ReverseUnroll"

    def estimate(self, problem, carry, phi, episode, call):
        def mixed(theta, phi, batch, buffers):
            loss, buffers = problem.inner_loss(theta, phi, batch, buffers)
            return loss + problem.outer_loss(theta, phi, episode.outer, buffers) / 3.0, buffers

        return ReverseUnroll().estimate(replace(problem, inner_loss=mixed), carry, phi, episode, call)


def test_a_strategy_that_mixes_both_losses_is_the_same_stacked_and_looped():
    episodes = [Episode([torch.randn(2, dtype=torch.float64)], torch.randn(2, dtype=torch.float64)) for _ in range(4)]
    stacked, looped = (hypergradient(Shared(episode_chunk_size=size), Penalty(), episodes) for size in (4, 1))
    torch.testing.assert_close(stacked.value, looped.value, rtol=1e-12, atol=0)
    torch.testing.assert_close(stacked.grads, looped.grads, rtol=1e-12, atol=0)


def test_a_penalty_put_in_by_replace_moves_the_solution():
    functional = Shared().functional()
    problem, phi = functional.problem, functional.phi()

    def penalized(theta, phi, batch, buffers):
        loss, buffers = problem.inner_loss(theta, phi, batch, buffers)
        return loss + theta["theta"].square().sum(), buffers

    plain, moved = (
        run(p, p.start(InnerState({}), phi), phi, p.batches(EPISODE)).state.params["theta"]
        for p in (problem, replace(problem, inner_loss=penalized))
    )
    assert not torch.allclose(plain, moved)


def test_options_follow_the_module(fit_once):
    module = Rates("late")
    assert module.functional().problem.traits.warm is False
    module.inner_start, module.inner_steps = "warm", 3
    problem = module.functional().problem
    assert (problem.traits.warm, problem.inner_steps) == (True, 3)
    shared = Shared(proximal=0.0)
    assert shared.functional().problem.traits.proximal == 0
    shared.proximal = 2.0
    problem = shared.functional().problem
    assert problem.traits.proximal == 2.0
    theta = {"theta": torch.zeros(2, dtype=torch.float64)}
    loss, _ = problem.inner_loss(theta, shared.functional().phi(), EPISODE.inner[0], {})
    torch.testing.assert_close(loss, torch.tensor(5.0 + 5.0, dtype=torch.float64))


def test_an_inner_start_that_changes_before_a_fit_counts(fit_once):
    module = Rates("late", inner_start="warm")
    module.inner_start = "reset"
    module.configure_optimizers = lambda: torch.optim.SGD([module.lr], lr=0.0)
    fit_once(module, [ReverseUnroll()])
    once = module.theta.detach().clone()
    fit_once(module, [ReverseUnroll()])  # a new fit: reset to where it began, which is where the last one ended
    assert module.fit_context.memory.initial["theta"].equal(once)


@pytest.mark.parametrize("strategy", [PZOBO(3, chunk_size=3), ZerothOrder(3, mu=1e-6, chunk_size=3)])
def test_estimates_leave_a_strategy_as_it_is(strategy):
    class Branches(Rates):
        def inner_loss(self, batch):
            if self.theta.sum() > 100:  # cannot be vectorized
                return self.theta.sum()
            return (self.theta - batch).square().sum()

    module, before = Branches("late"), dict(vars(strategy))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            hypergradient(module, strategy, EPISODE)
    assert vars(strategy) == before
    messages = [str(warning.message) for warning in caught]
    assert any("cannot be vectorized over directions" in message for message in messages)
    assert len(messages) == len(set(messages)), "each warning once, though asked three times"


def test_a_users_solver_is_one_step():
    class Solved(BilevelModule):
        def __init__(self):
            super().__init__(inner_start="reset")
            self.theta = nn.Parameter(torch.zeros(2, dtype=torch.float64))
            self.target = nn.Parameter(torch.tensor([0.3, -0.7], dtype=torch.float64))

        def inner_parameters(self):
            return [self.theta]

        def inner_loss(self, batch):
            return (self.theta - batch * self.target.exp()).square().sum()

        def outer_loss(self, batch):
            return (self.theta - batch).square().sum() + self.target.sum()

        def solve_inner(self, batches):
            return {"theta": sum(batches) / len(batches) * self.target.exp()}

    module = Solved()
    right = hypergradient(module, ReverseUnroll(), EPISODE).grads["target"]
    target = module.target.detach().requires_grad_()
    loss = (EPISODE.inner[0] * target.exp() - EPISODE.outer).square().sum() + target.sum()
    torch.testing.assert_close(right, torch.autograd.grad(loss, target)[0])
    from lightning_bilevel import GammaGreedy

    for strategy in (TruncatedReverse(1), GammaGreedy(0.5), ForwardUnroll(), ReverseUnroll(checkpoint=1)):
        torch.testing.assert_close(hypergradient(module, strategy, EPISODE).grads["target"], right)


def test_a_carry_goes_on_where_the_estimate_ended():
    def plain(steps):
        module = Rates("late", inner_start="warm", inner_steps=steps)
        return module, hypergradient(module, ReverseUnroll(), EPISODE)

    module, first = plain(2)
    second = hypergradient(module, ReverseUnroll(), EPISODE, carry=first.carry)
    _, whole = plain(4)
    torch.testing.assert_close(second.state.params, whole.state.params)
    assert second.state.steps == 4
    assert isinstance(first.carry, Carry)


def test_a_plain_problem_is_estimated_without_a_module():
    functional = Rates("per step").functional()
    problem, phi = functional.problem, functional.phi()
    carry = Carry(InnerState(functional.theta()))
    found = hypergradient(replace(problem, observer=None), ReverseUnroll(), EPISODE, phi=phi, carry=carry)
    right = by_hand(Rates("per step"))
    torch.testing.assert_close(found.grads, right)
    several = hypergradient(problem, ReverseUnroll(), [EPISODE, EPISODE], phi=phi, carry=carry)
    torch.testing.assert_close(several.grads, right)
    with pytest.raises(MisconfigurationError, match="^`BilevelProblem` has no `phi` to start from"):
        hypergradient(problem, ReverseUnroll(), EPISODE, carry=carry)
    with pytest.raises(MisconfigurationError, match="^`BilevelProblem` has no `carry` to start from"):
        hypergradient(problem, ReverseUnroll(), EPISODE, phi=phi)


def test_an_estimate_reports_what_its_own_outer_evaluation_left():
    class Own(HypergradientStrategy):
        exact, unbiased, differentiates, memory, cost = False, False, frozenset(), "", ""

        def estimate(self, problem, carry, phi, episode, call):
            start = problem.start(carry.inner, phi)
            state, metrics = run(problem, start, phi, problem.batches(episode))
            value, _, c, observed = outer_value_and_grads(problem, state, phi, episode)
            outer_value_and_grads(problem, start, phi, episode)  # of no account
            return Hypergradient(value, tree.zeros_like(c), state, metrics, observed=observed)

    class Logs(Shared):
        def outer_loss(self, batch):
            loss = self.inner_loss(batch)
            self.log("seen", loss)
            return loss

    result = hypergradient(Logs(), Own(), EPISODE)
    torch.testing.assert_close(result.observed.calls["seen"][0].double(), result.value)


class Bounded(InnerOptimizer):
    """Gradient descent with a bound on the norm over all of θ."""

    def update(self, params, grads, opt_state, step):
        factor = (1 / tree.norm(grads)).clamp(max=1.0)
        return {name: value - 0.3 * factor * grads[name] for name, value in params.items()}, {}


class Clipped(SGD):
    def update(self, params, grads, opt_state, step):
        factor = (1 / tree.norm(grads)).clamp(max=1.0)
        return super().update(params, tree.scale(grads, factor), opt_state, step)


class Claims(Bounded):
    elementwise = True


def episodes(count):
    return [
        Episode([3 * torch.randn(2, dtype=torch.float64)], torch.randn(2, dtype=torch.float64)) for _ in range(count)
    ]


@pytest.mark.parametrize("make", [Bounded, lambda: Clipped(lr=0.3)], ids=["own", "of ours"])
def test_an_update_that_mixes_entries_keeps_episodes_apart(make):
    class Task(Shared):
        def configure_inner_optimizer(self):
            return make()

    several = episodes(4)
    together = hypergradient(Task(), ReverseUnroll(), several).grads["theta"]
    alone = [hypergradient(Task(), ReverseUnroll(), each).grads["theta"] for each in several]
    torch.testing.assert_close(together, torch.stack(alone).mean(0))


def test_an_update_that_claims_to_be_elementwise_is_refused():
    class Task(Shared):
        def configure_inner_optimizer(self):
            return Claims()

    with pytest.raises(MisconfigurationError, match="^Cannot use an inner optimizer of `Task` that says it is `elemen"):
        hypergradient(Task(), ReverseUnroll(), episodes(2))

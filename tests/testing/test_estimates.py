"""Properties of single estimates: each fails on a fake that lacks it, and says what is wrong."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_bilevel import FirstOrder, ForwardGradient, HypergradientStrategy, ReverseUnroll, TruncatedReverse, tree
from lightning_bilevel.calculus import outer_value_and_grads, run
from lightning_bilevel.directions import DirectionSampler, Gaussian, Rademacher
from lightning_bilevel.errors import combination_error
from lightning_bilevel.problem import BilevelProblem, Carry, Episode, Hypergradient
from lightning_bilevel.randomness import Call, Key
from lightning_bilevel.testing import estimates as properties
from lightning_bilevel.tree import Params

Change = Callable[[Hypergradient], Hypergradient]


class Changed(FirstOrder):
    """An estimate of which something is changed."""

    def __init__(self, change: Change) -> None:
        self.change = change

    def estimate(self, *args: Any) -> Hypergradient:
        return self.change(super().estimate(*args))


def fails(name: str, fake: HypergradientStrategy, message: str) -> None:
    with pytest.raises(AssertionError, match=rf"^`{type(fake).__name__}\(.*\)` fails `{name}`: {message}"):
        getattr(properties, name)(fake)


def on_grads(change: Callable[[Tensor], Tensor]) -> Change:
    return lambda result: result._replace(grads=tree.map(change, result.grads))


# --- What comes back ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda result: result.grads, r"AttributeError"),
        (lambda r: r._replace(grads=dict(list(r.grads.items())[1:])), r"`grads` is of \['features', 'log_penalty'\]"),
        (on_grads(lambda grad: grad.reshape(-1)), r"the estimate of `features` has shape torch.Size\(\[9\]\)"),
        (
            on_grads(Tensor.double),
            r"the estimate of `weights` has dtype torch.float64, and the parameter torch.float32",
        ),
        (on_grads(lambda grad: grad.requires_grad_()), r"the estimate of `weights` has a graph"),
        (on_grads(lambda grad: grad / 0), r"NonfiniteError: Expected the hypergradient of `weights` to be finite"),
        (lambda r: r._replace(value=r.value[None]), r"the value has shape \(1,\), not \(\)"),
        (lambda r: r._replace(metrics={"both": torch.zeros(2)}), r"the metric `both` has shape \(2,\), not \(\)"),
        (lambda r: r._replace(value=r.value.double()), r"the value is of torch.float64 in a problem of torch.float32"),
    ],
)
def test_form(change: Change, message: str) -> None:
    fails("estimates_every_outer_parameter", Changed(change), message)


class OneStepLess(FirstOrder):
    def estimate(self, problem: BilevelProblem, carry: Carry, phi: Params, episode: Episode, call: Call) -> Any:
        batches = problem.batches(episode)[:-1]
        state, metrics = run(problem, problem.start(carry.inner, phi), phi, batches)
        value, _, c, _ = outer_value_and_grads(problem, state, phi, episode)
        return Hypergradient(value, c, state, metrics)


def test_another_inner_run() -> None:
    fails("takes_the_inner_run", OneStepLess(), r"θ_T of `net.weight` is off by .*: \[.*\] instead of \[")
    properties.values_the_end_of_the_run(OneStepLess())


def test_another_value() -> None:
    half = Changed(lambda result: result._replace(value=result.value / 2))
    fails("values_the_end_of_the_run", half, r"the value of `h` is off by ")
    fails("takes_the_inner_run", half, r"h of `h` is off by ")


# --- Exact and unbiased ---


class SlightlyOff(ReverseUnroll):
    def estimate(self, *args: Any) -> Hypergradient:
        return on_grads(lambda grad: grad * (1 + 1e-7))(super().estimate(*args))


class WithoutTheStart(ReverseUnroll):
    """Right but where Ω_0 depends on φ."""

    def estimate(self, problem: BilevelProblem, carry: Carry, phi: Params, episode: Episode, call: Call) -> Any:
        result = super().estimate(problem, carry, phi, episode, call)
        if problem.shared:
            result = on_grads(lambda grad: grad * 0)(result)
        return result


class OtherMasks(ReverseUnroll):
    """Right but where losses draw."""

    def estimate(self, *args: Any) -> Hypergradient:
        torch.rand(1)
        return super().estimate(*args)


class ExactTruncation(TruncatedReverse):
    exact = unbiased = True


@pytest.mark.parametrize(
    ("fake", "message"),
    [
        (SlightlyOff(), r"on `Quadratic`, ∇h of `target` is off by .*: \[.*\] instead of \["),
        (WithoutTheStart(), r"on `Initialization`, ∇h of `theta` is off by "),
        (OtherMasks(), r"on `Centred, dropout`, ∇h of `weights` is off by "),
        (ExactTruncation(), r"on `Quadratic`, ∇h of `target` is off by "),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exactness(fake: HypergradientStrategy, message: str) -> None:
    fails("is_exact_where_it_says_so", fake, message)


class Refusing(ReverseUnroll):
    def refusals(self, problem: BilevelProblem) -> Any:
        what = f"`Refusing` with `inner_steps={problem.inner_steps}`"
        return [combination_error(what, "it takes seven", "Use `inner_steps=7`")]


@pytest.mark.parametrize(
    "name", ["is_exact_where_it_says_so", "estimates_every_outer_parameter", "leaves_the_module_alone"]
)
def test_a_strategy_that_refuses_everything(name: str) -> None:
    message = r"it refuses every problem of `lightning_bilevel.testing`:\nCannot use `Refusing` with `inner_steps=3`"
    fails(name, Refusing(), message)


class UnitLength(DirectionSampler):
    """Broken: directions of length 1, not √N."""

    def flat(self, key: Key, start: int, stop: int, like: Tensor) -> Tensor:
        return torch.nn.functional.normalize(Gaussian().flat(key, start, stop, like))


class OneCoordinate(ForwardGradient):
    """30% too large in one coordinate."""

    def estimate(self, *args: Any) -> Hypergradient:
        scale = torch.tensor([1.0, 1.0, 1.3])
        return on_grads(lambda grad: grad * scale.to(grad) if grad.shape == (3,) else grad)(super().estimate(*args))


class UnbiasedTruncation(TruncatedReverse):
    unbiased = True


@pytest.mark.parametrize(
    "fake", [ForwardGradient(4, UnitLength()), OneCoordinate(16), UnbiasedTruncation()], ids=lambda v: type(v).__name__
)
def test_bias(fake: HypergradientStrategy) -> None:
    message = r"the mean of 300 estimates is off by .* standard errors (in `target`\[\d\]|along ∇h): .* instead of "
    fails("is_unbiased_where_it_says_so", fake, message)


def test_what_makes_no_promise_is_not_held_to_it() -> None:
    properties.is_exact_where_it_says_so(TruncatedReverse())
    properties.is_unbiased_where_it_says_so(TruncatedReverse())


# --- What stays as it is ---


class Before(FirstOrder):
    """Does something before an estimate."""

    def __init__(self, do: Callable[[Carry, Params], Any]) -> None:
        self.do = do

    def estimate(self, problem: BilevelProblem, carry: Carry, phi: Params, episode: Episode, call: Call) -> Any:
        self.do(carry, phi)
        return super().estimate(problem, carry, phi, episode, call)


def test_parameters_are_not_changed_in_place() -> None:
    outer = Before(lambda carry, phi: phi["weights"].add_(1) if "weights" in phi else None)
    fails("leaves_the_module_alone", outer, r"MisconfigurationError: .* that writes to weights at times only\. ")
    inner = Before(lambda carry, phi: carry.inner.params["net.bias"].zero_())
    fails("leaves_the_module_alone", inner, r"MisconfigurationError: .* that writes to net\.bias at times only\. ")


def test_generators_are_not_seeded() -> None:
    seeding = Before(lambda carry, phi: random.seed(3))
    # On a module the surroundings of an estimate put it back.
    fails("draws_by_its_key", seeding, r"an estimate draws from the global generator of python")


class Drawn(DirectionSampler):
    """Broken: directions from a global generator."""

    def __init__(self, draw: Callable[..., Any]) -> None:
        self.draw_from = draw

    def flat(self, key: Key, start: int, stop: int, like: Tensor) -> Tensor:
        return torch.as_tensor(self.draw_from(stop - start, like.numel())).to(like)


class AlwaysTheSame(DirectionSampler):
    def flat(self, key: Key, start: int, stop: int, like: Tensor) -> Tensor:
        return Rademacher().flat(Key((0,)), start, stop, like)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        # The inner run is repeated from where the generator of torch stood before, so that it ends where it began.
        (torch.randn, r"the same key gives another estimate where the global generators stand elsewhere"),
        (np.random.randn, r"an estimate draws from the global generator of numpy"),
        (lambda n, m: [[random.gauss(0, 1)] * m] * n, r"an estimate draws from the global generator of python"),
    ],
    ids=["torch", "numpy", "python"],
)
def test_draws_from_global_generators(draw: Callable[..., Any], message: str) -> None:
    fails("draws_by_its_key", ForwardGradient(2, Drawn(draw)), message)


def test_draws_that_no_key_changes() -> None:
    fails("draws_by_its_key", ForwardGradient(2, AlwaysTheSame()), r"another key gives the same directions")


def test_masks_of_its_own() -> None:
    own = Before(lambda carry, phi: torch.manual_seed(3) if "weights" in phi else None)
    fails("draws_by_its_key", own, r"another seed gives the same dropout masks")


# --- Several episodes ---


class SquareOfTheLoss(FirstOrder):
    """∇ f²/2: of a stack, whose f is a sum, that is not the sum of the episodes' own."""

    def estimate(self, *args: Any) -> Hypergradient:
        result = super().estimate(*args)
        return result._replace(grads=tree.scale(result.grads, result.value))


class Momentum(FirstOrder):
    """Carries what a stack has the sum of, so that a stack and a loop go on from different things."""

    def estimate(self, problem: BilevelProblem, carry: Carry, phi: Params, episode: Episode, call: Call) -> Any:
        result = super().estimate(problem, carry, phi, episode, call)
        last = carry.strategy.get("last", tree.zeros_like(phi))
        grads = tree.add(result.grads, last, alpha=0.5)
        return result._replace(grads=grads, kept={"last": grads})


def test_what_mixes_the_losses_is_off_by_the_size_of_the_stack() -> None:
    where = r"in step 1 on episodes of equal shapes with `episode_chunk_size=2`"
    fails("averages_episodes", SquareOfTheLoss(), rf"{where}, the estimate of `features` is off by ")


def test_what_carries_a_sum_is_off_in_the_second_step() -> None:
    where = r"in step 2 on episodes of equal shapes with `episode_chunk_size=\w+`"
    fails("averages_episodes", Momentum(), rf"{where}, the estimate of `features` is off by ")

    class Alone(Momentum):
        supports_stacking = False

    properties.averages_episodes(Alone())


class Warm(FirstOrder):
    def refusals(self, problem: BilevelProblem) -> Any:
        if problem.traits.warm:
            return []
        return [combination_error("`Warm` with a cold start", "θ has to go on", "Use `inner_start='warm'`")]


def test_several_episodes_of_a_strategy_that_takes_a_warm_start_only() -> None:
    properties.averages_episodes(Warm())
    properties.leaves_the_module_alone(Warm())


# --- Other problems ---


class OfModulesOnly(FirstOrder):
    def estimate(self, problem: BilevelProblem, *args: Any) -> Hypergradient:
        result = super().estimate(problem, *args)
        return result if problem.observer is not None else on_grads(lambda grad: 2 * grad)(result)


def test_a_plain_problem() -> None:
    fails("works_on_a_plain_problem", OfModulesOnly(), r"the estimate on a plain problem of `features` is off by ")


class WithoutItsShare(ForwardGradient):
    """The mean over its own shard, not its part of the mean over all."""

    def estimate(self, problem: BilevelProblem, carry: Carry, phi: Params, episode: Episode, call: Call) -> Any:
        result = super().estimate(problem, carry, phi, episode, call)
        return on_grads(lambda grad: grad / call.shard[1])(result)


def test_shards() -> None:
    fails("shares_out_directions", WithoutItsShare(3), r"the mean over 2 shards of `weights` is off by ")
    properties.shares_out_directions(FirstOrder())


class NeverRefuses(TruncatedReverse):
    def all_refusals(self, problem: BilevelProblem) -> Any:
        return []


class RefusesInWords(TruncatedReverse):
    def check(self, problem: BilevelProblem) -> None:
        pass


class NeedsSteps(NeverRefuses):
    needs_steps = True


@pytest.mark.parametrize(
    ("fake", "message"),
    [
        (NeverRefuses(), r"it states `differentiates` the run, and does not refuse `RidgeBlackBox`"),
        (NeedsSteps(), r"it states `needs_steps`, and does not refuse `RidgeSolver`"),
        (RefusesInWords(), r"`all_refusals` refuses `RidgeBlackBox`, and an estimate does not: Cannot use "),
    ],
    ids=lambda value: type(value).__name__,
)
def test_refusals(fake: HypergradientStrategy, message: str) -> None:
    fails("refuses_what_it_cannot", fake, message)

"""What is known before directions are drawn, guides and a memory: unbiased, with error and decay of the formulas."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lightning_bilevel import (
    PZOBO,
    FirstOrder,
    ForwardGradient,
    Hypergradient,
    HypergradientSchedule,
    HypergradientStrategy,
    ImplicitGradient,
    TruncatedReverse,
    ZerothOrder,
    hypergradient,
    tree,
)
from lightning_bilevel.directions import Blocks, Coordinate, DirectionSampler, Gaussian, Orthogonal, Rademacher, Sphere
from lightning_bilevel.linear_solvers import Dense
from lightning_bilevel.problem import Carry, InnerState
from lightning_bilevel.strategies.directional import MEMORY, DirectionalStrategy
from lightning_bilevel.strategies.slopes import Slopes
from lightning_bilevel.testing import Initialization
from lightning_bilevel.tree import Params
from tests.support import pure
from tests.support.modules import identical
from tests.support.problems import RidgeBlackBox, assert_close, draw
from tests.support.pure import CARRY, EPISODE, EXACT, GOOD, PHI, PROBLEM, Given
from tests.support.seeds import call_of
from tests.support.statistics import check_mean

B, SIZE = 6, 40
SAMPLERS = [Rademacher(), Gaussian(), Sphere(), Coordinate(), Orthogonal(), Blocks()]
each_sampler = pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: type(sampler).__name__)

# --- A gradient that is known, so that thousands of estimates take seconds ---


class Known(Slopes):
    """⟨g, v⟩ of a given g; makes no inner runs."""

    def __init__(self, gradient: Tensor) -> None:
        self.gradient = {"phi": gradient}

    def chunk_size(self) -> int:
        return 1000

    def along(self, directions: Params) -> Tensor:
        return tree.rows_dot(directions, self.gradient)

    def result(self, grads: Params) -> Hypergradient:
        return Hypergradient(torch.tensor(0.0), grads, InnerState({}), {})


class Along(ForwardGradient):
    """A forward gradient whose ∇h is given: ``self.gradient``."""

    gradient: Tensor

    def slopes(self, *args: Any) -> Slopes:
        return Known(self.gradient)


class Vector(Given):
    """A guide that gives a vector."""

    def estimate(self, *args: Any) -> Hypergradient:
        return Hypergradient(torch.tensor(0.0), {"phi": self.direction}, InnerState({}), {})


def estimated(strategy: Along, gradient: Tensor, memory: Tensor | None = None, seed: int = 0) -> Hypergradient:
    strategy.gradient = gradient
    kept = {} if memory is None else {MEMORY: {"phi": memory}}
    carry, phi = Carry(InnerState({}), kept), {"phi": torch.zeros_like(gradient)}
    return strategy.estimate(PROBLEM, carry, phi, EPISODE, call_of(seed))


def memory_of(result: Hypergradient) -> Tensor:
    return result.kept[MEMORY]["phi"]


def partly(gradient: Tensor, cosine: float, seed: int) -> Tensor:
    """Return a vector at a cosine to the gradient, of a length of its own."""
    unit, other = gradient / gradient.norm(), draw(len(gradient), seed=seed)
    other = other - (other @ unit) * unit
    return 7 * (cosine * unit + (1 - cosine**2) ** 0.5 * other / other.norm())


GRADIENT = draw(SIZE, seed=1)
PAST, GUESS = partly(GRADIENT, 0.7, 2), partly(GRADIENT, 0.5, 3)
KNOWN: dict[str, Callable[[DirectionSampler], Along]] = {
    "memory": lambda sampler: Along(B, sampler, remember=True),
    "guides": lambda sampler: Along(B, sampler, guide=[Vector(GUESS), Vector(PAST)]),
    "guide and memory": lambda sampler: Along(B, sampler, guide=Vector(GUESS), remember=True),
}


COUNT = 400


class Sample(NamedTuple):
    """Estimates at the same past: theirs and the memories that they leave, ``(COUNT, N)``, and what was known."""

    grads: Tensor
    memories: Tensor
    q: Tensor


@cache
def sampled(known: str, kind: type[DirectionSampler]) -> Sample:
    strategy = KNOWN[known](kind())
    results = [estimated(strategy, GRADIENT, PAST, seed) for seed in range(COUNT)]
    memories = torch.stack([memory_of(each) for each in results]) if strategy.remember else torch.empty(0)
    return Sample(torch.stack([each.grads["phi"] for each in results]), memories, spanned(results[0]))


def spanned(result: Hypergradient) -> Tensor:
    return torch.stack([tree.flatten(q) for q in result.known.values()])


def check_scalar(values: Tensor, expected: float, rel: float = 0.0) -> None:
    """Compare a mean with what is expected, within four standard errors and what the formula leaves out."""
    error = values.std().item() / len(values) ** 0.5
    off = abs(values.mean().item() - expected)
    assert off <= 4 * error + rel * abs(expected), f"{values.mean():.5g} ± {error:.2g} is not {expected:.5g}"


# --- Unbiased given the past, and the error of the formula ---

CASES = [("guide and memory", type(sampler)) for sampler in SAMPLERS]
CASES += [(known, kind) for known in ("memory", "guides") for kind in (Rademacher, Gaussian)]
each_case = pytest.mark.parametrize(("known", "kind"), CASES, ids=lambda each: getattr(each, "__name__", each))


@each_case
def test_unbiased_given_the_past(known: str, kind: type[DirectionSampler]) -> None:
    check_mean(sampled(known, kind).grads, GRADIENT, 1e-12)


def test_the_check_rejects_a_memory_that_is_updated_before_the_estimate() -> None:
    rows = []
    for seed, memory in enumerate(sampled("memory", Rademacher).memories):  # of the same estimate
        rows.append(estimated(KNOWN["memory"](Rademacher()), GRADIENT, memory, seed).grads["phi"])
    with pytest.raises(AssertionError, match="^the mean is off by"):
        check_mean(torch.stack(rows), GRADIENT, 1e-12)


def test_the_check_rejects_a_memory_that_sees_the_fresh_directions() -> None:
    class Peeking(Along):
        """Adds the first direction that it will draw to its memory."""

        def estimate(self, problem: Any, carry: Any, phi: Any, episode: Any, call: Any) -> Hypergradient:
            first = tree.index(self.directions.draw(call.key, 0, 1, phi), 0)
            memory = tree.add(carry.strategy[MEMORY], first, alpha=0.5)
            return super().estimate(problem, Carry(carry.inner, {MEMORY: memory}), phi, episode, call)

    peeking = Peeking(B, Rademacher(), remember=True)
    rows = [estimated(peeking, GRADIENT, PAST, seed).grads["phi"] for seed in range(COUNT)]
    with pytest.raises(AssertionError, match="^the mean is off by"):
        check_mean(torch.stack(rows), GRADIENT, 1e-12)


@each_case
def test_error_is_that_of_the_formula(known: str, kind: type[DirectionSampler]) -> None:
    """E‖ĝ − ∇h‖² of p = v − P v, and what a sampler says of b − k directions in N − k dimensions."""
    grads, _, q = sampled(known, kind)
    w, k, m = GRADIENT - q.T @ (q @ GRADIENT), len(q), B - len(q)
    assert k == (1 if known == "memory" else 2)
    length, own = w.square().sum().item(), (w.square() * q.square().sum(0)).sum().item()  # ‖w‖², Σ w_i² P_ii
    squares = {  # E‖⟨w, v⟩ (1 − P) v‖²
        Gaussian: (SIZE - k + 2) * length,
        Rademacher: (SIZE - k) * length + 2 * own,
        Sphere: SIZE * (SIZE - k + 2) / (SIZE + 2) * length,
        Coordinate: SIZE * (length - own),
    }
    said = length * kind().of(m).error(SIZE - k, m)
    errors = (grads - GRADIENT).square().sum(1)
    if kind in squares:
        check_scalar(errors, (squares[kind] - length) / m)
        assert (squares[kind] - length) / m == pytest.approx(said, rel=0.08)
    else:  # orthogonal ones are not quite so once they are projected
        check_scalar(errors, said, rel=k / SIZE)


def test_the_error_check_tells_guided_from_plain() -> None:
    errors = (sampled("guide and memory", Rademacher).grads - GRADIENT).square().sum(1)
    with pytest.raises(AssertionError, match=" is not "):
        check_scalar(errors, GRADIENT.square().sum().item() * (SIZE - 1) / B)


# --- The memory ---


@each_sampler
def test_the_step_is_the_best_one(sampler: DirectionSampler) -> None:
    """α minimises E‖∇h − h‖² = ‖w‖² − 2α ⟨w, E d⟩ + α² E‖d‖²: it is ‖w‖²/E‖d‖²."""
    grads, memories, q = sampled("guide and memory", type(sampler))
    torch.testing.assert_close(memories @ q.T, (q @ GRADIENT).expand(COUNT, 2))  # what is known is measured anew
    w, d, rest = (each - each @ q.T @ q for each in (GRADIENT, grads, memories))
    alphas = (rest * d).sum(1) / d.square().sum(1)
    torch.testing.assert_close(alphas, alphas[:1].expand(COUNT))
    check_scalar(d.square().sum(1) / w.square().sum(), 1 / alphas[0].item(), rel=0.05)
    check_scalar((w - rest).square().sum(1) / w.square().sum(), 1 - alphas[0].item(), rel=0.05)


def sine_squared(a: Tensor, b: Tensor) -> float:
    return 1 - float((a @ b) ** 2 / (a.square().sum() * b.square().sum()))


@pytest.mark.parametrize("sampler", [Gaussian(), Rademacher(), Blocks()], ids=lambda each: type(each).__name__)
def test_a_gradient_that_stays_is_learned_at_the_rate_of_the_formula(sampler: DirectionSampler) -> None:
    """1 − cos² falls by (1 − α) an estimate, like ((N − b)/N)^t, whatever sign and length the gradient has today."""
    steps, runs = 16, 25
    found = torch.zeros(runs, steps, dtype=torch.float64)
    for run in range(runs):
        gradient, memory = draw(SIZE, seed=100 + run), None
        for step in range(steps):
            strategy = Along(B, sampler, remember=True)
            memory = memory_of(estimated(strategy, (-0.9) ** step * gradient, memory, seed=50 * run + step))
            found[run, step] = sine_squared(memory, gradient)
    expected = 1.0
    for step in range(steps):
        m, size = (B, SIZE) if step == 0 else (B - 1, SIZE - 1)
        expected *= 1 - 1 / (1 + sampler.of(m).error(size, m))
        check_scalar(found[:, step], expected, rel=0.03)
    if isinstance(sampler, Blocks):
        assert expected == pytest.approx(((SIZE - B) / SIZE) ** steps, rel=0.5)


@pytest.mark.parametrize("tau", [8, 30])
def test_a_gradient_that_drifts_is_known_as_well_as_the_formula_says(tau: int) -> None:
    """1 − cos² of what is known and the gradient of the next step comes to about 1/(1 + bτ/2N)."""
    keep, runs = math.exp(-1 / tau), 4
    means = []
    for run in range(runs):
        gradient, memory, seen = draw(SIZE, seed=run), None, []
        for step, noise in enumerate(draw(8 * tau, SIZE, seed=100 + run)):
            gradient = keep * gradient + (1 - keep**2) ** 0.5 * noise
            if memory is not None and step > 3 * tau:
                seen.append(sine_squared(memory, gradient))
            memory = memory_of(estimated(Along(B, Gaussian(), remember=True), gradient, memory, seed=1000 * run + step))
        means.append(sum(seen) / len(seen))

    def stationary(size: int) -> float:
        return (1 - keep**2) / (1 - keep**2 * (1 - 1 / (1 + Gaussian().error(size - 1, B - 1))))

    check_scalar(torch.tensor(means), stationary(SIZE), rel=0.05)
    keep = math.exp(-1 / (100 * tau))  # where b is small against N, and τ is long
    assert stationary(100 * SIZE) == pytest.approx(1 / (1 + (B - 1) * tau / (2 * SIZE)), rel=0.02)


def test_a_perfect_memory_gives_the_exact_answer() -> None:
    torch.testing.assert_close(estimated(Along(2, remember=True), GRADIENT, -3 * GRADIENT).grads["phi"], GRADIENT)


def test_the_first_estimate_is_the_plain_one() -> None:
    for memory in (
        None,
        torch.zeros(SIZE, dtype=torch.float64),
        torch.full((SIZE,), float("nan"), dtype=torch.float64),
    ):
        first = estimated(Along(B, remember=True), GRADIENT, memory)
        torch.testing.assert_close(first.grads, estimated(Along(B), GRADIENT).grads, rtol=0, atol=0)
        assert torch.isfinite(memory_of(first)).all()


class OneByOne(Along):
    """Directions one at a time, so that memory is that of what is known."""

    def slopes(self, *args: Any) -> Slopes:
        found = Known(self.gradient)
        found.chunk_size = lambda: 1
        return found


@pytest.mark.parametrize("known", [1, 2, 3])
def test_memory_is_one_vector_for_each_that_is_known(known: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one more, while a guide's estimate is made orthogonal."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    tensor_peak = importlib.import_module("support.measure").tensor_peak
    size = 100_000
    gradient, *others = (torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in range(4))

    def copies(strategy: Along, memory: Tensor | None = None) -> float:
        result, peak = tensor_peak(lambda: estimated(strategy, gradient, memory))
        assert len(result.known) == (0 if memory is None else known)
        return peak / (size * 4 / 2**20)

    remembering = OneByOne(8, guide=[Vector(each) for each in others[1:known]], remember=True)
    assert copies(remembering, others[0]) < copies(OneByOne(8)) + known + 1.1


def test_no_more_is_known_than_directions_allow() -> None:
    guides = [Vector(draw(SIZE, seed=seed)) for seed in range(4)]
    result = estimated(Along(3, guide=guides, remember=True), GRADIENT, PAST)
    assert list(result.known) == ["guide 0", "guide 1"]
    assert list(estimated(Along(2, guide=guides[0], remember=True), GRADIENT, PAST).known) == ["guide"]
    assert list(estimated(Along(3, guide=guides[:1], remember=True), GRADIENT, PAST).known) == ["guide 0", MEMORY]


def test_a_memory_is_forgotten_where_it_is_infinite() -> None:
    big = torch.full((SIZE,), 1e30)
    result = estimated(Along(B, remember=True), big)  # finite in float32, and its square is not
    assert torch.equal(memory_of(result), torch.zeros(SIZE))


def test_a_memory_of_other_parameters_counts_for_those_that_are_left() -> None:
    strategy, kept = ForwardGradient(B, remember=True), tree.unflatten(pure.partly_right(0.9), PHI)
    gone = {
        "a": kept["a"],
        "other": torch.ones(3),
        "b": torch.ones(7),
    }  # b has another shape, one name is not there now
    result = strategy.estimate(PROBLEM, Carry(CARRY.inner, {MEMORY: gone}), PHI, EPISODE, call_of())
    expected = {"a": kept["a"], "b": torch.zeros_like(kept["b"])}
    same = strategy.estimate(PROBLEM, Carry(CARRY.inner, {MEMORY: expected}), PHI, EPISODE, call_of())
    assert_close(result.grads, same.grads, 1e-12)
    assert list(result.kept[MEMORY]) == list(PHI)


def test_a_memory_in_half_precision_is_kept_in_single() -> None:
    strategy = Along(B, remember=True)
    first = estimated(strategy, GRADIENT.bfloat16())
    assert memory_of(first).dtype == torch.float32
    second = estimated(strategy, GRADIENT.bfloat16(), memory_of(first), seed=1)
    assert second.grads["phi"].dtype == torch.bfloat16
    assert sine_squared(memory_of(second), GRADIENT.float()) < sine_squared(memory_of(first), GRADIENT.float())


# --- With real inner runs ---

REMEMBERING: dict[str, HypergradientStrategy] = {
    "ForwardGradient": ForwardGradient(3, remember=True),
    "forward mode": ForwardGradient(3, remember=True, mode="forward"),
    "guided": ForwardGradient(4, guide=GOOD, remember=True),
    "ZerothOrder": ZerothOrder(3, mu=1e-4, scheme="central", remember=True),
    "PZOBO": PZOBO(3, mu=1e-6, remember=True),
    "PZOBO, guided": PZOBO(4, mu=1e-6, guide=[TruncatedReverse(1)], remember=True),
}
each_remembering = pytest.mark.parametrize("name", REMEMBERING)


def explicit_of(name: str) -> Tensor:
    return 0.2 * tree.flatten(PHI) if "PZOBO" in name else torch.zeros_like(EXACT)


@each_remembering
def test_estimates_learn_the_gradient(name: str) -> None:
    """Of a gradient that stays, the memory ends at what directions have to find out; PZOBO knows c without."""
    carry, strategy = CARRY, REMEMBERING[name]
    for step in range(40):
        result = strategy.estimate(PROBLEM, carry, PHI, EPISODE, call_of(step))
        carry = Carry(CARRY.inner, result.kept)
    known = tree.flatten(result.kept[MEMORY])
    rest = EXACT - explicit_of(name)
    assert (known - rest).norm() < 0.03 * rest.norm()
    assert (tree.flatten(result.grads) - EXACT).norm() < 0.1 * EXACT.norm()


@each_remembering
@pytest.mark.parametrize("ranks", [2, 5])
def test_shards_of_directions_leave_the_memory_of_the_whole(name: str, ranks: int) -> None:
    strategy = REMEMBERING[name]
    carry = Carry(CARRY.inner, {MEMORY: tree.unflatten(pure.partly_right(0.6), PHI)})
    whole = strategy.estimate(PROBLEM, carry, PHI, EPISODE, call_of(3))
    parts = [strategy.estimate(PROBLEM, carry, PHI, EPISODE, call_of(3, shard=(rank, ranks))) for rank in range(ranks)]
    grads = tree.map(lambda *values: torch.stack(values).mean(0), *[part.grads for part in parts])
    assert_close(grads, whole.grads, 1e-6 if "ForwardG" not in name else 1e-12)
    for part in parts:
        assert identical(part.kept[MEMORY], carry.strategy[MEMORY])  # until it knows the whole estimate
        ended = strategy.averaged(part._replace(grads=grads))
        assert_close(ended.kept[MEMORY], whole.kept[MEMORY], 1e-6 if strategy.differentiates == frozenset() else 1e-12)


def bias_of_differences(strategy: ZerothOrder, q: Tensor, third: Tensor) -> Tensor:
    """Return E ĝ − ∇h of differences of h = gᵀx + ½ xᵀHx + ⅙ T(x, x, x) for Gaussian directions, T of rank one: t t t.

    Along q the slope is T(q, q, q) N μ²/6 too large, whatever the scheme: what is odd in the sign goes out. Elsewhere
    E p T(p, p, p) μ²/6 = (μ²/2) t' (t'ᵀt'), for p ~ N(0, 1 − P) and t' = (1 − P) t.
    """
    rest = third - q.T @ (q @ third)
    along = len(third) * strategy.mu**2 / 6 * (q @ third) ** 3 @ q
    return along + strategy.mu**2 / 2 * rest * (rest @ rest)


@pytest.mark.parametrize("scheme", ["forward", "central"])
def test_zeroth_order_has_the_mean_of_its_own_smoothed_loss(scheme: Any) -> None:
    size, mu = 5, 0.8
    g, third, past = (draw(size, seed=seed) for seed in (1, 2, 3))
    root = draw(size, size, seed=4) / 2

    def outer_loss(theta: Params, phi: Params, batch: Any, buffers: Params) -> Tensor:
        x = phi["phi"]
        return g @ x + (root @ x).square().sum() / 2 + (third @ x) ** 3 / 6

    problem = replace(
        PROBLEM,
        outer_loss=outer_loss,
        inner_loss=lambda theta, phi, batch, buffers: (theta["w"].square().sum() + 0 * phi["phi"].sum(), buffers),
        inner_steps=1,
    )
    strategy = ZerothOrder(8, mu, scheme, guide=Vector(draw(size, seed=5)), remember=True, chunk_size=8)
    carry, phi = Carry(CARRY.inner, {MEMORY: {"phi": past}}), {"phi": torch.zeros(size, dtype=torch.float64)}
    rows = [strategy.estimate(problem, carry, phi, EPISODE, call_of(seed)) for seed in range(250)]
    samples = torch.stack([row.grads["phi"] for row in rows])
    bias = bias_of_differences(strategy, spanned(rows[0]), third)
    check_mean(samples, g + bias, 1e-9)
    with pytest.raises(AssertionError, match="^the mean is off by"):  # the bias is there to be seen
        check_mean(samples, g, 1e-9)


def test_several_episodes_remember_their_mean() -> None:
    module = Initialization(inner_steps=2)
    episodes = [module.episode(seed) for seed in range(3)]
    strategy = ForwardGradient(4, remember=True)
    carry = hypergradient(module, strategy, episodes).carry
    kept = []
    for size in (1, 2, None):
        module.episode_chunk_size = size
        kept.append(hypergradient(module, strategy, episodes, seed=1, carry=carry).kept[MEMORY])
    parts = [hypergradient(module, strategy, episode, seed=1, carry=carry).kept[MEMORY] for episode in episodes]
    mean = tree.map(lambda *values: torch.stack(values).mean(0), *parts)
    for each in kept:
        assert_close(each, mean, 1e-10)


def test_a_memory_outside_of_a_fit_is_handed_in() -> None:
    module = Initialization(inner_steps=2)
    episode = module.episode()
    strategy = ForwardGradient(4, remember=True)
    first = hypergradient(module, strategy, episode)
    assert_close(first.grads, hypergradient(module, ForwardGradient(4), episode).grads, 1e-12)
    assert first.known == {}
    assert list(hypergradient(module, strategy, episode).known) == []  # it is in the result, and nowhere else
    assert list(hypergradient(module, strategy, episode, seed=1, carry=first.carry).known) == [MEMORY]


def test_a_schedule_keeps_a_memory_to_its_phase() -> None:
    both = [(ForwardGradient(4, remember=True), 2), (ForwardGradient(6, remember=True), None)]
    schedule, carry, known = HypergradientSchedule(both), CARRY, []
    for step in range(4):
        result = schedule.estimate(PROBLEM, carry, PHI, EPISODE, call_of(step, step=step))
        known.append(list(result.known))
        carry = Carry(CARRY.inner, schedule.averaged(result).kept)
        assert_close(carry.strategy[f"phase {step // 2}/memory"], result.kept[f"phase {step // 2}/memory"], 1e-12)
    assert known == [[], [MEMORY], [], [MEMORY]]


# --- Facts and refusals ---


def test_a_guide_that_differentiates_is_one_that_does() -> None:
    assert not ZerothOrder(2, remember=True).second_order
    guided = ZerothOrder(3, guide=[FirstOrder(), ImplicitGradient(Dense())])
    assert guided.second_order
    assert guided.all_differentiates == {"inner_gradient"}
    module = RidgeBlackBox()
    found = ZerothOrder(2, guide=TruncatedReverse(1)).all_refusals(module.functional().problem)
    assert [str(each).split(" with")[0] for each in found] == ["Cannot use `TruncatedReverse`"]
    hypergradient(module, ZerothOrder(2, guide=ImplicitGradient(Dense())), module.episode())


@pytest.mark.parametrize("kind", [ForwardGradient, ZerothOrder, PZOBO])
def test_bad_arguments(kind: type[DirectionalStrategy]) -> None:
    name = kind.__name__
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"guide": FirstOrder()},
            r"num_directions=\.\.\.\)` to be at least 2 with a guide, got 1\. `guide=\.\.\.`: one",
        ),
        ({"remember": True}, r"num_directions=\.\.\.\)` to be at least 2 with a memory, got 1\. `remember=True`: one"),
        (
            {"guide": [FirstOrder()], "remember": True},
            r"num_directions=\.\.\.\)` to be at least 2 with a guide and a memory, got 1\. `guide=\.\.\.` and `r",
        ),
        (
            {"guide": "FirstOrder"},
            r"guide=\.\.\.\)` to be a strategy such as `TruncatedReverse\(1\)`, or a list of them, g",
        ),
        (
            {"guide": [FirstOrder]},
            r"guide=\.\.\.\)` to be a strategy such as `TruncatedReverse\(1\)`, or a list of them, g",
        ),
        ({"remember": 1}, r"remember=\.\.\.\)` to be True or False, got 1\."),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=rf"^Expected `{name}\({message}"):
            kind(1, **arguments)
    assert kind(2, guide=[FirstOrder(), FirstOrder()], remember=True).num_directions == 2
    assert kind(1, guide=[]).guide == []

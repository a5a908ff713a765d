"""Properties of single estimates, without a Trainer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.errors import MisconfigurationError, report
from lightning_bilevel.estimation import estimate
from lightning_bilevel.problem import Carry, Hypergradient
from lightning_bilevel.randomness import Call, Key
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.testing.base import (
    EXACT,
    accepted,
    accepts,
    assert_close,
    generator_states,
    rounding,
    same,
    strategy_property,
)
from lightning_bilevel.testing.problems import (
    PROBLEMS,
    Centred,
    Initialization,
    Quadratic,
    RidgeBlackBox,
    RidgeSolver,
    Several,
)
from lightning_bilevel.testing.solved import SolvedModule
from lightning_bilevel.training.hypergradient import hypergradient
from lightning_bilevel.tree import Params

SEEDS = 300
"""Estimates whose mean is compared: all with fixed seeds, so that the answer is always the same."""

STANDARD_ERRORS = 5.0
"""Distance of a mean from the truth that an unbiased estimate exceeds once in a million."""


@strategy_property
def estimates_every_outer_parameter(strategy: HypergradientStrategy) -> None:
    """Value, estimate, metrics and state: names, shapes, dtypes, devices; finite, and without a graph."""
    for dtype in (torch.float64, torch.float32):
        module = accepted(strategy, Several).to(dtype)
        result = hypergradient(module, strategy, module.episode())
        assert isinstance(result, Hypergradient), f"`estimate` returns a `{type(result).__name__}`"
        phi = module.named(module.PHI)
        assert set(result.grads) == set(phi), f"`grads` is of {sorted(result.grads)}, instead of {sorted(phi)}"
        for name, value in phi.items():
            _assert_alike(f"the estimate of `{name}`", result.grads[name], value)
        for name, value in module.named(module.THETA).items():
            _assert_alike(f"θ_T of `{name}`", result.state.params[name], value)
        scalars = {"the value": result.value, **{f"the metric `{key}`": v for key, v in result.metrics.items()}}
        for what, scalar in scalars.items():
            assert scalar.shape == (), f"{what} has shape {tuple(scalar.shape)}, not ()"
            assert not scalar.requires_grad, f"{what} has a graph"
        assert result.value.dtype == dtype, f"the value is of {result.value.dtype} in a problem of {dtype}"


@strategy_property
def takes_the_inner_run(strategy: HypergradientStrategy) -> None:
    """θ_T is that of a plain loop over the same batches; leave it out for a strategy with an inner run of its own."""
    for make in (Several, Centred):
        module = accepted(strategy, make)
        episode = module.episode()
        result, known = hypergradient(module, strategy, episode), module.solution(episode)
        assert_close("θ_T", result.state.params, known.theta, EXACT)
        assert_close("h", {"h": result.value}, {"h": known.value}, EXACT)
        steps = len(episode.inner) if module.has_solver else module.inner_steps
        assert result.state.steps == steps, f"`state.steps` is {result.state.steps} after {steps} steps"


@strategy_property
def values_the_end_of_the_run(strategy: HypergradientStrategy) -> None:
    """The value is f at the θ_T and buffers that the estimate returns."""
    for make in (Several, Centred):
        module = accepted(strategy, make)
        episode = module.episode()
        result = hypergradient(module, strategy, episode)
        buffers = {**module.named(module.BUFFERS), **result.state.buffers}
        with torch.no_grad():
            value = module.f(result.state.params, module.named(module.PHI), episode.outer, buffers)
        assert_close("the value", {"h": result.value}, {"h": value}, EXACT)


@strategy_property
def is_exact_where_it_says_so(strategy: HypergradientStrategy) -> None:
    """An exact strategy equals closed forms, and autograd through plain loops, on every problem that it accepts."""
    if not strategy.exact:
        return
    accepted(strategy)
    for name, make in PROBLEMS.items():
        module = make()
        if strategy.all_refusals(module.functional().problem):
            continue
        episode = module.episode()
        result, known = hypergradient(module, strategy, episode), module.solution(episode)
        assert_close(f"on `{name}`, ∇h", result.grads, known.grads, EXACT)
        assert_close(f"on `{name}`, h", {"h": result.value}, {"h": known.value}, EXACT)


@strategy_property
def is_unbiased_where_it_says_so(strategy: HypergradientStrategy) -> None:
    """The mean of an unbiased strategy over many seeds is ∇h, entry by entry and along ∇h, within standard errors."""
    if strategy.exact or not strategy.unbiased:
        return
    module = accepted(strategy, lambda **options: Quadratic(**{"inner_steps": 2, **options}), Initialization)
    episode = module.episode()
    problem, phi, carry = module.plain()
    grads = [hypergradient(problem, strategy, episode, seed=seed, phi=phi, carry=carry).grads for seed in range(SEEDS)]
    known = module.solution(episode).grads
    samples = torch.stack([tree.flatten({name: each[name] for name in known}) for each in grads])
    exact = tree.flatten(known)
    samples = torch.cat([samples, samples @ exact[:, None] / exact.norm()], dim=1)
    exact = torch.cat([exact, exact.norm()[None]])
    spread = samples.std(0) / SEEDS**0.5 + EXACT * exact.norm()
    off = (samples.mean(0) - exact).abs() / spread
    worst = int(off.argmax())
    names = [f"`{name}`[{entry}]" for name, value in known.items() for entry in range(value.numel())]
    assert off[worst] <= STANDARD_ERRORS, (
        f"the mean of {SEEDS} estimates is off by {off[worst]:.1f} standard errors "
        f"{('in ' + names[worst]) if worst < len(names) else 'along ∇h'}: "
        f"{samples.mean(0)[worst]:.6g} instead of {exact[worst]:.6g}"
    )


@strategy_property
def leaves_the_module_alone(strategy: HypergradientStrategy) -> None:
    """Parameters, buffers, flags, gradients, modes, attributes and generators are as they were before."""
    for training in (True, False):
        module = accepted(strategy, lambda **options: Centred(dropout=0.3, **options)).train(training)
        several = accepts(strategy, Several, Initialization, inner_start="reset")
        batches: list[tuple[SolvedModule, Any]] = [(module, module.episode())]
        if several is not None:
            batches.append((several.train(training), [several.episode(seed) for seed in (0, 1)]))
        for each, batch in batches:
            for parameter in each.parameters():
                parameter.grad = torch.ones_like(parameter)
            before = _snapshot(each)
            hypergradient(each, strategy, batch)
            after = _snapshot(each)
            changed = [name for name, value in before.items() if not same(value, after[name])]
            assert not changed, f"an estimate changes {', '.join(changed)} of the module"


@strategy_property
def draws_by_its_key(strategy: HypergradientStrategy) -> None:
    """The seed decides everything: nothing comes from the global generators, and nothing is drawn from them."""
    module = accepted(strategy, Quadratic)
    episode, (problem, phi, carry) = module.episode(), module.plain()

    def drawn(seed: int, elsewhere: int) -> Params:
        # Not by `hypergradient`, which seeds the generators for the losses, and puts them back.
        torch.manual_seed(elsewhere)
        random.seed(elsewhere)
        before = generator_states()
        grads = strategy.estimate(problem, carry, phi, episode, Call(Key((seed,)))).grads
        touched = [name for name, state in generator_states().items() if state != before[name]]
        assert not touched, f"an estimate draws from the global generator of {', '.join(touched)}"
        return grads

    first, again, other = drawn(1, 0), drawn(1, 1), drawn(2, 0)
    assert same(first, again), "the same key gives another estimate where the global generators stand elsewhere"
    if strategy.direction_parallel or (strategy.unbiased and not strategy.exact):
        assert not same(first, other), "another key gives the same directions"
    noisy = accepts(strategy, lambda **options: Centred(dropout=0.3, **options))
    if noisy is not None and isinstance(noisy, Centred) and noisy.dropout:
        results = [hypergradient(noisy, strategy, noisy.episode(), seed=seed) for seed in (1, 1, 2)]
        assert same(results[0].grads, results[1].grads), "the same seed gives other dropout masks"
        assert not same(results[0].value, results[2].value), "another seed gives the same dropout masks"


@strategy_property
def averages_episodes(strategy: HypergradientStrategy) -> None:
    """Several episodes give the mean of their estimates: looped, stacked as far as that goes, and of unequal shapes.

    Two outer steps, so that what is carried is compared too. Without content where only a warm start will do, of
    which several episodes cannot go on.
    """
    module = accepts(strategy, Several, Initialization, inner_start="reset")
    if module is None or module.has_solver:
        return
    alike = [module.episode(seed) for seed in range(3)]
    unequal = [module.episode(seed, size) for seed, size in enumerate((4, 3, 4))]
    sizes = (1, 2, None) if strategy.supports_stacking else (None,)
    for kind, episodes, chosen in (("equal", alike, sizes), ("unequal", unequal, (None,))):
        carry: Carry | None = None
        for number in (1, 2):
            parts = [hypergradient(module, strategy, episode, carry=carry) for episode in episodes]
            for size in chosen:
                module.episode_chunk_size = size
                result = hypergradient(module, strategy, episodes, carry=carry)
                where = f"in step {number} on episodes of {kind} shapes with `episode_chunk_size={size}`"
                _assert_mean(where, result, parts, rounding(strategy))
            if not result.kept:
                break
            carry = result.carry  # of the last size


@strategy_property
def works_on_a_plain_problem(strategy: HypergradientStrategy) -> None:
    """A problem that knows no module gives the estimate that the module gives."""
    for make in (Several, Centred):
        module = accepted(strategy, make)
        episode = module.episode()
        problem, phi, carry = module.plain()
        result = hypergradient(problem, strategy, episode, seed=3, phi=phi, carry=carry)
        expected = hypergradient(module, strategy, episode, seed=3)
        assert_close("the estimate on a plain problem", result.grads, expected.grads, rounding(strategy))
        assert_close("its value", {"h": result.value}, {"h": expected.value}, EXACT)


@strategy_property
def shares_out_directions(strategy: HypergradientStrategy) -> None:
    """The mean over shards of the directions is the whole estimate, also where some shards are empty."""
    if not strategy.direction_parallel:
        return
    module = accepted(strategy, Several)
    episode = module.episode()
    problem, phi, carry = module.plain()

    def shard(number: int, count: int) -> Hypergradient:
        call = Call(Key((5,)), shard=(number, count))
        return estimate(problem, strategy, [carry.inner], phi, [episode], call, kept=carry.strategy)

    whole = shard(0, 1)
    for count in (2, 3, 41):
        parts = [shard(number, count) for number in range(count)]
        mean = tree.map(lambda *values: torch.stack(values).mean(0), *[part.grads for part in parts])
        assert_close(f"the mean over {count} shards", mean, whole.grads, rounding(strategy))
        for part in parts:
            assert_close(f"θ_T in one of {count} shards", part.state.params, whole.state.params, EXACT)


@strategy_property
def refuses_what_it_cannot(strategy: HypergradientStrategy) -> None:
    """A user's solver is refused where the facts say so; elsewhere an estimate is that of its solution."""
    for module in (RidgeSolver(), RidgeBlackBox()):
        kind = type(module).__name__
        found = strategy.all_refusals(module.functional().problem)
        through = not module.differentiable_solve and "run" in strategy.differentiates
        if strategy.needs_steps or through:
            fact = "`needs_steps`" if strategy.needs_steps else "`differentiates` the run"
            assert found, f"it states {fact}, and does not refuse `{kind}`"
        if found:
            try:
                hypergradient(module, strategy, module.episode())
            except MisconfigurationError:
                continue
            raise AssertionError(f"`all_refusals` refuses `{kind}`, and an estimate does not: {report(found)}")
        episode = module.episode()
        result, known = hypergradient(module, strategy, episode), module.solution(episode)
        assert_close(f"on `{kind}`, θ_T", result.state.params, known.theta, EXACT)
        assert_close(f"on `{kind}`, h", {"h": result.value}, {"h": known.value}, EXACT)


def _assert_alike(what: str, actual: Tensor, expected: Tensor) -> None:
    for attribute in ("shape", "dtype", "device"):
        got, wanted = (attrgetter(attribute)(value) for value in (actual, expected))
        assert got == wanted, f"{what} has {attribute} {got}, and the parameter {wanted}"
    assert torch.isfinite(actual).all(), f"{what} is not finite"
    assert not actual.requires_grad, f"{what} has a graph"


def _assert_mean(where: str, result: Hypergradient, parts: Sequence[Hypergradient], rtol: float) -> None:
    grads = tree.map(lambda *values: torch.stack(values).mean(0), *[part.grads for part in parts])
    value = torch.stack([part.value for part in parts]).mean()
    params = tree.stack([part.state.params for part in parts])
    assert_close(f"{where}, the estimate", result.grads, grads, rtol)
    assert_close(f"{where}, the value", {"h": result.value}, {"h": value}, rtol)
    assert_close(f"{where}, θ_T", result.state.params, params, EXACT)


def _snapshot(module: SolvedModule) -> dict[str, Any]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        found[f"the values of `{name}`"] = tensor.detach().clone()
        found[f"which tensor `{name}` is"] = id(tensor)
        found[f"`{name}.requires_grad`"] = tensor.requires_grad
        found[f"`{name}.grad`"] = None if tensor.grad is None else (id(tensor.grad), tensor.grad.clone())
    children = dict(module.named_modules()).values()
    found["modes"] = [child.training for child in children]
    found["attributes"] = [sorted(vars(child)) for child in children]
    found["the grad mode"] = torch.is_grad_enabled()
    states = generator_states()
    return {**found, **{f"the random generator of {name}": state for name, state in states.items()}}

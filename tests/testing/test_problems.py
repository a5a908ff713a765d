"""The problems of ``lightning_bilevel.testing`` know what they say: held against finite differences of their loops."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_bilevel import Episode, ReverseUnroll, hypergradient
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.testing import (
    Centred,
    Initialization,
    Quadratic,
    Ridge,
    RidgeBlackBox,
    Solution,
    SolvedModule,
    problems,
)
from lightning_bilevel.testing.problems import PROBLEMS

DIFFERENCE = 1e-5
"""Step of central differences in float64: truncation is then about 1e-10, rounding 1e-11."""

every_problem = pytest.mark.parametrize("make", PROBLEMS.values(), ids=PROBLEMS)


def differences(module: SolvedModule, value: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the gradient of ``value()`` by the outer parameters, one entry after another."""
    found = {}
    for name in module.PHI:
        flat = module.get_parameter(name).detach().reshape(-1)
        slopes = torch.empty_like(flat)
        for entry, before in enumerate(flat.tolist()):
            flat[entry] = before + DIFFERENCE
            ahead = value().item()
            flat[entry] = before - DIFFERENCE
            slopes[entry] = (ahead - value().item()) / (2 * DIFFERENCE)
            flat[entry] = before
        found[name] = slopes.reshape(module.get_parameter(name).shape)
    return found


def assert_known(known: Solution, expected: Solution, rtol: float) -> None:
    for mine, its in ((known.theta, expected.theta), ({"h": known.value}, {"h": expected.value})):
        torch.testing.assert_close(mine, its, rtol=rtol, atol=1e-12)
    assert_grads(known, expected.grads, rtol)


def assert_grads(known: Solution, grads: dict[str, torch.Tensor], rtol: float) -> None:
    assert set(known.grads) == set(grads)
    for name, grad in grads.items():
        torch.testing.assert_close(known.grads[name], grad, rtol=0, atol=rtol * float(grad.abs().max()))


@every_problem
def test_the_hypergradient_is_that_of_finite_differences(make: Callable[..., SolvedModule]) -> None:
    module = make()
    episode = module.episode(seed=1)
    by_differences = differences(module, lambda: module.solution(episode, seed=2).value)
    assert_grads(module.solution(episode, seed=2), by_differences, 1e-7)
    assert all(float(value.abs().max()) > 1e-3 for value in by_differences.values())  # or the problem tests nothing


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize(
    "make",
    [Quadratic, PROBLEMS["Quadratic, momentum"], Initialization, PROBLEMS["Initialization, proximal"]],
    ids=["Quadratic", "momentum", "Initialization", "proximal"],
)
def test_closed_forms_are_those_of_the_loop(make: Callable[..., SolvedModule], steps: int) -> None:
    module = make(inner_steps=steps)
    episode = module.episode()
    assert_known(module.solution(episode), module.unrolled(episode), 1e-11)


@pytest.mark.parametrize(("kind", "steps"), [(Quadratic, 1000), (Ridge, 1000)])
def test_the_optimum_is_the_limit_of_many_steps(kind: type[Any], steps: int) -> None:
    module = kind(inner_steps=steps)
    episode = module.episode()
    assert_known(module.solution(episode), module.optimum(episode), 1e-8)


@pytest.mark.parametrize("kind", [Quadratic, Ridge])
def test_the_optimum_has_no_inner_gradient_and_the_hypergradient_of_differences(kind: type[Any]) -> None:
    module = kind()
    episode = module.episode()
    theta, _, grads = module.optimum(episode)
    leaves = {name: value.requires_grad_() for name, value in theta.items()}
    loss, _ = module.g(leaves, module.named(module.PHI), episode.inner[0], {})
    assert all(grad.abs().max() < 1e-12 for grad in torch.autograd.grad(loss, list(leaves.values())))
    assert_grads(
        module.optimum(episode)._replace(grads=grads), differences(module, lambda: module.optimum(episode).value), 1e-7
    )


@every_problem
def test_the_three_forms_are_one_problem(make: Callable[..., SolvedModule]) -> None:
    module = make()
    episode, (problem, phi, carry) = module.episode(), module.plain()
    by_module = hypergradient(module, ReverseUnroll(), episode, seed=3)
    plainly = hypergradient(problem, ReverseUnroll(), episode, seed=3, phi=phi, carry=carry)
    known = module.solution(episode, seed=3)
    for result in (by_module, plainly):
        assert_known(Solution(result.state.params, result.value, result.grads), known, 1e-10)


@every_problem
def test_another_dtype_and_mode(make: Callable[..., SolvedModule]) -> None:
    module = make().float().eval()
    episode = module.episode()
    batches = [
        value for batch in (*episode.inner, episode.outer) for value in (batch if type(batch) is tuple else [batch])
    ]
    assert {value.dtype for value in batches} == {torch.float32}
    result, known = hypergradient(module, ReverseUnroll(), episode), module.solution(episode)
    assert_grads(known, result.grads, 1e-3)


@every_problem
def test_knowing_changes_nothing(make: Callable[..., SolvedModule]) -> None:
    module = make()
    before = {name: value.clone() for name, value in {**module.state_dict(), "rng": torch.get_rng_state()}.items()}
    module.solution(module.episode())
    after = {**module.state_dict(), "rng": torch.get_rng_state()}
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in module.parameters())


def test_episodes_are_drawn_by_their_seed() -> None:
    module = Centred()
    again, other = module.episode(seed=1), module.episode(seed=2)
    assert torch.equal(again.outer[0], module.episode(seed=1).outer[0])
    assert not torch.equal(again.outer[0], other.outer[0])
    assert module.episode(size=3).inner[0][0].shape == (3, 3)
    assert isinstance(again, Episode)


def test_the_running_mean_moves_and_the_outer_loss_uses_it() -> None:
    module = Centred()
    result = hypergradient(module, ReverseUnroll(), module.episode())
    assert result.state.buffers["mean"].abs().max() > 0.01
    assert module.mean.abs().max() == 0


def test_the_black_box_is_one() -> None:
    with pytest.raises(MisconfigurationError, match=r"^Cannot use `ReverseUnroll` with `solve_inner`"):
        hypergradient(RidgeBlackBox(), ReverseUnroll(), RidgeBlackBox().episode())


def test_an_unknown_inner_optimizer_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^Expected `Ridge\(inner=\.\.\.\)` to be one of SGD, momentum, Adam, got 'sgd'"
    ):
        Ridge(inner="sgd")


def test_every_problem_is_in_the_table() -> None:
    kinds = {kind for _, kind in inspect.getmembers(problems, inspect.isclass) if issubclass(kind, SolvedModule)}
    assert kinds - {type(make()) for make in PROBLEMS.values()} == {
        SolvedModule,
        RidgeBlackBox,
    }  # that has no ∇h to see

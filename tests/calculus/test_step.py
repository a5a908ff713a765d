"""One inner step: what it returns, and its derivatives against differences of the step itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.calculus import InnerStep, Mode, inner_step, run, vector_jacobian
from lightning_bilevel.problem import Batch, BilevelProblem, InnerState
from lightning_bilevel.tree import Params
from tests.support.problems import DIFFERENCE, INNER_OPTIMIZERS, Mlp, Problem, RidgeSolver, assert_close, draw, episodes


class Place(NamedTuple):
    """Where a step is looked at."""

    problem: BilevelProblem
    state: InnerState
    phi: Params
    batches: list[Batch]


def place(module: Problem, episode: Any, taken: int = 0) -> Place:
    """Return the state after so many steps, for the optimizer's state is more than zeros then."""
    functional = module.functional()
    problem, phi = functional.problem, functional.phi()
    batches = problem.batches(episode)
    start = problem.start(InnerState(functional.theta()), phi)
    return Place(problem, run(problem, start, phi, batches[:taken]).state, phi, batches[taken:])


def mlp(inner: str) -> Place:
    return place(Mlp(inner), *episodes(1), taken=1)


PLACES = {name: lambda name=name: mlp(name) for name in INNER_OPTIMIZERS} | {
    "solver": lambda: place(RidgeSolver(), RidgeSolver().episode())
}
every_place = pytest.mark.parametrize("make", PLACES.values(), ids=PLACES)


def directions(like: Params, seed: int, count: int = 2) -> Params:
    return {name: draw(count, *value.shape, seed=seed + i) for i, (name, value) in enumerate(like.items())}


def tangents_at(state: InnerState) -> Params:
    """Return directions for a state: relative ones for the optimizer's, for it takes roots of what is small."""
    drawn = directions(state.flat(), 100)
    return {name: z if name in state.params else z * state.flat()[name] for name, z in drawn.items()}


def after(at: Place, steps: int, z: Params, v: Params, scale: float) -> Params:
    """Return what ``steps`` steps make of a state and of φ that are moved."""
    state, phi = at.state.unflat(tree.add(at.state.flat(), z, alpha=scale)), tree.add(at.phi, v, alpha=scale)
    for batch in at.batches[:steps]:
        state, _ = inner_step(at.problem)(state, phi, batch)
    return state.flat()


def pushed_by_differences(at: Place, z: Params, v: Params, steps: int = 1) -> Params:
    """Return A z + B v, a row for each of z and v."""
    rows = []
    for row in range(len(next(iter(v.values())))):
        moved = tree.index(z, row), tree.index(v, row)
        ends = (after(at, steps, *moved, scale) for scale in (DIFFERENCE, -DIFFERENCE))
        rows.append(tree.scale(tree.sub(*ends), 1 / (2 * DIFFERENCE)))
    return tree.stack(rows)


@every_place
def test_a_step_has_no_graph_and_counts(make: Any) -> None:
    at = make()
    state, loss = inner_step(at.problem)(at.state, tree.leaves(at.phi), at.batches[0])
    assert not any(value.requires_grad for value in state.flat().values())
    assert state.steps == at.state.steps + 1
    assert (loss is None) == (at.problem.solver is not None)
    assert loss is None or (loss.shape == () and not loss.requires_grad)


@pytest.mark.parametrize("mode", ["double_backward", "forward"])
@every_place
def test_pushed_tangents_are_differences(make: Any, mode: Mode) -> None:
    at = make()
    z, v = tangents_at(at.state), directions(at.phi, 200)
    expected = pushed_by_differences(at, z, v)
    plain = inner_step(at.problem)(at.state, at.phi, at.batches[0])[0]
    state, _, tangents = inner_step(at.problem, mode).jvp(make().state, at.phi, at.batches[0], z, v)
    assert_close({name: tangents[name] for name in expected}, expected, 1e-6)
    assert_close({name: state.flat()[name] for name in plain.flat()}, plain.flat(), 1e-12)
    assert state.steps == plain.steps


@every_place
def test_pulled_cotangents_are_the_transpose_of_differences(make: Any) -> None:
    """⟨d, A z + B v⟩ = ⟨d A, z⟩ + ⟨d B, v⟩, for a stretch of all steps that are left."""
    at = make()
    z, v = tangents_at(at.state), directions(at.phi, 200)
    pulled = inner_step(at.problem).vjp(at.state, at.phi, at.batches)
    d = {name: draw(*value.shape, seed=300 + i) for i, (name, value) in enumerate(pulled.state.flat().items())}
    expected = tree.rows_dot(pushed_by_differences(at, z, v, len(at.batches)), d)
    by_state, by_phi = pulled.pull(dict(d), list(at.state.flat()))
    found = tree.rows_dot(z, by_state) + tree.rows_dot(v, by_phi)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert not any(value.requires_grad for value in pulled.state.flat().values())


def test_what_is_pulled_is_what_is_wanted_and_what_the_cotangent_lacks_is_zero() -> None:
    at = mlp("Adam")
    whole, part, none = (inner_step(at.problem).vjp(at.state, at.phi, at.batches) for _ in range(3))
    name, d = "net.head.bias", dict(whole.state.params)
    rest = {key: torch.zeros_like(value) for key, value in whole.state.flat().items() if key not in d}
    by_all, by_phi = whole.pull({**d, **rest}, list(at.state.flat()))
    by_one, again = part.pull(dict(d), [name])
    assert list(by_one) == [name]
    assert_close(by_one, {name: by_all[name]})
    assert_close(again, by_phi)
    assert none.pull({}, ())[0] == {}


@every_place
def test_a_graph_leads_to_what_pulled_cotangents_are(make: Any) -> None:
    at = make()
    begin, outer = tree.leaves(at.state.flat()), tree.leaves(at.phi)
    end, losses = inner_step(at.problem).graph(at.state.unflat(begin), outer, at.batches)
    pulled = inner_step(at.problem).vjp(at.state, at.phi, at.batches)
    assert [loss.tolist() for loss in losses] == [loss.tolist() for loss in pulled.losses]
    d = {name: draw(*value.shape, seed=300 + i) for i, (name, value) in enumerate(pulled.state.flat().items())}
    moved = {name: value for name, value in end.flat().items() if value.requires_grad}
    by_graph = vector_jacobian(moved, outer, {name: d[name] for name in moved})
    _, by_phi = pulled.pull(d, list(begin))
    assert_close(by_graph, by_phi)


def test_a_cotangent_is_taken_over() -> None:
    """At no time does it live beside what is pulled, which is as large."""
    at = mlp("SGD")
    pulled = inner_step(at.problem).vjp(at.state, at.phi, at.batches)
    d = dict(pulled.state.flat())
    pulled.pull(d, ())
    assert d == {}


@pytest.mark.parametrize("make", [PLACES["Adam"], PLACES["solver"]], ids=["Adam", "solver"])
def test_products_of_second_derivatives_are_differences_of_the_gradient(make: Any) -> None:
    at = make()
    batch = at.batches[0] if at.problem.solver is None else at.batches[0][0]

    def gradient(theta: Params, phi: Params) -> Params:
        theta = tree.leaves(theta)
        with torch.enable_grad():
            return tree.grad(at.problem.inner_loss(theta, phi, batch, {})[0], theta)

    def difference(z: Params, v: Params) -> Params:
        ends = [
            gradient(tree.add(at.state.params, z, alpha=scale), tree.add(at.phi, v, alpha=scale))
            for scale in (DIFFERENCE, -DIFFERENCE)
        ]
        return tree.scale(tree.sub(*ends), 1 / (2 * DIFFERENCE))

    z, v = (tree.index(directions(like, 400, 1), 0) for like in (at.state.params, at.phi))
    hessian, mixed = inner_step(at.problem).products(at.state, at.phi, batch)
    for _ in range(2):  # on one graph
        assert_close(hessian(z), difference(z, tree.zeros_like(at.phi)), 1e-6)
        along_v = tree.dot(z, difference(tree.zeros_like(at.state.params), v))
        torch.testing.assert_close(tree.dot(mixed(z), v), along_v, rtol=1e-6, atol=1e-9)


def test_a_step_is_that_of_the_functions_that_a_problem_has_now() -> None:
    """Another problem is made by ``replace``: a penalty on the inner loss moves θ and all derivatives."""
    at = mlp("SGD")

    def penalized(theta: Params, phi: Params, batch: Batch, buffers: Params) -> tuple[Tensor, Params]:
        loss, left = at.problem.inner_loss(theta, phi, batch, buffers)
        return loss + 0.5 * tree.dot(theta, theta), left

    other = at._replace(problem=replace(at.problem, inner_loss=penalized))
    steps: list[InnerStep] = [inner_step(where.problem) for where in (at, other)]
    plain, moved = (step(at.state, at.phi, at.batches[0])[0].params for step in steps)
    rate = at.phi["log_hyperparameters"].exp()  # of plain descent
    assert_close(moved, tree.add(plain, at.state.params, alpha=-rate))
    z, v = tangents_at(at.state), directions(at.phi, 200)
    expected = pushed_by_differences(other, z, v)
    _, _, tangents = steps[1].jvp(mlp("SGD").state, at.phi, at.batches[0], z, v)
    assert_close({name: tangents[name] for name in expected}, expected, 1e-6)

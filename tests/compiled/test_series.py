"""Terms of a Neumann series in one graph are those that are taken product by product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from lightning_bilevel import ImplicitGradient, tree
from lightning_bilevel.compiled import series
from lightning_bilevel.compiled.graphs import trace
from lightning_bilevel.compiled.series import written_out
from lightning_bilevel.linear_solvers import LinearSystem, Neumann
from tests.compiled.test_products import conditions
from tests.support.compiled import apart, both, needs_inductor, weighted


def product() -> tuple[fx.GraphModule, list[Tensor]]:
    """Return the graph of (A, v, w, s) ↦ s A (v, w), and its arguments."""
    generator = torch.Generator().manual_seed(0)
    a, v = torch.rand(5, 5, generator=generator).double() / 5, torch.randn(5, generator=generator).double()
    args = [a, v[:2], v[2:], torch.tensor(2.0).double()]

    def times(args: list[Tensor]) -> list[Tensor | None]:
        found = args[3] * (args[0] @ torch.cat(args[1:3]))
        return [found[:2], found[2:]]

    return trace(times, args).graph, args


@pytest.mark.parametrize("terms", [1, 2, 7])
@pytest.mark.parametrize(
    "way",
    [
        "flat",
        pytest.param("inductor", marks=[pytest.mark.slow, needs_inductor]),
    ],
)
def test_terms_are_powers(terms: int, way: series.Backend) -> None:
    graph, args = product()
    call = written_out(graph, args, 1, 2, terms, 0.3, way)
    assert call is not None
    found = call(args)
    contraction, v = torch.eye(5) - 0.3 * 2.0 * args[0], torch.cat(args[1:3])
    powers = [torch.linalg.matrix_power(contraction, k) @ v for k in range(terms)]
    expected = [sum(powers), powers[-1], powers[max(0, terms - 2)]]
    for number, value in enumerate(expected):
        torch.testing.assert_close(torch.cat(list(found[2 * number : 2 * number + 2])), value)


def test_what_is_large_or_wrong_is_taken_product_by_product(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, args = product()
    assert written_out(graph, args, 1, 2, series.MOST_NODES, 0.3, "flat") is None
    monkeypatch.setattr(series, "compiled", lambda *given: lambda args: [2 * each for each in args[1:3] * 3])
    assert written_out(graph, args, 1, 2, 3, 0.3, "flat") is None

    def broken(*given: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(series, "compiled", broken)
    assert written_out(graph, args, 1, 2, 3, 0.3, "flat") is None


def test_a_solver_takes_them_of_a_condition() -> None:
    ours, _, v, _ = conditions(lambda step, *at: step.stationarity(*at), lambda problem: problem.stationary())
    solver = Neumann(4, step_size=0.1)
    expected = solver.solve(LinearSystem(ours.transposed, v))
    found = solver.solve(LinearSystem(lambda v: pytest.fail("a product"), v, series=ours.series))
    for name, value in expected.value.items():
        torch.testing.assert_close(found.value[name], value)
    assert (found.converged, found.iterations) == (expected.converged, expected.iterations)


def test_warm_starts_and_divergence() -> None:
    ours, _, v, _ = conditions(lambda step, *at: step.stationarity(*at), lambda problem: problem.stationary())
    for step_size in (0.1, 300.0):
        found = []
        for terms in (ours.series, None):
            solver = Neumann(4, step_size=step_size)
            system = LinearSystem(ours.transposed, v, tree.scale(v, 0.3), series=terms)
            if step_size > 1:
                with pytest.warns(UserWarning, match="diverges"):
                    found.append(solver.solve(system))
            else:
                found.append(solver.solve(system))
        for name, value in found[1].value.items():
            torch.testing.assert_close(found[0].value[name], value, rtol=1e-4, atol=1e-4)


def test_estimates_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    module = weighted()
    module.log_lr.requires_grad_(False)
    seen: list[int] = []
    original = series.written_out

    def counted(*args: object) -> object:
        call = original(*args)  # type: ignore[arg-type]
        assert call is not None
        seen.append(1)
        return call

    monkeypatch.setattr("lightning_bilevel.compiled.evaluation.written_out", counted)
    for _ in range(3):
        assert apart(*both(module, ImplicitGradient(Neumann(5, step_size=0.2)))) < 2e-6
    assert seen == [1]

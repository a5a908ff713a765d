"""A graph that computes something else is found out before it is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_bilevel import SGD
from lightning_bilevel.compiled import program
from lightning_bilevel.compiled.agree import agree
from lightning_bilevel.compiled.graphs import Backend, compiled
from lightning_bilevel.compiled.program import made
from lightning_bilevel.compiled.reasons import NotCompiled
from tests.compiled.test_program import At
from tests.support.compiled import apart, both, weighted


def wrong(change: Callable[[list[Tensor]], None]) -> Callable[..., Callable[[list[Tensor]], Sequence[Tensor]]]:
    """Return a compiler that makes something of what comes out."""

    def broken(
        graph: torch.fx.GraphModule, examples: list[Tensor], backend: Backend, *forks: Any
    ) -> Callable[[list[Tensor]], list[Tensor]]:
        right = compiled(graph, examples, backend)

        def call(args: list[Tensor]) -> list[Tensor]:
            results = list(right(args))
            change(results)
            return results

        return call

    return broken


def first_twice(results: list[Tensor]) -> None:
    results[0] = 2 * results[0]


def last_gone(results: list[Tensor]) -> None:
    results[-1] = torch.zeros_like(results[-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [(first_twice, "`net.weight` after a step is apart by 1e"), (last_gone, "the inner loss is apart by 1e")],
)
def test_a_wrong_graph_is_found(
    change: Callable[[list[Tensor]], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = At()
    with at.functional.session():
        agree(
            at.functions,
            "take",
            made(at.functions, "take", at.args, 0, "flat", lambda traced: []),
            at.args,
            0,
            torch.float32,
        )
        monkeypatch.setattr(program, "compiled_forks", wrong(change))
        part = made(at.functions, "take", at.args, 0, "flat", lambda traced: [])
        with pytest.raises(NotCompiled, match=f"compiled, it is not what it is: {message}"):
            agree(at.functions, "take", part, at.args, 0, torch.float32)


def test_what_is_wrong_is_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "compiled_forks", wrong(first_twice))
    with pytest.warns(UserWarning, match="The inner steps are not compiled: compiled, it is not what it is"):
        assert apart(*both(weighted())) == 0


def test_what_is_not_finite_agrees_where_both_are_not() -> None:
    at = At()
    args = [at.args[0] * float("nan"), *at.args[1:]]
    with at.functional.session():
        part = made(at.functions, "take", at.args, 0, "flat", lambda traced: [])
        agree(at.functions, "take", part, args, 0, torch.float32)


def test_what_meets_zeros_at_the_start_is_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The momentum is zero at first: a graph that loses its gradient would agree on cotangents made of it."""

    def lost(results: list[Tensor]) -> None:
        if len(results) == 5:  # those of the way back: two parameters, two momenta, and φ
            results[2:4] = [torch.zeros_like(value) for value in results[2:4]]

    at = At(optimizer=lambda module: SGD(lr=0.3, momentum=0.9))
    args = [*at.args, *at.state.flat().values()]
    monkeypatch.setattr(program, "compiled", wrong(lost))
    with at.functional.session():
        part = made(at.functions, "pull", args, 1, "flat", lambda traced: [])
        with pytest.raises(NotCompiled, match="derivative 2 of a step is apart by 1e"):
            agree(at.functions, "pull", part, args, 1, torch.float32)

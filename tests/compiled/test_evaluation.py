"""The functions of the losses on lists of tensors, and what is made of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_bilevel import SGD
from lightning_bilevel.calculus import inner_step
from lightning_bilevel.calculus.inner import inner_value_and_grads
from lightning_bilevel.calculus.outer import outer_value_and_grads
from lightning_bilevel.compiled.evaluation import Evaluation, Evaluations, evaluation
from lightning_bilevel.compiled.program import Form, Layout
from lightning_bilevel.compiled.reasons import NotCompiled
from lightning_bilevel.problem import Episode, InnerState
from lightning_bilevel.stacking import tensors_in
from tests.support.compiled import episode, logged, weighted


class At:
    """The losses of a problem, and all that their functions take."""

    def __init__(self, **options: Any) -> None:
        self.module = weighted(optimizer=lambda module: SGD(lr=0.1, weight_decay=0.1), **options)
        self.functional = self.module.functional()
        self.problem, self.phi = replace(self.functional.problem, compiler=None), self.functional.phi()
        self.state, self.batch = InnerState(self.functional.theta()), episode().outer
        tensors = list(tensors_in(self.batch))
        layout = Layout(self.state, self.phi, Form(self.batch, tensors))
        self.functions = Evaluations(self.problem.stationary(), layout, self.functional.recorder)
        self.args = [*self.state.params.values(), *self.phi.values(), *tensors]

    def made(self, name: str, vectors: list[Tensor] | None = None) -> Evaluation:
        return evaluation(self.functions, name, [*self.args, *(vectors or [])], "flat", lambda traced: [])


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_outer_loss_and_its_gradients() -> None:
    at = At()
    with at.functional.session():
        value, d, c, _ = outer_value_and_grads(at.problem, at.state, at.phi, Episode([], at.batch))
        same(at.made("outer_slopes")(at.args), [value, *d.values(), *c.values()])
        same(at.made("outer")(at.args), [value])


def test_the_inner_loss_and_its_gradients() -> None:
    at = At()
    with at.functional.session():
        value, d, c = inner_value_and_grads(at.problem.stationary(), at.state, at.phi, [at.batch])
        same(at.made("inner_slopes")(at.args), [value, *d.values(), *c.values()])
        same(at.made("inner_slopes_by_phi")(at.args), [value, *c.values()])


def test_products_are_those_of_the_step() -> None:
    at = At()
    with at.functional.session():
        expected = inner_step(at.problem.stationary()).stationarity(at.state, at.phi, at.batch)
        vectors = [torch.randn_like(value) for value in at.state.params.values()]
        part = at.made("curvature", vectors)
        results = part(at.args)
        same(results[: part.outputs], list(expected.residual.values()))
        v = dict(zip(at.state.params, vectors, strict=True))
        for which, product in enumerate((expected.transposed, expected.mixed)):
            same(part.product(which, at.args, results[part.outputs :], vectors), list(product(v).values()))
        same(
            part.all_of([*at.args, *vectors])[part.outputs :],
            [*expected.transposed(v).values(), *expected.mixed(v).values()],
        )


def test_what_is_logged_comes_out_of_the_graph() -> None:
    at, seen = At(term=logged), []
    with at.functional.session():
        part = at.made("inner_slopes")
        at.functional.recorder.log = lambda *args, **kwargs: seen.append((args, kwargs))  # type: ignore[method-assign]
        part.tell(part(at.args), at.functional)
        (value, *_) = inner_value_and_grads(at.problem, at.state, at.phi, [at.batch])
    (twice, options), (number, _) = seen
    assert part.told.total == 1
    assert options == {"prog_bar": True}
    torch.testing.assert_close(twice[1], 2 * value)
    assert number == ("number", 3)


def returns_beside(at: At, more: Any) -> None:
    at.module.outer_loss = lambda batch: {"loss": at.module.net.weight.sum(), "more": more(at.module)}  # type: ignore[method-assign]


def test_what_is_returned_beside_the_value_comes_out_of_the_graph() -> None:
    at = At()
    returns_beside(at, lambda module: [2 * module.net.weight, 3])
    with at.functional.session():
        part = at.made("outer_slopes")
        _, weight, *slopes = part(at.args)
    assert part.left.beside.size == 1
    assert len(slopes) == len(at.state.params) + len(at.phi)
    (twice, three) = part.left.beside.filled([weight])["more"]
    torch.testing.assert_close(twice, 2 * at.module.net.weight.detach())
    assert three == 3


def test_an_object_that_is_returned_beside_the_value_cannot_be_compiled() -> None:
    at = At()
    returns_beside(at, lambda module: module)
    with at.functional.session(), pytest.raises(NotCompiled, match="it returns beside its value"):
        at.made("outer")

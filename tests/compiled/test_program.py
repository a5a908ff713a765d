"""The functions of a step on lists of tensors, and what is made of them."""

from __future__ import annotations

from typing import Any

import torch

from lightning_bilevel import SGD, tree
from lightning_bilevel.calculus.step import GradientStep
from lightning_bilevel.compiled.program import Form, Functions, Layout, made
from lightning_bilevel.problem import InnerState
from lightning_bilevel.stacking import tensors_in
from tests.support.compiled import episode, logged, weighted


class At:
    """A step of a problem, and all that its functions take."""

    def __init__(self, **options: Any) -> None:
        self.functional = weighted(**options).functional()
        self.problem, self.phi = self.functional.problem, self.functional.phi()
        self.state, self.batch = self.problem.start(InnerState(self.functional.theta()), self.phi), episode().outer
        tensors = list(tensors_in(self.batch))
        layout = Layout(self.state, self.phi, Form(self.batch, tensors))
        self.step = GradientStep(self.problem)
        self.functions = Functions(self.step, layout, self.functional.recorder)
        self.args = [*self.state.flat().values(), *self.phi.values(), *tensors]


def test_arguments_are_opened_as_they_were_laid_out() -> None:
    at = At()
    state, phi, (batch,), _, rest = at.functions.layout.opened([*at.args, torch.ones(1)], 3)
    assert state.steps == 3
    assert all(state.params[name] is value for name, value in at.state.params.items())
    assert all(phi[name] is value for name, value in at.phi.items())
    assert all(a is b for a, b in zip(batch, at.batch, strict=True))
    assert [value.item() for value in rest] == [1.0]


def test_a_step_is_that_of_the_problem() -> None:
    at = At()
    with at.functional.session():
        part = made(at.functions, "take", at.args, 0, "flat", lambda traced: [])
        after, loss = at.step(at.state, at.phi, at.batch)
        results = part(0, at.args)
    for found, value in zip(results, [*after.flat().values(), loss[None]], strict=True):
        torch.testing.assert_close(found, value)


def test_the_way_back_is_that_of_autograd() -> None:
    at = At()
    with at.functional.session():
        pulled = at.step.vjp(at.state, at.phi, [at.batch])
        cotangents = {name: torch.randn_like(value) for name, value in at.state.flat().items()}
        part = made(at.functions, "pull", [*at.args, *cotangents.values()], 0, "flat", lambda traced: [])
        kept = list(part(0, at.args))[part.outputs :]
        found = part.backward(0, at.args, kept, list(cotangents.values()))
        d, through = pulled.pull(dict(cotangents), list(cotangents))
    assert part.live == (True, False)  # nothing depends on the rate that this optimizer does not have
    for value, expected in zip(found, [*d.values(), through["logits"]], strict=True):
        torch.testing.assert_close(value, expected)


def test_the_way_back_through_the_rule_alone() -> None:
    at = At(optimizer=lambda module: SGD(lr=module.log_lr.exp(), momentum=0.9, weight_decay=0.1))
    with at.functional.session():
        after, _ = at.step(at.state, at.phi, at.batch)  # whose momentum is more than zeros
        args = [*after.flat().values(), *at.args[len(at.state.flat()) :]]
        expected, d = at.step.rule(after, at.phi, at.batch), tree.map(torch.randn_like, after.params)
        part = made(at.functions, "rule", [*args, *d.values()], 1, "flat", lambda traced: [])
        results = list(part(1, args))
        found = part.backward(1, args, results[part.outputs :], list(d.values()))
    same = zip(results, [*expected.state.flat().values(), expected.loss[None]], strict=False)
    back = zip(found, (value for each in expected.pull(d) for value in each.values()), strict=True)
    for value, other in (*same, *back):
        torch.testing.assert_close(value, other)


def test_tangents_are_those_of_the_step() -> None:
    at = At()
    tangents, v = (tree.map(lambda value: torch.randn(2, *value.shape), each) for each in (at.state.flat(), at.phi))
    args = [*at.args, *tangents.values(), *v.values()]
    with at.functional.session():
        part = made(at.functions, "push", args, 0, "flat", lambda traced: [])
        results = list(part(0, args))
        pushed = at.step.jvp(at.problem.start(InnerState(at.functional.theta()), at.phi), at.phi, at.batch, tangents, v)
    for found, value in zip(results[part.outputs :], pushed.tangents.values(), strict=True):
        torch.testing.assert_close(found, value)


def test_what_is_logged_comes_out_of_the_graph() -> None:
    at, seen = At(term=logged), []
    with at.functional.session():
        part = made(at.functions, "take", at.args, 0, "flat", lambda traced: [])
        at.functional.recorder.log = lambda *args, **kwargs: seen.append((args, kwargs))  # type: ignore[method-assign]
        results = part(0, at.args)
        part.tell(results, at.functional)
    (twice, options), (number, _) = seen
    assert options == {"prog_bar": True}
    torch.testing.assert_close(twice[1], 2 * results[part.outputs - 2][0])
    assert number == ("number", 3)

"""The first look at the losses: what they change, what they do not read, and that it leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bilevel import SGD, Episode
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.inner_optimizers import InnerOptimizer
from lightning_bilevel.modules.examine import Examination, examination_of, once_differentiable
from lightning_bilevel.modules.functional import FunctionalModule
from tests.support.audits import Net, line
from tests.support.functions import Once
from tests.support.modules import differing, examples, parameters
from tests.support.spoilt import net, zeros

X, Y, INDEX = examples(0)
EPISODE = Episode([(X, Y, INDEX)], (X, Y))


def looked(functional: FunctionalModule, episode: Episode = EPISODE) -> Examination:
    memory = functional.module.fit_context.memory
    with functional.session():
        return examination_of(functional, memory.values(functional), episode)


def test_what_works_has_nothing_to_tell() -> None:
    assert looked(net().functional()) == Examination()


def normalized() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))


STATISTICS = ("net.1.running_mean", "net.1.running_var", "net.1.num_batches_tracked")


def test_buffers_that_the_losses_change_by_the_mode_of_the_module() -> None:
    functional = Net(net=normalized()).functional()
    assert looked(functional).buffers == STATISTICS
    functional.module.eval()
    assert looked(functional).buffers == ()
    functional.module.net[1].train()  # BatchNorm alone
    assert looked(functional).buffers == STATISTICS


def test_without_an_outer_batch_only_buffers_are_looked_at() -> None:
    module = Net(net=normalized())
    module.outer_loss = None  # never called
    assert looked(module.functional(), Episode([(X, Y)], None)) == Examination(buffers=STATISTICS)
    module = Net()
    module.outer_loss = module.inner_loss = None  # without buffers there is nothing to see
    assert looked(module.functional(), Episode([(X, Y)], None)) == Examination()


def test_it_leaves_no_trace_and_is_made_once() -> None:
    calls = []

    class Counting(Net):
        def outer_loss(self, batch: Any) -> Tensor:
            calls.append(batch)
            return super().outer_loss(batch)

    module = Counting(net=normalized())
    functional, before, state = module.functional(), parameters(module), torch.get_rng_state()
    first = looked(functional)
    assert looked(functional) is first
    assert len(calls) == 1
    assert differing(before, parameters(module)) == []
    assert torch.equal(state, torch.get_rng_state())  # though dropout draws
    assert all(parameter.grad is None for parameter in module.parameters())


class Table(InnerOptimizer):
    """Descent at rates[step − 1]; past the table's end, and in ``first`` steps, at the rate 0.1."""

    def __init__(self, rates: Tensor, first: int = 0) -> None:
        self.rates, self.first = rates, first

    def update(self, params: Any, grads: Any, opt_state: Any, step: int) -> Any:
        rate = self.rates[step - 1] if self.first < step <= len(self.rates) else 0.1
        return {name: value - rate * grads[name] for name, value in params.items()}, {}


class Rates(Net):
    """Its rates are the outer parameters, one a step, the first of them not used."""

    def __init__(self, first: int, **options: Any) -> None:
        super().__init__(**options)
        self.first, self.rates = first, nn.Parameter(torch.full((3,), 0.1))

    def outer_parameters(self) -> Any:
        return [self.rates]

    def configure_inner_optimizer(self) -> Any:
        return Table(self.rates, self.first)


@pytest.mark.parametrize(
    ("first", "steps", "start", "reached"),
    [
        (0, 1, "reset", True),
        (2, 3, "reset", True),
        (2, 2, "reset", False),
        (1, 1, "reset", False),
        (1, 1, "warm", True),
    ],
)
def test_the_updates_of_all_steps_are_looked_at(first: int, steps: int, start: Any, reached: bool) -> None:
    """A rate may enter late: of a run of T steps in the last one; where the inner level goes on, in the one after."""
    found = looked(Rates(first, inner_steps=steps, inner_start=start).functional())
    assert found.unreached == (() if reached else ("rates",))


def test_an_outer_parameter_may_be_read_in_one_place_only() -> None:
    class Each(Net):
        def __init__(self) -> None:
            super().__init__()
            for name in ("inner", "outer", "start", "lr", "nowhere"):
                setattr(self, name, nn.Parameter(torch.full((), 0.1)))

        def inner_loss(self, batch: Any) -> Tensor:
            return super().inner_loss(batch) + self.inner * self.net[0].weight.sum()

        def outer_loss(self, batch: Any) -> Tensor:
            return super().outer_loss(batch) + self.outer

        def initial_inner_parameters(self) -> Any:
            return {"net.0.bias": self.start * torch.ones(4)}

        def configure_inner_optimizer(self) -> Any:
            return SGD(lr=self.lr)

    assert looked(Each().functional()).unreached == ("nowhere",)


def test_what_a_solver_reads_no_graph_tells() -> None:
    assert looked(net(solve_inner=zeros, inner_loss=None).functional()).unreached == ()


def test_an_inner_loss_that_does_not_read_the_inner_parameters_is_refused() -> None:
    module = net(inner_loss=lambda self, batch: self.log_penalty.sum())
    with pytest.raises(MisconfigurationError, match=r"^`Net` has no inner loss that depends on the inner parameters\."):
        looked(module.functional())


def test_functions_that_can_be_differentiated_once_are_found() -> None:
    functional = Net(Once.apply).functional()
    assert [name for name, _ in looked(functional).once_differentiable] == ["Once"]
    assert looked(Net(torch.tanh).functional()).once_differentiable == ()


def squared(x: Tensor) -> Tensor:
    return Once.apply(Once.apply(x))  # here: squared


def test_a_function_is_named_once_with_a_line_under_anomaly_mode() -> None:
    module = Net(squared)
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        functional = module.functional()
        with functional.session():
            loss, _ = functional.problem.inner_loss(functional.theta(), functional.phi(), (X, Y), {})
    assert once_differentiable(loss) == []  # nothing in it requires a gradient
    theta = {name: value.requires_grad_() for name, value in functional.theta().items()}
    with torch.autograd.set_detect_anomaly(True, check_nan=False), functional.session():
        loss, _ = functional.problem.inner_loss(theta, functional.phi(), (X, Y), {})
    assert once_differentiable(loss) == [("Once", line(squared))]

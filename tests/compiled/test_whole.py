"""A run and the outer loss at its end as one graph: what it leaves behind, and what of the outer loss may change."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bilevel import SGD, ReverseUnroll, hypergradient
from lightning_bilevel.compiled import plan
from lightning_bilevel.problem import Episode
from tests.support.compiled import CLASSES, FEATURES, Weighted, apart, both, episode
from tests.support.modules import Maml

SCALE = {"of": 1.0}


class Judging(Weighted):
    """A problem with something in its outer loss.

    Args:
        judge: of the module and the outer loss, to the outer loss.
        options: of :class:`Weighted`.
    """

    def __init__(self, judge: Callable[[Any, Tensor], Any] = lambda self, loss: loss, **options: Any) -> None:
        super().__init__(**options)
        self.judge, self.number, self.kept, self.array = judge, 1.0, torch.tensor(1.0), np.ones(2)
        self.register_buffer("scale", torch.tensor(1.0))

    def outer_loss(self, batch: Any) -> Any:
        return self.judge(self, super().outer_loss(batch))


def judging(judge: Callable[[Any, Tensor], Any] = lambda self, loss: loss, **options: Any) -> Judging:
    torch.manual_seed(0)
    return Judging(judge, **options)


class Change(NamedTuple):
    """What the outer loss reads, and what is done to it between estimates."""

    judge: Callable[[Any, Tensor], Any]
    change: Callable[[Any], Any]


def write(module: Any) -> None:
    module.kept.mul_(2)


CHANGES = {
    "a float": Change(lambda m, loss: loss * m.number, lambda m: setattr(m, "number", m.number + 1)),
    "a tensor, replaced": Change(lambda m, loss: loss * m.kept, lambda m: setattr(m, "kept", 2 * m.kept)),
    "a tensor, in place": Change(lambda m, loss: loss * m.kept, write),
    "a buffer": Change(lambda m, loss: loss * m.scale, lambda m: m.scale.add_(1)),
    "a global": Change(lambda m, loss: loss * SCALE["of"], lambda m: SCALE.update(of=SCALE["of"] + 1)),
    "the mode": Change(lambda m, loss: loss * (2 if m.training else 3), lambda m: m.train(not m.training)),
    "an outer parameter": Change(lambda m, loss: loss * m.log_lr.exp(), lambda m: m.log_lr.data.add_(1)),
    "a hook": Change(
        lambda m, loss: loss, lambda m: m.net.register_forward_hook(lambda module, inputs, output: 2 * output)
    ),
    "the outer loss itself": Change(lambda m, loss: loss, lambda m: setattr(m, "judge", lambda m, loss: 3 * loss)),
}


@pytest.mark.parametrize("case", CHANGES.values(), ids=CHANGES)
def test_what_the_outer_loss_reads_may_change(case: Change, calls: list[int]) -> None:
    module = judging(case.judge)
    for _ in range(3):
        assert apart(*both(module)) < 2e-6
        case.change(module)
    assert len(calls) <= 3 + 3  # one for each estimate, and one for each comparison with eager


def count(module: Any, loss: Tensor) -> Tensor:
    module.number += 1
    return loss


REFUSED = {
    "a number in a tensor": (lambda m, loss: loss * m.kept.item(), "takes numbers out of|item"),
    "a number in an array": (lambda m, loss: loss * float(m.array[1]), "numbers out of"),
    "a branch on data": (lambda m, loss: loss if loss > 0 else -loss, "Data-dependent"),
    "a counter": (count, "it writes to an attribute"),
    "an object beside": (lambda m, loss: {"loss": loss, "net": m.net}, "returns beside its value"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_leaves_the_steps_compiled(name: str, calls: list[int]) -> None:
    judge, because = REFUSED[name]
    module = judging(judge)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert apart(*both(module)) < 2e-6
            module.kept, module.array = 2 * module.kept, 2 * module.array
    (said,) = [str(each.message) for each in caught if "not compiled" in str(each.message)]
    assert said.startswith("The outer losses are not compiled: ")
    assert re.search(because, said)
    assert calls


class Observing(ReverseUnroll):
    """Keeps what the losses left behind."""

    def estimate(self, *args: Any) -> Any:
        result = super().estimate(*args)
        self.observed = result.observed
        return result


def test_what_the_losses_log() -> None:
    def inner(self: Any, loss: Tensor) -> Tensor:
        self.log("inner", 2 * loss)
        self.log("both", loss)
        return loss

    def outer(self: Any, loss: Tensor) -> Tensor:
        self.log("both", 3 * loss, prog_bar=True)
        self.log_dict({"number": self.number, "outer": loss})
        return loss

    module, ours, eager = judging(outer, term=inner), Observing(), Observing()
    hypergradient(module, ours, episode())
    module.compiles_steps = False
    hypergradient(module, eager, episode())
    assert list(ours.observed.calls) == list(eager.observed.calls) == ["inner", "both", "number", "outer"]
    for name, (value, *options) in eager.observed.calls.items():
        torch.testing.assert_close(ours.observed.calls[name][0], value)
        assert ours.observed.calls[name][1:] == tuple(options)


@pytest.mark.parametrize("count", [1, 3])
def test_buffers_that_both_losses_write(count: int, calls: list[int]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES))
    module = Maml(net, F.cross_entropy, compile=True, episode_chunk_size=3)
    episodes = [Episode([each.inner[0][:2]], each.outer[:2]) for each in map(episode, range(count))]
    ours, eager = both(module, episodes=episodes)
    assert apart(ours, eager) < 2e-6
    assert len(calls) == 2
    assert eager.state.buffers
    for name, value in eager.state.buffers.items():
        torch.testing.assert_close(ours.state.buffers[name], value)
    torch.testing.assert_close(ours.value, eager.value)
    torch.testing.assert_close(ours.metrics, eager.metrics)


def test_masks_in_both_losses(calls: list[int]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(), nn.Tanh(), nn.Dropout(), nn.Linear(8, CLASSES))
    module = Maml(net, F.cross_entropy, compile=True, episode_chunk_size=3)
    episodes = [Episode([each.inner[0][:2]], each.outer[:2]) for each in map(episode, range(3))]
    assert apart(*both(module, episodes=episodes)) < 2e-6
    assert apart(*both(module, episodes=episodes[:1])) < 2e-6
    assert len(calls) == 4


class EveryStep(Judging):
    """Weighs the outer loss at every step, and learns the weights if they are parameters."""

    def __init__(self, weights: Tensor, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.weights = weights

    def outer_loss_weights(self) -> Tensor:
        return self.weights

    def outer_parameters(self) -> Any:
        learned = [self.weights] if isinstance(self.weights, nn.Parameter) else []
        return [self.logits, self.log_lr, *learned]


def every_step(weights: Any, *args: Any, **options: Any) -> EveryStep:
    torch.manual_seed(0)
    return EveryStep(weights, *args, optimizer=lambda module: SGD(lr=module.log_lr.exp(), momentum=0.5), **options)


def noisy(module: Any, loss: Tensor) -> Tensor:
    return loss * (1 + torch.rand(()))


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("weights", [[0.2, 0.3, 0.5], [0.0, 0.4, 0.6], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], ids=str)
def test_the_outer_loss_at_every_step(weights: list[float], learned: bool, calls: list[int]) -> None:
    given = torch.tensor(weights)
    module = every_step(nn.Parameter(given) if learned else given, lambda m, loss: loss * m.kept)
    for _ in range(2):
        assert apart(*both(module)) < 2e-6
        module.kept = 2 * module.kept
        module.weights.data *= 1.5
    assert len(calls) == 3  # the first is compared with eager


def test_the_outer_loss_at_every_step_of_a_stack(calls: list[int]) -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES))

    module = every_step(torch.tensor([0.2, 0.3, 0.5]), net=net, episode_chunk_size=3)
    ours, eager = both(module, episodes=[episode(seed) for seed in range(3)])
    assert apart(ours, eager) < 2e-6
    assert len(calls) == 2


def test_the_outer_loss_at_every_step_that_draws(calls: list[int]) -> None:
    module = every_step(torch.tensor([0.2, 0.3, 0.5]), noisy, term=noisy)
    assert apart(*both(module)) < 2e-6
    assert len(calls) == 2


def test_what_an_outer_loss_on_the_way_logs_does_not_count() -> None:
    def outer(self: Any, loss: Tensor) -> Tensor:
        self.log("outer", loss)
        return loss

    module, ours, eager = every_step(torch.tensor([0.2, 0.3, 0.5]), outer), Observing(), Observing()
    hypergradient(module, ours, episode())
    module.compiles_steps = False
    hypergradient(module, eager, episode())
    torch.testing.assert_close(ours.observed.calls["outer"][0], eager.observed.calls["outer"][0])


class Starting(Weighted):
    """Starts from outer parameters, from what a hook makes of one of these, and from values of its own."""

    def __init__(self, starts: Callable[[Any], dict[str, Tensor]], **options: Any) -> None:
        super().__init__(**options)
        self.starts, self.shift = starts, nn.Parameter(torch.zeros(CLASSES))

    def inner_parameters(self) -> Any:
        return [*self.net.parameters(), self.shift]

    def outer_parameters(self) -> Any:
        return [*self.net.parameters(), self.logits]

    def inner_loss(self, batch: Any) -> Tensor:
        return super().inner_loss(batch) + (self.shift - self.net.bias).square().sum()

    def initial_inner_parameters(self) -> dict[str, Tensor]:
        return self.starts(self)


STARTS: dict[str, Callable[[Any], dict[str, Tensor]]] = {
    "those of the module": lambda m: {},
    "another weight": lambda m: {"net.weight": 2 * m.net.weight},
    "another bias, and the shift": lambda m: {"net.bias": m.net.bias + m.logits[:CLASSES], "shift": m.net.bias},
    "what is no copy": lambda m: {"net.weight": m.net.weight.flip(0)},
    "a part of the graph only": lambda m: {"net.weight": m.net.weight.detach()},
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS)
def test_what_starts_as_an_outer_parameter_is_no_argument(
    starts: Callable[[Any], dict[str, Tensor]], momentum: float, count: int, calls: list[int]
) -> None:
    torch.manual_seed(0)
    module = Starting(starts, optimizer=lambda self: SGD(lr=0.3, momentum=momentum))
    assert apart(*both(module, episodes=[episode(seed) for seed in range(count)])) < 2e-6
    assert calls


def test_a_warm_start_goes_on_from_the_end(calls: list[int]) -> None:
    module = judging(optimizer=lambda module: SGD(lr=module.log_lr.exp(), momentum=0.9), inner_start="warm")
    ours, eager = both(module)
    ours = hypergradient(module, ReverseUnroll(), episode(1), carry=ours.carry)
    module.compiles_steps = False
    eager = hypergradient(module, ReverseUnroll(), episode(1), carry=eager.carry)
    assert apart(ours, eager) < 2e-6
    assert ours.state.steps == eager.state.steps == 6


def test_a_loss_that_is_not_finite_is_told_with_its_step() -> None:
    module = judging(optimizer=lambda module: SGD(lr=1e30), term=lambda module, loss: loss**3)
    with pytest.raises(FloatingPointError, match="inner loss at step 2 of 3"):
        hypergradient(module, ReverseUnroll(), episode())


def test_small_steps_share_a_graph(calls: list[int]) -> None:
    both(judging())
    assert len(calls) == 2


@pytest.mark.parametrize("bound", ["MOST_NODES", "MOST_NUMBERS_OF_A_STEP"])
def test_large_steps_have_a_graph_each(bound: str, monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    monkeypatch.setattr(plan, bound, 0)
    assert apart(*both(judging())) < 2e-6
    assert len(calls) == 4

"""What Dynamo's guards see, and what stands beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bilevel.compiled.reasons import NotCompiled
from lightning_bilevel.compiled.watch import MOST_STATES, Watch, Watchman, drawn_beside_torch
from lightning_bilevel.modules.functional import FunctionalModule
from tests.support.compiled import episode, weighted


class Holder(nn.Module):
    """Holds what a watched function reads."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.seen, self.tensor = 1.0, False, torch.ones(2)


def test_states_are_numbered_and_known_again() -> None:
    holder = Holder()
    watch = Watch(lambda x: (x * holder.scale).sum(), holder)
    states = []
    for holder.scale in (1.0, 2.0, 1.0):
        states.append(watch.look(torch.ones(2)))
    assert states == [1, 2, 1]


def test_inputs_are_what_is_read_now() -> None:
    holder = Holder()
    watch = Watch(lambda x: (x * holder.tensor).sum(), holder)
    x = torch.ones(2)
    watch.look(x)
    assert any(value is holder.tensor for value in watch.inputs)
    holder.tensor = torch.zeros(2)
    watch.look(x)
    assert any(value is holder.tensor for value in watch.inputs)


def test_nothing_is_computed() -> None:
    watch = Watch(lambda x: 1 / x.sum().log().sqrt(), Holder())
    assert watch.look(torch.empty(2)) == 1


class Squared(torch.autograd.Function):
    """Has forward mode, too."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 2 * tangent * ctx.saved_tensors[0]


def test_losses_are_watched_where_gradients_are_taken() -> None:
    holder, weight = Holder(), torch.ones(2, requires_grad=True)
    watch = Watch(lambda x: (x * weight).sum() * (holder.scale if torch.is_grad_enabled() else 1.0), holder)
    states = []
    for holder.scale in (1.0, 2.0, 1.0):
        states.append(watch.look(torch.ones(2)))
    assert states == [1, 2, 1]


def test_a_function_with_forward_mode_is_followed() -> None:
    holder, weight = Holder(), torch.ones(2, requires_grad=True)
    watch = Watch(lambda x: Squared.apply(x * weight).sum() * holder.scale, holder)
    states = []
    for holder.scale in (1.0, 2.0, 1.0):
        states.append(watch.look(torch.ones(2)))
    assert states == [1, 2, 1]


def test_a_gradient_within_is_followed() -> None:
    weight = torch.ones(2, requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad((x * weight).square().sum(), weight, create_graph=True)
        return gradient.sum()

    assert Watch(loss, Holder()).look(torch.ones(2)) == 1


def test_what_is_written_is_put_back() -> None:
    holder = Holder()

    def note(x: Tensor) -> Tensor:
        holder.seen = True
        return x.sum()

    watch = Watch(note, holder)
    with pytest.raises(NotCompiled, match="it writes to an attribute of the module"):
        watch.look(torch.ones(2))
    assert holder.seen is False


def test_many_states_are_too_many() -> None:
    holder = Holder()
    watch = Watch(lambda x: (x * holder.scale).sum(), holder)
    for number in range(MOST_STATES):
        holder.scale = float(number)
        watch.look(torch.ones(2))
    holder.scale = -1.0
    with pytest.raises(NotCompiled, match="it has done 4 different things so far"):
        watch.look(torch.ones(2))


def test_a_compiler_that_is_switched_off_sees_nothing() -> None:
    watch = Watch(lambda x: x.sum(), Holder())
    with torch.compiler.set_stance("force_eager"), pytest.raises(NotCompiled, match="`torch.compile` is switched off"):
        watch.look(torch.ones(2))


def test_hooks_and_autocast_are_seen() -> None:
    module: Any = weighted()
    functional = module.functional()
    watchman = Watchman(functional, episode().outer)
    with functional.session():
        before = watchman.look(functional)
        assert watchman.look(functional) == before
    with torch.autocast("cpu", torch.bfloat16), functional.session():
        assert watchman.look(functional) != before
    handle = module.net.register_forward_hook(lambda module, inputs, output: None)
    with functional.session():
        assert watchman.look(functional) != before
    handle.remove()
    with functional.session():
        assert watchman.look(functional)[1] == before[1]  # type: ignore[index]


def test_draws_beside_torch_are_seen() -> None:
    import random

    functional = weighted().functional()
    before = functional.snapshot()
    assert not drawn_beside_torch(functional, before)
    random.random()
    assert drawn_beside_torch(functional, before)


def test_what_was_looked_at_is_looked_at_again_where_code_of_the_users_has_run() -> None:
    module: Any = weighted(term=lambda self, loss: loss * self.scale)
    module.scale, given = 1.0, episode()
    functional = module.functional()
    watchman = Watchman(functional, given.outer)
    with functional.session():
        problem, phi, theta = functional.problem, functional.phi(), functional.theta()
        runs: list[Callable[[], Any]] = [
            lambda: problem.inner_loss(theta, phi, given.outer, {}),
            lambda: problem.outer_loss(theta, phi, given.outer, {}),
            lambda: problem.update(theta, theta, {}, phi, 1),
            lambda: problem.initial(theta, phi),
            lambda: problem.init_opt_state(theta, phi),
            lambda: problem.penalty(theta, phi) if problem.penalty else None,
        ]
        for number, run in enumerate(runs):
            before = watchman.look(functional)
            assert watchman.look(functional) is not None
            module.scale = 3.0 - module.scale
            run()
            assert watchman.look(functional) != before, number
    module.scale = 3.0 - module.scale
    before = watchman.look(functional)
    module.scale = 3.0 - module.scale
    with functional.session():
        assert watchman.look(functional) != before


def test_of_another_functional_module_it_is_looked_at_again() -> None:
    module: Any = weighted(term=lambda self, loss: loss * self.scale)
    module.scale = 1.0
    first, watchman = module.functional(), None
    states = []
    for functional in (first, FunctionalModule(module)):
        watchman = watchman or Watchman(functional, episode().outer)
        with functional.session():
            states.append(watchman.look(functional))
        module.scale = 2.0
    assert states[0] != states[1]

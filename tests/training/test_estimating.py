"""The surroundings of an estimate: entered and left without a trace, and what an estimate reads from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bilevel import ForwardGradient, Hypergradient, ReverseUnroll, hypergradient, tree
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.modules.functional import FunctionalModule
from lightning_bilevel.training.estimating import Surroundings, estimated, estimated_at, estimating
from tests.support.functions import Once
from tests.support.modules import Cleaning, Maml, differing, loader, parameters, tasks
from tests.support.seeds import call_of, key_of, seeded

EPISODE = next(iter(loader()))


class Noisy(Cleaning):
    """Draws masks, moves buffers and logs."""

    def __init__(self, **options: Any) -> None:
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
        super().__init__(net=lambda: net, **options)

    def inner_loss(self, batch: Any) -> Tensor:
        loss = super().inner_loss(batch)
        self.log("inner", loss)
        return loss


def entered(functional: FunctionalModule, **options: Any) -> Any:
    return estimating(functional, functional.module.fit_context.memory, [EPISODE], key_of(), **options)


def estimate(functional: FunctionalModule, *, seed: int = 0, **options: Any) -> Hypergradient:
    memory = functional.module.fit_context.memory
    return estimated(functional, memory, ReverseUnroll(), [EPISODE], call_of(seed), **options)


def trace(module: Any) -> dict[str, Any]:
    """Return what surroundings change while they last."""
    return {
        "attributes": {name: sorted(vars(child)) for name, child in module.named_modules()},
        "levels": module._levels,
        "generator": torch.get_rng_state().tolist(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "kernels": (torch.nn.functional.linear, torch.nn.functional.batch_norm),
    }


@pytest.mark.parametrize("fails", [False, True])
def test_they_leave_no_trace_also_after_an_error(fails: bool) -> None:
    module = seeded(Noisy)
    functional, before, values = module.functional(), trace(module), parameters(module)
    with torch.autocast("cpu", torch.bfloat16):
        outside = trace(module)
        try:
            with entered(functional):
                assert "log" in vars(module)
                assert not torch.is_autocast_enabled("cpu")  # but in the losses
                assert module._levels is functional.levels
                torch.rand(3)
                if fails:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            assert fails
        assert trace(module) == outside
    assert trace(module) == before
    assert differing(values, parameters(module)) == []


def test_what_is_yielded_is_where_an_estimate_starts() -> None:
    module = seeded(Noisy)
    functional = module.functional()
    with entered(functional, inner_steps=7) as at:
        assert isinstance(at, Surroundings)
        assert at.problem.inner_steps == 7
        assert module.inner_steps == 3
        assert list(at.phi) == ["example_weights", "log_lr"]
        assert list(at.carried[0].params) == list(functional.levels.inner_only)
        assert tuple(at.carried[0].buffers) == at.examination.buffers != ()
        assert at.kept == {}


def test_masks_go_by_their_own_name() -> None:
    """The same masks under other directions, as a monitor compares; the same directions under other masks."""
    functional = seeded(Noisy).functional()
    memory = functional.module.fit_context.memory

    def found(directions: int, masks: int) -> Hypergradient:
        key = key_of(masks)
        return estimated(functional, memory, ForwardGradient(1), [EPISODE], call_of(directions), key)

    first, other_directions, other_masks = found(1, 1), found(2, 1), found(1, 2)
    assert first.value == other_directions.value != other_masks.value
    assert differing(first.grads, other_directions.grads)
    signs = [tree.flatten(each.grads).sign() for each in (first, other_masks)]
    assert signs[0].equal(signs[1]) or signs[0].equal(-signs[1])  # a slope times the same v
    assert differing(found(1, 1).grads, first.grads) == []
    assert estimate(functional, seed=1).value == first.value  # by default that of the call


@pytest.mark.parametrize("steps", [1, 5])
def test_other_inner_steps_are_those_of_a_module_with_so_many(steps: int) -> None:
    short = estimate(seeded(Cleaning).functional(), inner_steps=steps)
    expected = hypergradient(seeded(lambda: Cleaning(inner_steps=steps)), ReverseUnroll(), EPISODE)
    assert short.value == expected.value
    assert differing(short.grads, expected.grads) == []
    assert short.state.steps == steps


@pytest.mark.parametrize(
    "options",
    [{"inner_steps": 1}, {"proximal": 0.5}, {"inner_steps": 4, "proximal": 2.0}],
    ids=str,
)
def test_options_are_those_that_the_module_has_now(options: dict[str, Any]) -> None:
    """As a fit reads them, whose functions were made at its start."""

    def found(module: Maml, functional: FunctionalModule) -> Hypergradient:
        return estimated(functional, module.fit_context.memory, ReverseUnroll(), tasks(1), call_of())

    module = seeded(Maml)
    functional = module.functional()
    before = found(module, functional)
    for name, value in options.items():
        setattr(module, name, value)
    after, expected = (
        found(module, functional),
        hypergradient(seeded(lambda: Maml(**options)), ReverseUnroll(), tasks(1)),
    )
    assert differing(after.grads, expected.grads) == []
    assert differing(after.grads, before.grads)


def test_several_episodes_cannot_go_on_warm() -> None:
    functional = Cleaning().functional()
    message = r"^Cannot use `inner_start='warm'` with 2 episodes in a batch\. This is because net\.0\.weight would"
    with pytest.raises(MisconfigurationError, match=message):
        estimated(functional, functional.module.fit_context.memory, ReverseUnroll(), [EPISODE] * 2, call_of())


def test_functions_that_can_be_differentiated_once_are_refused_unless_one_has_looked() -> None:
    class Marked(Cleaning):
        def inner_loss(self, batch: Any) -> Tensor:
            return Once.apply(super().inner_loss(batch))

    module = Marked()
    functional = module.functional()
    with pytest.raises(MisconfigurationError, match=r"^Cannot use `ReverseUnroll` with `Once` in `Marked\.inner_loss`"):
        estimate(functional)
    with entered(functional) as at:  # the audit, which tells of them
        assert [name for name, _ in at.examination.once_differentiable] == ["Once"]
        assert torch.isfinite(estimated_at(functional, ReverseUnroll(), at, call_of()).value)

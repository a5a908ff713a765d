"""Carried tangents (RTHO): many short runs under one φ have the hypergradient of one long run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_bilevel import ForwardUnroll, ReverseUnroll, hypergradient, tree
from lightning_bilevel.errors import MisconfigurationError
from tests.support.fits import Before, Fit, fit
from tests.support.problems import Mlp, Quadratic, assert_close, episodes

WAYS = {
    "all at once": ForwardUnroll(warm_start=True),
    "in chunks": ForwardUnroll(warm_start=True, chunk_size=4),
    "forward AD": ForwardUnroll(warm_start=True, mode="forward"),
}
ways = pytest.mark.parametrize("strategy", WAYS.values(), ids=WAYS)


def carried(strategy: ForwardUnroll, module: Any, episode: Any, times: int) -> Any:
    result = None
    for _ in range(times):
        result = hypergradient(module, strategy, episode, carry=None if result is None else result.carry)
    return result


@ways
@pytest.mark.parametrize("inner", ["SGD", "momentum", "Adam", "RMSprop"])
def test_short_runs_add_up_to_a_long_one(strategy: ForwardUnroll, inner: str) -> None:
    """Learned rates, decay and data weights, the optimizer's state included."""
    short, long = (Mlp(inner, inner_steps=steps, inner_start="warm", learned=True) for steps in (2, 6))
    (data,) = episodes(1)
    data = data._replace(inner=[data.inner[0], data.inner[1]] if len(data.inner) > 1 else data.inner)
    result, expected = carried(strategy, short, data, 3), hypergradient(long, ReverseUnroll(), data)
    assert_close(result.state.params, expected.state.params, 1e-10)
    assert_close(result.grads, expected.grads, 1e-8)


@ways
def test_one_step_at_a_time_tends_to_the_implicit_hypergradient(strategy: ForwardUnroll) -> None:
    """Z → A⁻¹B geometrically, where what a single step sees stays far off."""
    module = Quadratic(inner_steps=1)
    module.inner_start = "warm"
    data = module.episode()
    limit = module.optimum(data).grads

    def off(times: int) -> float:
        grads = carried(strategy, module, data, times).grads
        return float(tree.norm(tree.sub(grads, limit)) / tree.norm(limit))

    assert off(1) > 0.1
    assert off(300) < 1e-6


def test_a_fit_carries_them(tmp_path: Any) -> None:
    """With an outer rate of zero, the last hypergradient of a fit is that of all its inner steps."""

    class Still(Fit):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.outer_parameters(), lr=0.0)

    norms = {}
    for name, strategy in (("carried", ForwardUnroll(warm_start=True)), ("cut off", ForwardUnroll())):
        watch = Before()
        fit(strategy, watch, module=Still())
        norms[name] = watch.logged("hypergradient_norm")
    assert norms["carried"][0] == norms["cut off"][0]
    assert norms["carried"][-1] != norms["cut off"][-1]


def test_refusals() -> None:
    (data,) = episodes(1)
    with pytest.raises(
        MisconfigurationError, match=r"Cannot use `ForwardUnroll\(warm_start=True\)` with an inner level"
    ):
        hypergradient(Mlp("SGD", inner_start="reset"), ForwardUnroll(warm_start=True), data)
    with pytest.raises(ValueError, match=r"Expected `ForwardUnroll\(warm_start=...\)` to be True or False, got 1"):
        ForwardUnroll(warm_start=1)  # type: ignore[arg-type]
    assert not ForwardUnroll(warm_start=True).exact
    assert ForwardUnroll().exact

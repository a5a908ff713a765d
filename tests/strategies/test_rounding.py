"""What finite differences say where they are mostly rounding."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_bilevel import PZOBO, Episode, ZerothOrder, hypergradient
from lightning_bilevel.problem import Carry, InnerState
from lightning_bilevel.strategies.rounding import CoarsestDtype
from tests.support.modules import listed, trainer
from tests.support.precisions import EPISODE, Cleaning, by_hand
from tests.support.problems import Quadratic, RidgeBlackBox, draw
from tests.support.seeds import call_of, seeded


def test_warns_once_of_differences_that_are_rounding() -> None:
    module = Quadratic().float()
    module.A, module.B, module.C = module.A.float(), module.B.float(), module.C.float()
    episode = Episode([draw(4, seed=10).float()], draw(5, seed=20).float())
    functional, strategy = module.functional(), ZerothOrder(2, mu=1e-5)
    arguments = functional.problem, Carry(InnerState(functional.theta())), functional.phi(), episode, call_of()
    message = r"^`ZerothOrder\(mu=1e-05\)` is small for torch\.float32: .* Raise `mu` to about 0\.00\d, or use float64"
    with pytest.warns(UserWarning, match=message):
        strategy.estimate(*arguments)
    strategy.estimate(*arguments)
    ZerothOrder(2, mu=1e-2).estimate(*arguments)
    hypergradient(Quadratic(), ZerothOrder(2, mu=1e-5), Quadratic().episode())


FLOAT, DOUBLE, BRAIN, HALF = torch.float32, torch.float64, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("strategy", "stored", "computed", "said"),
    [
        (lambda: PZOBO(4, mu=1e-2), FLOAT, None, None),
        (lambda: PZOBO(4, mu=1e-6), FLOAT, None, FLOAT),
        (lambda: PZOBO(4, mu=1e-6), DOUBLE, None, None),
        (lambda: PZOBO(4, mu=1e-2), FLOAT, BRAIN, BRAIN),
        (lambda: PZOBO(4, mu=1e-2), FLOAT, HALF, HALF),
        (lambda: PZOBO(4, mu=0.3), FLOAT, HALF, None),
        (lambda: PZOBO(4, mu=1e-2, chunk_size=1), FLOAT, BRAIN, BRAIN),
        (lambda: PZOBO(4, mu=1e-2), BRAIN, None, BRAIN),
        (lambda: ZerothOrder(4, mu=1e-2), FLOAT, None, None),
        (lambda: ZerothOrder(4, mu=1e-5), FLOAT, None, FLOAT),
        (lambda: ZerothOrder(4, mu=1e-5), DOUBLE, None, None),
        (lambda: ZerothOrder(4, mu=1e-2), FLOAT, BRAIN, BRAIN),
        (lambda: ZerothOrder(4, mu=1e-2), BRAIN, None, BRAIN),
        (lambda: ZerothOrder(4, mu=1.0), FLOAT, BRAIN, None),
    ],
)
def test_a_small_mu(
    strategy: Callable[[], Any], stored: torch.dtype, computed: torch.dtype | None, said: torch.dtype | None
) -> None:
    made = strategy()
    words = rf"^`{type(made).__name__}\(mu={made.mu}\)` is small for {said}: .* rounding\. Raise `mu` to .* or use"
    warns = nullcontext() if said is None else pytest.warns(UserWarning, match=words)
    autocast = torch.autocast("cpu", computed, enabled=computed is not None)
    with warns, autocast:
        by_hand(seeded(Cleaning), made, stored)


def test_a_loss_that_casts_by_itself_is_seen() -> None:
    class Casts(Cleaning):
        def inner_loss(self, batch: Any) -> Tensor:
            x, y, index = batch
            hidden = F.linear(x.bfloat16(), self.net[0].weight.bfloat16()).float().tanh()
            return (self.example_weights[index].sigmoid() * (self.net[2](hidden) - y).square().mean(1)).mean()

    with pytest.warns(UserWarning, match=r"^`PZOBO\(mu=0\.001\)` is small for torch\.bfloat16"):
        by_hand(seeded(Casts), PZOBO(2, mu=1e-3), FLOAT)


def test_the_advice_on_mu_leads_to_silence() -> None:
    """It is a lower bound where the differences are mostly rounding, so it may take more than one look."""
    mu = 0.02
    for _ in range(5):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            by_hand(seeded(Cleaning), PZOBO(4, mu=mu), BRAIN)
        if not caught:
            break
        advised = str(caught[0].message).split("Raise `mu` to ")[1].split(", or")[0]
        mu = 3 * mu if advised == "much more" else float(advised.removeprefix("about "))
    assert not caught
    assert 0.1 < mu < 5


@pytest.mark.parametrize("dtype", [FLOAT, BRAIN])
def test_a_solution_that_does_not_move_at_all(dtype: torch.dtype) -> None:
    with pytest.warns(UserWarning, match=r"moves by 0 times its rounding\. Raise `mu` to much more, or use float"):
        by_hand(seeded(Cleaning), PZOBO(2, mu=1e-12, chunk_size=1), dtype)


def test_a_solver_has_the_rounding_of_what_it_returns() -> None:
    module = RidgeBlackBox()
    hypergradient(module, PZOBO(2, mu=1e-6), module.episode())
    with pytest.warns(UserWarning, match=r"^`PZOBO\(mu=1e-16\)` is small for torch\.float64: .* much more"):
        hypergradient(module, PZOBO(2, mu=1e-16), module.episode())


@pytest.mark.parametrize("kind", [PZOBO, ZerothOrder])
def test_looking_changes_no_bit(kind: Any) -> None:
    module = seeded(Cleaning)
    with pytest.warns(UserWarning, match="is small"):
        looked = by_hand(module, kind(3, mu=1e-6), FLOAT)
    assert torch.equal(by_hand(module, kind(3, mu=1e-6), FLOAT), looked)  # of one module there is one look


@pytest.mark.parametrize("kind", [PZOBO, ZerothOrder])
def test_another_mu_is_another_look(kind: Any) -> None:
    module = seeded(Cleaning)
    by_hand(module, kind(3, mu=0.1), FLOAT)
    for mu in (1e-6, 1e-7):
        with pytest.warns(UserWarning, match=rf"^`{kind.__name__}\(mu={mu}\)` is small"):
            by_hand(module, kind(3, mu=mu), FLOAT)


def test_one_look_a_fit() -> None:
    strategy = PZOBO(2, mu=1e-6)
    module = seeded(Cleaning)
    with pytest.warns(UserWarning, match="is small") as caught:
        trainer(strategy, max_steps=3).fit(module, listed([EPISODE] * 3))
    assert len([each for each in caught if "is small" in str(each.message)]) == 1


def test_the_coarsest_dtype() -> None:
    with CoarsestDtype() as seen:
        assert seen.dtype is None
        torch.ones(2, dtype=torch.int64).sum()
        assert seen.dtype is None
        torch.ones(2, dtype=DOUBLE)
        assert seen.dtype == DOUBLE
        torch.ones(2, dtype=HALF).float().double()
        assert seen.dtype == HALF
        with torch.autocast("cpu", BRAIN):
            F.linear(torch.ones(2, 2), torch.ones(2, 2)).float()
    assert seen.dtype == BRAIN


class Named(torch.Tensor):
    """Made as users make them: of another tensor, with an attribute."""

    asked = 0

    @staticmethod
    def __new__(cls, values: Tensor) -> Any:
        return torch.Tensor.__new__(cls, values)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Named.asked += 1
        return super().__torch_function__(func, types, args, kwargs)


class Wrapper(torch.Tensor):
    """Holds a tensor and no storage."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Any:
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda x: x.held if isinstance(x, Wrapper) else x, (args, kwargs or {}))
        return tree_map(lambda x: cls(x) if isinstance(x, Tensor) else x, func(*args, **kwargs))


class Duck:
    """No tensor, and stands for one."""

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls(func(*(x.held if isinstance(x, Duck) else x for x in args), **(kwargs or {})))


PASSED: dict[str, Callable[[Tensor], Tensor]] = {
    "made of another": lambda x: Named(x).as_subclass(Tensor),
    "a subclass to the end": lambda x: x.as_subclass(Named),
    "_make_subclass": lambda x: Tensor._make_subclass(Named, x).as_subclass(Tensor),
    "_make_wrapper_subclass": lambda x: (Wrapper(x) + 0).held,
    "no subclass": lambda x: torch.add(Duck(x), 0).held,  # type: ignore[arg-type, attr-defined]
    "nested": lambda x: torch.stack(torch.nested.nested_tensor(list(x), layout=torch.jagged).unbind()),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("episodes", [1, 3])
@pytest.mark.parametrize("how", PASSED)
def test_looking_leaves_tensor_subclasses_alone(how: str, episodes: int) -> None:
    class Passed(Cleaning):
        plain = False

        def inner_loss(self, batch: Any) -> Tensor:
            x, *others = batch
            return super().inner_loss([x if self.plain else PASSED[how](x), *others])

    options = {"inner_start": "reset", "episode_chunk_size": 1}
    module, plain = (seeded(lambda: Passed(**options)).double() for _ in range(2))
    plain.plain = True
    x, y, index = EPISODE.inner[0]
    batch = x.double(), y.double(), index
    given = [Episode([batch], batch)] * episodes
    for kind in (PZOBO, ZerothOrder):
        for chunk_size in (1, None) if how != "nested" else (1,):  # which vmap has no rule for
            strategy = kind(1, mu=1e-4, chunk_size=chunk_size)
            found, expected = (hypergradient(each, strategy, given).grads for each in (module, plain))
            torch.testing.assert_close(found, expected)


def test_looking_asks_no_subclass() -> None:
    values, calls = torch.ones(2).as_subclass(Named), []
    for context in (nullcontext(), CoarsestDtype()):
        before = Named.asked
        with context:
            values.sum()
        calls.append(Named.asked - before)
    assert calls[0] == calls[1] > 0

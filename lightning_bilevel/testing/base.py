"""What the properties have in common: how they fail, which problem they run on, what counts as equal."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.auditing.rehearsal import written
from lightning_bilevel.errors import report
from lightning_bilevel.host import _collect_rng_states, _set_rng_states
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.testing.problems import PROBLEMS
from lightning_bilevel.testing.solved import SolvedModule
from lightning_bilevel.tree import Params

Property = Callable[[HypergradientStrategy], None]
"""Raises an ``AssertionError`` where a strategy does not have the property."""

Make = Callable[..., SolvedModule]
"""Makes a problem from options of ``BilevelModule``."""

EXACT = 1e-9
"""Relative error, in float64, of what is equal but for the order of sums."""

DIFFERENCES = 1e-6
"""The same of a strategy that differentiates nothing: differences over a small μ magnify rounding."""

_VARIANTS: tuple[dict[str, Any], ...] = ({}, {"inner_start": "warm"}, {"inner_start": "warm", "inner_steps": 1})
"""What a strategy may need of the inner level, the least first."""

_OF_LIGHTNING = ("log", "log_dict")
"""What a Trainer puts on its callbacks."""


def strategy_property(check: Property) -> Property:
    """Let a failure name the property and the strategy; keep warnings and the global random generators out of it."""

    @wraps(check)
    def named(strategy: HypergradientStrategy) -> None:
        states = _collect_rng_states(include_cuda=False)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check(strategy)
        except Exception as error:
            what = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            raise AssertionError(f"`{_shown(strategy)}` fails `{check.__name__}`: {what}") from error
        finally:
            _set_rng_states(states)

    return named


def accepted(strategy: HypergradientStrategy, *preferred: Make, **options: Any) -> SolvedModule:
    """Return the first problem that a strategy does not refuse.

    Args:
        strategy: it is asked: ``strategy.all_refusals(problem)``.
        preferred: tried first, before the other problems; each also with a warm start, and with one inner step.
        options: that every problem is to have.

    Raises:
        AssertionError: it refuses them all; the message says why.
    """
    refused: dict[str, None] = {}
    for module in _variants(preferred, options):
        found = strategy.all_refusals(module.functional().problem)
        if not found:
            return module
        refused[str(report(found))] = None
    raise AssertionError("it refuses every problem of `lightning_bilevel.testing`:\n" + "\n".join(refused))


def accepts(strategy: HypergradientStrategy, *preferred: Make, **options: Any) -> SolvedModule | None:
    """Return :func:`accepted`, or ``None`` where that raises."""
    try:
        return accepted(strategy, *preferred, **options)
    except AssertionError:
        return None


def rounding(strategy: HypergradientStrategy) -> float:
    """Return the relative error that does not count against a strategy."""
    return EXACT if strategy.second_order else DIFFERENCES


def assert_close(what: str, actual: Params, expected: Params, rtol: float) -> None:
    """Compare trees, relative to the largest entry of each tensor.

    Raises:
        AssertionError: names are missing or too many, or a tensor is off; the message has both values.
    """
    assert set(actual) == set(expected), f"{what} is of {sorted(actual)}, instead of {sorted(expected)}"
    for name, value in expected.items():
        got = actual[name]
        assert got.shape == value.shape, f"{what} of `{name}` has shape {tuple(got.shape)}, not {tuple(value.shape)}"
        error, size = float((got - value).abs().max()), float(value.abs().max())
        # A tensor of zeros has no scale of its own; it takes that of the whole.
        allowed = rtol * max(size, 1e-3 * float(tree.norm(expected)))
        assert error <= allowed, f"{what} of `{name}` is off by {error:.3g}: {_text(got)} instead of {_text(value)}"


def same(a: Any, b: Any) -> bool:
    """Return whether two objects hold equal values, tensors bit for bit, whatever their ``==`` says.

    >>> same({"w": [torch.ones(2)]}, {"w": [torch.ones(2)]}), same(torch.ones(2), torch.zeros(2))
    (True, False)
    """
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(same(value, b[name]) for name, value in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    by_identity: Any = object.__eq__
    return same(attributes(a), attributes(b)) if type(a).__eq__ is by_identity else bool(a == b)


def attributes(thing: Any) -> dict[str, Any]:
    """Return what an object holds, but for what Lightning adds."""
    held = getattr(thing, "__dict__", {})
    return {name: value for name, value in held.items() if name not in _OF_LIGHTNING}


def generator_states() -> dict[str, Any]:
    """Return the states of the global random generators, of torch, Python and NumPy, in a form that ``==`` compares.

    >>> before = generator_states()
    >>> drawn = torch.rand(1)
    >>> [name for name, state in generator_states().items() if state != before[name]]
    ['torch']
    """

    def plain(state: Any) -> Any:
        return (
            state.tolist() if hasattr(state, "tolist") else tuple(map(plain, state)) if type(state) is tuple else state
        )

    return {name: plain(state) for name, state in _collect_rng_states(include_cuda=False).items()}


def _variants(preferred: tuple[Make, ...], options: dict[str, Any]) -> Iterator[SolvedModule]:
    others = tuple(make for name, make in PROBLEMS.items() if "dropout" not in name)
    for makes in (preferred, others):
        for variant in _VARIANTS:
            for make in makes:
                yield make(**{**variant, **options})


def _shown(strategy: HypergradientStrategy) -> str:
    try:
        return written(strategy)
    except Exception:  # of a strategy whose arguments are not what they seem
        return type(strategy).__name__


def _text(value: Tensor) -> str:
    return str([float(f"{number:.6g}") for number in value.detach().reshape(-1)[:6].tolist()])

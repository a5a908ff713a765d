"""Properties of a strategy as an object: what it states, and that it holds settings only."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Mapping
from typing import Any

from lightning_bilevel.randomness import Call, Key
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.testing.base import accepted, attributes, same, strategy_property
from lightning_bilevel.testing.problems import Centred, Several
from lightning_bilevel.training.estimating import estimated
from lightning_bilevel.training.hypergradient import hypergradient

_TYPES: dict[str, type] = {
    "exact": bool,
    "unbiased": bool,
    "differentiates": frozenset,
    "needs_steps": bool,
    "memory": str,
    "cost": str,
    "direction_parallel": bool,
    "weighs_steps": bool,
    "supports_stacking": bool,
}
_DIFFERENTIATED = frozenset({"run", "inner_gradient"})


@strategy_property
def states_facts(strategy: HypergradientStrategy) -> None:
    """All facts are there and of the right types, and an exact strategy is unbiased."""
    for name, kind in _TYPES.items():
        assert hasattr(strategy, name), f"the fact `{name}` is not stated"
        value = getattr(strategy, name)
        assert isinstance(value, kind), f"the fact `{name}` is {value!r}, not of type {kind.__name__}"
    surplus = strategy.differentiates - _DIFFERENTIATED
    assert not surplus, f"`differentiates` has {sorted(surplus)}, beyond {sorted(_DIFFERENTIATED)}"
    assert strategy.unbiased or not strategy.exact, "what is exact is unbiased too"
    assert strategy.memory, "the fact `memory` is empty"
    assert strategy.cost, "the fact `cost` is empty"
    members = strategy.members()
    assert isinstance(members, Mapping), f"`members()` returns {members!r}, not a mapping"
    for name, member in members.items():
        assert isinstance(member, HypergradientStrategy), f"`members()[{name!r}]` is {member!r}"


@strategy_property
def keeps_its_arguments(strategy: HypergradientStrategy) -> None:
    """Every argument of the constructor is an attribute of its name: what YAML, the audit and errors show."""
    for name, parameter in inspect.signature(type(strategy)).parameters.items():
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            assert hasattr(strategy, name), f"the argument `{name}` is no attribute"


@strategy_property
def can_be_copied(strategy: HypergradientStrategy) -> None:
    """``copy.deepcopy`` and ``pickle`` give an equal strategy."""
    for way, again in (("copy.deepcopy", copy.deepcopy), ("pickle", _pickled)):
        other = again(strategy)
        assert type(other) is type(strategy), f"`{way}` gives a `{type(other).__name__}`"
        assert other is not strategy, f"`{way}` gives the same object"
        differing = _differing(attributes(strategy), attributes(other))
        assert not differing, f"`{way}` changes {differing}"


@strategy_property
def is_frozen(strategy: HypergradientStrategy) -> None:
    """Estimates leave the object as it is: what goes on from step to step is a value that they return."""
    before = copy.deepcopy(attributes(strategy))
    for make in (Several, Centred):
        module = accepted(strategy, make)
        episode, carry = module.episode(), None
        for number in range(2):
            call = Call(Key((number,)), step=number)
            functional, memory = module.functional(), module.fit_context.memory
            carry = estimated(functional, memory, strategy, [episode], call, carry=carry).carry
        hypergradient(module, strategy, episode, seed=1)
    differing = _differing(before, attributes(strategy))
    assert not differing, f"an estimate changes {differing} of the strategy"


def _differing(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [
        f"`{name}`"
        for name in sorted({*before, *after})
        if (name in before) != (name in after) or not same(before[name], after[name])
    ]


def _pickled(strategy: HypergradientStrategy) -> HypergradientStrategy:
    """Return what comes out of a pickle; classes are passed by, for those of a notebook have no address."""
    kinds: list[type] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> int | None:
            if not isinstance(obj, type):
                return None
            kinds.append(obj)
            return len(kinds) - 1

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> type:
            return kinds[pid]

    file = io.BytesIO()
    Pickler(file).dump(strategy)
    found: HypergradientStrategy = Unpickler(io.BytesIO(file.getvalue())).load()
    return found

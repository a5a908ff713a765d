"""``check_strategy``: every property that this package holds its own hypergradient strategies to, for any strategy."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_bilevel.errors import value_error
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.testing.base import Property
from lightning_bilevel.testing.estimates import (
    averages_episodes,
    draws_by_its_key,
    estimates_every_outer_parameter,
    is_exact_where_it_says_so,
    is_unbiased_where_it_says_so,
    leaves_the_module_alone,
    refuses_what_it_cannot,
    shares_out_directions,
    takes_the_inner_run,
    values_the_end_of_the_run,
    works_on_a_plain_problem,
)
from lightning_bilevel.testing.facts import can_be_copied, is_frozen, keeps_its_arguments, states_facts
from lightning_bilevel.testing.fits import accumulates, carries_its_state, resumes, stays_frozen_in_a_fit
from lightning_bilevel.testing.processes import trains_in_two_processes

PROPERTIES: dict[str, Property] = {
    each.__name__: each
    for each in (
        states_facts,
        keeps_its_arguments,
        can_be_copied,
        estimates_every_outer_parameter,
        takes_the_inner_run,
        values_the_end_of_the_run,
        is_exact_where_it_says_so,
        is_unbiased_where_it_says_so,
        leaves_the_module_alone,
        draws_by_its_key,
        is_frozen,
        averages_episodes,
        works_on_a_plain_problem,
        shares_out_directions,
        refuses_what_it_cannot,
        carries_its_state,
        resumes,
        accumulates,
        stays_frozen_in_a_fit,
    )
}
"""Every property by name, in the order in which they are checked: the cheap ones first."""

PROCESSES: dict[str, Property] = {trains_in_two_processes.__name__: trains_in_two_processes}
"""Those that start processes."""


def check_strategy(
    strategy: HypergradientStrategy, *, ddp: bool = False, properties: Iterable[str] | None = None
) -> None:
    """Check that a hypergradient strategy is what it says it is, and keeps what every strategy keeps.

    It is run on the small problems of :mod:`lightning_bilevel.testing`, in float64 and on the CPU: those that
    ``strategy.all_refusals(problem)`` accepts, with a warm start and one inner step where nothing else will do. Takes
    one to five seconds. Random numbers are seeded, so that the answer is always the same, and the global generators
    are as before afterwards.

    What every property asks for is in its docstring, ``PROPERTIES[name].__doc__`` of this module; each may be called
    by itself. A strategy whose inner run is not that of the problem leaves out
    ``takes_the_inner_run``.

    Args:
        strategy: one object; other settings may be checked by another call.
        ddp: also train in two processes, which takes ten seconds more; the class has to be importable there.
        properties: names of the properties to check; default: all.

    Raises:
        AssertionError: a property does not hold; the message names it, the strategy, and numbers.
        ValueError: a name that no property has.

    >>> from lightning_bilevel import ReverseUnroll
    >>> check_strategy(ReverseUnroll(), properties=["states_facts", "is_exact_where_it_says_so"])
    >>> class Half(ReverseUnroll):
    ...     def estimate(self, *args):
    ...         result = super().estimate(*args)
    ...         return result._replace(grads={name: value / 2 for name, value in result.grads.items()})
    >>> check_strategy(Half())  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    AssertionError: `Half()` fails `is_exact_where_it_says_so`: on `Quadratic`, ∇h of `target` is off by 0.651: ...
    """
    known = {**PROPERTIES, **PROCESSES}
    names = list(PROPERTIES) if properties is None else list(properties)
    if unknown := [name for name in names if name not in known]:
        raise value_error("check_strategy(properties=...)", f"names among {', '.join(known)}", unknown)
    for name in dict.fromkeys([*names, *(PROCESSES if ddp else ())]):
        known[name](strategy)

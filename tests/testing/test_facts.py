"""Properties of a strategy as an object: each fails on a fake that lacks it, and says what is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_bilevel import FirstOrder, ForwardGradient, HypergradientStrategy, ReverseUnroll
from lightning_bilevel.directions import Gaussian
from lightning_bilevel.testing.facts import can_be_copied, is_frozen, keeps_its_arguments, states_facts


class WithoutFacts(HypergradientStrategy):
    exact, unbiased = False, False

    def estimate(self, *args: Any) -> Any:
        raise NotImplementedError


class ATupleOfNames(FirstOrder):
    differentiates = ("run",)  # type: ignore[assignment]


class OfAnotherThing(FirstOrder):
    differentiates = frozenset({"outer_gradient"})  # type: ignore[arg-type]


class ExactAndBiased(FirstOrder):
    exact = True


class NoWords(FirstOrder):
    cost = ""


class ListOfMembers(FirstOrder):
    def members(self) -> Any:
        return [FirstOrder()]


class StrangeMember(FirstOrder):
    def members(self) -> Any:
        return {"guide": 3}


@pytest.mark.parametrize(
    ("fake", "message"),
    [
        (WithoutFacts(), r"the fact `differentiates` is not stated"),
        (ATupleOfNames(), r"the fact `differentiates` is \('run',\), not of type frozenset"),
        (OfAnotherThing(), r"`differentiates` has \['outer_gradient'\], beyond \['inner_gradient', 'run'\]"),
        (ExactAndBiased(), r"what is exact is unbiased too"),
        (NoWords(), r"the fact `cost` is empty"),
        (ListOfMembers(), r"`members\(\)` returns \[.*\], not a mapping"),
        (StrangeMember(), r"`members\(\)\['guide'\]` is 3"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_facts(fake: HypergradientStrategy, message: str) -> None:
    with pytest.raises(AssertionError, match=rf"^`{type(fake).__name__}\(\)` fails `states_facts`: {message}"):
        states_facts(fake)


class Forgetful(FirstOrder):
    def __init__(self, rate: float = 0.5, *rest: int, **options: int) -> None:
        self.speed = rate


def test_arguments() -> None:
    keeps_its_arguments(ForwardGradient(2, Gaussian()))
    with pytest.raises(
        AssertionError, match=r"^`Forgetful\(.*\)` fails `keeps_its_arguments`: the argument `rate` is no"
    ):
        keeps_its_arguments(Forgetful())


class WithALambda(FirstOrder):
    def __init__(self) -> None:
        self.weigh = lambda t: t


class ItsOwnCopy(FirstOrder):
    def __deepcopy__(self, memo: Any) -> Any:
        return self


class FadingCopy(FirstOrder):
    def __init__(self) -> None:
        self.rate = 1.0

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.rate = state["rate"] / 2


@pytest.mark.parametrize(
    ("fake", "message"),
    [
        (WithALambda(), r"(PicklingError|AttributeError): Can't (get|pickle) "),
        (ItsOwnCopy(), r"`copy.deepcopy` gives the same object"),
        (FadingCopy(), r"`copy.deepcopy` changes \['`rate`'\]"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_copies(fake: HypergradientStrategy, message: str) -> None:
    with pytest.raises(AssertionError, match=rf"^`{type(fake).__name__}\(\)` fails `can_be_copied`: {message}"):
        can_be_copied(fake)


def test_a_class_of_a_notebook_can_be_pickled() -> None:
    class Local(ReverseUnroll):
        pass

    can_be_copied(Local(checkpoint=2))


class Counting(FirstOrder):
    calls = 0

    def estimate(self, *args: Any) -> Any:
        self.calls += 1
        return super().estimate(*args)


class InsideOut(ForwardGradient):
    def estimate(self, *args: Any) -> Any:
        self.directions.scale = 2
        return super().estimate(*args)


@pytest.mark.parametrize(("fake", "name"), [(Counting(), "calls"), (InsideOut(2), "directions")])
def test_what_goes_on_is_no_part_of_the_object(fake: HypergradientStrategy, name: str) -> None:
    with pytest.raises(AssertionError, match=rf"fails `is_frozen`: an estimate changes \['`{name}`'\] of the strategy"):
        is_frozen(fake)

"""What Dynamo's guards leave out."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bilevel.compiled.watch import Watch

KEYED: dict[str, float] = {}
ENVIRONMENT = "FACTOR_OF_A_LOSS"


def turn(keyed: dict[str, float]) -> None:
    first = next(iter(keyed))
    keyed[first] = keyed.pop(first)


def states(function: Callable[..., Tensor], change: Callable[[], Any], *args: Any) -> list[Any]:
    """Return what a watch says before a change, again, and after it."""
    watch = Watch(function, nn.Identity())
    found = [watch.look(*args), watch.look(*args)]
    change()
    return [*found, watch.look(*args)]


@pytest.mark.parametrize("kind", [dict, OrderedDict])
@pytest.mark.parametrize("place", ["closure", "global", "argument", "attribute"])
def test_the_order_of_keys(kind: Any, place: str) -> None:
    keyed: dict[str, float] = kind(a=1.0, b=2.0)
    KEYED.clear()
    KEYED.update(keyed)
    module = nn.Identity()
    module.held = [{"inside": keyed}]  # type: ignore[assignment]
    x = torch.ones(())
    functions: dict[str, Callable[..., Tensor]] = {
        "closure": lambda x: x * (1 + (list(keyed)[0] == "a")),
        "global": lambda x: x * (1 + (list(KEYED)[0] == "a")),
        "argument": lambda given: given[1] * (1 + (list(given[0])[0] == "a")),
        "attribute": lambda x: x * (1 + (list(module.held[0]["inside"])[0] == "a")),
    }
    given = (keyed, x) if place == "argument" else x
    first, second, third = states(functions[place], lambda: (turn(keyed), turn(KEYED)), given)
    assert first == second != third


def test_an_ordered_dict_in_place_of_another() -> None:
    module: Any = nn.Identity()
    module.keyed = OrderedDict(a=1.0, b=2.0)

    def other() -> None:
        module.keyed = OrderedDict(b=2.0, a=1.0)

    first, second, third = states(lambda x: x * next(iter(module.keyed.values())), other, torch.ones(()))
    assert first == second != third


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x * float(os.getenv(ENVIRONMENT, "1")),
        lambda x: x * float(os.environ.get(ENVIRONMENT, "1")),
        lambda x: x * (1 + (ENVIRONMENT in os.environ)),
    ],
)
def test_the_environment(read: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = states(read, lambda: monkeypatch.setenv(ENVIRONMENT, "2"), torch.ones(()))
    assert first == second != third


def test_where_nothing_is_left_out_the_number_of_the_state_is_all() -> None:
    scale = {"a": 2.0}
    assert states(lambda x: x * scale["a"], lambda: scale.update(a=3.0), torch.ones(())) == [1, 1, 2]


@pytest.mark.parametrize(("count", "is_seen"), [(1_000, True), (1_001, False)])
def test_a_long_dict_is_a_table(count: int, is_seen: bool) -> None:
    keyed = {str(number): float(number) for number in range(count)}
    first, second, third = states(lambda x: x * (1 + (list(keyed)[0] == "0")), lambda: turn(keyed), torch.ones(()))
    assert first == second
    assert (second != third) is is_seen

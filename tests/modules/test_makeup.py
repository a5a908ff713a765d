"""What a module is made of: kept looks hold while nothing that its code can read is another thing."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_bilevel import SGD, BilevelModule, Episode, ReverseUnroll, hypergradient
from lightning_bilevel.modules.makeup import Makeup

FACTOR = 1.0
NOISE = np.random.default_rng(0)


def scaled(value: Tensor) -> Tensor:
    return FACTOR * value


@dataclass
class Options:
    power: int = 2


class Toy(BilevelModule):
    def __init__(self) -> None:
        super().__init__(inner_steps=2, inner_start="reset")
        self.theta, self.phi = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(1.0))
        self.register_buffer("shift", torch.tensor(0.0))
        self.options, self.table = Options(), {"weights": [1.0, 2.0]}
        self.draws = False

    def outer_parameters(self) -> Any:
        return [self.phi]

    def power(self) -> int:
        return self.options.power

    def inner_loss(self, x: Tensor) -> Tensor:
        noise = float(NOISE.normal()) if self.draws else 0.0
        return scaled(self.theta - self.phi * x - self.shift - noise).abs().pow(self.power()) * self.table["weights"][0]

    def outer_loss(self, x: Tensor) -> Tensor:
        return (self.theta - x).square()

    def configure_inner_optimizer(self) -> SGD:
        return SGD(lr=0.1)


def _global(name: str, value: Any) -> Callable[[Toy, pytest.MonkeyPatch], None]:
    return lambda module, patch: patch.setitem(globals(), name, value)


def _attribute(name: str, value: Any) -> Callable[[Toy, pytest.MonkeyPatch], None]:
    return lambda module, patch: setattr(module, name, value)


def _method(module: Toy, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Toy, "power", lambda self: 4)


def _own_method(module: Toy, patch: pytest.MonkeyPatch) -> None:
    module.power = lambda: 4  # type: ignore[method-assign]


def _within_an_object(module: Toy, patch: pytest.MonkeyPatch) -> None:
    module.options.power = 4


def _within_containers(module: Toy, patch: pytest.MonkeyPatch) -> None:
    module.table["weights"][0] = 3.0


def _level(module: Toy, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Toy, "inner_parameters", lambda self: [self.theta])
    patch.setattr(Toy, "outer_parameters", lambda self: [self.phi, self.theta])


def _buffer(module: Toy, patch: pytest.MonkeyPatch) -> None:
    module.shift = torch.tensor(1.0)


def _new_parameter(module: Toy, patch: pytest.MonkeyPatch) -> None:
    module.theta = nn.Parameter(torch.tensor(2.0))


def _new_child(module: Toy, patch: pytest.MonkeyPatch) -> None:
    module.child = nn.Linear(1, 1)


def _double(module: Toy, patch: pytest.MonkeyPatch) -> None:
    module.double()


CHANGES: dict[str, Callable[[Toy, pytest.MonkeyPatch], None]] = {
    "a number among the globals": _global("FACTOR", 2.0),
    "a function among the globals": _global("scaled", lambda value: 3 * value),
    "a generator among the globals": _global("NOISE", np.random.default_rng(7)),
    "an attribute": _attribute("inner_steps", 3),
    "a flag": _attribute("draws", True),
    "a method": _method,
    "a method of the instance": _own_method,
    "an object in an attribute": _within_an_object,
    "a list in a dict": _within_containers,
    "which parameters are outer": _level,
    "a buffer": _buffer,
    "a parameter": _new_parameter,
    "a child": _new_child,
    "the precision": _double,
}


def _episode(module: Toy) -> Episode:
    return Episode([torch.tensor(2.0, dtype=module.theta.dtype)], torch.tensor(1.0, dtype=module.theta.dtype))


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_kept_from_an_estimate_goes_where_something_has_changed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Toy()
    makeup = Makeup(module)
    before, functional = hypergradient(module, ReverseUnroll(), _episode(module)), module.functional()
    assert makeup.holds()
    assert module.functional() is functional
    CHANGES[name](module, monkeypatch)
    assert not makeup.holds()
    assert module.functional() is not functional
    fresh = Toy()
    CHANGES[name](fresh, monkeypatch)
    got = hypergradient(module, ReverseUnroll(), _episode(module))
    expected = hypergradient(fresh, ReverseUnroll(), _episode(fresh))
    torch.testing.assert_close(dict(got.grads), dict(expected.grads), rtol=0, atol=0)
    same = {"a generator among the globals", "a child"}
    assert (name in same) == (got.grads.keys() == before.grads.keys() and bool(got.grads["phi"] == before.grads["phi"]))


def test_a_generator_among_the_globals_is_repeated_after_it_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Toy()
    module.draws = True
    hypergradient(module, ReverseUnroll(), _episode(module))
    monkeypatch.setitem(globals(), "NOISE", np.random.default_rng(7))
    before = NOISE.bit_generator.state
    hypergradient(module, ReverseUnroll(), _episode(module))
    assert NOISE.bit_generator.state == before


def test_values_in_tensors_are_no_change() -> None:
    module = Toy()
    makeup = Makeup(module)
    with torch.no_grad():
        module.theta += 1
        module.shift += 1
    assert makeup.holds()


def test_nothing_is_kept_alive() -> None:
    module = Toy()
    module.features = torch.ones(3)  # type: ignore[assignment]
    hypergradient(module, ReverseUnroll(), _episode(module))
    features = weakref.ref(module.features)
    del module.features
    hypergradient(module, ReverseUnroll(), _episode(module))
    assert features() is None


class Node:
    """Knows all others."""

    def __init__(self, others: list[Node]) -> None:
        self.others = others


def test_objects_that_know_each_other_are_marked_once() -> None:
    module, nodes = Toy(), list[Node]()
    nodes += [Node(nodes) for _ in range(500)]
    module.nodes = nodes  # type: ignore[assignment]
    makeup = Makeup(module)
    assert len(str(makeup._marks)) < 200_000
    nodes.append(Node(nodes))
    assert not makeup.holds()


def test_what_a_closure_holds_is_seen() -> None:
    factor = 1.0

    class Closed(Toy):
        def outer_loss(self, x: Tensor) -> Tensor:
            return factor * super().outer_loss(x)

    module = Closed()
    makeup = Makeup(module)
    assert makeup.holds()
    factor = 2.0
    assert not makeup.holds()

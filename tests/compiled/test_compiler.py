"""What changes between two estimates is seen, or the steps are eager: never a wrong number."""

from __future__ import annotations

import logging
import os
import random
import re
import types
import warnings
from collections import OrderedDict, UserDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_bilevel import SGD, Adam, Episode, ReverseUnroll, hypergradient
from lightning_bilevel.inner_optimizers import InnerOptimizer
from tests.support.compiled import FEATURES, Weighted, apart, both, episode, weighted

GLOBAL, ARRAY, CLOSED = {"scale": 1.0}, np.ones(2), torch.ones(3)
NOTHING: Callable[[Any], Any] = lambda module: None  # noqa: E731


class Case(NamedTuple):
    """Something in a module, what changes it, and why it stays eager, if it does."""

    options: dict[str, Any]
    change: Callable[[Any], Any] = NOTHING
    because: str = ""


def scaled(factor: Callable[[Any], Any]) -> dict[str, Any]:
    return {"term": lambda self, loss: loss * factor(self)}


def up(name: str) -> Callable[[Any], None]:
    return lambda module: setattr(module, name, getattr(module, name) + 1)


def doing(action: Callable[[Any], Any]) -> dict[str, Any]:
    """Do something in the loss that is not its value."""
    return {"term": lambda self, loss: (action(self), loss)[1]}


class Rule(InnerOptimizer):
    """Gradient descent with a rate that is a function of the number of the step."""

    def __init__(self, rate: Callable[[int], float]) -> None:
        self.rate = rate

    def update(self, params: Any, grads: Any, opt_state: Any, step: int) -> Any:
        return {name: value - self.rate(step) * grads[name] for name, value in params.items()}, {}


VARIABLE = "FACTOR_OF_A_LOSS"
NUMBERS = "it takes numbers out of an array or a tensor"
CASES = {
    # seen: compiled again, or the graphs read it
    "nothing": Case({}),
    "a float": Case(scaled(lambda m: m.number), up("number")),
    "an int, by a method": Case(scaled(lambda m: m.ask()), up("count")),
    "there and back": Case(scaled(lambda m: m.number), lambda m: setattr(m, "number", 4.0 - m.number)),
    "a global": Case(scaled(lambda m: GLOBAL["scale"]), lambda m: GLOBAL.update(scale=GLOBAL["scale"] + 1)),
    "an entry of a dict": Case(scaled(lambda m: m.config["a"]), lambda m: m.config.update(a=m.config["a"] + 1)),
    "the order of an OrderedDict": Case(
        scaled(lambda m: next(iter(m.ordered.values()))), lambda m: m.ordered.move_to_end(next(iter(m.ordered)))
    ),
    "the order of keys": Case(scaled(lambda m: 1 + (list(m.keyed)[0] == "a")), lambda m: _turned(m.keyed)),
    "the environment": Case(scaled(lambda m: float(os.getenv(VARIABLE, "1"))), lambda m: _one_more(os.environ)),
    "what is in the environment": Case(scaled(lambda m: 1 + (VARIABLE in os.environ)), lambda m: _one_more(os.environ)),
    "a list": Case(scaled(lambda m: sum(m.listed)), lambda m: m.listed.append(1.0)),
    "a set": Case(scaled(lambda m: len(m.bag)), lambda m: m.bag.add(len(m.bag))),
    "the length of a text": Case(scaled(lambda m: len(m.title)), lambda m: setattr(m, "title", m.title + "x")),
    "an object's attribute": Case(scaled(lambda m: m.space.v), lambda m: setattr(m.space, "v", m.space.v + 1)),
    "hparams": Case(scaled(lambda m: m.hparams.a), lambda m: m.hparams.update(a=m.hparams.a + 1)),
    "a tensor of a list": Case(scaled(lambda m: torch.tensor(m.listed).sum()), lambda m: m.listed.append(1.0)),
    "a tensor, replaced": Case(scaled(lambda m: m.tensor), lambda m: setattr(m, "tensor", m.tensor + 1)),
    "a tensor, in place": Case(scaled(lambda m: m.tensor), lambda m: m.tensor.add_(1)),
    "a tensor that is closed over": Case(scaled(lambda m: CLOSED.sum()), lambda m: CLOSED.add_(1)),
    "a buffer, in place": Case(scaled(lambda m: m.buffer.sum()), lambda m: m.buffer.add_(1)),
    "a buffer, replaced": Case(scaled(lambda m: m.buffer.sum()), lambda m: setattr(m, "buffer", m.buffer + 1)),
    "the mode": Case(scaled(lambda m: 1.0 if m.training else 2.0), lambda m: m.train(not m.training)),
    "a forward hook": Case({}, lambda m: m.net.register_forward_hook(lambda module, inputs, output: 2 * output)),
    "another forward": Case({}, lambda m: setattr(m.net, "forward", lambda x: 2 * nn.Linear.forward(m.net, x))),
    "another layer": Case(
        {"net": lambda: nn.Sequential(nn.Linear(FEATURES, 3), nn.Tanh())}, lambda m: m.net.__setitem__(1, nn.ReLU())
    ),
    "a hook on the loss": Case({"term": lambda self, loss: _hooked(self, loss)}, up("count")),
    "the inner rate": Case({"optimizer": lambda m: SGD(lr=0.3 / m.count)}, up("count")),
    "the inner rate, a tensor": Case({"optimizer": lambda m: SGD(lr=0.1 * m.tensor)}, lambda m: m.tensor.add_(1)),
    "inner rates by name": Case(
        {"optimizer": lambda m: SGD(lr=m.config["rates"])},
        lambda m: m.config.update(rates={"*bias": 0.1, "*": m.log_lr}),
    ),
    "the learned inner rate": Case({"optimizer": lambda m: SGD(lr=m.log_lr.exp(), momentum=0.9)}),
    "the rate of a torch.optim": Case(
        {"optimizer": lambda m: torch.optim.Adam(m.net.parameters(), lr=0.1 / m.count)}, up("count")
    ),
    "another optimizer": Case(
        {"optimizer": lambda m: SGD(lr=0.3) if m.count == 1 else Adam(lr=0.3)},
        lambda m: setattr(m, "count", 3 - m.count),
    ),
    "a rate that a table has": Case({"optimizer": lambda m: Rule(lambda step: {3: 0.01}.get(step, 0.3))}),
    "a rate for each step": Case({"optimizer": lambda m: Rule(lambda step: 0.3 / step)}),
    "what is logged": Case(doing(lambda m: m.log("scale", m.number, prog_bar=True)), up("number")),
    "a float, where gradients are taken": Case(
        scaled(lambda m: m.number if torch.is_grad_enabled() else 1.0), up("number")
    ),
    # not seen: eager
    "a number in an array": Case(scaled(lambda m: float(m.array[0])), lambda m: m.array.__iadd__(1), NUMBERS),
    "an entry of an array": Case(scaled(lambda m: m.array[0]), lambda m: m.array.__iadd__(1), NUMBERS),
    "an array in a tensor": Case(
        scaled(lambda m: torch.from_numpy(m.array).sum()), lambda m: m.array.__iadd__(1), NUMBERS
    ),
    "a global array": Case(scaled(lambda m: ARRAY.sum()), lambda m: ARRAY.__iadd__(1), NUMBERS),
    "a number in a tensor": Case(scaled(lambda m: float(m.tensor)), lambda m: m.tensor.add_(1), NUMBERS),
    "an item of a tensor": Case(scaled(lambda m: m.tensor.item()), lambda m: m.tensor.add_(1), NUMBERS),
    "the inner rate, an item": Case(
        {"optimizer": lambda m: SGD(lr=0.1 * m.tensor.item())}, lambda m: m.tensor.add_(1), "."
    ),
    "the inner rate, in an array": Case(
        {"optimizer": lambda m: SGD(lr=0.1 * m.array[0])}, lambda m: m.array.__iadd__(1), "."
    ),
    "Python's random": Case(scaled(lambda m: random.random()), because="."),
    "NumPy's random": Case(
        scaled(lambda m: torch.from_numpy(np.random.rand(2)).sum()),
        because="it draws from NumPy, `random` or a generator",
    ),
    "a NumPy generator": Case(scaled(lambda m: m.numbers.random()), because="."),
    "a torch generator": Case(scaled(lambda m: torch.rand((), generator=m.generator)), because="."),
    "a branch on data": Case({"term": lambda self, loss: 2 * loss if loss > 0.5 else loss}, because="Data-dependent"),
    "a counter": Case({"term": lambda self, loss: _counted(self, loss)}, because="it writes to an attribute"),
    "a list that grows": Case(doing(lambda m: m.listed.append(1.0)), because="it writes to an attribute"),
    "a feature that is kept": Case(
        {"term": lambda self, loss: (setattr(self, "kept", loss.detach()), loss)[1]}, because="it leaves tensors behind"
    ),
    "a metric": Case({"term": lambda self, loss: (self.metric.update(loss.detach()), loss)[1]}, because="."),
}


def _hooked(module: Any, loss: Tensor) -> Tensor:
    loss.register_hook(lambda grad: grad * module.count)
    return loss


def _counted(module: Any, loss: Tensor) -> Tensor:
    module.count += 1
    return loss * module.count


def _turned(keyed: dict[str, Any]) -> None:
    first = next(iter(keyed))
    keyed[first] = keyed.pop(first)


def _one_more(environment: Any) -> None:
    environment[VARIABLE] = str(float(environment.get(VARIABLE, "1")) + 1)


def furnished(options: dict[str, Any]) -> Weighted:
    module: Any = weighted(**options)
    module.number, module.count, module.listed, module.title, module.bag = 1.0, 1, [1.0], "a", {-1}
    module.config, module.space, module.array = (
        {"a": 1.0, "rates": {"*": 0.2}},
        types.SimpleNamespace(v=1.0),
        np.ones(2),
    )
    module.tensor, module.ask = torch.tensor(1.0), lambda: module.count
    module.numbers, module.generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    module.ordered, module.keyed = OrderedDict(a=1.0, b=2.0), {"a": 1.0, "b": 2.0}
    module.metric = MeanMetric()
    module.register_buffer("buffer", torch.ones(2))
    module.save_hyperparameters({"a": 1.0})
    return module


FAST = {
    "nothing", "a float", "a float, where gradients are taken",
    "a global", "a tensor, replaced", "a tensor, in place", "a buffer, in place", "the mode",
    "a forward hook", "the inner rate", "the learned inner rate", "the rate of a torch.optim", "what is logged",
    "a rate that a table has", "a number in an array", "a number in a tensor", "Python's random", "NumPy's random",
    "a branch on data", "a counter", "a feature that is kept",
}  # fmt: skip
"""One of each kind; the others are slow together."""


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=() if name in FAST else pytest.mark.slow) for name, case in CASES.items()],
)
def test_what_changes_is_seen_or_the_steps_are_eager(
    case: Case, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "")
    del os.environ[VARIABLE]  # which stands as it did, in the end
    module = furnished(case.options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            ours, eager = both(module)
            assert apart(ours, eager) < 2e-6
            case.change(module)
    said = [str(each.message) for each in caught if "compiled" in str(each.message)]
    if case.because:
        (message,) = said
        assert re.match(f"The inner steps are not compiled: {case.because}", message)
        assert not calls
    else:
        assert not said
        assert len(calls) >= 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The inner steps are not compiled. it has done 4 different things so far")
def test_what_changes_all_the_time_is_eager_in_the_end(calls: list[int]) -> None:
    module = furnished(scaled(lambda m: m.number))
    for _ in range(6):
        assert apart(*both(module)) < 2e-6
        module.number += 1
    calls.clear()
    both(module)
    assert not calls


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The inner steps are not compiled. hooks, or what else surrounds the losses")
def test_hooks_that_change_all_the_time_are_eager_in_the_end(calls: list[int]) -> None:
    module = furnished({"inner_steps": 1})
    for _ in range(10):
        handle = module.net.register_forward_hook(lambda module, inputs, output: 2 * output)
        assert apart(*both(module)) < 2e-6
        handle.remove()
    calls.clear()
    both(module)
    assert not calls


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The inner steps are not compiled. there are more than 8 kinds of batches")
def test_batches_of_many_kinds_are_eager_in_the_end(calls: list[int]) -> None:
    module = weighted(inner_steps=1)
    for examples in range(2, 12):
        assert apart(*both(module, episodes=episode(examples=examples))) < 2e-6
    calls.clear()
    both(module)
    assert not calls


def test_batches_of_two_shapes_in_one_run(calls: list[int]) -> None:
    small, large = episode(examples=3), episode(examples=5)
    assert apart(*both(weighted(), episodes=Episode([small.inner[0], large.inner[0]], small.outer))) < 2e-6
    assert len(calls) >= 3


def test_a_batch_with_numbers_in_it_has_graphs_of_its_own(calls: list[int]) -> None:
    class Tempered(Weighted):
        def inner_loss(self, batch: Any) -> Tensor:
            return super().inner_loss(batch["data"]) * batch["temperature"]

    torch.manual_seed(0)
    module, (first, second), outer = Tempered(), episode().inner, episode().outer
    batches = [{"data": first, "temperature": 1.0}, {"data": second, "temperature": 3.0}]
    assert apart(*both(module, episodes=Episode(batches, outer))) < 2e-6
    assert calls


def test_a_batch_that_a_loss_takes_apart(calls: list[int]) -> None:
    class Popping(Weighted):
        def inner_loss(self, batch: Any) -> Tensor:
            index = batch.pop("index")
            return super().inner_loss((*batch.values(), index))

    torch.manual_seed(0)
    module, given = Popping(), episode()
    batches = [UserDict(zip(("x", "y", "index"), each, strict=True)) for each in given.inner]
    for _ in range(2):
        assert apart(*both(module, episodes=Episode(batches, given.outer))) < 2e-6
    assert calls


WITHIN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a gradient by the net": lambda m, loss: (
        loss + sum(g.square().sum() for g in torch.autograd.grad(loss, list(m.net.parameters()), create_graph=True))
    ),
    "vmap": lambda m, loss: loss + torch.func.vmap(lambda x: m.net(x).tanh().sum())(torch.eye(FEATURES)).sum(),
    "a Jacobian": lambda m, loss: loss + torch.func.jacrev(m.net)(torch.ones(FEATURES)).square().sum(),
}


@pytest.mark.parametrize("name", WITHIN)
def test_derivatives_and_vmap_within_a_loss(name: str, calls: list[int]) -> None:
    assert apart(*both(weighted(term=WITHIN[name], inner_steps=2))) < 2e-6
    assert calls


def test_a_batch_that_holds_an_object_is_eager(calls: list[int]) -> None:
    class Held:
        def __init__(self, batch: Any) -> None:
            self.batch = batch

    class OfObjects(Weighted):
        def inner_loss(self, batch: Any) -> Tensor:
            return super().inner_loss(batch.batch)

    torch.manual_seed(0)
    module, given = OfObjects(), episode()
    with pytest.warns(UserWarning, match="a batch holds something else than tensors, numbers and texts in containers"):
        assert apart(*both(module, episodes=Episode([Held(each) for each in given.inner], given.outer))) == 0
    assert not calls


def test_an_older_torch_is_eager(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    monkeypatch.setattr(torch, "__version__", "2.12.1+cpu")
    with pytest.warns(UserWarning, match=r"that takes PyTorch 2\.13 or newer"):
        both(weighted())
    assert not calls


class Observing(ReverseUnroll):
    """Keeps what the losses logged."""

    def estimate(self, *args: Any) -> Any:
        result = super().estimate(*args)
        self.logged = result.observed.calls
        return result


def test_what_is_logged_is_that_of_the_last_step() -> None:
    def logged(self: Any, loss: Tensor) -> Tensor:
        self.log("inner/scaled", 2 * loss, prog_bar=True)
        self.log_dict({"inner/number": self.number})
        return loss

    module, ours, eager = furnished({"term": logged}), Observing(), Observing()
    hypergradient(module, ours, episode())
    module.compiles_steps = False
    hypergradient(module, eager, episode())
    assert ours.logged.keys() == eager.logged.keys() == {"inner/scaled", "inner/number"}
    assert torch.allclose(ours.logged["inner/scaled"][0], eager.logged["inner/scaled"][0])
    assert ours.logged["inner/scaled"][1:] == eager.logged["inner/scaled"][1:]
    assert ours.logged["inner/number"] == eager.logged["inner/number"]


def test_messages_tell_what_was_compiled(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        both(weighted())
    (message,) = [each for each in caplog.messages if "Compiled" in each]
    assert message.startswith("Compiled 3 inner steps of `Weighted` (with the outer loss and the derivative, flat) in ")


@pytest.mark.usefixtures("one_by_one")
def test_messages_tell_what_was_compiled_of_a_step(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        both(weighted())
    step, outer = [each for each in caplog.messages if "Compiled" in each]
    assert step.startswith("Compiled an inner step of `Weighted` (with the derivative, flat) in ")
    assert outer.startswith("Compiled the outer loss with its gradients of `Weighted` (flat) in ")

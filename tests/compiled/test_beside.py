"""What an outer loss returns beside its value comes out of graphs as it does without them."""

from __future__ import annotations

import dataclasses
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_bilevel import FirstOrder, HypergradientStrategy, ReverseUnroll, ZerothOrder, hypergradient
from lightning_bilevel.compiled import agree
from lightning_bilevel.compiled.beside import Beside, looked_at, taken_apart
from lightning_bilevel.compiled.reasons import NotCompiled
from lightning_bilevel.modules import recorder
from tests.support.compiled import Weighted, apart, both, episode


class Pair(NamedTuple):
    outputs: Tensor
    name: str


@dataclasses.dataclass
class Record:
    outputs: Tensor
    number: float


class Returning(Weighted):
    """Returns all kinds of things beside its value: what it computes, is given, has, and makes, in containers."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.tensor, self.number, self.text, self.listed = torch.ones(2), 1.0, "a", [1]

    def outer_loss(self, batch: Any) -> Any:
        outputs = self.net(batch[0])
        loss = F.cross_entropy(outputs, batch[1])
        computed = {"list": [outputs, outputs.argmax(-1)], "pair": Pair(2 * outputs, self.text), "none": None}
        besides = {"record": Record(outputs > 0, self.number), "number": self.number, "listed": self.listed}
        made = {"weight": self.net.weight, "input": batch[0], "made": torch.zeros(1), "kept": self.tensor}
        return OrderedDict(loss=loss, computed=computed, **besides, **made)


@pytest.fixture
def returned(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list of what each episode has left beside its value."""
    seen: list[Any] = []
    original = recorder.by_episode

    def kept(outputs: Any, count: int) -> Any:
        found = original(outputs, count)
        seen.extend(found)
        return found

    monkeypatch.setattr(recorder, "by_episode", kept)
    return seen


def same(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert type(found) is Tensor
        assert not found.requires_grad
        torch.testing.assert_close(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            same(found[key], value)
    elif isinstance(expected, (list, tuple)):
        assert type(found) is type(expected)
        for a, b in zip(found, expected, strict=True):
            same(a, b)
    elif isinstance(expected, Record):
        same(vars(found), vars(expected))
    else:
        assert found == expected


def change(module: Any) -> None:
    module.tensor, module.number, module.text = module.tensor + 1, module.number + 1, module.text + "b"
    module.listed.append(2)


@pytest.mark.parametrize(
    "strategy", [ReverseUnroll, FirstOrder, lambda: ZerothOrder(2)], ids=["whole", "one", "copies"]
)
@pytest.mark.parametrize("chunk", [1, 3], ids=["looped", "stacked"])
def test_all_that_is_returned(
    strategy: Callable[[], HypergradientStrategy], chunk: int, returned: list[Any], recwarn: pytest.WarningsRecorder
) -> None:
    torch.manual_seed(0)
    module, episodes = Returning(episode_chunk_size=chunk), [episode(seed) for seed in range(3)]
    for _ in range(3):
        assert apart(*both(module, strategy(), episodes)) < 2e-6
        same(returned[:3], returned[3:])
        returned.clear()
        change(module)
    assert not [each for each in recwarn if "compiled" in str(each.message)]


REFUSED: dict[str, Callable[[Any, Tensor], Any]] = {
    "an object": lambda module, loss: module.net,
    "an object in a list": lambda module, loss: [loss, module.optimizer],
    "an array": lambda module, loss: module.tensor.numpy(),
    "a number that is computed": lambda module, loss: loss.item(),
    "a sparse tensor": lambda module, loss: loss.detach().reshape(1).to_sparse(),
    "a number that counts": lambda module, loss: setattr(module, "number", module.number + 1) or module.number,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_followed(name: str, returned: list[Any], calls: list[int]) -> None:
    class Module(Returning):
        def outer_loss(self, batch: Any) -> Any:
            loss = super().outer_loss(batch)["loss"]
            return {"loss": loss, "more": REFUSED[name](self, loss)}

    torch.manual_seed(0)
    module = Module()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert apart(*both(module)) < 2e-6
    (said,) = [str(each.message) for each in caught if "compiled" in str(each.message)]
    assert said.startswith("The outer losses are not compiled: ")
    assert len(returned) == 2
    assert returned[0].keys() == returned[1].keys() == {"more"}
    assert calls


def test_tensors_beside_of_any_size_hide_no_difference() -> None:
    class Module(Returning):
        def outer_loss(self, batch: Any) -> Any:
            return {"loss": super().outer_loss(batch)["loss"], "large": 1e9 * batch[0].square()}

    torch.manual_seed(0)
    sizes: list[Any] = []
    module, original = Module(), agree._apart
    with pytest.MonkeyPatch.context() as patch:

        def wrong(functions: Any, expected: Any, found: Any, tolerance: float) -> str:
            assert any("beside" in functions.described(number) for number in range(len(found)))
            last = [*found[:-1], found[-1] + 0.1]
            sizes.append(original(functions, expected, last, tolerance))
            return original(functions, expected, found, tolerance)

        patch.setattr(agree, "_apart", wrong)
        hypergradient(module, ReverseUnroll(), episode())
    assert all("is apart" in each for each in sizes)


def test_a_form_is_filled_with_other_tensors() -> None:
    beside, tensors = taken_apart({"a": torch.ones(2), "b": [torch.zeros(1), "c"]})
    assert beside.size == len(tensors) == 2
    assert not any(beside.stacked)
    same(beside.filled(tensors), {"a": torch.ones(2), "b": [torch.zeros(1), "c"]})
    assert Beside().filled([]) == {}


def test_what_has_an_attribute_of_its_own_is_an_object() -> None:
    class Named(dict[str, Any]):
        pass

    named = Named(a=torch.ones(1))
    named.of = object()
    with pytest.raises(NotCompiled, match="no tensor, number or text"):
        taken_apart({"named": named})


def test_a_watched_loss_depends_on_all_of_it() -> None:
    kept = torch.ones(2, requires_grad=True)
    assert looked_at(torch.tensor(1.0), {"kept": [kept, kept > 0, 1, "a", None]}).item() == 5

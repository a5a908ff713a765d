"""``torch.compile`` of a whole module: nothing is compiled, and every entrance runs as without it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_bilevel import SGD, FirstOrder, ReverseUnroll, audit, bilevel, hypergradient
from lightning_bilevel.errors import MisconfigurationError
from tests.support.modules import Maml, differing, listed, parameters, tasks, trainer
from tests.support.seeds import seeded
from tests.support.wrapping import Minimal

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
SAID = "`torch.compile` of a whole"
DATA = listed([tasks(2)] * 2)


class Adapting(Maml):
    """Adapts in its evaluations; ``forward`` is its net."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def predict_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        with self.adapted(batch[0].inner):
            return self.outer_loss(batch[0].outer)

    def validation_step(self, batch: Any, batch_idx: int = 0) -> None:
        self.log("loss", self.predict_step(batch), batch_size=1)

    test_step = validation_step


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Count what is handed to a compiler."""
    graphs: list[Any] = []
    yield graphs
    torch.compiler.reset()


def compiled(module: Any, graphs: list[Any]) -> Any:
    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    return torch.compile(module, backend=backend)


@pytest.mark.parametrize("validated", [True, False])
def test_a_fit_is_that_of_the_module(validated: bool, compilations: list[Any], caplog: Any) -> None:
    module, plain = seeded(Adapting), seeded(Adapting)
    data = (DATA, DATA) if validated else (DATA,)
    with caplog.at_level(logging.INFO), caplog.at_level(logging.INFO, "pytorch_lightning"):
        trainer(ReverseUnroll()).fit(compiled(module, compilations), *data)
    trainer(ReverseUnroll()).fit(plain, *data)
    assert differing(parameters(module), parameters(plain)) == []
    assert compilations == []
    assert len([record for record in caplog.records if SAID in record.getMessage()]) == 1
    assert not {"training_step", "validation_step", "forward"} & set(vars(module))


@pytest.mark.parametrize("run", ["validate", "test", "predict"])
def test_an_evaluation_is_that_of_the_module(run: str, compilations: list[Any]) -> None:
    quiet = {} if run == "predict" else {"verbose": False}
    found, expected = (
        getattr(trainer(), run)(each, DATA, **quiet)
        for each in (compiled(seeded(Adapting), compilations), seeded(Adapting))
    )
    assert str(found) == str(expected)
    assert compilations == []


def test_calls_without_a_trainer(compilations: list[Any]) -> None:
    module = compiled(seeded(Maml), compilations)
    expected = hypergradient(seeded(Maml), ReverseUnroll(), tasks(1))
    assert differing(hypergradient(module, ReverseUnroll(), tasks(1)).grads, expected.grads) == []
    assert audit(module, tasks(1), [FirstOrder()], verbose=False)["FirstOrder"].works
    with module.adapted(tasks(1)[0].inner) as inside:
        assert differing(dict(inside.named_parameters()), expected.state.params) == []
    assert compilations == []


def test_wrapped_modules(compilations: list[Any]) -> None:
    def wrapped(module: Any) -> Any:
        return bilevel(module, inner="head", outer="body", inner_optimizer=SGD(lr=0.1), inner_start="reset")

    modules = [seeded(Minimal) for _ in range(3)]
    data = listed(tasks(2))
    trainer(ReverseUnroll()).fit(wrapped(modules[0]), data)
    trainer(ReverseUnroll()).fit(wrapped(compiled(modules[1], compilations)), data)
    trainer(ReverseUnroll()).fit(compiled(wrapped(modules[2]), compilations), data)
    for module in modules[1:]:
        assert differing(parameters(module), parameters(modules[0])) == []
    assert compilations == []


@pytest.mark.filterwarnings("ignore:Dynamo does not know")
def test_a_module_that_is_compiled_in_place_compiles_its_forward_only() -> None:
    """That is called where a loss calls ``self(x)``, as a compiled part is."""

    class Calling(Adapting):
        def inner_loss(self, batch: Any) -> Tensor:
            return (self(batch[0]) - batch[1]).square().mean()

        outer_loss = inner_loss

    module, plain = seeded(Calling), seeded(Calling)
    module.compile(backend="eager")
    for each in (module, plain):
        trainer(ReverseUnroll()).fit(each, listed(tasks(2)))
    assert differing(parameters(module), parameters(plain)) == []
    torch.compiler.reset()


def test_a_training_step_of_an_instance_is_refused() -> None:
    module = Maml()
    module.training_step = lambda batch, batch_idx: module.outer_loss(batch[0].outer)
    with pytest.raises(MisconfigurationError, match=r"^Cannot use an overridden `Maml.training_step`"):
        trainer(ReverseUnroll()).fit(module, DATA)

"""What an outer loss returns beside its value reaches ``on_train_batch_end``, of the module and of callbacks."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from pytorch_lightning import Callback
from torch import Tensor

from lightning_bilevel import (
    PZOBO,
    SGD,
    Episode,
    ForwardGradient,
    HypergradientMonitor,
    ImplicitGradient,
    ReverseUnroll,
    bilevel,
)
from lightning_bilevel.linear_solvers import Identity
from lightning_bilevel.modules.outputs import beside_loss, by_episode, together
from tests.support.modules import Maml, listed, loader, tasks, trainer
from tests.support.seeds import seeded
from tests.support.wrapping import Minimal


class Pair(NamedTuple):
    prediction: Tensor
    name: str


@dataclasses.dataclass
class Record:
    prediction: Tensor


class Predicting(Minimal):
    """Hands predictions to its own hook, in containers of several kinds, with their graphs."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        prediction = self.head(self.body(batch[0]).tanh())
        loss = (prediction - batch[1]).square().mean()
        inside = {"list": [prediction], "named": Pair(prediction, "train"), "record": Record(prediction)}
        return OrderedDict(loss=loss, prediction=prediction, size=len(batch[0]), inside=inside, constant=torch.ones(2))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.outputs = outputs


class Predicts(Maml):
    """The same as a subclass, beside the loss that it returns."""

    def outer_loss(self, batch: Any) -> Any:
        prediction = self.net(batch[0])
        return {"loss": self.loss(prediction, batch[1]), "prediction": prediction}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.outputs = outputs


class Spy(Callback):
    """Keeps the outputs of the last step."""

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.outputs = outputs


STRATEGIES = {
    "reverse": ReverseUnroll,
    "forward": lambda: ForwardGradient(num_directions=2, mode="forward"),
    "vectors": lambda: ForwardGradient(num_directions=2),
    "pzobo": PZOBO,
    "implicit": lambda: ImplicitGradient(Identity()),
}


def wrapped(module: Any, **options: Any) -> Any:
    defaults = {"inner": "head", "outer": "body", "inner_steps": 2, "inner_start": "reset"}
    return bilevel(module, **{**defaults, "inner_optimizer": SGD(lr=0.1), **options})


def expected(episode: Episode) -> Tensor:
    """Return the prediction at θ_T of the module as it was before the fit."""
    module = seeded(Predicting)
    with torch.no_grad(), wrapped(module).adapted(episode.inner * 2, steps=2):
        return module.head(module.body(episode.outer[0]).tanh())


def is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) is Tensor
        and not tensor.requires_grad
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("chunk", [None, 1], ids=["stacked", "looped"])
@pytest.mark.parametrize("count", [1, 3])
def test_hooks_get_what_the_outer_loss_returned_at_the_end_of_the_inner_run(name, chunk, count):
    module, spy, episodes = seeded(Predicting), Spy(), tasks(count)
    wrapper = wrapped(module, episode_chunk_size=chunk)
    trainer(STRATEGIES[name](), spy, HypergradientMonitor()).fit(wrapper, listed([episodes]))
    outputs = module.outputs
    assert spy.outputs is outputs
    assert set(outputs) == {"loss", "prediction", "size", "inside", "constant"}
    found = {key: [value] if count == 1 else value for key, value in outputs.items() if key != "loss"}
    assert found["size"] == [8] * count
    for number, episode in enumerate(episodes):
        inside, want = found["inside"][number], expected(episode)
        tensors = [
            found["prediction"][number],
            inside["list"][0],
            inside["named"].prediction,
            inside["record"].prediction,
        ]
        for tensor in tensors:
            assert is_plain(tensor)
            torch.testing.assert_close(tensor, want, atol=1e-6, rtol=1e-5)
        assert inside["named"].name == "train"
        assert torch.equal(found["constant"][number], torch.ones(2))


def test_episodes_of_unequal_shapes_are_listed():
    module, episodes = seeded(Predicting), tasks(2)
    x, y = episodes[1].outer
    trainer(ReverseUnroll()).fit(wrapped(module), listed([[episodes[0], Episode(episodes[1].inner, (x[:5], y[:5]))]]))
    assert [len(each) for each in module.outputs["prediction"]] == [8, 5]


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_subclass_returns_a_mapping_too(name):
    module = seeded(lambda: Predicts(proximal=1.0))
    trainer(STRATEGIES[name](), accumulate_grad_batches=2).fit(module, listed([tasks(2), tasks(2)]))
    assert [tuple(each.shape) for each in module.outputs["prediction"]] == [(8, 1)] * 2
    assert all(map(is_plain, module.outputs["prediction"]))


def test_a_loss_that_is_a_tensor_leaves_the_outputs_as_they_were():
    module, spy = seeded(Maml), Spy()
    trainer(ReverseUnroll(), spy).fit(module, loader())
    assert set(spy.outputs) == {"loss"}


def test_each_episode_may_have_keys_of_its_own():
    assert together([{"a": 1}, {"b": 2}]) == {"a": [1, None], "b": [None, 2]}
    assert together([{}, {}]) == together([{}]) == together([]) == {}
    assert beside_loss(torch.ones(())) == {}
    assert by_episode({"a": [torch.ones(2)]}, 2)[1]["a"][0].shape == (2,)

"""``adapted``: a block in which the module computes with adapted inner parameters, wherever Lightning evaluates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchmetrics
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from lightning_bilevel import SGD, Adam, ForwardGradient, ReverseUnroll, bilevel, hypergradient
from tests.support.modules import (
    Cleaning,
    Maml,
    differing,
    examples,
    functional_net,
    identical,
    listed,
    loader,
    parameters,
    tasks,
    trainer,
)
from tests.support.problems import RidgeSolver
from tests.support.seeds import seeded


class Adapting:
    """Adapts in every kind of evaluation and keeps what it saw there."""

    def evaluate(self, batch: Any, batch_idx: int = 0) -> Tensor:
        before = dict(self.named_parameters())
        with self.adapted(batch.inner) as inside:
            assert inside is self
            theta = [p.clone() for p in self.net.parameters()]
            prediction = self.net(batch.outer[0])
            self.metric.update(prediction, batch.outer[1])
            flags = [p.requires_grad for p in self.net.parameters()]
        after = dict(self.named_parameters())
        self.seen.append((theta, prediction, torch.is_inference_mode_enabled(), flags))
        assert all(before[name] is after[name] for name in before)
        return prediction

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate(batch)
        self.log("error", self.metric, on_epoch=True, batch_size=1)

    test_step = validation_step
    predict_step = evaluate


class AdaptingMaml(Adapting, Maml):
    def __init__(self) -> None:
        super().__init__()
        self.metric, self.seen = torchmetrics.MeanSquaredError(), []


class AdaptingCleaning(Adapting, Cleaning):
    def __init__(self) -> None:
        super().__init__()
        self.metric, self.seen = torchmetrics.MeanSquaredError(), []


def adapt_by_hand(module: Maml, batches: list[Any], steps: int) -> list[Tensor]:
    """Return θ after gradient steps at rate 0.1 from the parameters as they are."""
    theta = [p.detach().clone().requires_grad_() for p in module.net.parameters()]
    for t in range(steps):
        x, y = batches[t % len(batches)]
        loss = (functional_net(theta, x) - y).square().mean()
        theta = [
            torch.add(p, g, alpha=-0.1).detach().requires_grad_()
            for p, g in zip(theta, torch.autograd.grad(loss, theta), strict=True)
        ]
    return [p.detach() for p in theta]


def assert_adapted(module: Any, episodes: list[Any], inference: bool) -> float:
    """Check what :class:`Adapting` saw, against the present parameters; return the mean error of its predictions."""
    assert len(module.seen) == len(episodes)
    errors = []
    for (theta, prediction, inferring, flags), episode in zip(module.seen, episodes, strict=True):
        expected = adapt_by_hand(module, episode.inner, module.inner_steps)
        assert all(map(torch.equal, theta, expected))
        assert torch.equal(prediction, functional_net(expected, episode.outer[0]))
        assert inferring == inference  # the block stays in the mode that it was opened in
        assert not any(flags)
        assert not prediction.requires_grad
        errors.append((prediction - episode.outer[1]).square().mean())
    return torch.stack(errors).mean().item()


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("run", ["validate", "test", "predict"])
def test_evaluation_adapts_and_restores(run, inference):
    module, episodes = seeded(AdaptingMaml), tasks(3)
    before, fit = parameters(module), trainer(inference_mode=inference)
    output = getattr(fit, run)(module, listed(episodes), **({} if run == "predict" else {"verbose": False}))
    error = assert_adapted(module, episodes, inference)
    assert differing(before, parameters(module)) == []
    if run == "predict":
        assert identical(output, [seen[1] for seen in module.seen])
    else:
        assert output == [{"error": pytest.approx(error, rel=1e-5)}]


@pytest.mark.parametrize("inference", [True, False])
def test_validation_during_a_fit_adapts_from_the_present_parameters(inference):
    module, episodes = seeded(AdaptingMaml), tasks(2)
    alone = seeded(Maml)
    fit = trainer(ReverseUnroll(), inference_mode=inference, num_sanity_val_steps=1)
    fit.fit(module, listed([tasks(3)] * 4), listed(episodes))
    module.seen = module.seen[1:]  # sanity checking
    error = assert_adapted(module, episodes, inference=False)  # Lightning validates under no_grad in a fit
    assert fit.callback_metrics["error"].item() == pytest.approx(error, rel=1e-5)
    trainer(ReverseUnroll()).fit(alone, listed([tasks(3)] * 4))
    assert differing(parameters(module), parameters(alone)) == []  # adapting leaves no trace in the training


def test_warm_parameters_and_momentum_go_on_from_where_training_is():
    """At θ_k, with the momentum of step k, ``adapted`` takes the steps that training would take next."""
    episodes = list(loader())
    module, ahead = seeded(Cleaning), seeded(Cleaning)
    for each, steps in ((module, 2), (ahead, 3)):
        each.configure_optimizers = lambda each=each: torch.optim.SGD(each.outer_parameters(), lr=0.0)
        trainer(ReverseUnroll(), max_steps=steps).fit(each, listed(episodes))
    with module.adapted(episodes[2].inner):
        inside = parameters(module.net)
    assert differing(inside, parameters(ahead.net)) == []
    assert differing(parameters(module.net), inside)


def test_a_checkpoint_brings_the_momentum_along(tmp_path):
    episode = next(iter(loader()))
    module, fit = AdaptingCleaning(), trainer(ReverseUnroll())
    fit.fit(module, loader(), listed([episode]))
    fit.save_checkpoint(tmp_path / "end.ckpt")
    other = AdaptingCleaning()
    trainer(ReverseUnroll()).validate(other, listed([episode]), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    loaded = AdaptingCleaning.load_from_checkpoint(tmp_path / "end.ckpt")
    with loaded.adapted(episode.inner):
        assert identical(list(loaded.net.parameters()), module.seen[-1][0])
    assert identical(other.seen[-1][0], module.seen[-1][0])


class Plain(LightningModule):
    """Has a hook of its own for checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.scale, self.loaded = nn.Linear(3, 1), nn.Parameter(torch.ones(())), False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.scale * self.net(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.1)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loaded = True


def test_a_checkpoint_brings_the_momentum_along_for_a_wrapped_module_without_a_strategy(tmp_path):
    def wrapped() -> Any:
        sgd = SGD(lr=0.1, momentum=0.9)
        return bilevel(Plain(), inner="net", outer="scale", outer_loss="training_step", inner_optimizer=sgd)

    module, fit = wrapped(), trainer(ReverseUnroll())
    fit.fit(module, loader(), listed([examples(0)]))
    fit.save_checkpoint(tmp_path / "end.ckpt")
    other = wrapped()
    trainer().validate(other, listed([examples(0)]), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert other.module.loaded
    assert identical(other.fit_context.state_dict(), module.fit_context.state_dict())


@pytest.mark.parametrize(("steps", "expected"), [(None, 2), (0, 0), (1, 1), (5, 5)])
@pytest.mark.parametrize("batches", [1, 3])
def test_steps_and_cycled_batches(steps, expected, batches):
    module = seeded(Maml)
    inner = [examples(seed)[:2] for seed in range(batches)]
    theta = adapt_by_hand(module, inner, expected)
    with module.adapted(inner, steps):
        assert all(map(torch.equal, module.net.parameters(), theta))
        assert not any(p.requires_grad for p in module.net.parameters())


def test_an_exception_in_the_block_restores():
    module, [episode] = Maml(), tasks(1)
    before, objects = parameters(module), list(module.parameters())
    with pytest.raises(ZeroDivisionError), module.adapted(episode.inner):
        raise ZeroDivisionError
    assert differing(before, parameters(module)) == []
    assert all(a is b for a, b in zip(objects, module.parameters(), strict=True))
    assert module._levels is None


def test_an_exception_in_the_adaptation_restores():
    class Module(Maml):
        def inner_loss(self, batch):
            self.calls += 1
            if self.calls == 2:
                raise ZeroDivisionError
            return super().inner_loss(batch)

    module, [episode] = Module(), tasks(1)
    module.calls, before, objects = 0, parameters(module), list(module.parameters())
    with pytest.raises(ZeroDivisionError), module.adapted(episode.inner):
        raise AssertionError
    assert differing(before, parameters(module)) == []
    assert all(a is b for a, b in zip(objects, module.parameters(), strict=True))
    assert "log" not in module.__dict__


def test_a_block_sends_no_gradients_to_the_module():
    module, [episode] = Maml(), tasks(1)
    with torch.enable_grad(), module.adapted(episode.inner):
        assert not module.outer_loss(episode.outer).requires_grad
    assert all(p.grad is None and p.requires_grad for p in module.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Buffers and randomness
# ---------------------------------------------------------------------------------------------------------------------


def normalized(dropout: float) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(dropout), nn.Linear(4, 1))


@pytest.mark.filterwarnings("ignore:`adapted` takes its inner steps in evaluation mode")
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_in_either_mode(training):
    """In training mode statistics move inside the block as in plain training, and are back afterwards."""
    module = seeded(lambda: Cleaning(net=lambda: normalized(0.0), optimizer=lambda lr: SGD(lr=0.05)))
    plain = seeded(lambda: Cleaning(net=lambda: normalized(0.0)))
    inner = [examples(seed) for seed in range(2)]
    for each in (module, plain):
        each.train(training)
    optimizer = torch.optim.SGD(plain.net.parameters(), lr=0.05)
    for t in range(3):
        optimizer.zero_grad()
        plain.inner_loss(inner[t % 2]).backward()
        optimizer.step()
    before = parameters(module)
    with module.adapted(inner, mode=None):
        inside = parameters(module)
    for name, value in parameters(plain).items():
        torch.testing.assert_close(inside[name], value)
    assert ("net.1.running_mean" in differing(before, inside)) == training
    assert differing(before, parameters(module)) == []
    assert module.training == training


@pytest.mark.parametrize("training", [True, False])
def test_dropout_draws_masks_in_training_mode_only(training):
    module, inner = Cleaning(net=lambda: normalized(0.5)).train(training), [examples(0)]
    state = torch.get_rng_state()
    results = []
    for _ in range(2):
        with module.adapted(inner):
            results.append(parameters(module))
    assert torch.equal(state, torch.get_rng_state()) == (not training)
    assert bool(differing(*results)) == training
    torch.set_rng_state(state)
    with module.adapted(inner):
        assert differing(results[0], parameters(module)) == []


@pytest.mark.parametrize("start", ["reset", "reinit"])
@pytest.mark.parametrize("strategy", [ReverseUnroll, lambda: ForwardGradient(num_directions=2)])
def test_adapting_draws_nothing_from_the_global_generator(start, strategy):
    module, episode = Cleaning(inner_start=start), next(iter(loader()))
    trainer(strategy(), max_steps=1).fit(module, loader())
    state = torch.get_rng_state()
    with module.adapted(episode.inner):
        first = parameters(module)
    with module.adapted(episode.inner):
        assert differing(first, parameters(module)) == []  # the same fresh values, between two training steps
    hypergradient(module, strategy(), episode)
    assert torch.equal(state, torch.get_rng_state())


# ---------------------------------------------------------------------------------------------------------------------
# Other inner levels
# ---------------------------------------------------------------------------------------------------------------------


def test_a_solver_of_ones_own():
    module = RidgeSolver()
    episode, before = module.episode(), parameters(module)
    with torch.inference_mode(), module.adapted(episode.inner):
        inside = module.weight.clone()
        assert not module.weight.requires_grad
    ((x, y),), penalty = episode.inner, module.log_penalty.detach().exp()
    assert torch.equal(inside, torch.linalg.solve(x.T @ x + torch.diag(penalty), x.T @ y))
    assert differing(before, parameters(module)) == []


@pytest.mark.parametrize("optimizer", [lambda lr: Adam(lr=lr), lambda lr: SGD(lr={"*bias": 0.1, "*": lr})])
def test_learned_hyperparameters_are_used_but_not_differentiated(optimizer: Callable[[Tensor], Any]):
    module, episode = Cleaning(optimizer=optimizer), next(iter(loader()))
    before = parameters(module)
    with torch.inference_mode(), module.adapted(episode.inner):
        assert len(differing(before, parameters(module))) == 4
    assert module.log_lr.grad is None
    assert differing(before, parameters(module)) == []

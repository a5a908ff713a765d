"""Properties of a strategy in a Trainer: what it carries, what a resumed fit goes on from, accumulated gradients."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_bilevel import tree
from lightning_bilevel.data.numbered import with_numbers
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.host import Trainer
from lightning_bilevel.problem import Carry, Episode, Hypergradient, InnerState
from lightning_bilevel.randomness import Call, Key
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.testing.base import (
    accepted,
    assert_close,
    attributes,
    rounding,
    same,
    strategy_property,
)
from lightning_bilevel.testing.problems import Centred
from lightning_bilevel.testing.solved import SolvedModule
from lightning_bilevel.training.estimating import estimated
from lightning_bilevel.training.hypergradient import hypergradient
from lightning_bilevel.tree import Params

SEED = 7
"""Of all fits here."""


def moving(**options: Any) -> SolvedModule:
    """Return a problem with state of every kind: a warm start with momentum, buffers, dropout."""
    return Centred(**{"inner": "momentum", "dropout": 0.3, "inner_start": "warm", **options})


def still(**options: Any) -> SolvedModule:
    """Return the same without momentum, for strategies that take plain descent only."""
    return moving(**{**options, "inner": "SGD"})


@strategy_property
def carries_its_state(strategy: HypergradientStrategy) -> None:
    """What is carried is a dict of trees of tensors; a fit is a loop of ``hypergradient(..., carry=result.carry)``."""
    module, other = (accepted(strategy, moving, still) for _ in range(2))
    episodes = [module.episode(seed) for seed in range(3)]
    for name, values in hypergradient(module, copy.deepcopy(strategy), episodes[0]).kept.items():
        assert isinstance(values, dict), f"`kept[{name!r}]` is a `{type(values).__name__}`, not a tree of tensors"
        for key, value in values.items():
            assert isinstance(value, Tensor), f"`kept[{name!r}][{key!r}]` is {value!r}, not a tensor"
            assert not value.requires_grad, f"`kept[{name!r}][{key!r}]` has a graph"
    fitted(module, copy.deepcopy(strategy), episodes, max_steps=3)
    result = by_hand(other, copy.deepcopy(strategy), [[episode] for episode in episodes])
    assert_fit("a fit of three steps", Ended.of(module), other, result, rounding(strategy))


@strategy_property
def resumes(strategy: HypergradientStrategy) -> None:
    """Four steps are two, a checkpoint, and two in a new module and Trainer: bit for bit."""
    modules = [accepted(strategy, moving, still) for _ in range(3)]
    episodes = [modules[0].episode(seed) for seed in range(2)]
    with TemporaryDirectory() as folder:
        path = Path(folder, "middle.ckpt")
        whole = fitted(modules[0], copy.deepcopy(strategy), episodes, max_epochs=2)
        fitted(modules[1], copy.deepcopy(strategy), episodes, max_epochs=1).save_checkpoint(path, weights_only=False)
        with torch.no_grad():
            for parameter in modules[2].parameters():
                parameter.add_(1)  # so that all comes from the checkpoint
        resumed = fitted(modules[2], copy.deepcopy(strategy), episodes, seed=SEED + 1, max_epochs=2, ckpt_path=path)
    for what, value in _everything(whole).items():
        assert same(value, _everything(resumed)[what]), f"{what} differ after a resume"


@strategy_property
def accumulates(strategy: HypergradientStrategy) -> None:
    """``accumulate_grad_batches=2`` averages two estimates at the same φ, unless ``trainer_refusals`` says no."""
    module, other = (accepted(strategy, moving, still) for _ in range(2))
    episodes = [module.episode(seed) for seed in range(4)]
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "max_steps": 2}
    with _quiet():
        found = strategy.all_trainer_refusals(Trainer(**{**_OPTIONS, **options}))
    if found:
        try:
            fitted(module, copy.deepcopy(strategy), episodes, **options)
        except MisconfigurationError:
            return
        raise AssertionError(f"`trainer_refusals` refuses accumulation, and a fit does not: {found[0]}")
    fitted(module, copy.deepcopy(strategy), episodes, **options)
    result = by_hand(other, copy.deepcopy(strategy), [[episode] for episode in episodes], accumulate=2)
    assert_fit("a fit with `accumulate_grad_batches=2`", Ended.of(module), other, result, rounding(strategy))


@strategy_property
def stays_frozen_in_a_fit(strategy: HypergradientStrategy) -> None:
    """A fit leaves the strategy as it is, so that one object may serve many of them."""
    before = copy.deepcopy(attributes(strategy))
    module = accepted(strategy, moving, still)
    fitted(module, strategy, [module.episode()], max_steps=2)
    after = attributes(strategy)
    differing = [name for name in sorted({*before, *after}) if not same(before.get(name), after.get(name))]
    assert not differing, f"a fit changes `{'`, `'.join(differing)}` of the strategy"


def fitted(
    module: SolvedModule,
    callback: HypergradientStrategy,
    episodes: Sequence[Episode],
    *,
    seed: int = SEED,
    ckpt_path: Path | None = None,
    **options: Any,
) -> Trainer:
    """Fit and return the Trainer; the episodes are gone through again and again.

    Args:
        module: what is fitted.
        callback: its strategy.
        episodes: an epoch.
        seed: of the fit.
        ckpt_path: a checkpoint to resume from.
        options: of the Trainer.
    """
    data = list(map(with_numbers, episodes))
    loader: DataLoader[Any] = DataLoader(data, batch_size=None)  # type: ignore[arg-type]
    with _quiet():
        trainer = Trainer(callbacks=[callback], **{**_OPTIONS, **options})
        torch.manual_seed(seed)
        trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


class Ended(NamedTuple):
    """Where a fit ended.

    Attributes:
        values: parameters and buffers, by name.
        kept: what the strategy carries.
    """

    values: Params
    kept: dict[str, Params]

    @staticmethod
    def of(module: SolvedModule) -> Ended:
        """Read a module that was fitted."""
        values = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        return Ended(tree.detach(values), module.fit_context.memory.strategy)


def by_hand(
    module: SolvedModule,
    strategy: HypergradientStrategy,
    steps: Sequence[Sequence[Episode]],
    accumulate: int = 1,
) -> Hypergradient:
    """Do without a Trainer what a fit does, and return the last estimate; φ of the module moves, and nothing else.

    What is carried is copied before φ moves in place: an estimate must not depend on whether it is.

    Args:
        module: what is fitted.
        strategy: the estimator.
        steps: for every estimate, an episode for each process.
        accumulate: estimates to a step of the outer optimizer.
    """
    functional, memory = module.functional(), module.fit_context.memory
    optimizer = module.configure_optimizers()
    carry: Carry | None = None
    for number, episodes in enumerate(steps):
        keys = [Key((SEED, number, 0, rank)) for rank in range(len(episodes))]
        calls = [Call(key, step=number // accumulate, together=keys[0]) for key in keys]
        results = [
            estimated(functional, memory, strategy, [episode], call, carry=carry)
            for episode, call in zip(episodes, calls, strict=True)
        ]
        grads = _mean([result.grads for result in results])
        carry = _mean_carry([result.carry for result in results])
        for name, grad in grads.items():
            parameter = module.get_parameter(name)
            before = torch.zeros_like(grad) if parameter.grad is None else parameter.grad
            parameter.grad = before + grad / accumulate
        if number % accumulate == accumulate - 1:
            optimizer.step()
            optimizer.zero_grad()
    assert carry is not None
    return results[0]._replace(state=carry.inner, kept=carry.strategy)


def assert_fit(what: str, fit: Ended, other: SolvedModule, result: Hypergradient, rtol: float) -> None:
    """Compare the end of a fit with a module that went :func:`by_hand`."""
    values, kept = fit
    phi = tree.detach(other.named(other.PHI))
    theta = {name: result.state.params[name] for name in other.THETA if name not in phi}
    for kind, expected in (("φ", phi), ("θ", theta), ("buffers", result.state.buffers)):
        assert_close(f"{what}: {kind}", {name: values[name] for name in expected}, expected, rtol)
    assert set(kept) == set(result.kept), f"{what} carries {sorted(kept)}, instead of {sorted(result.kept)}"
    for name, values in result.kept.items():
        exact = {key for key, value in values.items() if not (value.is_floating_point() or value.is_complex())}
        assert all(torch.equal(kept[name][key], values[key]) for key in exact), f"{what} carries another `{name}`"
        mine, its = ({key: value for key, value in each.items() if key not in exact} for each in (kept[name], values))
        assert_close(f"{what}: the carried `{name}`", mine, its, rtol)


def _mean_carry(carries: Sequence[Carry]) -> Carry:
    """Return what processes go on from together, in tensors of its own."""
    states, kept = [carry.inner for carry in carries], [carry.strategy for carry in carries]
    inner = InnerState(
        _mean([state.params for state in states]),
        _mean([state.buffers for state in states]),
        {slot: _mean([state.opt_state[slot] for state in states]) for slot in states[0].opt_state},
        states[0].steps,
    )
    return Carry(inner, {name: _mean([each[name] for each in kept]) for name in kept[0]})


def _mean(trees: Sequence[Params]) -> Params:
    def mean(*values: Tensor) -> Tensor:
        inexact = values[0].is_floating_point() or values[0].is_complex()
        return torch.stack(values).mean(0) if inexact else values[0].clone()

    return tree.map(mean, *trees)


_OPTIONS: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": -1,
}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's remarks on devices, steps and checkpoints to itself."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _everything(trainer: Trainer) -> dict[str, Any]:
    module: Any = trainer.lightning_module
    return {
        "parameters and buffers": dict(module.state_dict()),
        "the outer optimizer's state": trainer.optimizers[0].state_dict()["state"],
        "what the inner level and the strategy carry": module.fit_context.state_dict(),
        "metrics": dict(trainer.callback_metrics),
    }

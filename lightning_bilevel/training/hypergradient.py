"""One hypergradient estimate without a Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lightning_bilevel import tree
from lightning_bilevel.data.inputs import check_episodes
from lightning_bilevel.errors import missing_error, value_error
from lightning_bilevel.estimation import estimate, stack_size, vectorizes
from lightning_bilevel.host import Trainer
from lightning_bilevel.kernels.safe import differentiable_kernels
from lightning_bilevel.problem import BilevelProblem, Carry, Episode, Hypergradient
from lightning_bilevel.randomness import Call, Key, RngState
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.training.attachment import attached
from lightning_bilevel.training.estimating import estimated
from lightning_bilevel.training.module import BilevelModule
from lightning_bilevel.training.uncompiled import uncompiled
from lightning_bilevel.tree import Params


def hypergradient(
    module: BilevelModule | BilevelProblem,
    strategy: HypergradientStrategy,
    episode: Episode | Sequence[Episode],
    *,
    seed: int = 0,
    carry: Carry | None = None,
    phi: Params | None = None,
    trainer: Trainer | None = None,
) -> Hypergradient:
    """Return one hypergradient estimate, without a Trainer; nothing in the module changes.

    What a first look at the module tells is kept for the next call, while nothing that its code can read is another
    thing: attributes, modes, parts, and the globals that its methods name.

    Args:
        module: a bilevel module, or a plain problem.
        strategy: the estimator.
        episode: one episode, or several for the mean of their estimates.
        seed: of random directions, and of dropout. Directions also go by the training steps taken, so that the
            same seed repeats an estimate of a fit while the fit stands there.
        carry: that of the last estimate, ``result.carry``, to go on from it: what the strategy carries, buffers, and θ
            where ``inner_start="warm"``. A plain problem needs it: its ``inner`` is the state to start from.
        phi: the outer parameters of a plain problem; those of a module are its own.
        trainer: lent to the module for the length of the call, where its hooks read ``self.trainer``.

    Raises:
        ValueError: no strategy, or an episode of the wrong form.
        MisconfigurationError: the strategy cannot work on the problem; a plain problem without ``phi`` or ``carry``; a
            hook that reads ``self.trainer`` where there is none.
        FloatingPointError: something is nan or infinite.

    >>> from lightning_bilevel import SGD, ReverseUnroll
    >>> class Scale(BilevelModule):
    ...     def __init__(self):
    ...         super().__init__(inner_steps=1, inner_start="reset")
    ...         self.theta, self.phi = (torch.nn.Parameter(torch.tensor(value)) for value in (0.0, 1.0))
    ...     def outer_parameters(self): return [self.phi]
    ...     def inner_loss(self, x): return (self.theta - self.phi * x).square() / 2
    ...     def outer_loss(self, x): return (self.theta - x).square() / 2
    ...     def configure_inner_optimizer(self): return SGD(lr=0.5)
    >>> x = torch.tensor(2.0)
    >>> hypergradient(Scale(), ReverseUnroll(), Episode([x], x)).grads
    {'phi': tensor(-1.)}
    """
    if not isinstance(strategy, HypergradientStrategy):
        raise value_error("hypergradient(strategy=...)", "a strategy such as `ReverseUnroll()`", strategy)
    given: Sequence[Any] = [episode] if isinstance(episode, Episode) else list(episode)
    module = uncompiled(module)
    if isinstance(module, BilevelProblem):
        with torch.inference_mode(False), torch.enable_grad():
            return _of_problem(module, strategy, check_episodes(given, "BilevelProblem"), seed, carry, phi)
    with attached(module, "hypergradient", trainer), torch.inference_mode(False), torch.enable_grad():
        if not all(isinstance(each, Episode) for each in given):
            given = module.episodes(episode)
        functional, memory = module.functional(), module.fit_context.memory
        episodes = check_episodes(given, type(module).__name__)
        call = Call(Key((seed, memory.estimates, 0, 0)))
        try:
            return estimated(functional, memory, strategy, episodes, call, carry=carry)
        finally:
            functional.recorder.forget()


def _of_problem(
    problem: BilevelProblem,
    strategy: HypergradientStrategy,
    episodes: list[Episode],
    seed: int,
    carry: Carry | None,
    phi: Params | None,
) -> Hypergradient:
    if phi is None or carry is None:
        lacking = "`phi`" if phi is None else "`carry`"
        fix = "Pass `hypergradient(problem, strategy, episode, phi=phi, carry=Carry(InnerState(theta)))`"
        raise missing_error("BilevelProblem", f"{lacking} to start from", fix)
    call = Call(Key((seed, 0, 0, 0)))
    carried = [carry.inner] * len(episodes)
    device = tree.device(phi)
    with differentiable_kernels(None, strategy.second_order), RngState(device).fork(call.key.fold_in(-1).seed):
        size = stack_size(problem, episodes, None, lambda: vectorizes(problem, carry.inner, phi, episodes[0]))
        return estimate(problem, strategy, carried, phi, episodes, call, size, carry.strategy)

"""One estimate on the episodes of a batch: stacked where shapes agree, looped otherwise, averaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lightning_bilevel import tree
from lightning_bilevel.calculus.autodiff import gradients
from lightning_bilevel.data.inputs import nonfinite
from lightning_bilevel.errors import NonfiniteError, nonfinite_error
from lightning_bilevel.host import rank_zero_warn
from lightning_bilevel.problem import (
    BilevelProblem,
    Episode,
    Hypergradient,
    InnerState,
    stack_episodes,
    stackable,
)
from lightning_bilevel.randomness import Call, RngState
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.strategies.chunks import even
from lightning_bilevel.tree import Params


def estimate(
    problem: BilevelProblem,
    strategy: HypergradientStrategy,
    memories: Callable[[int, int], InnerState],
    phi: Params,
    episodes: Sequence[Episode],
    call: Call,
    chunk_size: int,
    ended: Callable[[Hypergradient, int], None] = lambda part, count: None,
) -> Hypergradient:
    """Return the mean estimate over episodes.

    Args:
        problem: the problem of one episode.
        strategy: the estimator.
        memories: (first, count) to the memory of episode ``first`` (count 0), or of ``count`` stacked ones from it.
        phi: outer parameters.
        episodes: at least one.
        call: names this estimate. All episodes get the same directions, so that a stack equals the loop.
        chunk_size: episodes in one stack at most; some strategies take one at a time.
        ended: told of the estimate of each stack, and of the number of episodes in it.

    Returns:
        The mean of values, estimates and metrics. With several episodes the tensors of ``state`` are
        stacked, ``(len(episodes), *shape)``.

    Raises:
        FloatingPointError: something is nan or infinite; the message says what, and names the strategy.
    """
    parts: list[tuple[int, Hypergradient]] = []
    first = 0
    try:
        for chunk in _chunks(problem, episodes, even(len(episodes), chunk_size) if strategy.stacks else 1):
            if len(chunk) > 1:
                vectorized = problem.stack(len(chunk))
                part = strategy.estimate(vectorized, memories(first, len(chunk)), phi, stack_episodes(chunk), call)
            else:
                part = strategy.estimate(problem, memories(first, 0), phi, chunk[0], call)
            ended(part, len(chunk))
            if len(chunk) == 1 < len(episodes):
                part = part._replace(state=_map_state(lambda value: value[None], part.state))
            parts.append((len(chunk), part))
            first += len(chunk)
        return checked(parts[0][1] if len(parts) == 1 else _mean(parts, len(episodes)))
    except FloatingPointError as error:
        if name := tree.first_nonfinite(phi):
            hint = "Lower the learning rate of `configure_optimizers()`, or clip: `Trainer(gradient_clip_val=...)`."
            raise nonfinite_error(f"outer parameter `{name}`", "nan or inf after the last outer step", hint) from error
        data = f"The {where} itself has nan or inf in it. " if (where := nonfinite(episodes)) else ""
        note = f"{data}(Hypergradient strategy: `{type(strategy).__name__}`.)"
        if isinstance(error, NonfiniteError):
            raise error.with_note(note) from error
        raise NonfiniteError(f"{error} {note}") from error


def vectorizes(problem: BilevelProblem, memory: InnerState, phi: Params, episode: Episode) -> bool:
    """Return whether the losses run under ``vmap``; warn with the reason where they do not."""
    device = next(iter(phi.values())).device
    with torch.enable_grad(), RngState(device).fork():
        stacked = problem.stack(1)
        batch = stack_episodes([episode])
        try:
            outer = tree.leaves(phi)
            theta = tree.leaves(stacked.start(_map_state(lambda value: value[None], memory), phi).params)
            buffers = tree.map(lambda value: value[None], memory.buffers)
            # With gradients: `torch.utils.checkpoint`, for one, runs forward and fails backward.
            gradients(stacked.inner_loss(theta, outer, batch.inner[0], buffers)[0], theta, outer)
            gradients(stacked.outer_loss(theta, outer, batch.outer, buffers), theta, outer)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            rank_zero_warn(
                "The losses cannot be vectorized over episodes, so the episodes of a batch are looped: "
                f"{str(error).splitlines()[0]} Set `episode_chunk_size=1` to choose this without a warning."
            )
            return False
    return True


def checked(result: Hypergradient) -> Hypergradient:
    """Raise if θ_T, the outer loss or the estimate is nan or infinite, with names; one synchronization."""
    theta = result.state.params
    total = tree.norm(result.grads) + tree.norm(theta) + result.value.abs()
    if torch.isfinite(total):
        return result
    if name := tree.first_nonfinite(theta):
        raise nonfinite_error(
            f"inner parameter `{name}` after the last inner step",
            "nan or inf",
            "Lower the inner learning rate, or take fewer inner steps.",
        )
    if not torch.isfinite(result.value):
        raise nonfinite_error(
            "outer loss", result.value.item(), "Look at the outer loss at θ_T; lower the inner learning rate."
        )
    name = tree.first_nonfinite(result.grads)
    if name is None:  # finite entries whose squares overflow
        return result
    raise nonfinite_error(
        f"hypergradient of `{name}`",
        "nan or inf",
        "Lower the inner learning rate, take fewer inner steps, or truncate with `TruncatedReverse`.",
    )


def _chunks(problem: BilevelProblem, episodes: Sequence[Episode], size: int) -> list[list[Episode]]:
    chunks: list[list[Episode]] = [[]]
    for episode in episodes:
        last = chunks[-1]
        fits = not last or (len(last) < size and problem.solver is None and stackable(last[0], episode))
        if fits:
            last.append(episode)
        else:
            chunks.append([episode])
    return chunks


def _mean(parts: Sequence[tuple[int, Hypergradient]], count: int) -> Hypergradient:
    value = torch.stack([n / count * part.value for n, part in parts]).sum()
    grads = tree.scale(parts[0][1].grads, parts[0][0] / count)
    for n, part in parts[1:]:
        grads = tree.add(grads, part.grads, alpha=n / count)
    metrics = {
        name: torch.stack([n / count * part.metrics[name] for n, part in parts]).sum() for name in parts[0][1].metrics
    }
    states = [part.state for _, part in parts]
    first = states[0]
    state = InnerState(
        params=_cat([s.params for s in states]),
        buffers=_cat([s.buffers for s in states]),
        slots={slot: _cat([s.slots[slot] for s in states]) for slot in first.slots},
        steps=first.steps,
    )
    return Hypergradient(value, grads, state, metrics)


def _cat(trees: Sequence[Params]) -> Params:
    return {name: torch.cat([values[name] for values in trees]) for name in trees[0]}


def _map_state(fn: Callable[[torch.Tensor], torch.Tensor], state: InnerState) -> InnerState:
    slots = {slot: tree.map(fn, values) for slot, values in state.slots.items()}
    return InnerState(tree.map(fn, state.params), tree.map(fn, state.buffers), slots, state.steps)

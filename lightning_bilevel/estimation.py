"""One estimate on a plain problem: episodes stacked where shapes agree, looped otherwise, averaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.calculus.outer import gradients
from lightning_bilevel.data.inputs import nonfinite
from lightning_bilevel.errors import NonfiniteError, nonfinite_error
from lightning_bilevel.host import rank_zero_warn
from lightning_bilevel.problem import (
    BilevelProblem,
    Carry,
    Episode,
    Hypergradient,
    InnerState,
    stack_episodes,
    stackable,
)
from lightning_bilevel.randomness import Call, RngState
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.strategies.slopes import balanced_size
from lightning_bilevel.tree import Params


def estimate(
    problem: BilevelProblem,
    strategy: HypergradientStrategy,
    carried: Sequence[InnerState],
    phi: Params,
    episodes: Sequence[Episode],
    call: Call,
    chunk_size: int = 1,
    kept: dict[str, Params] | None = None,
) -> Hypergradient:
    """Return the mean estimate over episodes.

    Args:
        problem: the problem of one episode.
        strategy: the estimator.
        carried: the inner state that each episode starts from.
        phi: outer parameters.
        episodes: at least one.
        call: names this estimate. All episodes get the same directions, so that a stack equals the loop.
        chunk_size: episodes in one stack at most; some strategies take one at a time.
        kept: what the strategy carries from the last estimate.

    Returns:
        The mean of values, estimates, metrics and what the strategy carries. With several episodes the tensors of
        ``state`` are stacked, ``(len(episodes), *shape)``.

    Raises:
        MisconfigurationError: the strategy cannot work on the problem.
        FloatingPointError: something is nan or infinite; the message says what, and names the strategy.
    """
    strategy.check(problem)
    parts: list[tuple[int, Hypergradient]] = []
    first = 0
    try:
        for chunk in _chunks(problem, episodes, chunk_size if strategy.supports_stacking else 1):
            count = len(chunk)
            part = _one_stack(problem, strategy, carried[first : first + count], phi, chunk, call, kept or {})
            if count == 1 < len(episodes):
                part = part._replace(state=part.state.map(lambda value: value[None]))
            parts.append((count, part))
            first += count
        result = checked(parts[0][1] if len(parts) == 1 else _mean(parts, len(episodes)))
        return result if len(episodes) == 1 else strategy.averaged(result)
    except FloatingPointError as error:
        if name := tree.first_nonfinite(phi):
            hint = "Lower the learning rate of `configure_optimizers()`, or clip: `Trainer(gradient_clip_val=...)`."
            raise nonfinite_error(f"outer parameter `{name}`", "nan or inf after the last outer step", hint) from error
        data = f"The {where} itself has nan or inf in it. " if (where := nonfinite(episodes)) else ""
        note = f"{data}(Hypergradient strategy: `{type(strategy).__name__}`.)"
        if isinstance(error, NonfiniteError):
            raise error.with_note(note) from error
        raise NonfiniteError(f"{error} {note}") from error


def _one_stack(
    problem: BilevelProblem,
    strategy: HypergradientStrategy,
    carried: Sequence[InnerState],
    phi: Params,
    episodes: Sequence[Episode],
    call: Call,
    kept: dict[str, Params],
) -> Hypergradient:
    if problem.observer is not None:
        problem.observer.begin()
    count, state, episode = len(episodes), carried[0], episodes[0]
    if count > 1:
        problem = problem.vmapped(count, over="episodes")
        state, episode = InnerState.stack(carried), stack_episodes(episodes)
    result = strategy.estimate(problem.on(episode), Carry(state, kept), phi, episode, call)
    if problem.observer is not None:
        left = problem.observer.end(result.observed, count)
        result = result._replace(state=replace(result.state, buffers={**result.state.buffers, **left}))
    return result.divided(count)


def stack_size(
    problem: BilevelProblem, episodes: Sequence[Episode], most: int | None, vectorizes: Callable[[], bool]
) -> int:
    """Return how many episodes to stack at most.

    Args:
        problem: the problem of one episode; a user's solver takes one.
        episodes: at least one.
        most: what a user has asked for; ``None`` goes by the problem.
        vectorizes: whether the losses do; called where it matters.
    """
    size, first = most or problem.max_copies, episodes[0]
    if min(size, len(episodes)) == 1 or problem.solver is not None or not stackable(first, first):
        return 1
    return size if vectorizes() else 1


def vectorizes(problem: BilevelProblem, carried: InnerState, phi: Params, episode: Episode) -> bool:
    """Return whether the losses run under ``vmap`` and have the same gradients there; warn with the reason if not.

    Backward hooks, for one, are not called under ``vmap``. Losses that draw random numbers are not compared.
    """
    device = next(iter(phi.values())).device
    with torch.enable_grad(), RngState(device).fork():
        before = RngState(device)
        try:
            stacked = problem.vmapped(1, over="episodes")
            batch = stack_episodes([episode])
            outer = tree.leaves(phi)
            start = stacked.on(batch).start(carried.map(lambda value: value[None]), phi)
            theta = tree.leaves(start.params)
            buffers = tree.map(lambda value: value[None], carried.buffers)
            # With gradients: `torch.utils.checkpoint`, for one, runs forward and fails backward.
            found = [
                gradients(stacked.inner_loss(theta, outer, batch.inner[0], buffers)[0], theta, outer),
                gradients(stacked.outer_loss(theta, outer, batch.outer, buffers), theta, outer),
            ]
            stacked.update(start.params, found[0][0], start.opt_state, phi, start.steps + 1)
            if before.untouched():
                theta = tree.leaves(tree.index(theta, 0))
                plain = [
                    gradients(problem.inner_loss(theta, outer, episode.inner[0], carried.buffers)[0], theta, outer),
                    gradients(problem.outer_loss(theta, outer, episode.outer, carried.buffers), theta, outer),
                ]
                pairs = zip(found, plain, strict=True)
                same_start = alike(tree.index(start.params, 0), problem.on(episode).start(carried, phi).params)
                if not same_start or not all(alike(tree.index(d, 0), e) and alike(c, b) for (d, c), (e, b) in pairs):
                    raise RuntimeError("they have other starts or gradients than one by one.")
        except (RuntimeError, NotImplementedError, TypeError) as error:
            rank_zero_warn(
                "The losses cannot be vectorized over episodes, so the episodes of a batch are looped: "
                f"{str(error).splitlines()[0]} Set `episode_chunk_size=1` to choose this without a warning."
            )
            return False
    return True


def alike(a: Params, b: Params) -> bool:
    """Return whether two trees agree to 1%: kernels that sum in another order do, a term that is left out does not."""
    difference, size = tree.norm(tree.sub(a, b)), tree.norm(a) + tree.norm(b)
    return bool(difference <= 0.01 * size + torch.finfo(size.dtype).tiny) or not bool(torch.isfinite(size))


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


def _chunks(problem: BilevelProblem, episodes: Sequence[Episode], most: int) -> list[list[Episode]]:
    size = balanced_size(len(episodes), most)
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
    results = [part for _, part in parts]
    weights = [size / count for size, _ in parts]

    def mean(values: Sequence[Tensor]) -> Tensor:
        if not values[0].is_floating_point() and not values[0].is_complex():
            return values[0]
        total = weights[0] * values[0]
        for weight, value in zip(weights[1:], values[1:], strict=True):
            total = total + weight * value
        return total

    def means(trees: Sequence[Params]) -> Params:
        return {name: mean([values[name] for values in trees]) for name in trees[0]}

    return Hypergradient(
        mean([result.value for result in results]),
        means([result.grads for result in results]),
        InnerState.cat([result.state for result in results]),
        means([result.metrics for result in results]),
        {name: means([result.kept[name] for result in results]) for name in results[0].kept},
        known={
            name: means([result.known[name] for result in results])
            for name in results[0].known
            if all(name in result.known for result in results)
        },
        explicit=means([result.explicit for result in results]),
    )

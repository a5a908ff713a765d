"""More than one process: what they share of an estimate, and how they stay equal."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_bilevel.errors import (
    ArgumentError,
    MisconfigurationError,
    NoLossError,
    NonfiniteError,
    combination_error,
)
from lightning_bilevel.host import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    StrategyRegistry,
    Trainer,
    XLAStrategy,
    _collect_rng_states,
    _set_rng_states,
    pl_worker_init_function,
)
from lightning_bilevel.problem import Hypergradient
from lightning_bilevel.randomness import generator_state, set_generator_state
from lightning_bilevel.strategies.base import HypergradientStrategy

T = TypeVar("T")


class DirectionParallelStrategy(DDPStrategy):
    """Shares the random directions of one estimate out over processes: ``Trainer(strategy="ddp_directions")``.

    Every process sees the same episodes and evaluates its shard of ``num_directions``; the mean over processes is
    the estimate of one process with all of them. So more processes are faster, and train the same. With
    ``strategy="ddp"``, every process has episodes and directions of its own instead.

    Validation, test and prediction run on all data in every process.

    All processes begin with the random state of rank 0, of torch, ``random`` and NumPy, and the workers of a
    ``DataLoader`` are seeded alike. What draws more numbers on one rank than on another still sets them apart; then
    the outer losses differ, which is an error.

    >>> import pytorch_lightning as pl
    >>> trainer = pl.Trainer(strategy="ddp_directions", accelerator="cpu", devices=2, logger=False)
    >>> type(trainer.strategy).__name__
    'DirectionParallelStrategy'
    """

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """One replica: every process sees all data."""
        return {"num_replicas": 1, "rank": 0}

    @override
    def setup_environment(self) -> None:
        """Start the processes, and give them the random state of rank 0."""
        super().setup_environment()
        if self.lightning_module is not None:
            # A sampler of one replica would do nothing but shuffle loaders that do not shuffle.
            self.lightning_module.trainer._accelerator_connector.use_distributed_sampler = False
        self._share_randomness()

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """Seed workers as on rank 0, where Lightning would seed them by rank (``seed_everything(workers=True)``)."""
        seeded = int(os.environ.get("PL_SEED_WORKERS", 0))
        if seeded and isinstance(dataloader, DataLoader) and dataloader.worker_init_fn is None:
            dataloader.worker_init_fn = partial(pl_worker_init_function, rank=0)
        return super().process_dataloader(dataloader)

    @override
    def on_train_start(self) -> None:
        """Give all processes the random state of rank 0 again: what ran before may have drawn on some ranks only."""
        super().on_train_start()
        self._share_randomness()

    def _share_randomness(self) -> None:
        here = _collect_rng_states(include_cuda=False), generator_state(self.root_device)
        states, there = self.broadcast(here)
        _set_rng_states(states)
        set_generator_state(self.root_device, there)

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Register ``"ddp_directions"``."""
        description = "Shares the directions of a hypergradient strategy out over processes"
        strategy_registry.register("ddp_directions", cls, description, override=True)


DirectionParallelStrategy.register_strategies(StrategyRegistry)


def parallel_refusals(strategy: HypergradientStrategy, trainer: Trainer) -> list[MisconfigurationError]:
    """Return what is wrong with the way the Trainer spreads a fit over processes."""
    name, found = type(strategy).__name__, []
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, XLAStrategy)):
        found.append(
            combination_error(
                f"a `BilevelModule` with `{type(trainer.strategy).__name__}`",
                "inner runs need whole parameters in ordinary processes, and it keeps parts of them elsewhere",
                "Use `Trainer(strategy='ddp')`, or 'ddp_directions' to share out directions",
            )
        )
    if isinstance(trainer.strategy, DirectionParallelStrategy) and not strategy.direction_parallel:
        found.append(
            combination_error(
                f"`{name}` with `Trainer(strategy='ddp_directions')`",
                "it has no directions that processes could share",
                "Use `Trainer(strategy='ddp')`, where each process has its own episodes, or `ForwardGradient`",
            )
        )
    return found


class Ranks:
    """The processes of a fit, as one of them sees them. With one process, nothing here costs anything.

    Args:
        trainer: its strategy has set up the processes.

    Attributes:
        rank: for directions of this process's own; 0 where the processes share directions out.
        shard: (i, n): this process evaluates the i-th of n shards of the directions.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._strategy = trainer.strategy
        self._global_rank, self._world = trainer.global_rank, trainer.world_size
        self._shares = isinstance(trainer.strategy, DirectionParallelStrategy)
        self.rank = 0 if self._shares else self._global_rank
        self.shard = (self._global_rank, self._world) if self._shares else (0, 1)
        self._rounded = False  # ranks that share directions differ by rounding

    def reduce_estimate(self, estimate: Callable[[], Hypergradient]) -> tuple[Hypergradient, Tensor]:
        """Return this process's estimate, and the mean of h over processes.

        Where the processes share directions out, the estimate is that of all of them, the same everywhere.

        Args:
            estimate: makes it.

        Raises:
            Exception: on every process, if any process raised.
            MisconfigurationError: the processes should have seen the same data and did not.
        """
        result, values = self._gathered(estimate, lambda made: made.value)
        if values is None:
            return result, result.value
        if self._shares:
            self._compare(values, torch.finfo(result.value.dtype).eps ** 0.5)
            grads = self._mean(list(result.grads.values()))
            result = result._replace(grads=dict(zip(result.grads, grads, strict=True)))
        return result, values.mean().to(result.value)

    def raise_on_all(self, action: Callable[[], T]) -> T:
        """Return what this process's ``action`` returns; if any process raised, raise on every one."""
        return self._gathered(action, lambda made: torch.zeros(()))[0]

    def average_(self, carried: Sequence[Tensor]) -> None:
        """Make what is carried to the next step equal on all processes, in place, with one collective per dtype.

        Processes with episodes of their own average; of integers, all take those of rank 0. Where processes share
        directions out, their states are equal anyway: nothing is sent, unless h differed in its last digits (some
        kernels on GPUs sum in any order); then all take the state of rank 0.
        """
        if self._world > 1 and not self._shares:
            _copy(carried, self._mean(carried))
        elif self._rounded:
            _copy(carried, self._first(carried))

    def begin(self, values: Sequence[Tensor]) -> None:
        """Give all processes the values of rank 0, in place."""
        if self._world > 1:
            _copy(values, self._first(values))

    def _gathered(self, action: Callable[[], T], value: Callable[[T], Tensor]) -> tuple[T, Tensor | None]:
        """Return what ``action`` returns, and of every process the value of it (none with one process)."""
        if self._world == 1:
            return action(), None
        made: list[T] = []
        raised: Exception | None = None
        report = torch.zeros(2, dtype=torch.float64, device=self._strategy.root_device)
        try:
            made.append(action())
            report[1] = value(made[0]).detach()
        except Exception as error:
            raised, report[0] = error, 1
        reports = [torch.zeros_like(report) for _ in range(self._world)]
        distributed.all_gather(reports, report)
        failed, values = torch.stack(reports).cpu().unbind(1)
        if failed.any():
            first = int(failed.nonzero()[0])
            message = (type(raised).__name__, _known(raised), str(raised)) if raised is not None else None
            message = self._strategy.broadcast(message, src=first)
            if raised is not None:
                raise raised
            assert message is not None
            kind, known, text = message
            raise _ERRORS[known](f"{text} (This was on rank {first}: {kind}.)")
        return made[0], values

    def _compare(self, values: Tensor, tolerance: float) -> None:
        spread = float(values.max() - values.min())
        self._rounded = spread > 0
        if spread > tolerance * float(values.abs().max()):
            seen = ", ".join(f"{value:.9g} on rank {rank}" for rank, value in enumerate(values.tolist()))
            raise combination_error(
                f"`Trainer(strategy='ddp_directions')` with an outer loss that is {seen}",
                "ranks that share out the directions of one estimate have to see the same episodes. Data differ if a "
                "loader shuffles or shards by rank, if its workers are seeded by rank (your own `worker_init_fn`, "
                "transforms that draw from an unseeded generator), or if one rank has drawn more random numbers than "
                "another before a loader shuffles (code under `rank_zero_only`)",
                "Call `seed_everything(seed, workers=True)` and let all ranks do the same, or use "
                "`Trainer(strategy='ddp')`",
            )

    def _mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        def reduce(flat: Tensor) -> None:
            if flat.is_floating_point() or flat.is_complex():
                distributed.all_reduce(flat)
                flat /= self._world
            else:
                distributed.broadcast(flat, 0)

        return self._flattened(tensors, reduce)

    def _first(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return self._flattened(tensors, lambda flat: distributed.broadcast(flat, 0))

    def _flattened(self, tensors: Sequence[Tensor], collective: Callable[[Tensor], Any]) -> list[Tensor]:
        """Apply a collective, in place, to all tensors at once; half precision is widened for it."""
        groups: dict[torch.dtype, list[int]] = defaultdict(list)
        for position, tensor in enumerate(tensors):
            exact = not (tensor.is_floating_point() or tensor.is_complex())
            groups[tensor.dtype if exact else torch.promote_types(tensor.dtype, torch.float32)].append(position)
        found = [tensor.detach() for tensor in tensors]
        for dtype, positions in groups.items():
            pieces = [found[position].to(self._strategy.root_device, dtype).reshape(-1) for position in positions]
            flat = torch.cat(pieces)
            collective(flat)
            for position, piece in zip(positions, flat.split([piece.numel() for piece in pieces]), strict=True):
                found[position] = piece.reshape(found[position].shape).to(found[position])
        return found


_ERRORS: dict[str, type[Exception]] = {
    error.__name__: error
    for error in (
        *(NonfiniteError, NoLossError, ArgumentError, MisconfigurationError),
        *(FloatingPointError, ValueError, TypeError, RuntimeError, Exception),
    )
}
"""What an error on another process is raised as: a step is skipped on all of them, or on none."""


def _known(error: Exception) -> str:
    return next(kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _ERRORS)


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

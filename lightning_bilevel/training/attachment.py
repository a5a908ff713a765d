"""The tie between a bilevel module and the strategy of a running fit."""

from __future__ import annotations

from lightning_bilevel.errors import MisconfigurationError, combination_error
from lightning_bilevel.host import Trainer
from lightning_bilevel.modules.functional import FunctionalModule
from lightning_bilevel.modules.hooks import BilevelHooks
from lightning_bilevel.modules.levels import Levels
from lightning_bilevel.modules.recorder import LogRecorder
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.training.memory import InnerMemory
from lightning_bilevel.training.parallel import Ranks, parallel_refusals


class Attachment:
    """What a fit adds to a module, from :meth:`prepare` to :meth:`undo`.

    Args:
        strategy: estimates the hypergradients.
        trainer: runs the fit; its processes are set up.
        seed: of all random draws.

    Attributes:
        ranks: the processes.
        usable: whether any estimate counts toward the coming step of the outer optimizer.
    """

    def __init__(self, strategy: HypergradientStrategy, trainer: Trainer, seed: int) -> None:
        self.strategy, self.ranks, self.seed = strategy, Ranks(trainer), seed
        self.usable = False
        self._functional: FunctionalModule | None = None

    @property
    def ready(self) -> bool:
        """Whether the module's layers exist and its levels are known."""
        return self._functional is not None

    @property
    def functional(self) -> FunctionalModule:
        """The module's pure functions."""
        assert self._functional is not None
        return self._functional

    def prepare(self, module: BilevelHooks, memory: InnerMemory) -> Levels:
        """Look up the levels, check the strategy, freeze what no outer optimizer steps."""
        functional = functional_of(module)
        self.strategy.check(functional.problem)
        memory.begin(functional, self.seed)
        # The processes may have built different layers; Lightning gives them those of rank 0 only after this.
        self.ranks.begin(list(memory.initial.values()))
        for name in functional.levels.inner_only:
            module.get_parameter(name).requires_grad_(False)
        self._functional = functional
        return functional.levels

    def undo(self) -> None:
        """Restore the flags that :meth:`prepare` changed: by name, for a move to a device may make new parameters."""
        if self._functional is not None:
            for name in self._functional.levels.inner_only:
                self._functional.module.get_parameter(name).requires_grad_(True)


def functional_of(module: BilevelHooks) -> FunctionalModule:
    """Build the pure functions of a module; what its hooks log meanwhile has nowhere to go yet."""
    with LogRecorder().recording(module):
        return FunctionalModule(module)


def fit_refusals(
    module: BilevelHooks, training_step: object, strategy: HypergradientStrategy, trainer: Trainer
) -> list[MisconfigurationError]:
    """Return what is wrong with a fit before the module's layers need to exist.

    Args:
        module: the module.
        training_step: the one function that its class may have for a training step.
        strategy: estimates the hypergradients.
        trainer: runs the fit.
    """
    found = [*module.missing_hooks(), *parallel_refusals(strategy, trainer)]
    if type(module).training_step is not training_step:
        found.append(
            combination_error(
                f"an overridden `{type(module).__name__}.training_step`",
                "the training step of a `BilevelModule` is the hypergradient estimate",
                "Write `inner_loss(batch)` and `outer_loss(batch)` instead",
            )
        )
    if not module.automatic_optimization:
        found.append(
            combination_error(
                "manual optimization with a `BilevelModule`",
                "the hypergradient reaches the optimizer through automatic optimization",
                "Remove `self.automatic_optimization = False`",
            )
        )
    return found

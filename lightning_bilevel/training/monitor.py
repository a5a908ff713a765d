"""How good are the hypergradients of a running fit? Compares them with a reference, now and then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.errors import (
    MisconfigurationError,
    combination_error,
    integer,
    missing_error,
    number,
    of_an_instance,
    refuse,
    value_error,
)
from lightning_bilevel.host import Callback, Trainer, is_foreign, mixing
from lightning_bilevel.problem import Hypergradient
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.strategies.reverse_unroll import ReverseUnroll

Again = Callable[[HypergradientStrategy, int], Hypergradient]
"""(strategy, number of an independent draw) to its estimate at the same φ, θ, episodes and dropout masks."""


class HypergradientMonitor(Callback):
    r"""Logs how the running strategy's estimate ĝ compares with a reference g on the same training step.

    ``hypergradient_cosine`` is ⟨ĝ, g⟩ / (‖ĝ‖ ‖g‖), ``hypergradient_relative_error`` ‖ĝ − g‖ / ‖g‖,
    ``hypergradient_norm_ratio`` ‖ĝ‖ / ‖g‖. For strategies with random directions
    ``hypergradient_standard_error`` is the root mean squared deviation of ĝ from its own mean, over ‖g‖, from
    ``samples`` fresh estimates: what of the relative error is noise; the rest is bias.

    They also say something about themselves, from what was measured anyway, without a reference:

    - ``hypergradient_explained_by_guide`` (``_guide_0``, … of a list) and ``hypergradient_explained_by_memory``: the
      share of ‖∇h‖² in the direction of each, cos²(∇h, q), as far as it is not in those of the guides before. The slope
      along q is exact; ‖∇h‖² is estimated without bias, with the slopes along the random directions. For ``PZOBO``, ∇h
      is without ∂f/∂φ.
    - ``hypergradient_expected_cosine``: the cosine of ĝ and ∇h that follows.
    - ``hypergradient_directions_needed``: how many directions it would take for the cosine that is wanted.

    The training run is the same with and without it, bit for bit.

    Cost: one estimate of the reference, and ``samples`` of the running strategy, every ``every_n_steps`` steps.

    Args:
        reference: an exact strategy, or a better one; default ``ReverseUnroll(checkpoint="sqrt")``. ``False`` for none:
            then nothing more is computed than what estimates say about themselves.
        every_n_steps: training steps from one comparison to the next; the first step is compared.
        samples: fresh estimates for the standard error; at least 2, or 0 for none.
        cosine: the cosine with ∇h that is wanted, below 1.

    Raises:
        ValueError: a bad argument.

    >>> HypergradientMonitor(every_n_steps=20).reference.exact
    True
    """

    def __init__(
        self,
        reference: HypergradientStrategy | Literal[False] | None = None,
        every_n_steps: int = 50,
        samples: int = 4,
        cosine: float = 0.5,
    ) -> None:
        given: Any = reference if reference is not None else ReverseUnroll(checkpoint="sqrt")
        if given is not False and not isinstance(given, HypergradientStrategy):
            expected = "a strategy such as `ReverseUnroll()`, or False"
            raise value_error("HypergradientMonitor(reference=...)", expected, given)
        self.reference: HypergradientStrategy | Literal[False] = given
        self.every_n_steps = integer("HypergradientMonitor(every_n_steps=...)", every_n_steps)
        if type(samples) is not int or samples < 0 or samples == 1:
            raise value_error("HypergradientMonitor(samples=...)", "0, or an integer of at least 2", samples)
        self.samples = samples
        self.cosine = number("HypergradientMonitor(cosine=...)", cosine, above=0)
        if self.cosine >= 1:
            raise value_error("HypergradientMonitor(cosine=...)", "a number in (0, 1)", cosine)

    @of_an_instance
    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Ask the module for its estimates."""
        if is_foreign(trainer):
            raise combination_error(*mixing(f"`{type(self).__name__}` in a `{type(trainer).__name__}`"))
        if stage != "fit":
            return
        if not hasattr(pl_module, "fit_context"):
            raise missing_error(
                type(pl_module).__name__,
                "hypergradient to monitor",
                "`HypergradientMonitor` works on a `lightning_bilevel.BilevelModule`: derive from it, "
                "or use `bilevel(module, ...)`",
            )
        pl_module.fit_context.watch(self)

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Let go of the module."""
        if hasattr(pl_module, "fit_context"):
            pl_module.fit_context.forget(self)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Let go of the module; Lightning calls no ``teardown`` after an error."""
        if hasattr(pl_module, "fit_context"):
            pl_module.fit_context.forget(self)

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuse a reference that cannot work on the problem, before the first batch."""
        if self.reference and (found := self.reference.all_refusals(pl_module.functional().problem)):
            hint = "pass another, such as `reference=ImplicitGradient(...)` or `reference=ZerothOrder(...)`"
            refuse([*found, MisconfigurationError(f"It is the reference of `HypergradientMonitor`: {hint}.")])

    def compare(self, strategy: HypergradientStrategy, estimate: Hypergradient, again: Again) -> dict[str, Tensor]:
        """Return the metrics to log.

        Args:
            strategy: the running strategy.
            estimate: its estimate at this step.
            again: computes another estimate at this step.
        """
        own_words = {f"hypergradient_{name}": v for name, v in strategy.explained(estimate, self.cosine).items()}
        if not self.reference:
            return own_words
        reference = again(self.reference, 0).grads
        length = tree.norm(reference)
        own = tree.norm(estimate.grads)
        smallest = torch.finfo(length.dtype).tiny  # an estimate of zero points nowhere: its cosine is 0
        metrics = {
            **own_words,
            "hypergradient_cosine": tree.dot(estimate.grads, reference) / (own * length).clamp_min(smallest),
            "hypergradient_relative_error": tree.norm(tree.sub(estimate.grads, reference)) / length,
            "hypergradient_norm_ratio": own / length,
        }
        if self.samples and strategy.direction_parallel:
            draws = tree.stack([again(strategy, number + 1).grads for number in range(self.samples)])
            deviations = {name: values - values.mean(0) for name, values in draws.items()}
            squares = torch.stack([values.square().sum() for values in deviations.values()]).sum()
            metrics["hypergradient_standard_error"] = (squares / (self.samples - 1)).sqrt() / length
        return metrics

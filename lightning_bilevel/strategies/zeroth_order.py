"""Hypergradient from finite differences of h along random directions."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal

from torch import Tensor
from typing_extensions import override

from lightning_bilevel.calculus.outer import outer_value
from lightning_bilevel.directions import DirectionSampler, Gaussian
from lightning_bilevel.errors import number, one_of
from lightning_bilevel.problem import BilevelProblem, Episode, Hypergradient, InnerState
from lightning_bilevel.strategies.directional import DirectionalStrategy, Guide
from lightning_bilevel.strategies.perturbation import PerturbedRuns, coarsest
from lightning_bilevel.strategies.rounding import first_look, look_at_differences
from lightning_bilevel.strategies.slopes import Slopes
from lightning_bilevel.tree import Params

Scheme = Literal["forward", "central"]


class ZerothOrder(DirectionalStrategy):
    r"""ĝ = (1/b) Σ_i [h(φ + μ v_i) − h(φ)] / μ · v_i, or central: [h(φ + μ v_i) − h(φ − μ v_i)] / 2μ · v_i.

    Biased by O(μ), central by O(μ²); its variance is that of :class:`ForwardGradient`. Nothing is
    differentiated, so it serves black-box solvers (``differentiable_solve = False``), losses without a second
    derivative, and inner levels of any kind. Also known as (FG)²U-ZO, HOZOG, ES-MAML, randomized smoothing.

    Memory: one inner run (times ``chunk_size``). Cost: b + 1 inner runs, central 2b + 1.

    Not where the inner steps can be differentiated: :class:`ForwardGradient` has no bias at a similar cost.
    Choose μ well above the rounding of h: a warning tells when μ² < ε h, with ε that of the least precise dtype in
    which anything is computed (bfloat16's under ``bf16-mixed``).

    ``guide`` and ``remember`` are those of :class:`ForwardGradient`. Along what they know, slopes are differences over
    ±μ √N, with a random sign: in expectation ĝ is there the central difference at that distance, and elsewhere the
    gradient of h smoothed over directions orthogonal to it. A memory differentiates nothing.

    Source: (FG)²U, arXiv 2406.14095, eq. 16 and 40; Nesterov and Spokoiny, 2017.

    Args:
        num_directions: b, the number of directions.
        mu: μ, in the units of φ.
        scheme: ``"forward"`` or ``"central"``.
        directions: the sampler.
        chunk_size: perturbed runs that are vectorized together; ``None`` chooses by device and kind of net.
        guide: a strategy whose estimate becomes the first direction, or a list of them; at most b − 1 are used.
        remember: whether the estimates before become a direction, after those of the guides.

    Raises:
        ValueError: a bad argument, or one direction, the default, with a guide or a memory, which need two.

    >>> ZerothOrder(num_directions=4, mu=1e-2, scheme="central").scheme
    'central'
    """

    exact = False
    unbiased = False
    differentiates = frozenset()
    memory = "O(M · chunk)"
    cost = "b + 1 inner runs"
    weighs_steps = True

    def __init__(
        self,
        num_directions: int = 1,
        mu: float = 1e-3,
        scheme: Scheme = "forward",
        directions: DirectionSampler | None = None,
        chunk_size: int | None = None,
        guide: Guide = None,
        remember: bool = False,
    ) -> None:
        super().__init__(num_directions, directions or Gaussian(), chunk_size, guide, remember)
        self.mu = number("ZerothOrder(mu=...)", mu, above=0)
        self.scheme = one_of("ZerothOrder(scheme=...)", Scheme, scheme)

    @override
    def slopes(self, problem: BilevelProblem, start: InnerState, phi: Params, episode: Episode) -> Slopes:
        look = first_look(problem, "ZerothOrder", self.mu)
        with coarsest(problem, start, phi, episode) if look else nullcontext() as seen:
            slopes = _Differences(problem, start, phi, episode, self)
        if seen is not None:
            look_at_differences("ZerothOrder", self.mu, slopes.value, seen.dtype)
        return slopes


class _Differences(Slopes):
    """Slopes of h by differences over μ."""

    differences = True

    def __init__(
        self, problem: BilevelProblem, carried: InnerState, phi: Params, episode: Episode, by: ZerothOrder
    ) -> None:
        self._runs, self._by = PerturbedRuns(problem, carried, phi, episode, by.chunk_size), by
        self.value, self._observed = outer_value(problem, self._runs.base.state, phi, episode)

    def chunk_size(self) -> int:
        return self._runs.chunk_size

    def along(self, directions: Params) -> Tensor:
        mu = self._by.mu
        ahead = self._runs.values(directions, mu)
        if self._by.scheme == "central":
            return (ahead - self._runs.values(directions, -mu)) / (2 * mu)
        return (ahead - self.value) / mu

    def result(self, grads: Params) -> Hypergradient:
        state, metrics = self._runs.base
        return Hypergradient(self.value, grads, state, metrics, observed=self._observed)

"""Finite differences of the outer loss along a few directions, each with the precision that it is good to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from lightning_bilevel import tree
from lightning_bilevel.calculus.outer import outer_value
from lightning_bilevel.directions import Rademacher
from lightning_bilevel.problem import BilevelProblem, Carry, Episode, Hypergradient
from lightning_bilevel.randomness import Call, Key
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.strategies.perturbation import PerturbedRuns
from lightning_bilevel.strategies.rounding import CoarsestDtype
from lightning_bilevel.tree import Params

DIFFERENCES = (1e-2, 1e-1)
"""Steps of the finite differences, relative to the root mean square of φ. 1% is small beside the curvature of a usual
net; in float32 slopes below 1e-4 drown in the rounding of an outer loss near 1, and a longer step may show them."""

FINE = 1e-4
"""The step that is tried first in float64: it meets fewer kinks."""

DIRECTIONS = 3
"""Directions along which derivatives are compared with finite differences; forward gradients along the first."""

AGREEMENT = 0.2
"""Relative difference from a finite difference beyond which a derivative is doubted, however rough the difference is;
kinks stay well below it."""

TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-2}
"""Relative differences that are always allowed, by the coarsest dtype of the computation; others have ``AGREEMENT``."""

SHORTER = (0.5, 0.1)
"""Parts of the step at which a small difference has to show again, the second one in float64 alone: a step meets kinks,
or gradients near zero that Adam divides by their size, where a shorter one does not."""

SPREAD = 10
"""A finite difference is good to this many times the distance of its extrapolations from each other."""

ROUNDING = 8
"""And to the rounding of this many units in the last place of the outer loss."""


class Differences:
    """Slopes of h along a few random directions, and whether an estimate has them.

    Args:
        attempt: estimates with a strategy; ``None`` where that raises.
        phi: outer parameters.
        key: of the directions.
        episodes: their number.
        by_solver: whether a user's solver solves the inner problem: its precision is not known.

    Attributes:
        slopes: those that are clear; none if the first of them is not.
    """

    def __init__(
        self,
        attempt: Callable[[HypergradientStrategy], Hypergradient | None],
        phi: Params,
        key: Key,
        episodes: int,
        by_solver: bool,
    ) -> None:
        self._attempt, self._phi, self._key = attempt, phi, key
        self._episodes, self._by_solver = episodes, by_solver
        self._shorter: dict[tuple[int, float], Slope | None] = {}
        self.slopes = self._found()

    def agree(self, grads: Params, length: float, along: bool) -> bool:
        """Return whether an estimate has the slopes of h.

        Args:
            grads: the estimate.
            length: ‖∇h‖.
            along: whether the estimate is one along the first direction.
        """
        return all(self._has(slope, grads, length, along) for slope in self.slopes[: 1 if along else None])

    def _found(self) -> list[Slope]:
        """Return the derivatives of h along a few random directions; none where the first of them is unclear.

        One is clear where several step sizes agree and stand out from rounding.
        """
        found: list[Slope] = []
        for number in range(DIRECTIONS):
            v = self._direction(number)
            if any(abs(tree.dot(v, slope.direction)) > 0.99 * math.sqrt(slope.size) * tree.norm(v) for slope in found):
                continue  # few outer parameters have few directions
            slope = self._slope_at(number, found[0].factor) if found else self._clearest()
            if slope is None and number == 0:
                return []
            found += [] if slope is None else [slope]
        return found

    def _clearest(self) -> Slope | None:
        """Return the first finite difference along the first direction that is precise, or the most precise one."""
        double = all(value.dtype == torch.float64 for value in self._phi.values())
        best: Slope | None = None
        for factor in (FINE, *DIFFERENCES) if double else DIFFERENCES:
            slope = self._slope_at(0, factor)
            if slope is not None and (best is None or slope.error / slope.length < best.error / best.length):
                best = slope
            if best is not None and best.error <= best.tolerance * best.length:
                break
        return best

    def _direction(self, number: int) -> Params:
        return tree.index(Rademacher().draw(self._key, number, number + 1, self._phi), 0)

    def _slope_at(self, number: int, factor: float) -> Slope | None:
        """Return the central difference along a direction, extrapolated from three steps to none."""
        size = tree.flatten(self._phi).square().mean().sqrt().item() or 1.0
        steps, v = [factor * size * part for part in (1.0, 0.6, 0.3)], self._direction(number)
        look = _Values(v, steps)
        result = self._attempt(look)
        if result is None:
            return None
        here, *values = (torch.stack(look.seen).double().sum(0) / self._episodes).tolist()
        ahead, behind = values[: len(steps)], values[len(steps) :]
        slopes = [(plus - minus) / (2 * step) for plus, minus, step in zip(ahead, behind, steps, strict=True)]
        bends = [(plus + minus - 2 * here) / (2 * step) for plus, minus, step in zip(ahead, behind, steps, strict=True)]
        near = slopes[-1]
        for slope, step in zip(slopes, steps, strict=True):
            if not abs(slope) > 20 * torch.finfo(result.value.dtype).eps * abs(here) / step:
                return None
            if slope * near <= 0 or abs(abs(slope) - abs(near)) > AGREEMENT / 4 * abs(near):
                return None
        extrapolated = _towards_zero(steps, slopes, 2)
        estimates = (near, _towards_zero(steps[1:], slopes[1:], 2), extrapolated)
        dtype = look.dtype or result.value.dtype
        unit = _unit(dtype, result.value.device)
        error = SPREAD * (max(estimates) - min(estimates)) + ROUNDING * unit * abs(here) / steps[-1]
        # Where φ lies on a kink, the slopes of its two sides differ however small the step is.
        kink = abs(_towards_zero(steps[1:], bends[1:], 1))
        count = tree.numel(self._phi)
        root = math.sqrt(count)
        return Slope(
            tree.scale(v, math.copysign(1 / root, extrapolated)),
            abs(extrapolated) * root,
            count,
            error * root,
            kink * root,
            AGREEMENT if self._by_solver else TOLERANCES.get(dtype, AGREEMENT),
            dtype,
            number,
            factor,
        )

    def _has(self, slope: Slope, grads: Params, length: float, along: bool) -> bool:
        """Return whether an estimate has a slope; a small difference from it has to show at shorter steps as well."""
        off = slope.distance(grads, length, along)
        if off.difference <= off.allowed:
            return True
        if off.difference > off.most:
            return False
        for shorter in SHORTER if slope.dtype == torch.float64 else SHORTER[:1]:
            place = slope.number, slope.factor * shorter
            if place not in self._shorter:
                self._shorter[place] = self._slope_at(*place)
            again = self._shorter[place]
            off = again.distance(grads, length, along) if again is not None else off
            if again is None or off.difference <= off.allowed:
                return True
        return False


class Distance(NamedTuple):
    """How far an estimate is from a finite difference.

    Attributes:
        difference: of the two slopes.
        allowed: what the precision of the finite difference allows for.
        most: what is allowed at most.
    """

    difference: float
    allowed: float
    most: float


class Slope(NamedTuple):
    """A finite difference of h along v, whose entries are ±1.

    Attributes:
        direction: v or −v, at length 1, along which h grows.
        length: |⟨∇h, v⟩| √N.
        size: N, the number of outer parameters.
        error: what ``length`` is good to.
        kink: half the difference of the slopes on either side of φ, times √N.
        tolerance: relative difference that is always allowed.
        dtype: the coarsest one in which h is computed.
        number: of the direction.
        factor: of the step, relative to φ.
    """

    direction: Params
    length: float
    size: int
    error: float
    kink: float
    tolerance: float
    dtype: torch.dtype
    number: int
    factor: float

    def distance(self, grads: Params, length: float, along: bool) -> Distance:
        """Return how far an estimate is from this slope.

        Args:
            grads: the estimate.
            length: ‖∇h‖.
            along: whether the estimate is one along this direction.
        """
        # With v of ±1: a forward gradient is ⟨∇h, v⟩ v, as long as the finite difference's estimate; ∇h itself has the
        # slope ⟨∇h, v⟩/√N along v/√N, where that estimate has the length |⟨∇h, v⟩| √N.
        part = 1.0 if along else 1 / self.size
        found = tree.dot(grads, self.direction).item()
        # Where ∇h is nearly at right angles to v, its slope is a small difference of large terms: ‖∇h‖ is the scale.
        scale = max(self.length, length * math.sqrt(self.size)) * part
        # On a kink, any slope between those of the two sides is a derivative.
        most = max(AGREEMENT * scale, (self.kink + self.error) * part)
        allowed = max(self.tolerance * scale, (2 * self.kink + self.error) * part)
        return Distance(abs(found - self.length * part), min(allowed, most), most)


class _Values(HypergradientStrategy):
    """Not an estimate: h at φ and on both sides of it, at several steps along a direction.

    Attributes:
        seen: values at φ, φ + μ v of all steps μ, and φ − μ v; of every episode, or their sum.
        dtype: the coarsest one in which h was computed.
    """

    exact = False
    unbiased = False
    differentiates = frozenset()
    memory = "O(M)"
    cost = "2 inner runs a step, and one"
    weighs_steps = True

    def __init__(self, v: Params, steps: Sequence[float]) -> None:
        self._stacked, self._steps = tree.stack([v]), steps
        self.seen: list[torch.Tensor] = []
        self.dtype: torch.dtype | None = None

    def estimate(
        self, problem: BilevelProblem, carry: Carry, phi: Params, episode: Episode, call: Call
    ) -> Hypergradient:
        """Look at h; the estimate is zero."""
        problem = replace(problem, compiler=None)  # whose graphs tell of no dtype
        with CoarsestDtype() as seen:
            runs = PerturbedRuns(problem, carry.inner, phi, episode, 1)
            value, observed = outer_value(problem, runs.base.state, phi, episode)
        self.dtype = seen.dtype
        moved = [runs.values(self._stacked, sign * step)[0] for sign in (1, -1) for step in self._steps]
        self.seen.append(torch.stack([value, *moved]).detach())
        state, metrics = runs.base
        return Hypergradient(value, tree.zeros_like(phi), state, metrics, observed=observed)


def _unit(dtype: torch.dtype, device: torch.device) -> float:
    """Return the distance of one to the next number, in what products of matrices are computed in."""
    backends = torch.backends
    short = backends.cuda.matmul.allow_tf32 or backends.cudnn.allow_tf32
    if dtype == torch.float32 and device.type == "cuda" and short:
        return 2.0**-10
    return torch.finfo(dtype).eps


def _towards_zero(steps: Sequence[float], values: Sequence[float], power: int) -> float:
    """Return the value at a step of zero of the polynomial in ``step**power`` through all values.

    >>> _towards_zero([2.0, 1.0], [3 + 4.0, 3 + 1.0], 2)
    3.0
    """
    xs = [step**power for step in steps]
    return sum(
        value * math.prod(other / (other - x) for other in xs if other != x)
        for x, value in zip(xs, values, strict=True)
    )

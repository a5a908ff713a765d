"""Is θ_T where the implicit function theorem takes it to be? How far it is from there, and a fixed point elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Collection

import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.errors import MisconfigurationError, combination_error
from lightning_bilevel.problem import BilevelProblem, InnerState, Penalty
from lightning_bilevel.randomness import RngState
from lightning_bilevel.tree import Params

UPDATES = 10
"""Further updates that are tried: at a turning point momentum stays where it is for one of them, and not for ten."""

STAYS = 0.05
"""Ratio of two ways below which θ stays where it is; descent that is under way goes equally far either way."""

ROUNDING = 100
"""Ways below this many rounding units of ‖θ‖ say nothing."""


def distance(residual: Params, x: Params, d: Params, theta: Params) -> Tensor:
    r"""Return ‖r‖ ‖x‖ / (‖d‖ ‖θ‖), about the distance from θ to where r is zero, relative to ‖θ‖.

    It is the metric ``inner_residual``. With (∂r/∂θ)ᵀ x = d and d = ∂f/∂θ, f(θ) − f(θ*) = ⟨x, r⟩ to first order, so
    that abs(f(θ) − f(θ*)) ≤ ``inner_residual`` · ‖d‖ ‖θ‖. It has no units, costs no product and waits for no device.
    For x = s · d it is the length of a further step of gradient descent at the rate s, relative to ‖θ‖.

    >>> one = {"w": torch.tensor([1.0])}
    >>> distance({"w": torch.tensor([0.3])}, x=one, d={"w": torch.tensor([2.0])}, theta={"w": torch.tensor([5.0])})
    tensor(0.0300)
    """
    scale = tree.norm(d) * tree.norm(theta)
    return tree.norm(residual) * tree.norm(x) / scale.clamp_min(torch.finfo(scale.dtype).tiny)


def gradient_of_stationary(
    maximize: bool, penalty: Penalty | None, gradient: Params, theta: Params, phi: Params
) -> Params:
    """Return the gradient of :meth:`BilevelProblem.stationary` from that of g: ±∇g + ∇penalty, without a graph."""
    gradient = tree.scale(gradient, -1.0) if maximize else gradient
    return gradient if penalty is None else tree.add(gradient, _of_penalty(penalty, theta, phi))


def unseen_by_the_minimum(
    problem: BilevelProblem, strategy: str, learned: Collection[str]
) -> list[MisconfigurationError]:
    """Return refusals of outer parameters that no minimum depends on: where a run starts, and how it goes.

    Args:
        problem: the problem.
        strategy: the class name.
        learned: the outer parameters that say how it goes, of :class:`~lightning_bilevel.problem.Traits`.
    """
    found = []
    if problem.shared and not problem.traits.proximal:
        found.append(
            combination_error(
                f"`{strategy}` with parameters shared by both levels and `proximal=0`",
                "the minimum of the inner loss does not depend on where the inner run starts",
                "Set `BilevelModule(proximal=...)`, or use `ReverseUnroll` or `ForwardGradient`",
            )
        )
    if learned:
        found.append(
            combination_error(
                f"`{strategy}` with an inner optimizer that depends on the outer parameters",
                "the minimum of the inner loss does not depend on how it is reached",
                "Use `ReverseUnroll` or `ForwardGradient`",
            )
        )
    return found


def warn_of_another_map(
    problem: BilevelProblem, state: InnerState, phi: Params, residual: Params, strategy: str
) -> None:
    """Warn, once per problem, if updates leave θ where it is although ∇(±g + penalty) = ``residual`` is not zero there.

    Ten updates with the gradient of now are compared with ten whose ``residual`` has the other sign: a rule that
    follows the gradient goes equally far either way, and what holds θ in place, a projection or a decay, gives way in
    one direction only. No loss is evaluated and nothing is drawn. It looks at the first estimate of a problem, and at
    the second, the fourth, the eighth: a warm start may be long on its way.

    Args:
        problem: with its own update and penalty.
        state: s.
        phi: outer parameters.
        residual: the gradient of :meth:`BilevelProblem.stationary` at ``state``.
        strategy: the class name.
    """
    looks = problem.findings.setdefault(("stationarity", strategy), {"estimates": 0, "warned": False})
    looks["estimates"] += 1
    if looks["warned"] or looks["estimates"] & (looks["estimates"] - 1):  # not a power of two
        return
    along, against = _ways(problem, state, phi, residual)
    unit = torch.finfo(along.dtype).eps
    stays = (along < STAYS * against) & (against > ROUNDING * unit * tree.norm(state.params))
    if stays:
        looks["warned"] = True
        warnings.warn(
            f"`{strategy}` takes θ_T for a stationary point of the inner loss, but it is a fixed point of another map: "
            f"{UPDATES} further updates move it by {along:.1e}, and with the sign of the gradient changed by "
            f"{against:.1e}. The inner optimizer projects, or decays weights by itself. Use "
            '`ImplicitGradient(solver, form="fixed_point")`, or let the optimizer state its `penalty`.',
            stacklevel=3,
        )


def _ways(problem: BilevelProblem, state: InnerState, phi: Params, residual: Params) -> tuple[Tensor, Tensor]:
    """Return how far from θ updates come whose ``residual`` stays as it is, and such where it has the other sign."""
    sign = -1.0 if problem.maximize else 1.0
    other = _of_penalty(problem.penalty, state.params, phi)
    furthest = []
    with torch.no_grad(), RngState(tree.device(phi)).fork():
        for direction in (1.0, -1.0):
            gradient = tree.scale(tree.add(tree.scale(residual, direction), other, alpha=-1), sign)
            params, opt_state = state.params, state.opt_state
            ways = []
            for number in range(state.steps + 1, state.steps + 1 + UPDATES):
                params, opt_state = problem.update(params, gradient, opt_state, phi, number)
                ways.append(tree.norm(tree.sub(params, state.params)))
            furthest.append(torch.stack(ways).max())
    along, against = furthest
    return along, against


def _of_penalty(penalty: Penalty | None, theta: Params, phi: Params) -> Params:
    """Return the gradient of the penalty."""
    if penalty is None:
        return tree.zeros_like(theta)
    theta = tree.leaves(theta)
    with torch.enable_grad():
        return tree.grad(penalty(theta, phi), theta)

"""One tiny step of every hypergradient strategy on a module: what comes out, and why nothing does."""

from __future__ import annotations

import copy
import inspect
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch

from lightning_bilevel import tree
from lightning_bilevel.auditing.diagnosis import diagnose, explained
from lightning_bilevel.auditing.differences import AGREEMENT, Differences
from lightning_bilevel.auditing.probes import Graphs, graphs, saved_bytes, stacked
from lightning_bilevel.data.inputs import check_episodes
from lightning_bilevel.errors import MisconfigurationError, report
from lightning_bilevel.linear_solvers import LinearSolver
from lightning_bilevel.problem import Carry, Episode, Hypergradient, stackable
from lightning_bilevel.randomness import Call, Key
from lightning_bilevel.strategies import FirstOrder, HypergradientStrategy, ReverseUnroll
from lightning_bilevel.training.estimating import Reach, Surroundings, estimated_at, estimating
from lightning_bilevel.training.module import BilevelModule
from lightning_bilevel.tree import Params

T = TypeVar("T")

Verdict = Literal["yes", "zero", "doubtful", "not finite", "refused", "no"]
"""Works; gives exactly zero for an outer parameter; disagrees with finite differences; gave nan or infinity; cannot be
combined with this module; raised an error."""


@dataclass(frozen=True)
class AuditRow:
    """What became of one strategy.

    Attributes:
        strategy: the strategy as a user writes it.
        verdict: see :data:`Verdict`.
        operation: the operation behind a failure, as a user knows it: ``cdist``; empty where unknown.
        where: the user's line that calls it, ``file.py:line``; empty where unknown.
        reason: why it does not work.
        advice: what to do.
        zero: outer parameters whose estimate is exactly zero.
        seconds: of the rehearsed steps, with at most 2 directions.
        cosine: with the exact hypergradient of the rehearsed steps; ``None`` for random directions.
        memory: its order in T, M = dim θ, N = dim φ.
        cost: of an outer step.

    >>> row = AuditRow("PZOBO()", "no", reason="`cdist` has no double backward.", where="net.py:12")
    >>> row.works
    False
    """

    strategy: str
    verdict: Verdict
    operation: str = ""
    where: str = ""
    reason: str = ""
    advice: str = ""
    zero: tuple[str, ...] = ()
    seconds: float | None = None
    cosine: float | None = None
    memory: str = ""
    cost: str = ""

    @property
    def works(self) -> bool:
        """Whether nothing speaks against it."""
        return self.verdict == "yes"

    @property
    def because(self) -> str:
        """The reason and the line."""
        return located(self.reason, self.where)


class Rehearsal:
    """Estimates on a short inner run, all at the same φ, episodes, directions and dropout masks.

    Args:
        module: the module.
        episodes: one or two.
        steps: inner steps.
        seed: of directions and dropout.
    """

    def __init__(self, module: BilevelModule, episodes: Sequence[Episode], steps: int, seed: int) -> None:
        self.module, self.episodes, self.seed = module, episodes, seed
        self._functional = functional = module.functional()
        self.problem, self.phi, self.device = functional.problem, functional.phi(), functional.device
        self.steps = min(steps, module.inner_steps)
        self._compiled = compiled(module)
        self._reach = Reach()
        self._first_order = self.attempt(FirstOrder(), timed=False)
        self._graphs: Graphs = self._probe(graphs).result or Graphs()
        self._kind = self._probe(lambda at: at.examination.kind())
        self._exact = self.attempt(ReverseUnroll(), timed=False).result
        self._differences = self._difference() if self._exact is not None else None
        if self._graphs.once or self._agrees(ReverseUnroll(), self._exact) is False:
            self._exact = None  # nothing to compare with

    def rows(self, strategies: Sequence[HypergradientStrategy]) -> list[AuditRow]:
        """Return what becomes of every strategy."""
        rows = [self._row(strategy) for strategy in strategies]
        doubted = [row for row, s in zip(rows, strategies, strict=True) if row.verdict == "doubtful" and s.exact]
        if not doubted or doubted[0].operation:
            return rows
        because = f"it differentiates the losses twice, and `{doubted[0].strategy}` is doubtful"
        return [
            replace(row, verdict="doubtful", reason=because, advice=doubted[0].advice)
            if strategy.second_order and row.verdict in ("yes", "zero")
            else row
            for row, strategy in zip(rows, strategies, strict=True)
        ]

    def obstacle(self) -> str:
        """Return a sentence on what stands in every strategy's way; empty where nothing does."""
        error = self._first_order.error
        if error is not None:
            found = diagnose(error, lambda: self._estimate(FirstOrder()))
            return f"Not even first derivatives work: {located(found.reason, found.where)}. {found.fix}"
        return f"The outer loss has no gradient: {self._graphs.flat}" if self._graphs.flat else ""

    def kind(self) -> str:
        """Return a sentence on how the outer parameters act; empty where that is not known."""
        return self._kind.result or ""

    def unread(self) -> str:
        """Return a sentence on outer parameters that these episodes do not read; empty where they read all."""
        names = [name for name in self.phi if name in (self._reach.unreached or ())]
        return f"These episodes do not read the outer parameters {names}: their estimates are zero." if names else ""

    def vectorization(self) -> tuple[str, bool | None]:
        """Return a sentence on whether episodes of a batch can be stacked, and the answer, if there is one."""
        (first,) = self._checked(self.episodes[:1])
        if self.problem.solver is not None:
            return "The episodes of a batch are looped, for `solve_inner` takes one.", None
        if self._first_order.error is not None:
            return "", None
        if not stackable(first, first):
            return "The episodes of a batch are looped: their batches have entries that are no tensors.", False
        probe = partial(stacked, call=self._call)
        error = self._probe(probe, transforms=True).error
        if error is not None and not isinstance(error, FloatingPointError):
            found = diagnose(error, lambda: self._look(probe))
            because = located(found.reason, found.where)
            return f"The losses cannot be vectorized over episodes, so these are looped: {because}.", False
        looped = self.problem.max_copies == 1
        tail = "; on a CPU they are looped all the same, which is faster for this net" if looped else ""
        return f"The losses can be vectorized over episodes{tail}.", True

    def step_bytes(self) -> int | None:
        """Return what reverse mode saves per inner step; ``None`` where there are no steps, or they fail."""
        return self._probe(saved_bytes).result if self.problem.solver is None else None

    def attempt(self, strategy: HypergradientStrategy, transforms: bool = False, timed: bool = True) -> _Outcome:
        """Estimate, and once more where that is quick: the first call sets things up, the second one is timed."""
        seconds = math.inf
        try:
            for _ in range(2):
                began = time.perf_counter()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # about settings that are made small here
                    result = self._estimate(strategy)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                seconds = min(seconds, time.perf_counter() - began)
                if seconds > 1 or not timed:
                    break
        except Exception as error:  # whatever a user's losses raise is a finding
            return _Outcome(None, error)
        finally:
            if self._compiled and (transforms or _inside_transforms(strategy)):
                # What was met inside a function transform stays uncompiled ever after.
                torch.compiler.reset()
        return _Outcome(result, None, seconds)

    @property
    def _call(self) -> Call:
        return Call(Key((self.seed, self.module.fit_context.memory.estimates, 0, 0)))

    def _checked(self, episodes: Sequence[Episode]) -> list[Episode]:
        """Return episodes as a fit takes them; what there is to warn of was warned of before."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return check_episodes(episodes, type(self.module).__name__)

    def _estimate(self, strategy: HypergradientStrategy) -> Hypergradient:
        """Return the estimate over few steps; a second one where the strategy carries something on to it."""
        functional, memory = self._functional, self.module.fit_context.memory
        episodes = self._checked(self.episodes)
        options: dict[str, Any] = {"twice": strategy.second_order, "inner_steps": self.steps, "check": strategy.check}

        def again(carry: Carry | None = None) -> Hypergradient:
            with estimating(functional, memory, episodes, self._call.key, carry=carry, **options) as at:
                self._reach.look(functional, memory, at)  # of a fit, other episodes may reach the others
                return estimated_at(functional, strategy, at, self._call)

        with torch.inference_mode(False), torch.enable_grad():
            result = again()
            return again(result.carry) if result.kept else result

    def _look(self, probe: Callable[[Surroundings], T]) -> T:
        """Return what a probe finds in the surroundings of an estimate of the first episode."""
        functional, memory = self._functional, self.module.fit_context.memory
        episodes = self._checked(self.episodes[:1])
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            estimating(functional, memory, episodes, self._call.key, twice=False, inner_steps=self.steps) as at,
        ):
            return probe(at)

    def _probe(self, probe: Callable[[Surroundings], Any], transforms: bool = False) -> _Found:
        """Return what a probe found, or what it raised."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return _Found(self._look(probe))
        except Exception as error:  # whatever a user's losses raise is a finding
            return _Found(None, error)
        finally:
            if self._compiled and transforms:
                torch.compiler.reset()

    def _row(self, strategy: HypergradientStrategy) -> AuditRow:
        row = AuditRow(written(strategy), "yes", memory=strategy.memory, cost=strategy.cost)
        refusals = strategy.all_refusals(self.problem)
        if refusals:
            reason, advice = explained(report(refusals))
            return replace(row, verdict="refused", reason=_without(strategy, reason), advice=advice)
        small = strategy.small(tree.numel(self.phi))
        outcome = self.attempt(small)
        if outcome.result is None:
            assert outcome.error is not None
            return self._failed(row, small, outcome.error)
        grads = outcome.result.grads
        row = replace(
            row, seconds=outcome.seconds, zero=tuple(name for name, value in grads.items() if not value.any())
        )
        if self._exact is not None and not small.direction_parallel:
            row = replace(row, cosine=_cosine(grads, self._exact.grads))
        doubt = self._doubt(strategy, small, outcome.result)
        if doubt is not None:
            return replace(row, verdict="doubtful", **doubt._asdict())
        return self._zero(row) if row.zero else row

    def _doubt(
        self, strategy: HypergradientStrategy, small: HypergradientStrategy, result: Hypergradient
    ) -> _Doubt | None:
        """Return what is wrong with an estimate that nothing complained about."""
        if strategy.second_order and self._graphs.once:
            name, where = self._graphs.once[0]
            reason = f"`{name}` is marked `once_differentiable`: its second derivative is left out in silence"
            return _Doubt(reason, "Write its `backward` with differentiable operations, without the mark.", name, where)
        if small.exact and self._exact is not None:
            error = tree.norm(tree.sub(result.grads, self._exact.grads))
            # In float32 the first steps of Adam leave few digits: differences of large terms.
            first = self._differences.slopes[0] if self._differences is not None and self._differences.slopes else None
            allowed = first.tolerance if first is not None and first.dtype == torch.float64 else AGREEMENT
            if error > allowed * tree.norm(self._exact.grads):
                return _Doubt(
                    "it claims to be exact and differs from `ReverseUnroll`",
                    "Look at the strategy, or at a custom `jvp`.",
                )
        if self._agrees(small, result) is False:
            return _Doubt(
                "it disagrees with a finite difference of the outer loss",
                "Look for a custom `autograd.Function`, a straight-through estimator or `detach` in the inner loss.",
            )
        return None

    def _zero(self, row: AuditRow) -> AuditRow:
        names = ", ".join(f"`{name}`" for name in row.zero[:3]) + (", ..." if len(row.zero) > 3 else "")
        reason, advice = f"it runs, but gives zero for {names}", ""
        if self._graphs.flat:
            reason += ": the outer loss has no gradient"
        elif self._exact is not None and not any(self._exact.grads[name].any() for name in row.zero):
            reason += ", as does the exact one over these steps"
        else:
            advice = "Use a strategy that sees how they act on the inner steps."
        return replace(row, verdict="zero", reason=reason, advice=advice)

    def _failed(self, row: AuditRow, strategy: HypergradientStrategy, error: Exception) -> AuditRow:
        """Return the row of a strategy that raised: the operation, and a way out that works, if there is one."""
        found = diagnose(error, lambda: self._estimate(strategy))
        verdict: Verdict = "no"
        if isinstance(error, MisconfigurationError):
            verdict = "refused"
        elif isinstance(error, FloatingPointError):
            verdict = "not finite"
        advice = found.fix
        for name, value in _other_ways(strategy):
            other = copy.deepcopy(strategy)
            setattr(other, name, value)
            if verdict == "no" and self._sound(other):
                advice = f"Use `{row.strategy.partition('(')[0]}(..., {name}={value!r})`, which works here."
        return replace(
            row, verdict=verdict, operation=found.operation, where=found.where, reason=found.reason, advice=advice
        )

    def _sound(self, strategy: HypergradientStrategy) -> bool:
        result = None if strategy.second_order and self._graphs.once else self.attempt(strategy, timed=False).result
        return result is not None and self._agrees(strategy, result) is not False

    def _difference(self) -> Differences | None:
        """Return finite differences of h; ``None`` where the rounding of a low precision hides them."""
        if torch.is_autocast_enabled(self.device.type):
            return None

        def attempt(strategy: HypergradientStrategy) -> Hypergradient | None:
            return self.attempt(strategy, timed=False).result

        return Differences(attempt, self.phi, self._call.key, len(self.episodes), self.problem.solver is not None)

    def _agrees(self, strategy: HypergradientStrategy, result: Hypergradient | None) -> bool | None:
        """Return whether an estimate has the slopes of h; ``None`` where these say nothing about it."""
        along = strategy.one_slope
        if result is None or self._differences is None or not self._differences.slopes or not (strategy.exact or along):
            return None
        exact = result if strategy.exact else self._exact
        length = 0.0 if exact is None else tree.norm(exact.grads).item()
        return self._differences.agree(result.grads, length, along)


class _Outcome(NamedTuple):
    """An estimate, or what it raised."""

    result: Hypergradient | None
    error: Exception | None = None
    seconds: float = 0.0


class _Found(NamedTuple):
    """What a probe found, or what it raised."""

    result: Any
    error: Exception | None = None


class _Doubt(NamedTuple):
    """Why an estimate may be wrong; see :class:`AuditRow`."""

    reason: str
    advice: str
    operation: str = ""
    where: str = ""


def located(reason: str, where: str) -> str:
    """Return a reason with its line.

    >>> located("`cdist` has no second derivative", "model.py:12")
    '`cdist` has no second derivative (model.py:12)'
    """
    return f"{reason} ({where})" if where else reason


def compiled(module: torch.nn.Module) -> bool:
    """Return whether ``torch.compile`` was applied to a part of the module."""
    return any(hasattr(child, "_orig_mod") or child._compiled_call_impl is not None for child in module.modules())


def written(strategy: HypergradientStrategy) -> str:
    """Return a strategy as a user writes it, with the arguments that are not at their defaults.

    >>> from lightning_bilevel import ForwardGradient
    >>> written(ForwardGradient(4)), written(ForwardGradient(guide=FirstOrder()))
    ('ForwardGradient(num_directions=4)', 'ForwardGradient(guide=FirstOrder())')
    """
    arguments = []
    for name, parameter in inspect.signature(type(strategy)).parameters.items():
        value = getattr(strategy, name, parameter.default)
        if isinstance(value, HypergradientStrategy):
            arguments.append(f"{name}={written(value)}")
        elif isinstance(value, LinearSolver):
            arguments.append(f"{type(value).__name__}(...)")
        elif isinstance(value, (int, float, str)) and value != parameter.default:
            arguments.append(f"{name}={value!r}")
    return f"{type(strategy).__name__}({', '.join(arguments)})"


def _without(strategy: HypergradientStrategy, reason: str) -> str:
    """Leave the strategy's name out of its own row."""
    return re.sub(rf"`{type(strategy).__name__}` with ", "", reason)


def _inside_transforms(strategy: HypergradientStrategy) -> bool:
    """Return whether the losses run inside of ``torch.func``."""
    vectorized = strategy.direction_parallel and not strategy.second_order
    return vectorized or getattr(strategy, "mode", "") == "forward"


def _other_ways(strategy: HypergradientStrategy) -> Iterator[tuple[str, Any]]:
    """Yield arguments that may make a strategy work."""
    mode = getattr(strategy, "mode", None)
    if mode is not None:
        yield "mode", "double_backward" if mode == "forward" else "forward"


def _cosine(a: Params, b: Params) -> float | None:
    lengths = (tree.norm(a) * tree.norm(b)).item()
    return tree.dot(a, b).item() / lengths if lengths else None

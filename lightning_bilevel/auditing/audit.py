"""Which hypergradient strategies work on a module, and why the others do not: a rehearsal before a long run."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from lightning_bilevel.auditing.rehearsal import AuditRow, Rehearsal, compiled
from lightning_bilevel.data.inputs import check_episodes
from lightning_bilevel.errors import MisconfigurationError, integer, missing_error, of_an_instance, value_error
from lightning_bilevel.host import (
    Callback,
    Trainer,
    _collect_rng_states,
    _set_rng_states,
    move_data_to_device,
    rank_zero_warn,
)
from lightning_bilevel.randomness import RngState
from lightning_bilevel.strategies import HypergradientSchedule, HypergradientStrategy
from lightning_bilevel.strategies.table import one_of_each
from lightning_bilevel.training.attachment import attached
from lightning_bilevel.training.module import BilevelModule
from lightning_bilevel.training.uncompiled import uncompiled

EPISODES = 2
"""Episodes of the batch that are rehearsed; more show nothing new."""

WIDTH = 124
"""Characters of a line of the table."""


@dataclass(frozen=True, repr=False)
class Audit:
    """The rows of an audit; ``str`` makes them a table.

    Attributes:
        module: name of the module's class.
        rows: one per strategy.
        steps: inner steps that were rehearsed.
        inner_steps: T of the module.
        notes: sentences that concern all strategies.
        vectorizes: whether the losses can be vectorized over episodes; ``None`` where that is not known.
        step_bytes: what autograd saves per inner step and episode for reverse mode; ``None`` where that is not known.

    >>> rows = AuditRow("ReverseUnroll()", "yes"), AuditRow("PZOBO()", "refused", reason="Not here.")
    >>> report = Audit("Net", rows, steps=2, inner_steps=2)
    >>> report
    <Audit of Net: 1 of 2 strategies work>
    >>> report["PZOBO"].reason
    'Not here.'
    """

    module: str
    rows: tuple[AuditRow, ...]
    steps: int
    inner_steps: int
    notes: tuple[str, ...] = ()
    vectorizes: bool | None = None
    step_bytes: int | None = None

    def __getitem__(self, strategy: str) -> AuditRow:
        """Return a strategy's row, by the name in the table; without brackets the first of its class."""
        for row in self.rows:
            if strategy in (row.strategy, row.strategy.partition("(")[0]):
                return row
        raise KeyError(f"{strategy} is not among {[row.strategy for row in self.rows]}")

    def __repr__(self) -> str:
        return f"<Audit of {self.module}: {sum(row.works for row in self.rows)} of {len(self.rows)} strategies work>"

    def __str__(self) -> str:
        steps = f"{self.steps} inner steps" if self.steps > 1 else "1 inner step"
        closing = []
        if any(row.cosine is not None for row in self.rows):
            closing.append("cosine: with the exact hypergradient of the rehearsed steps.")
        if self.steps < self.inner_steps:
            steps = f"{self.steps} of {self.inner_steps} inner steps"
            closing.append(
                "Bias, time, memory and overflow change with the number of inner steps: a `HypergradientMonitor` "
                f"shows the cosine at {self.inner_steps}."
            )
            if self.step_bytes is not None:
                counts = 1, self.inner_steps, math.ceil(self.inner_steps**0.5)
                one, whole, segment = (_bytes(count * self.step_bytes) for count in counts)
                closing.append(
                    f"Reverse mode saves at least {one} per inner step and episode: {whole} in all, {segment} and the "
                    "inner states with `checkpoint='sqrt'`."
                )
        heading = [f"Audit of `{self.module}`: every strategy took {steps}.", *self.notes]
        parts = [_wrapped(heading), _table(self._cells()), _wrapped([" ".join(closing)])]
        return "\n\n".join("\n".join(part) for part in parts if part)

    def _cells(self) -> list[tuple[str, ...]]:
        cells: list[tuple[str, ...]] = [("strategy", "works", "cosine", "ms", "because", "what to do")]
        told: dict[tuple[str, str], str] = {}
        for row in self.rows:
            cosine = "" if row.cosine is None else f"{row.cosine:.2f}"
            duration = "" if row.seconds is None else f"{1000 * row.seconds:.1f}"
            because, advice = row.because, row.advice
            if told.setdefault((because, advice), row.strategy) != row.strategy and because:
                because, advice = f"as {told[because, advice]}", ""
            cells.append((row.strategy, row.verdict, cosine, duration, because, advice))
        return cells


def audit(
    module: BilevelModule,
    batch: Any,
    strategies: Sequence[HypergradientStrategy] | None = None,
    *,
    steps: int = 2,
    seed: int = 0,
    verbose: bool = True,
    trainer: Trainer | None = None,
) -> Audit:
    """Rehearse every strategy for a tiny step; print which work on ``module``, why others do not, and what to do.

    The inner run is cut to ``steps`` steps, the batch to two episodes and random directions to two at most, so that it
    is fast whatever they are in the fit. Exact derivatives are compared with finite differences of the outer loss, for
    an operation may have a second derivative that is wrong in silence.

    Nothing in the module changes: parameters, buffers, flags, gradients, modes, random generators, the state of a
    running fit. What the losses do besides computing (a counter, a print) happens. Works before a fit and during one,
    on any device. Where a part is compiled, ``torch.compile`` starts afresh afterwards.

    Args:
        module: the problem.
        batch: what a training step gets: an :class:`Episode`, a list of them, or what ``module.episodes`` accepts.
        strategies: those to try; default: all of this package, ``ForwardGradient`` with both engines.
        steps: inner steps to rehearse. With two, what carries over from step to step takes part.
        seed: of random directions, and of dropout.
        verbose: print the table.
        trainer: lent to the module for the length of the call, where its hooks read ``self.trainer``.

    Returns:
        The rows of the table.

    Raises:
        MisconfigurationError: ``module`` is no bilevel module, or lacks a hook.
        ValueError: a bad argument, or a batch that ``module.episodes`` cannot split.

    Example:
        ``audit(module, next(iter(loader)))``

    >>> from lightning_bilevel import PZOBO, SGD, Episode, ReverseUnroll
    >>> class Scale(BilevelModule):
    ...     def __init__(self):
    ...         super().__init__(inner_steps=1, inner_start="reset")
    ...         self.theta, self.phi = (torch.nn.Parameter(torch.tensor(value)) for value in (0.0, 1.0))
    ...     def outer_parameters(self): return [self.phi]
    ...     def inner_loss(self, x): return (self.theta - self.phi * x).square() / 2
    ...     def outer_loss(self, x): return (self.theta - x).square() / 2
    ...     def configure_inner_optimizer(self): return SGD(lr=0.5)
    >>> x = torch.tensor(2.0)
    >>> report = audit(Scale(), Episode([x], x), [ReverseUnroll(), PZOBO()], verbose=False)
    >>> [(row.strategy, row.verdict) for row in report.rows]
    [('ReverseUnroll()', 'yes'), ('PZOBO()', 'yes')]
    """
    module = uncompiled(module)
    _bilevel("audit", module)
    integer("audit(steps=...)", steps)
    chosen = _checked("audit", strategies)
    with attached(module, "audit", trainer), _untouched(module):
        episodes = list(module.episodes(move_data_to_device(batch, module.functional().device)))[:EPISODES]
        if not episodes:
            raise value_error("audit(batch=...)", "at least one episode", batch)
        check_episodes(episodes, type(module).__name__)
        report = _report(Rehearsal(module, episodes, steps, seed), chosen)
    if verbose:
        print(report)
    return report


class StrategyAudit(Callback):
    """Prints the :func:`audit` of the first training batch; state, random generators and the fit are unchanged.

    The fit stops with the reason where the strategy that it runs does not work. With several processes, each
    audits a batch of its own and the first one prints.

    Args:
        strategies: those to try besides the one that runs; default: all of this package.
        steps: inner steps to rehearse.

    Attributes:
        report: the :class:`Audit`, once there is one.

    Raises:
        ValueError: a bad argument.

    Example:
        ``Trainer(callbacks=[ReverseUnroll(), StrategyAudit()])``

    >>> StrategyAudit(steps=3).steps
    3
    """

    def __init__(self, strategies: Sequence[HypergradientStrategy] | None = None, steps: int = 2) -> None:
        self.strategies = _checked("StrategyAudit", strategies)
        self.steps = integer("StrategyAudit(steps=...)", steps)
        self.report: Audit | None = None

    @of_an_instance
    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Refuse to fit what is no bilevel module; a new fit is audited anew."""
        if stage == "fit":
            _bilevel("StrategyAudit", pl_module)
            self.report = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Audit the first batch, print, and raise if the strategy of this fit does not work."""
        if self.report is not None:
            return
        running = _phases([each for each in _callbacks(trainer) if isinstance(each, HypergradientStrategy)])
        known = {_kind(strategy) for strategy in running}
        others = [strategy for strategy in self.strategies if _kind(strategy) not in known]
        with trainer.precision_plugin.train_step_context():
            report = audit(pl_module, batch, [*running, *others], steps=self.steps, verbose=False)
        mine = report.rows[: len(running)]
        broken = [row for row in mine if row.verdict in ("no", "refused")]
        names = " and ".join(f"`{row.strategy}`" for row in mine)
        self.report = replace(report, notes=(f"This fit runs {names}.", *report.notes))
        if trainer.is_global_zero:
            print(self.report)
        for row in mine:
            if row.verdict == "doubtful":
                rank_zero_warn(f"`{row.strategy}` may be wrong on `{report.module}`: {row.because}. {row.advice}")
        # One process that stopped alone would leave the others waiting for it.
        if not trainer.strategy.reduce_boolean_decision(not broken):
            raise _stopped(report, broken)


def _report(rehearsal: Rehearsal, strategies: Sequence[HypergradientStrategy]) -> Audit:
    rows = tuple(rehearsal.rows(strategies))
    vectorization, vectorizes = rehearsal.vectorization()
    notes = tuple(note for note in (rehearsal.obstacle(), rehearsal.kind(), rehearsal.unread(), vectorization) if note)
    module = rehearsal.module
    memory = rehearsal.step_bytes()
    return Audit(type(module).__name__, rows, rehearsal.steps, module.inner_steps, notes, vectorizes, memory)


def _stopped(report: Audit, broken: Sequence[AuditRow]) -> MisconfigurationError:
    if not broken:
        return MisconfigurationError("The strategy of this fit does not work on the first batch of another process.")
    working = ", ".join(row.strategy for row in report.rows if row.works) or "none"
    lines = [
        f"`{row.strategy}` does not work on `{report.module}`. This is because {row.because}. {row.advice}"
        for row in broken
    ]
    return MisconfigurationError("\n".join([*lines, f"What works here: {working}."]))


@contextmanager
def _untouched(module: BilevelModule) -> Iterator[None]:
    """Leave random generators, compiled code and what is known of the losses as they were.

    A fit looks at its losses, and warns of what it finds, with or without an audit before.
    """
    states, functional = _collect_rng_states(include_cuda=False), module.functional()
    kinds, vectorizes = (functional.findings, functional.examinations), functional.vectorizes
    known = [dict(kind) for kind in kinds]
    try:
        with RngState(functional.device).fork():
            yield
    finally:
        for kind, before in zip(kinds, known, strict=True):
            kind.clear()
            kind.update(before)
        functional.vectorizes = vectorizes
        _set_rng_states(states)
        if compiled(module):
            torch.compiler.reset()


def _bilevel(what: str, module: Any) -> None:
    if not isinstance(module, BilevelModule):
        raise missing_error(
            type(module).__name__,
            "inner and outer level",
            f"`{what}` works on a `lightning_bilevel.BilevelModule`: derive from it, or use `bilevel(module, ...)`",
        )


def _checked(owner: str, strategies: Sequence[HypergradientStrategy] | None) -> list[HypergradientStrategy]:
    """Return the strategies to try; raise unless they are strategies."""
    if strategies is None:
        return one_of_each()
    if not isinstance(strategies, Sequence) or not strategies:
        raise value_error(f"{owner}(strategies=...)", "a list such as `[ReverseUnroll(), PZOBO()]`", strategies)
    for strategy in strategies:
        if not isinstance(strategy, HypergradientStrategy):
            raise value_error(f"{owner}(strategies=...)", "a list of hypergradient strategies", strategy)
    return _phases(strategies)


def _callbacks(trainer: Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # which Lightning sets from elsewhere
    return callbacks


def _phases(strategies: Sequence[HypergradientStrategy]) -> list[HypergradientStrategy]:
    """Return the strategies with the phases of schedules in the schedules' places."""
    listed = []
    for strategy in strategies:
        if isinstance(strategy, HypergradientSchedule):
            listed += _phases([phase for phase, _ in strategy.phases])
        else:
            listed.append(strategy)
    return listed


def _kind(strategy: HypergradientStrategy) -> tuple[type, bool]:
    return type(strategy), getattr(strategy, "mode", "") == "forward"


def _bytes(count: int) -> str:
    """Return a size in a unit that suits it.

    >>> _bytes(500), _bytes(3 * 2**20)
    ('500 B', '3.0 MiB')
    """
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} B" if units[0] == "B" else f"{size:.1f} {units[0]}"


def _wrapped(sentences: Sequence[str]) -> list[str]:
    return [line for sentence in sentences for line in textwrap.wrap(sentence, WIDTH)]


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lay cells out in columns; the last two share the room that the others leave, and wrap."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    widths[0] = min(widths[0], 36)
    room = WIDTH - sum(widths[:-2]) - 2 * (len(widths) - 1)
    widths[-2] = min(widths[-2], max(room // 2, room - widths[-1]))
    widths[-1] = min(widths[-1], room - widths[-2])
    rule = tuple("-" * width for width in widths)
    lines = []
    for row in (rows[0], rule, *rows[1:]):
        cells = [textwrap.wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
        for number in range(max(map(len, cells))):
            texts = [cell[number] if number < len(cell) else "" for cell in cells]
            lines.append("  ".join(text.ljust(width) for text, width in zip(texts, widths, strict=True)).rstrip())
    return lines

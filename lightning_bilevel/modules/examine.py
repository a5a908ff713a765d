"""The first look at a module's losses: one evaluation of each, and what their graphs say before an estimate."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import function as autograd_function

from lightning_bilevel import tree
from lightning_bilevel.errors import combination_error, missing_error
from lightning_bilevel.generators import process_generators
from lightning_bilevel.host import LIBRARIES, rank_zero_warn
from lightning_bilevel.modules.functional import FunctionalModule, names_reached, usable
from lightning_bilevel.modules.levels import abbreviate
from lightning_bilevel.modules.parts import parts
from lightning_bilevel.modules.returned import scalar
from lightning_bilevel.modules.written import Written, versions_of, written_to_level
from lightning_bilevel.problem import Episode
from lightning_bilevel.stacking import copied
from lightning_bilevel.tree import Params

PACKAGE = Path(__file__).parents[1]
_LIBRARIES = {Path(torch.__file__).parent, *LIBRARIES}


@dataclass(frozen=True)
class Examination:
    """What one evaluation of both losses told.

    Attributes:
        buffers: names of the buffers, and of the parameters of neither level, that they change.
        unreached: outer parameters that neither loss, nor the start, nor any update of the inner optimizer reads.
        once_differentiable: name and line of every ``autograd.Function`` in the inner loss that is marked so.
        generators: of the process, those of NumPy and ``random``, from which the losses draw.
        direct: outer parameters that the outer loss reads itself.
        acting: those that the inner problem depends on: its loss, its start or its updates; ``None`` where that is not
            known, as of a user's solver.
    """

    buffers: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()
    once_differentiable: tuple[tuple[str, str], ...] = ()
    generators: tuple[Any, ...] = ()
    direct: frozenset[str] = field(default=frozenset(), compare=False)
    acting: frozenset[str] | None = field(default=None, compare=False)

    @property
    def one_level(self) -> bool:
        """Whether the inner problem is known not to depend on any outer parameter."""
        return self.acting is not None and not self.acting and bool(self.direct)

    def kind(self) -> str:
        """Return a sentence on how the outer parameters act; empty where that is not known.

        >>> Examination(direct=frozenset({"decoder", "decay"}), acting=frozenset({"decay", "lr"})).kind()
        'The outer parameters lr act through the inner problem only; decay act through the inner problem, and the
        outer loss reads them, too: of a penalty or a weight in it they make as little as they can; decoder act in the
        outer loss only, and the inner problem does not depend on them.'
        """
        if self.acting is None:
            return ""
        groups = {
            "act through the inner problem only": self.acting - self.direct,
            "act through the inner problem, and the outer loss reads them, too: of a penalty or a weight in it they "
            "make as little as they can": self.acting & self.direct,
            "act in the outer loss only, and the inner problem does not depend on them": self.direct - self.acting,
        }
        said = [f"{abbreviate(sorted(names))} {how}" for how, names in groups.items() if names]
        return f"The outer parameters {'; '.join(said)}." if said else ""


def examine(functional: FunctionalModule, carried: Params, episode: Episode) -> Examination:
    """Evaluate both losses once, in the module's present mode, and leave no trace.

    Args:
        functional: the module.
        carried: the inner parameters that are not shared.
        episode: its first inner batch and its outer batch; without an outer batch only the buffers are looked at.

    Raises:
        MisconfigurationError: the inner loss does not depend on the inner parameters, or a loss writes to parameters
            of a level.
    """
    levels = functional.levels
    rng = functional.snapshot()
    with rng.fork():
        for argument in functional.negative():
            rank_zero_warn(f"`{argument}` is negative as a tensor. Is an `.exp()` missing where it is learned?")
        mixes = functional.mixes_entries()
    if mixes:
        raise combination_error(
            f"an inner optimizer of `{type(functional.module).__name__}` that says it is `elementwise`",
            "two copies of the inner parameters, stacked, are updated otherwise than one by one",
            "Leave `elementwise` at `False`",
        )
    phi = tree.leaves(functional.phi())
    of_process = process_generators()
    with torch.enable_grad(), rng.fork():
        start = functional.problem.on(episode).initial(carried, phi)
        theta = tree.leaves(start)
        try:
            losses, buffers = evaluate(functional, theta, phi, episode)
        except RuntimeError as error:
            if "new Tensor subclass" not in str(error):  # some cannot be made while writes are seen
                raise
            rng.restore()
            losses, buffers = evaluate(functional, theta, phi, episode, see_writes=False)
        functional.try_update(theta, phi)
        drawn = tuple(rng.drawn(of_process))
        if episode.outer is None:
            return Examination(tuple(buffers), generators=drawn)
        inner = losses.get("inner_loss")
        if inner is not None and not names_reached([inner], theta):
            raise missing_error(
                type(functional.module).__name__,
                "inner loss that depends on the inner parameters",
                f"Use {', '.join(levels.inner[:3])} in `inner_loss(batch)`, not detached",
            )
        direct, unreached = names_reached([losses["outer_loss"]], phi), list[str]()
        acting: set[str] | None = None
        if inner is not None:  # what a user's solver reads, no graph tells
            own = {name: value for name, value in phi.items() if name not in levels.shared}
            acting = {*levels.shared, *names_reached(list(start.values()), own), *names_reached([inner], phi)}
            reached = (acting - levels.shared) | direct
            if functional.problem.outer_loss_weights is not None:
                reached |= names_reached([functional.problem.outer_loss_weights(phi)], phi)
            for loss in losses.values():
                reached |= names_reached([loss], theta)
            unreached = [name for name in levels.outer if name not in reached]
            if unreached or not acting:
                learned = functional.learned()
                acting |= learned
                unreached = [name for name in unreached if name not in learned]
        once = once_differentiable(inner) if inner is not None else []
        how = frozenset(direct), None if acting is None else frozenset(acting)
        return Examination(tuple(buffers), tuple(unreached), tuple(once), drawn, *how)


def evaluate(
    functional: FunctionalModule, theta: Params, phi: Params, episode: Episode, see_writes: bool = True
) -> tuple[dict[str, Tensor], list[str]]:
    """Evaluate both losses once, and put back what they write.

    Args:
        functional: the module.
        theta: inner parameters.
        phi: outer parameters.
        episode: its first inner batch and its outer batch; there is none where a module is only adapted.
        see_writes: whether to look for parameters that are written to in place.

    Returns:
        The losses by hook, and the names of the buffers, and of the parameters of neither level, that they changed.

    Raises:
        MisconfigurationError: a loss writes to parameters of a level.
    """
    module, current, losses = functional.module, functional.swapper.current, dict[str, Tensor]()
    present = {name: usable(buffer) for name, buffer in module.named_buffers()}
    clones = tree.map(torch.clone, present)
    others = {name: usable(p).data.requires_grad_(p.requires_grad) for name, p in functional.of_neither_level().items()}
    inner, outer = copied(episode.inner[0], tensors=True), copied(episode.outer, tensors=True)
    versions, known, functional.writes_to_batches = versions_of([inner, outer]), functional.writes_to_batches, False
    levels = {**phi, **theta}
    parameters = {**others, **levels}
    written = Written(parameters)
    try:
        with (
            torch.enable_grad(),
            functional.in_place({**parameters, **clones}),
            _eagerly(),
            written if see_writes else nullcontext(),
        ):
            if not module.has_solver:
                with functional.recorder.evaluation():
                    losses["inner_loss"] = scalar(module, "inner_loss", functional.called("inner", inner))
            if episode.outer is not None:
                with functional.recorder.evaluation():
                    losses["outer_loss"] = scalar(module, "outer_loss", functional.called("outer", outer))
            # BatchNorm's kernels write without counting a version, so values are compared too.
            changed = [
                name
                for name, clone in clones.items()
                if current(name) is not clone or clone._version or not torch.equal(clone, present[name])
            ]
            written_batches = versions_of([inner, outer]) != versions
            replaced = [name for name, tensor in parameters.items() if current(name) is not tensor]
    finally:
        written.undo()
        functional.writes_to_batches = known
    functional.writes_to_batches = bool(known) or written_batches
    names = list(dict.fromkeys([*written.names(), *replaced]))
    if moved := [name for name in names if name in levels]:
        raise written_to_level(type(module).__name__, abbreviate(moved))
    return losses, [*changed, *names]


def _eagerly() -> AbstractContextManager[Any]:
    """Let compiled parts run as they are written: compiled under a dispatch mode, they would stay eager for good."""
    stance = getattr(torch.compiler, "set_stance", None)
    return nullcontext() if stance is None else stance("force_eager")


def examination_of(functional: FunctionalModule, carried: Params, episode: Episode) -> Examination:
    """Return the examination of a module in its present mode, made at the first call and kept with ``functional``."""
    if episode.outer is None and not [*functional.module.buffers(), *functional.of_neither_level()]:
        return Examination()
    mode = (episode.outer is not None, *(part.training for part in parts(functional.module)))
    if mode not in functional.examinations:
        functional.examinations[mode] = examine(functional, carried, episode)
    found: Examination = functional.examinations[mode]
    return found


def once_differentiable(loss: Tensor) -> list[tuple[str, str]]:
    """Return name and line of every ``autograd.Function`` in a graph that is marked ``once_differentiable``.

    Their second derivative is an error in PyTorch only where *all* leaves are asked for: ``torch.autograd.grad`` with
    ``inputs`` never reaches the node that would raise, and leaves their part out without a word.

    Args:
        loss: the end of a graph; recorded under anomaly mode, else the lines are empty.
    """
    found: dict[type, tuple[str, str]] = {}
    for node in _nodes(loss):
        kind: Any = getattr(node, "_forward_cls", None)
        code = getattr(getattr(kind, "backward", None), "__code__", None)
        if code is not None and code.co_filename == autograd_function.__file__ and code.co_name == "wrapper":
            found[kind] = kind.__name__, user_line(frames_in("".join(node.metadata.get("traceback_", []))))
    return list(found.values())


def frames_in(text: str) -> list[tuple[str, int | None]]:
    """Return file and line of every frame in the text of a traceback."""
    return [(name, int(line)) for name, line in re.findall(r'File "([^"]+)", line (\d+)', text)]


def user_line(frames: list[tuple[str, int | None]]) -> str:
    """Return the user's line: the deepest one below this package's frames that is not PyTorch's or Lightning's."""
    inside = [number for number, (name, _) in enumerate(frames) if PACKAGE in Path(name).parents]
    if not inside:
        return ""
    for name, line in reversed(frames[inside[-1] + 1 :]):
        path = Path(name)
        if _LIBRARIES.isdisjoint(path.parents) and not name.startswith("<") and "torchinductor" not in name:
            return f"{path.name}:{line}"
    return ""


def _nodes(loss: Tensor) -> Iterator[Any]:
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack += [following for following, _ in node.next_functions]

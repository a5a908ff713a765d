"""From a module's hooks to pure functions: builds the :class:`BilevelProblem` of a bilevel module."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_bilevel import tree
from lightning_bilevel.errors import missing_error, value_error
from lightning_bilevel.generators import generators_of, process_generators
from lightning_bilevel.host import rank_zero_warn
from lightning_bilevel.inner_optimizers import InnerOptimizer, from_torch
from lightning_bilevel.inner_optimizers.base import OptState, is_elementwise, is_ours
from lightning_bilevel.inner_optimizers.elementwise import ElementwiseOptimizer
from lightning_bilevel.kernels.data import data_in_transforms
from lightning_bilevel.kernels.safe import differentiable_kernels, recomputing_within
from lightning_bilevel.modules.hooks import BilevelHooks
from lightning_bilevel.modules.levels import Levels, abbreviate
from lightning_bilevel.modules.parts import parts
from lightning_bilevel.modules.recorder import LogRecorder
from lightning_bilevel.modules.reset import check_all_drawn
from lightning_bilevel.modules.returned import named, refuse_learned, refuse_scheduled, scalar, step_weights
from lightning_bilevel.modules.swap import Swapper
from lightning_bilevel.modules.whereabouts import Whereabouts
from lightning_bilevel.modules.written import Standing, written_unseen
from lightning_bilevel.problem import Batch, BilevelProblem, Compiler, InnerState, Traits, with_proximal
from lightning_bilevel.randomness import RngState
from lightning_bilevel.stacking import copied
from lightning_bilevel.tree import Params

STACKED_ENTRIES = 2**21
"""Inner parameters that one vectorized call may hold on a CPU; with more, page faults take the time that is gained."""

FEWEST_COPIES = 8
"""Copies of θ below which a CPU is faster in a loop; both are measured in ``benchmarks/cost/chunk_choice.py``."""

_ONE_AT_A_TIME = threading.RLock()
"""Kernel patches and RNG state are process-global, so estimates of several threads run one at a time."""


_TURNS = count()
"""Values of :attr:`FunctionalModule.turns`."""

_HOOKED = "there were backward hooks"
"""Key of :attr:`BilevelProblem.findings`."""


class FunctionalModule:
    """The pure functions of one bilevel module, valid as long as its parameters stay the same objects.

    The user's methods are called on the module itself, with tensors swapped in place of parameters and
    buffers, so that they read as if no bilevel problem were there.

    Args:
        module: the module; its levels and whether it has a solver are looked up once.
        findings: see :attr:`BilevelProblem.findings`.

    Attributes:
        levels: which parameter names are inner and outer.
        swapper: puts tensors in place.
        recorder: what the losses logged.
        examinations: what a first look at the losses told, by the module's mode.
        drawn: generators of the process, those of NumPy and ``random``, that an estimate drew from unseen before.
        writes_to_batches: whether a loss writes to a tensor of its batch; unless it is known that none does, each
            evaluation gets copies.
        vectorizes: whether the losses run under ``vmap`` over episodes; ``None`` until that was tried.
        compiler: makes compiled steps of the problem's, see :attr:`BilevelProblem.compiler`.
        turns: a number that is another one, in all of the process, since code of the user's has run, or may have: what
            it reads stays the same in between.
    """

    def __init__(self, module: BilevelHooks, findings: dict[Any, Any] | None = None) -> None:
        self.module = module
        self.levels = Levels.of(module, module.inner_parameters(), module.outer_parameters())
        self.swapper = Swapper(module)
        self.recorder = LogRecorder()
        self.findings: dict[Any, Any] = {} if findings is None else findings
        self.examinations: dict[Any, Any] = {}
        self.vectorizes: bool | None = None
        self.drawn: list[Any] = []
        self.compiler: Compiler | None = None
        self.turns = next(_TURNS)
        self.writes_to_batches: bool | None = None
        self._whereabouts = Whereabouts(type(module).__name__)
        self._autocast_dtype: torch.dtype | None = None
        self._placed: Params = {}
        self._solves = module.has_solver
        self._converted: InnerOptimizer | None = None
        self._learned: dict[tuple[int, bool, bool], frozenset[str]] = {}
        self._hooked = _has_backward_hooks(module)
        self._said_of_hooks = False
        self._max_copies = _max_copies(module, self.theta())
        self._maximize = False
        with self.snapshot().fork():
            self._elementwise = self._look_at_optimizer()

    @property
    def problem(self) -> BilevelProblem:
        """The pure functions, with the options that the module has now."""
        module = self.module
        traits = Traits(
            warm=module.inner_start == "warm",
            learned=lambda: self.learned(decay=False),
            rates=self.rates,
            unstationary=self._unstationary,
            stateful=self._stateful,
            differentiable_solve=module.differentiable_solve,
        )
        problem = BilevelProblem(
            inner_loss=self._inner_loss,
            outer_loss=self._outer_loss,
            update=self._update,
            inner_steps=module.inner_steps,
            initial=self._initial,
            initial_from=self._initial if module.starts_from_data else None,
            init_opt_state=self._init_opt_state,
            shared=self.levels.shared,
            solver=self._solve if self._solves else None,
            outer_loss_weights=None if module.outer_loss_weights() is None else self._outer_loss_weights,
            penalty=None if self._solves else self._penalty,
            maximize=self._maximize,
            elementwise=self._elementwise,
            max_copies=1 if self._hooked else self._max_copies,
            traits=traits,
            observer=self.recorder,
            findings=self.findings,
            compiler=self.compiler,
        )
        return with_proximal(problem, module.proximal) if module.proximal else problem

    def turn(self) -> None:
        """Note that code of the user's runs, and may change what it reads."""
        self.turns = next(_TURNS)

    def _look_at_optimizer(self) -> bool:
        """Return whether the inner optimizer is elementwise; a ``torch.optim`` instance is taken anew."""
        if self._solves:
            return True
        self._converted = None
        configured = self.inner_optimizer()
        self._maximize = configured.maximize
        return is_elementwise(configured)

    def _look_at_hooks(self) -> None:
        """Find out anew what vectorizes if there are backward hooks since; warn of those that nothing calls."""
        hooked = _has_backward_hooks(self.module)
        if hooked and not self.findings.get(_HOOKED):
            self.vectorizes = None
            self.findings.clear()
        self._hooked = self.findings[_HOOKED] = hooked
        if self._said_of_hooks:
            return
        names = [name for name in self.levels.inner_only if _has_hooks(self.swapper.current(name))]
        if names:
            self._said_of_hooks = True
            rank_zero_warn(
                f"The hooks of the inner parameters {abbreviate(names)} are not called in the inner loop, which "
                "computes with other tensors in their places. What they do to a gradient belongs in an "
                "`InnerOptimizer`, or in a hook on what the loss computes."
            )

    def snapshot(self) -> RngState:
        """Return where all generators stand, the user's and those of the process."""
        sources = {id(each): each for each in (*self.generators, *process_generators())}
        return RngState(self.device, sources.values())

    @property
    def device(self) -> torch.device:
        """Where the parameters are now."""
        return self.swapper.current(self.levels.inner[0]).device

    def phi(self) -> Params:
        """Return the outer parameters, detached; storage is the module's own."""
        return {name: usable(self.swapper.current(name)) for name in self.levels.outer}

    def theta(self) -> Params:
        """Return the inner parameters as they stand in the module, detached."""
        return {name: usable(self.swapper.current(name)) for name in self.levels.inner}

    def buffers(self, names: Iterable[str]) -> Params:
        """Return clones of buffers, and of what goes along like them, as they stand in the module."""
        return {name: usable(self.swapper.current(name)).clone() for name in names}

    def of_neither_level(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are neither inner nor outer, as they stand in the module."""
        known = {*self.levels.inner, *self.levels.outer}
        return {name: p for name, p in self.module.named_parameters() if name not in known}

    def learned(self, decay: bool = True) -> frozenset[str]:
        """Return the outer parameters that the inner optimizer's updates read, by all T of them on equal gradients.

        A rate may be learned for one step only, or enter late; where the inner level goes on from step to step, an
        update after these is not looked at.

        Args:
            decay: whether a weight decay counts, too, that implicit differentiation sees.
        """
        if self._solves:
            return frozenset()
        steps, warm = self.module.inner_steps, self.module.goes_on
        if (steps, warm, decay) not in self._learned:
            found: set[str] = set()
            with torch.enable_grad():
                phi, theta = tree.leaves(self.phi()), tree.map(torch.clone, self.theta())
                opt_state = self._init_opt_state(theta, phi)
                grads = tree.map(torch.ones_like, theta)
                for step in range(1, max(steps, 2 if warm else 1) + 1):
                    with self.swapper.swapped(phi):
                        optimizer = self.inner_optimizer()
                        if not decay and isinstance(optimizer, ElementwiseOptimizer):
                            optimizer = optimizer.with_constant_decay()
                        theta, opt_state = optimizer.update(theta, grads, opt_state, step)
                    state = InnerState(theta, opt_state=opt_state)
                    found |= names_reached(list(state.flat().values()), phi)
                    state = state.detach()
                    theta, opt_state = state.params, state.opt_state
            self._learned[steps, warm, decay] = frozenset(found)
        return self._learned[steps, warm, decay]

    def rates(self) -> frozenset[str]:
        """Return the outer parameters that hyperparameters depend on which do not move a fixed point of the updates."""
        phi = tree.leaves(self.phi())
        with torch.enable_grad(), self.swapper.swapped(phi):
            optimizer = None if self._solves else self.inner_optimizer()
            tensors = optimizer.rates() if isinstance(optimizer, ElementwiseOptimizer) else []
            return frozenset(names_reached(tensors, phi))

    def _unstationary(self) -> str:
        optimizer = None if self._solves else self.inner_optimizer()
        if optimizer is None:
            return ""
        moved = isinstance(optimizer, ElementwiseOptimizer) and optimizer.moves_fixed_points
        return type(optimizer).__name__ if moved or optimizer.stationary is False else ""

    def mixes_entries(self) -> bool:
        """Return whether an optimizer that says it is elementwise treats two copies of θ otherwise than one by one."""
        if self._solves or not self._elementwise or is_ours(self.inner_optimizer()):
            return False
        phi, theta = self.phi(), self.theta()
        copies = [theta, tree.map(lambda value: value.flip(0) if value.ndim else value + 1, theta)]
        grads = [tree.map(lambda value, size=size: size * torch.ones_like(value) + value, theta) for size in (1.0, 7.0)]
        with torch.no_grad(), RngState(self.device).fork():
            alone = [
                self._update(p, g, self._init_opt_state(p, phi), phi, 1)[0] for p, g in zip(copies, grads, strict=True)
            ]
            params = tree.stack(copies)
            together, _ = self._update(params, tree.stack(grads), self._init_opt_state(params, phi), phi, 1)
        expected = tree.stack(alone)
        difference, moved = tree.norm(tree.sub(together, expected)), tree.norm(tree.sub(expected, params))
        return bool(difference > 1e-3 * moved)

    def try_update(self, theta: Params, phi: Params) -> None:
        """Take one update on equal gradients, for what it draws."""
        if not self._solves:
            with torch.no_grad():
                opt_state = self._init_opt_state(theta, phi)
                self._update(theta, tree.map(torch.ones_like, theta), opt_state, phi, 1)

    def _stateful(self) -> bool:
        return bool(self._init_opt_state(self.theta(), self.phi()))

    @contextmanager
    def knowing_levels(self) -> Iterator[None]:
        """Let the module's default ``inner_parameters`` or ``outer_parameters`` answer by name.

        What stands in the parameters' places while losses are evaluated has no flags to go by.
        """
        before, self.module._levels = self.module._levels, self.levels
        try:
            yield
        finally:
            self.module._levels = before

    @contextmanager
    def session(self, twice: bool = True, check: Callable[[], None] = lambda: None) -> Iterator[RngState]:
        """Enter the surroundings of one estimate: safe kernels, no autocast but in the losses, logs recorded.

        Other threads wait for it to end.

        Args:
            twice: whether losses are differentiated twice.
            check: called once all is in place; what it draws is put back, but for generators of the process.

        Yields:
            Where all generators stood at the beginning, and stand now.
        """
        kind = self.device.type
        self.turn()
        with _ONE_AT_A_TIME, self.knowing_levels(), ExitStack() as stack:
            stack.enter_context(differentiable_kernels(self.module, twice))
            stack.enter_context(recomputing_within(self._as_placed))
            stack.enter_context(data_in_transforms())
            stack.enter_context(self.recorder.recording(self.module))
            if torch.is_autocast_enabled(kind):
                self._autocast_dtype = torch.get_autocast_dtype(kind)
                stack.enter_context(torch.autocast(kind, enabled=False))
            before = self.snapshot()
            with RngState(self.device, self.generators).fork():
                self._elementwise = self._look_at_optimizer()  # since the last estimate it may be another
                check()
            self._look_at_hooks()
            standing = Standing(self.swapper)
            try:
                yield before
            finally:
                self._autocast_dtype = None
            if not self._solves and (names := standing.changed()):
                raise written_unseen(type(self.module).__name__, abbreviate(names))

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """What the losses are cast to in the session that is entered; ``None`` where they are not."""
        return self._autocast_dtype

    def inner_optimizer(self) -> InnerOptimizer:
        """Call the user's hook; a ``torch.optim`` instance is built once, with the real parameters."""
        if self._converted is not None:
            return self._converted
        optimizer = self.module.configure_inner_optimizer()
        if isinstance(optimizer, torch.optim.Optimizer):
            refuse_learned(optimizer)
            refuse_scheduled(optimizer)
            self._converted = from_torch(optimizer, {name: self.swapper.current(name) for name in self.levels.inner})
            return self._converted
        if not isinstance(optimizer, InnerOptimizer):
            raise value_error(
                f"{type(self.module).__name__}.configure_inner_optimizer()",
                "an `InnerOptimizer` or a `torch.optim` instance",
                optimizer,
            )
        return optimizer

    def converted(self) -> InnerOptimizer | None:
        """Return what was made of a ``torch.optim`` instance; ``None`` where the hook returns one of ours."""
        self.inner_optimizer()
        return self._converted

    @cached_property
    def generators(self) -> list[Any]:
        """The user's own random generators, as far as the module leads to them; of a black box the process's."""
        return [*generators_of(self.module), *(process_generators() if self._solves else ())]

    def negative(self) -> list[str]:
        """Return the hyperparameters of the inner optimizer that are tensors of negative numbers only."""
        optimizer = None if self._solves else self.inner_optimizer()
        found = optimizer.hyperparameters if isinstance(optimizer, ElementwiseOptimizer) else {}
        return [
            f"{type(optimizer).__name__}({argument}=...)"
            for argument, value in found.items()
            if isinstance(value, Tensor) and bool((value < 0).all())
        ]

    @contextmanager
    def in_place(self, tensors: Params) -> Iterator[None]:
        """Swap tensors in and run under the user's autocast.

        The cast cache is off: it would keep one cast copy of θ per inner step.
        """
        dtype = self._autocast_dtype
        cast: Any = nullcontext() if dtype is None else torch.autocast(self.device.type, dtype, cache_enabled=False)
        before, self._placed = self._placed, tensors
        try:
            with self.swapper.swapped(tensors), cast:
                yield
        finally:
            self._placed = before

    def _as_placed(self) -> Callable[[], AbstractContextManager[None]]:
        """Return what puts the present tensors in place again, with copies of the buffers, which may be written to."""
        placed = self._placed

        @contextmanager
        def again() -> Iterator[None]:
            parameters = {*self.levels.inner, *self.levels.outer}
            again = {name: t if name in parameters else t.clone() for name, t in placed.items()}
            with self.recorder.evaluation(counts=False), self.in_place(again):
                yield

        return again

    def called(self, level: Literal["inner", "outer"], batch: Batch) -> Any:
        """Return what a loss returns on containers of its own, which it may write to; a note is on what it raises."""
        loss = self.module.inner_loss if level == "inner" else self.module.outer_loss
        self.turn()
        try:
            return loss(copied(batch, tensors=self.writes_to_batches is not False))
        except Exception as error:
            dtype = self.swapper.current(self.levels.inner[0]).dtype
            self._whereabouts.note(error, level, batch, dtype)
            raise

    def _inner_loss(self, theta: Params, phi: Params, batch: Batch, buffers: Params) -> tuple[Tensor, Params]:
        own = tree.map(torch.clone, buffers) if buffers else {}
        with self.recorder.evaluation(), self.in_place({**phi, **theta, **own}):
            loss = scalar(self.module, "inner_loss", self.called("inner", batch))
            after = {name: self.swapper.current(name).detach() for name in own}
        return loss, after

    def _outer_loss(self, theta: Params, phi: Params, batch: Batch, buffers: Params) -> Tensor:
        own = tree.map(torch.clone, buffers) if buffers else {}
        with self.recorder.evaluation(), self.in_place({**phi, **theta, **own}):
            self.recorder.before_outer_loss()
            result = self.called("outer", batch)
            loss = scalar(self.module, "outer_loss", result)
            self.recorder.after_outer_loss({name: self.swapper.current(name) for name in own}, result)
        return loss

    def _outer_loss_weights(self, phi: Params) -> Tensor:
        self.turn()
        with self.swapper.swapped(phi):
            return step_weights(self.module, self.module.outer_loss_weights(), next(iter(phi.values())))

    def _initial(self, carried: Params, phi: Params, batches: Sequence[Batch] | None = None) -> Params:
        self._whereabouts.begin()
        self.turn()
        arguments = (batches,) if self.module.starts_from_data else ()
        own = {name: value for name, value in carried.items() if name not in self.levels.shared}
        with self.in_place({**phi, **own}):
            default = {name: self.swapper.current(name) for name in self.levels.inner}
            chosen = self.module.initial_inner_parameters(*arguments)
        if arguments and self.module.inner_start == "reinit":
            check_all_drawn(self.module, set(self.levels.inner_only), set(chosen))
        return named(self.module, "initial_inner_parameters()", default, {**default, **dict(chosen)})

    def _init_opt_state(self, params: Params, phi: Params) -> OptState:
        if self._solves:
            return {}
        self.turn()
        with self.swapper.swapped(phi):
            return self.inner_optimizer().init(params)

    def _update(
        self, params: Params, grads: Params, opt_state: OptState, phi: Params, step: int
    ) -> tuple[Params, OptState]:
        self._whereabouts.took(step)
        self.turn()
        with self.swapper.swapped(phi):
            return self.inner_optimizer().update(params, grads, opt_state, step)

    def _penalty(self, theta: Params, phi: Params) -> Tensor:
        self.turn()
        with self.swapper.swapped(phi):
            value = self.inner_optimizer().penalty(theta)
        if isinstance(value, Tensor):
            return value
        like = next(iter(theta.values())).real  # `new_tensor` fails under vmap in torch 2.4
        return torch.tensor(value, dtype=like.dtype, device=like.device)

    def _solve(self, params: Params, phi: Params, batches: Sequence[Batch], buffers: Params) -> Params:
        self.turn()
        with self.in_place({**phi, **params}):
            solution = self.module.solve_inner(copied(list(batches), tensors=self.writes_to_batches is not False))
        solved = named(self.module, "solve_inner(batches)", params, solution)
        wanted = self.module.differentiable_solve and torch.is_grad_enabled()
        if wanted and _require_grad(phi) and not _require_grad(solved):
            raise missing_error(
                f"{type(self.module).__name__}.solve_inner(batches)",
                "derivative: what it returns is detached from the outer parameters",
                "Compute it from them in torch, or set `differentiable_solve = False` on the class and use "
                "`ImplicitGradient`, `PZOBO` or `ZerothOrder`",
            )
        return solved


def _has_backward_hooks(module: nn.Module) -> bool:
    """Return whether backward hooks are registered, which PyTorch calls in plain passes only, not under ``vmap``."""
    shared = nn.modules.module
    if shared._global_backward_hooks or shared._global_backward_pre_hooks:
        return True
    return any(child._backward_hooks or child._backward_pre_hooks for child in parts(module))


def _has_hooks(parameter: Tensor) -> bool:
    """Return whether anything is called with the gradient of a parameter."""
    return bool(parameter._backward_hooks) or bool(getattr(parameter, "_post_accumulate_grad_hooks", None))


def _max_copies(module: nn.Module, theta: Params) -> int:
    """Return how many copies of θ to vectorize: a fixed rule, so that a run and its repetition agree bit for bit.

    Small nets gain several times from one vectorized call. Large ones and convolutions lose on a CPU, where
    their vectorized form is slower than the loop.
    """
    if next(iter(theta.values())).device.type != "cpu":
        return 2**30
    if any(isinstance(child, nn.modules.conv._ConvNd) for child in module.modules()):
        return 1
    copies = STACKED_ENTRIES // tree.numel(theta)
    return copies if copies >= FEWEST_COPIES else 1


def names_reached(outputs: Sequence[Tensor], inputs: Params) -> set[str]:
    """Return the names of the inputs that any output depends on."""
    outputs = [output.sum() for output in outputs if output.requires_grad]
    if not outputs or not inputs:
        return set()
    grads = torch.autograd.grad(outputs, list(inputs.values()), allow_unused=True, retain_graph=True)
    return {name for name, grad in zip(inputs, grads, strict=True) if grad is not None}


def _require_grad(params: Params) -> bool:
    return any(value.requires_grad for value in params.values())


def usable(tensor: Tensor) -> Tensor:
    """Detach; tensors made under inference mode are cloned, for autograd refuses them."""
    return tensor.detach().clone() if tensor.is_inference() else tensor.detach()

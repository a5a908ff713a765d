"""FSLA against Algorithm 1 written by hand, on the synthetic quadratic of the paper's section 6.1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from torch import Tensor, nn

from lightning_bilevel import (
    FSLA,
    SGD,
    Adam,
    Episode,
    ForwardGradient,
    HypergradientSchedule,
    TruncatedReverse,
    hypergradient,
)
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.problem import Carry, Hypergradient, InnerState
from lightning_bilevel.tree import Params
from tests.support.fits import Before, fit
from tests.support.modules import Calls, differing, identical, listed, parameters, trainer
from tests.support.problems import Problem, RidgeSolver, assert_close, draw
from tests.support.seeds import call_of

SIZE = 5
Sample = tuple[Tensor, Tensor, Tensor]


def sample(rows: int, seed: int) -> Sample:
    """Return matrices of the uniform law, of λ and of ω, and targets with noise of variance 0.1, as in the paper."""
    generator = torch.Generator().manual_seed(seed)
    by_outer, by_inner = torch.rand(2, rows, SIZE, generator=generator, dtype=torch.float64)
    truth = torch.rand(2, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = 0.1**0.5 * torch.randn(rows, generator=generator, dtype=torch.float64)
    return by_outer, by_inner, by_outer @ truth[0] + by_inner @ truth[1] + noise


class Synthetic(Problem):
    """G = mean (A_λ λ + A_ω ω − b)², F = mean (A_o ω − b_o)² + ρ λ·(½λ + ω); the paper has ρ = 0.

    Args:
        optimizer: the inner one.
        rho: ρ.
        lr: of the outer optimizer, plain descent.
        options: of ``BilevelModule``.
    """

    def __init__(self, optimizer: Any = None, rho: float = 0.0, lr: float = 0.3, **options: Any) -> None:
        super().__init__(**options)
        self.optimizer, self.rho, self.lr = optimizer or SGD(lr=0.3), rho, lr
        self.omega, self.lam = nn.Parameter(draw(SIZE, seed=1)), nn.Parameter(draw(SIZE, seed=2))

    def inner_parameters(self):
        return [self.omega]

    def inner_loss(self, batch):
        by_outer, by_inner, target = batch
        return (by_outer @ self.lam + by_inner @ self.omega - target).square().mean()

    def outer_loss(self, batch):
        _, by_inner, target = batch
        return (by_inner @ self.omega - target).square().mean() + self.rho * self.lam @ (0.5 * self.lam + self.omega)

    def configure_inner_optimizer(self):
        return self.optimizer

    def configure_optimizers(self):
        return torch.optim.SGD([self.lam], lr=self.lr)


def episode(seed: int, batches: int = 3, rows: int = 4) -> Episode:
    return Episode([sample(rows, 10 * seed + i) for i in range(batches)], sample(rows, 10 * seed + 9))


class ByHand:
    """Algorithm 1 with every derivative written out; ξ₁, ξ₃, ξ₅ are inner samples, ξ₂ and ξ₄ the outer one."""

    def __init__(self, tau: float, beta: float, eta: float, rho: float, inverse_sqrt: bool = False) -> None:
        self.tau, self.beta, self.eta, self.rho, self.inverse_sqrt = tau, beta, eta, rho, inverse_sqrt
        self.k, self.v = 0, torch.zeros(SIZE, dtype=torch.float64)
        self.d, self.old = self.v, (self.v, self.v, self.v)

    def step(self, omega: Tensor, lam: Tensor, batches: Sequence[Sample], outer: Sample) -> tuple[Tensor, Tensor]:
        """Return ω and d after outer step k + 1."""
        self.k += 1
        rate = 1 / math.sqrt(self.k) if self.inverse_sqrt else 1.0
        first, third, fifth = batches
        by_outer, by_inner, target = first
        gradient = 2 / len(target) * by_inner.T @ (by_outer @ lam + by_inner @ omega - target)
        new = omega - rate * self.tau * gradient
        slope = 2 / len(outer[2]) * outer[1].T @ (outer[1] @ omega - outer[2]) + self.rho * lam
        hessian = 2 / len(third[2]) * third[1].T @ third[1]
        self.v = rate * self.beta * slope + self.v - rate * self.beta * hessian @ self.v

        def estimate(lam: Tensor, omega: Tensor, v: Tensor) -> Tensor:
            return self.rho * (lam + omega) - 2 / len(fifth[2]) * fifth[0].T @ fifth[1] @ v

        triple = lam, new, self.v
        if self.k == 1:
            self.d = estimate(*triple)
        else:
            self.d = estimate(*triple) + (1 - rate * self.eta) * (self.d - estimate(*self.old))
        self.old = triple
        return new, self.d


Kept = dict[str, Params]


def advance(
    strategy: FSLA, module: Synthetic, omega: Tensor, lam: Tensor, data: Episode, kept: Kept | None = None
) -> Hypergradient:
    """Take one step of the strategy at (ω, λ), from what the last one kept."""
    with torch.no_grad():
        module.lam.copy_(lam)
    functional, carry = module.functional(), Carry(InnerState({"omega": omega}), kept or {})
    with functional.session():
        return strategy.estimate(functional.problem, carry, functional.phi(), data, call_of())


def path(k: int) -> Tensor:
    """Return λ of outer step k: any sequence."""
    return draw(SIZE, seed=50 + k)


# --- Algorithm 1 ---

OPTIONS = {
    "inner optimizer": {},
    "tau": {"tau": 0.15},
    "no momentum": {"eta": 1.0},
    "small eta": {"eta": 0.1},
    "inverse sqrt": {"schedule": "inverse_sqrt"},
    "inverse sqrt with tau": {"schedule": "inverse_sqrt", "tau": 0.15, "eta": 1.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_steps_are_those_of_the_algorithm(options: dict[str, Any]) -> None:
    module, strategy = Synthetic(rho=0.2), FSLA(beta=0.2, **options)
    tau, eta = options.get("tau", 0.3), options.get("eta", 0.9)
    by_hand = ByHand(tau, 0.2, eta, 0.2, inverse_sqrt="schedule" in options)
    omega, kept = module.omega.detach(), {}
    for k in range(4):
        data = episode(k)
        result = advance(strategy, module, omega, path(k), data, kept)
        kept = result.kept
        value = Synthetic.outer_loss(module_at(module, result), data.outer)
        omega, d = by_hand.step(omega, path(k), data.inner, data.outer)
        assert_close(result.state.params, {"omega": omega}, 1e-12)
        assert_close(result.grads, {"lam": d}, 1e-11)
        torch.testing.assert_close(result.value, value.detach())


def module_at(module: Synthetic, result: Hypergradient) -> Synthetic:
    moved = deepcopy(module)
    with torch.no_grad():
        moved.omega.copy_(result.state.params["omega"])
    return moved


def test_the_comparison_sees_which_sample_goes_where() -> None:
    module, data = Synthetic(), episode(0)
    omega = module.omega.detach()
    for order in ([1, 0, 2], [0, 2, 1], [2, 1, 0]):
        strategy, by_hand = FSLA(beta=0.2), ByHand(0.3, 0.2, 0.9, 0.0)
        result = None
        for k in range(2):
            result = advance(strategy, module, omega, path(k), data, result and result.kept)
            _, d = by_hand.step(omega, path(k), [data.inner[i] for i in order], data.outer)
            after = by_hand.old[1]
        with pytest.raises(AssertionError, match=r"^(omega|lam): "):
            assert_close({**result.state.params, **result.grads}, {"omega": after, "lam": d}, 1e-6)


@pytest.mark.parametrize("batches", [1, 2])
def test_fewer_inner_batches_are_cycled(batches: int) -> None:
    module, strategy, by_hand = Synthetic(), FSLA(beta=0.2), ByHand(0.3, 0.2, 0.9, 0.0)
    omega, kept = module.omega.detach(), {}
    for k in range(2):
        data = episode(k, batches)
        result = advance(strategy, module, omega, path(k), data, kept)
        kept = result.kept
        omega, d = by_hand.step(omega, path(k), [data.inner[i % batches] for i in range(3)], data.outer)
        assert_close(result.grads, {"lam": d}, 1e-11)


def test_without_momentum_the_past_enters_by_v_only() -> None:
    module, strategy = Synthetic(), FSLA(beta=0.2, eta=1.0)
    kept = advance(strategy, module, module.omega.detach(), path(0), episode(0)).kept

    def second(**changed: Params) -> Params:
        return advance(strategy, module, module.omega.detach(), path(1), episode(1), {**kept, **changed}).grads

    far = torch.full((SIZE,), 100.0, dtype=torch.float64)
    assert_close(second(d={"lam": far}), second(), 1e-12)
    with pytest.raises(AssertionError, match="^lam: "):
        assert_close(second(v={"omega": far}), second(), 1e-2)


# --- What it carries ---


def test_what_was_saved_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    module, strategy = Synthetic(rho=0.2), FSLA(schedule="inverse_sqrt")
    omega, kept = module.omega.detach(), {}
    for k in range(3):
        result = advance(strategy, module, omega, path(k), episode(k), kept)
        omega, kept = result.state.params["omega"], result.kept
    torch.save(kept, tmp_path / "kept.pt")
    saved = torch.load(tmp_path / "kept.pt", weights_only=True)
    assert saved["k"]["k"] == 3
    for k in range(3, 5):
        results = [advance(FSLA(schedule="inverse_sqrt"), module, omega, path(k), episode(k), saved)]
        results.append(advance(strategy, module, omega, path(k), episode(k), kept))
        assert torch.equal(results[0].grads["lam"], results[1].grads["lam"])
        omega, saved, kept = results[0].state.params["omega"], results[0].kept, results[1].kept
    fresh, anew = (advance(each, module, omega, path(5), episode(5)) for each in (FSLA(), strategy))
    assert torch.equal(fresh.grads["lam"], anew.grads["lam"])  # the object itself remembers nothing
    assert not torch.equal(fresh.grads["lam"], advance(strategy, module, omega, path(5), episode(5), kept).grads["lam"])


def test_a_single_estimate_goes_on_only_from_what_it_is_given() -> None:
    module, strategy = Synthetic(), FSLA()
    settings = deepcopy(vars(strategy))
    first = hypergradient(module, strategy, episode(0))
    before = deepcopy(first.kept)
    second, again = (hypergradient(module, strategy, episode(1), carry=first.carry) for _ in range(2))
    fresh = hypergradient(module, strategy, episode(1))
    assert [int(result.kept["k"]["k"]) for result in (first, second, again, fresh)] == [1, 2, 2, 1]
    assert torch.equal(second.grads["lam"], again.grads["lam"])
    assert not torch.equal(second.grads["lam"], fresh.grads["lam"])
    assert identical(first.kept, before)
    assert vars(strategy) == settings
    assert module.fit_context.memory.strategy == {}


def test_what_is_kept_is_not_changed_in_place() -> None:
    module, strategy = Synthetic(), FSLA()
    kept = advance(strategy, module, module.omega.detach(), path(0), episode(0)).kept
    with torch.no_grad():
        module.lam.fill_(7.0)
        module.omega.fill_(7.0)
    assert torch.equal(kept["phi"]["lam"], path(0))
    assert kept["theta"]["omega"].ne(7.0).all()


# --- In a Trainer ---


def exact_hypergradient(module: Synthetic, data: Episode) -> Tensor:
    """Return ∇h at the minimizer of the inner loss, in closed form."""
    (by_outer, by_inner, target), (_, outer, outer_target) = data.inner[0], data.outer
    lam, gram = module.lam.detach(), by_inner.T @ by_inner
    omega = torch.linalg.solve(gram, by_inner.T @ (target - by_outer @ lam))
    slope = 2 / len(outer_target) * outer.T @ (outer @ omega - outer_target) + module.rho * lam
    return -by_outer.T @ by_inner @ torch.linalg.solve(gram, slope) + module.rho * (lam + omega)


def test_tracks_the_exact_hypergradient_of_the_papers_problem_at_a_fixed_outer_point() -> None:
    module, data = Synthetic(lr=0.0), Episode([sample(300, 1)], sample(300, 2))
    exact, errors = exact_hypergradient(module, data), []
    record = Calls(lambda module: errors.append((module.fit_context.memory.strategy["d"]["lam"] - exact).norm()))
    trainer(FSLA(beta=0.3, eta=0.9), record).fit(module, listed([data] * 250))
    assert errors[0] > 0.1 * exact.norm()
    assert errors[-1] < 1e-3 * errors[0]


def test_converges_on_the_papers_problem() -> None:
    # Without ρ the outer problem is all but degenerate: its Hessian's eigenvalues differ by a factor of 1,000.
    module, data = Synthetic(rho=0.1), Episode([sample(300, 1)], sample(300, 2))
    start = exact_hypergradient(module, data).norm()
    trainer(FSLA(beta=0.3, eta=0.9)).fit(module, listed([data] * 250))
    assert exact_hypergradient(module, data).norm() < 1e-3 * start


def fitted(strategy: Any, epochs: int, ckpt_path: Path | None = None, *callbacks: Callback) -> tuple[Params, Any]:
    """Fit on three episodes in an epoch and return the parameters."""
    data = [episode(k) for k in range(3)]
    running = fit(strategy, *callbacks, module=Synthetic(rho=0.1), batches=data, max_epochs=epochs, ckpt_path=ckpt_path)
    return parameters(running.lightning_module), running


def test_a_fit_is_the_algorithm_and_a_resumed_fit_too(tmp_path: Path) -> None:
    by_hand, start = ByHand(0.3, 0.1, 0.9, 0.1), Synthetic()
    omega, lam = start.omega.detach(), start.lam.detach()
    for data in [episode(k) for k in range(3)] * 2:
        omega, d = by_hand.step(omega, lam, data.inner, data.outer)
        lam = lam - 0.3 * d
    whole, _ = fitted(FSLA(), 2)
    assert_close(whole, {"omega": omega, "lam": lam}, 1e-11)

    _, running = fitted(FSLA(), 1)
    running.save_checkpoint(tmp_path / "middle.ckpt")
    resumed, _ = fitted(FSLA(), 2, tmp_path / "middle.ckpt")
    assert differing(resumed, whole) == []


@pytest.mark.parametrize(
    "wrap",
    [
        lambda fsla: fsla,
        lambda fsla: HypergradientSchedule([(TruncatedReverse(1), 1), (fsla, None)]),
        lambda fsla: ForwardGradient(2, guide=fsla),
    ],
    ids=["alone", "in a schedule", "as a guide"],
)
def test_a_second_fit_starts_anew(wrap: Any) -> None:
    strategy = wrap(FSLA())
    (first, _), (second, _) = fitted(strategy, 1), fitted(strategy, 1)
    assert differing(first, second) == []


def test_a_single_estimate_does_not_advance_a_fit() -> None:
    """It is the one that the fit makes next, and leaves what the fit carries alone."""
    looks = Before(lambda module, data: [hypergradient(module, FSLA(), data).grads["lam"].norm() for _ in range(2)])
    looked, _ = fitted(FSLA(), 1, None, looks)
    undisturbed, _ = fitted(FSLA(), 1)
    assert differing(looked, undisturbed) == []
    assert [pair[0].item() for pair in looks.values] == [pair[1].item() for pair in looks.values]
    assert [pair[0].item() for pair in looks.values] == looks.logged("hypergradient_norm")


# --- Refusals ---


class LearnedStep(Synthetic):
    def configure_inner_optimizer(self):
        return SGD(lr=0.1 * self.lam[0].exp())


class Shared(Synthetic):
    def outer_parameters(self):
        return [self.omega, self.lam]


REFUSALS: dict[str, tuple[Problem, str]] = {
    "shared": (Shared(), "with parameters shared by both levels"),
    "reset": (Synthetic(inner_start="reset"), "with an inner level that starts anew"),
    "reinit": (Synthetic(inner_start="reinit"), "with an inner level that starts anew"),
    "steps": (Synthetic(inner_steps=2), "with `inner_steps=2`"),
    "momentum": (Synthetic(SGD(lr=0.1, momentum=0.9)), "with an inner optimizer with state"),
    "adam": (Synthetic(Adam(lr=0.1)), "with an inner optimizer with state"),
    "learned": (LearnedStep(), "with an inner optimizer that depends on φ"),
    "solver": (RidgeSolver(inner_start="warm"), "with `solve_inner`"),
}


@pytest.mark.parametrize(("module", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(module: Problem, message: str) -> None:
    data = module.episode() if isinstance(module, RidgeSolver) else episode(0)
    with pytest.raises(MisconfigurationError, match=rf"^Cannot use `FSLA` {message}"):
        hypergradient(module, FSLA(), data)


@pytest.mark.parametrize(
    "module", [LearnedStep(), Synthetic(SGD(lr=0.1, momentum=0.9))], ids=["learned rate", "momentum"]
)
def test_a_step_of_its_own_replaces_the_inner_optimizer(module: Synthetic) -> None:
    result = hypergradient(module, FSLA(tau=0.2), episode(0))
    assert_close(result.grads, hypergradient(Synthetic(SGD(lr=0.2)), FSLA(), episode(0)).grads, 1e-12)
    assert_close(result.state.params, hypergradient(Synthetic(SGD(lr=0.2)), FSLA(), episode(0)).state.params, 1e-12)


def test_reports_every_refusal_at_once() -> None:
    module = Synthetic(Adam(lr=0.1), inner_start="reset", inner_steps=3)
    with pytest.raises(MisconfigurationError, match="(?s)^Cannot use `FSLA` with an inner level") as caught:
        hypergradient(module, FSLA(), episode(0))
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a schedule"])
def test_refuses_accumulation(inside: bool) -> None:
    strategy = HypergradientSchedule([(FSLA(), None)]) if inside else FSLA()
    with pytest.raises(MisconfigurationError, match="^Cannot use `FSLA` with `accumulate_grad_batches=2`"):
        trainer(strategy, accumulate_grad_batches=2).fit(Synthetic(), listed([episode(0)]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 0}, r"beta=\.\.\.\)` to be a positive number, got 0"),
        ({"beta": float("inf")}, r"beta=\.\.\.\)` to be a positive number, got inf"),
        ({"eta": -0.1}, r"eta=\.\.\.\)` to be a number in \(0, 1\], got -0.1"),
        ({"eta": True}, r"eta=\.\.\.\)` to be a number in \(0, 1\], got True"),
        ({"eta": 1.5}, r"eta=\.\.\.\)` to be a number in \(0, 1\], got 1.5"),
        ({"tau": 0.0}, r"tau=\.\.\.\)` to be a positive number, got 0.0"),
        ({"schedule": "linear"}, r"schedule=\.\.\.\)` to be 'constant' or 'inverse_sqrt', got 'linear'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^Expected `FSLA\({message}"):
        FSLA(**arguments)

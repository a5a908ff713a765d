"""SOBA against its three lines in NumPy, with each kind of momentum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from lightning_bilevel import SGD, SOBA, BilevelModule, Episode, EpisodeLoader, NumberedBatch, hypergradient, numbered
from lightning_bilevel.errors import MisconfigurationError
from tests.strategies.test_bome import ByHand, Warm
from tests.support.problems import assert_close, draw

TAU, BETA, ETA = 0.2, 0.15, 0.4


def sampled(k: int, batches: int) -> Episode:
    return Episode([draw(4, seed=30 + 10 * k + i) for i in range(batches)], draw(5, seed=29 + 10 * k))


def directions(by_hand: ByHand, episode: Episode, theta: Any, v: Any, phi: Any) -> tuple[Any, Any, Any]:
    """Return D_θ, D_v, D_φ; only the first depends on the inner sample, for g is quadratic."""
    slope = by_hand.A @ theta - by_hand.B @ phi - episode.inner[0].numpy()
    d = by_hand.C.T @ (by_hand.C @ theta - episode.outer.numpy())
    return slope, by_hand.A @ v - d, by_hand.rho * phi + by_hand.B.T @ v


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("momentum", ["none", "average", "corrected", "recursive"])
def test_steps_are_those_of_the_algorithm(momentum: Any, batches: int, decay: float) -> None:
    period = 3 if momentum == "recursive" else None
    module, strategy, carry = Warm(1, SGD(0.7, weight_decay=decay)), SOBA(TAU, BETA, ETA, momentum, period), None
    by_hand = ByHand(module, decay)
    theta, phi = module.theta.detach().numpy(), module.phi.detach().numpy().copy()
    v, last = np.zeros(4), None
    for k in range(5):
        episode = sampled(k, batches)
        result = hypergradient(module, strategy, episode, carry=carry)
        used = now = directions(by_hand, episode, theta, v, phi)
        if last is not None and momentum == "average":
            used = (*now[:2], ETA * now[2] + (1 - ETA) * last[0][2])
        if last is not None and (momentum == "corrected" or (period is not None and k % period)):
            past = directions(by_hand, episode, *last[1])
            kept = 1 - ETA if period is None else 1
            used = tuple(d + kept * (old - p) for d, old, p in zip(now, last[0], past, strict=True))
        last = used, (theta, v, phi)
        theta, v = theta - TAU * used[0], v - BETA * used[1]
        np.testing.assert_allclose(result.grads["phi"], used[2], rtol=1e-9)
        np.testing.assert_allclose(result.state.params["theta"], theta, rtol=1e-9)
        np.testing.assert_allclose(result.kept["v"]["theta"], v, rtol=1e-9, atol=1e-14)
        carry, phi = result.carry, phi - 0.05 * used[2]
        with torch.no_grad():
            module.phi.copy_(torch.from_numpy(phi))


@pytest.mark.parametrize("momentum", ["none", "average", "corrected", "recursive"])
def test_it_tends_to_the_hypergradient(momentum: Any) -> None:
    period = 20 if momentum == "recursive" else None
    module, strategy, carry = Warm(1), SOBA(0.4, 0.4, 0.5, momentum, period), None
    functional = module.functional()
    carry = hypergradient(module, strategy, module.episode()).carry
    for _ in range(200):
        result = hypergradient(functional.problem, strategy, module.episode(), phi=functional.phi(), carry=carry)
        carry = result.carry
    assert_close(result.grads, module.optimum(module.episode()).grads, 1e-6)


def test_several_steps_are_refused() -> None:
    with pytest.raises(MisconfigurationError, match="^Cannot use `SOBA` with `inner_steps=3`"):
        hypergradient(Warm(), SOBA(), Warm().episode())


def error_after(strategy: SOBA, period: int, steps: int = 400) -> float:
    """Return the distance to ∇h of the mean problem after steps on 8 samples one by one, with all at each period."""
    module, carry = Warm(1), None
    samples = [sampled(k, 1) for k in range(8)]
    inner, outer = ([each.inner[0] for each in samples], [each.outer for each in samples])
    mean = Episode([torch.stack(inner).mean(0)], torch.stack(outer).mean(0))
    chosen = torch.randint(8, (steps,), generator=torch.Generator().manual_seed(0))
    for k in range(steps + 1):
        episode = mean if k % period == 0 else samples[int(chosen[k - 1])]
        result = hypergradient(module, strategy, episode, carry=carry)
        carry = result.carry
    expected = module.optimum(mean).grads["phi"]
    return float((result.grads["phi"] - expected).norm() / expected.norm())


def test_recursive_directions_leave_no_noise_where_plain_ones_do() -> None:
    plain, recursive = error_after(SOBA(0.3, 0.3), 25), error_after(SOBA(0.3, 0.3, 0.9, "recursive", 25), 25)
    assert recursive < 1e-6
    assert plain > 1e-3


@pytest.mark.parametrize(("momentum", "period"), [("recursive", None), ("none", 3), ("recursive", 1)])
def test_a_period_goes_with_recursive_directions(momentum: Any, period: int | None) -> None:
    with pytest.raises(ValueError, match=r"SOBA\(period=\.\.\.\)"):
        SOBA(momentum=momentum, period=period)


class FiniteSum(BilevelModule):
    """g_i = ½ θᵀA_iθ − θᵀ(B_iφ + b_i), f_j = ½‖C_jθ − e_j‖² + ½ ‖φ − r_j‖², of which the means are the problem."""

    def __init__(self) -> None:
        super().__init__(inner_steps=1, inner_start="warm")
        self.theta, self.phi = torch.nn.Parameter(draw(4, seed=1)), torch.nn.Parameter(draw(3, seed=2))

    def outer_parameters(self):
        return [self.phi]

    def inner_loss(self, batch):
        A, B, b = batch
        return 0.5 * self.theta @ A @ self.theta - self.theta @ (B @ self.phi + b)

    def outer_loss(self, batch):
        C, e, r = batch
        return 0.5 * (C @ self.theta - e).square().sum() + 0.5 * (self.phi - r).square().sum()

    def configure_inner_optimizer(self):
        return SGD(0.1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.outer_parameters(), lr=0.1)


def matrices(i: int) -> tuple[torch.Tensor, ...]:
    root = draw(4, 4, seed=50 + i)
    return root @ root.T / 8 + 0.5 * torch.eye(4).double(), draw(4, 3, seed=60 + i), draw(4, seed=70 + i)


INNER = numbered([matrices(i) for i in range(5)])
OUTER = numbered([(draw(4, 4, seed=80 + j) / 2, draw(4, seed=90 + j), draw(3, seed=95 + j)) for j in range(3)])


class Rows:
    """SAGA of one quantity, in NumPy: rows that have been seen, and their plain mean."""

    def __init__(self) -> None:
        self.rows: dict[int, np.ndarray] = {}

    def corrected(self, i: int, now: np.ndarray) -> np.ndarray:
        old = self.rows.get(i)
        used = now if old is None else now - old + np.mean(list(self.rows.values()), axis=0)
        self.rows[i] = now
        return used


@pytest.mark.parametrize("batches", [1, 2, 3])
def test_a_table_gives_the_steps_of_the_algorithm(batches: int) -> None:
    module, strategy, carry = FiniteSum(), SOBA(TAU, BETA, momentum="table"), None
    theta, phi, v = module.theta.detach().numpy(), module.phi.detach().numpy().copy(), np.zeros(4)
    tables, rng = [Rows() for _ in range(5)], np.random.default_rng(0)
    for _ in range(30):
        chosen, j = rng.integers(5, size=batches), int(rng.integers(3))
        episode = Episode([INNER[i] for i in chosen], OUTER[j])
        result = hypergradient(module, strategy, episode, carry=carry)
        first, second, third = (int(chosen[k % batches]) for k in range(3))
        A, B, b = (value.numpy() for value in INNER[first].batch)
        C, e, r = (value.numpy() for value in OUTER[j].batch)
        now = [
            (first, A @ theta - B @ phi - b),
            (second, INNER[second].batch[0].numpy() @ v),
            (third, -INNER[third].batch[1].numpy().T @ v),
            (j, C.T @ (C @ theta - e)),
            (j, phi - r),
        ]
        slope, product, mixed, d, c = (rows.corrected(i, value) for rows, (i, value) in zip(tables, now, strict=True))
        theta, v = theta - TAU * slope, v - BETA * (product - d)
        np.testing.assert_allclose(result.grads["phi"], c - mixed, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(result.state.params["theta"], theta, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(result.kept["v"]["theta"], v, rtol=1e-9, atol=1e-12)
        carry, phi = result.carry, phi - 0.02 * (c - mixed)
        with torch.no_grad():
            module.phi.copy_(torch.from_numpy(phi))


def gap(module: FiniteSum) -> float:
    """Return ‖∇h‖ of the mean problem at the φ of the module, in closed form."""
    phi = module.phi.detach()
    A, B, b = (torch.stack([each.batch[k] for each in INNER]).mean(0) for k in range(3))
    theta = torch.linalg.solve(A, B @ phi + b)
    d = torch.stack([C.T @ (C @ theta - e) for (C, e, _), *_ in OUTER]).mean(0)
    c = torch.stack([phi - r for (_, _, r), *_ in OUTER]).mean(0)
    return float((c + B.T @ torch.linalg.solve(A, d)).norm())


def fitted(module: FiniteSum, strategy: SOBA, passes: int, **options: Any) -> pl.Trainer:
    """Fit on batches that are shuffled anew in every pass."""
    inner, outer = (DataLoader(batches, batch_size=None, shuffle=True) for batches in (INNER, OUTER))
    torch.manual_seed(0)
    quiet: dict[str, Any] = {name: False for name in ("logger", "enable_checkpointing", "enable_progress_bar")}
    trainer = pl.Trainer(max_epochs=passes, callbacks=[strategy], enable_model_summary=False, **quiet)
    trainer.fit(module, EpisodeLoader(inner, outer, seed=3), **options)
    return trainer


def test_a_table_leaves_no_noise_at_constant_steps_where_none_does() -> None:
    first, second = FiniteSum(), FiniteSum()
    fitted(first, SOBA(0.3, 0.3), 40)
    fitted(second, SOBA(0.3, 0.3, momentum="table"), 120)
    assert gap(second) < 1e-3
    assert gap(first) > 1e-1


def test_a_table_goes_on_from_a_checkpoint(tmp_path: Any) -> None:
    whole, half, rest = FiniteSum(), FiniteSum(), FiniteSum()
    strategy = SOBA(0.2, 0.2, momentum="table")
    fitted(whole, strategy, 4)
    fitted(half, strategy, 2).save_checkpoint(tmp_path / "half.ckpt")
    fitted(rest, strategy, 4, ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(whole.phi, rest.phi)
    kept, again = (each.fit_context.memory.strategy for each in (whole, rest))
    assert list(kept) == list(again)
    assert all(torch.equal(kept[row][name], again[row][name]) for row in kept for name in kept[row])


def test_a_table_needs_numbers() -> None:
    table, (inner, *_), (outer, *_) = SOBA(momentum="table"), INNER, OUTER
    for episode in (
        Episode([inner.batch], outer.batch),
        Episode([inner], outer.batch),
        Episode([inner.batch], outer),
        Episode([inner, inner.batch], outer),
    ):
        with pytest.raises(
            MisconfigurationError, match=r"^Cannot use `SOBA\(momentum='table'\)` with batches that have no"
        ):
            hypergradient(FiniteSum(), table, episode)
        hypergradient(FiniteSum(), SOBA(), episode)  # the others need none


def test_a_table_has_as_many_rows_as_there_are_batches() -> None:
    module, table = FiniteSum(), SOBA(momentum="table")
    carry = hypergradient(module, table, Episode([INNER[0]], OUTER[0])).carry
    other = Episode([NumberedBatch(INNER[0].batch, 0, 7)], OUTER[0])
    with pytest.raises(MisconfigurationError, match="^Cannot use a batch that is one of 7. This is because .* for 5"):
        hypergradient(module, table, other, carry=carry)

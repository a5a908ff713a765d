"""``inner_start="rollback"``: θ and φ are those of the published loops, at every moment that anybody looks."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from torch import Tensor, nn

from lightning_bilevel import (
    FSLA,
    SGD,
    BilevelModule,
    Episode,
    EpisodeLoader,
    ForwardUnroll,
    HypergradientStrategy,
    ImplicitGradient,
    ReverseUnroll,
    ZerothOrder,
)
from lightning_bilevel.directions import Orthogonal
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.linear_solvers import Dense
from tests.support.modules import listed, trainer
from tests.support.problems import draw

T, RATE, MOMENTUM, STEP = 2, 0.1, 0.7, 0.5


class Weighted(BilevelModule):
    """Example weights outside, a linear model inside."""

    def __init__(self, momentum: float = MOMENTUM, **options: Any) -> None:
        super().__init__(**{"inner_steps": T, "inner_start": "rollback", **options})
        self.w, self.p, self.momentum = nn.Parameter(draw(3, seed=1)), nn.Parameter(draw(5, seed=2)), momentum

    def inner_parameters(self) -> list[Tensor]:
        return [self.w]

    def inner_loss(self, batch: Any) -> Tensor:
        return (self.p.sigmoid() * (batch[0] @ self.w - batch[1]).square()).mean()

    def outer_loss(self, batch: Any) -> Tensor:
        return (batch[0] @ self.w - batch[1]).square().mean()

    def configure_inner_optimizer(self) -> SGD:
        return SGD(lr=RATE, momentum=self.momentum)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.outer_parameters(), lr=STEP)


def episode(seed: int) -> Episode:
    inner = [(draw(5, 3, seed=seed + i), draw(5, seed=seed + i + 1)) for i in (0, 2)]
    return Episode(inner, (draw(5, 3, seed=seed + 4), draw(5, seed=seed + 5)))


EPISODES = [episode(100 * number) for number in range(1, 7)]


def inner_run(data: Episode, w: Tensor, velocity: Tensor, p: Tensor, momentum: float) -> tuple[Tensor, Tensor]:
    for x, y in data.inner:
        loss = (p.sigmoid() * (x @ w - y).square()).mean()
        velocity = momentum * velocity + torch.autograd.grad(loss, w, create_graph=True)[0]
        w = w - RATE * velocity
    return w, velocity


def published(momentum: float = MOMENTUM, every: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Return (θ, φ) after every batch; φ steps every so many, with the mean gradient."""
    w, p, velocity, total, after = draw(3, seed=1), draw(5, seed=2), torch.zeros(3).double(), 0.0, []
    for number, data in enumerate(EPISODES, 1):
        w, p, velocity = w.detach().requires_grad_(), p.detach().requires_grad_(), velocity.detach()
        virtual, _ = inner_run(data, w, velocity, p, momentum)
        x, y = data.outer
        total = total + torch.autograd.grad((x @ virtual - y).square().mean(), p)[0] / every
        if number % every == 0:
            p, total = (p - STEP * total).detach(), 0.0
        w, velocity = inner_run(data, w, velocity, p, momentum)
        after.append((w.detach(), p.detach()))
    return after


class Watch(Callback):
    """Looks at (θ, φ) at the end of every batch; given before the strategy."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen.append((pl_module.w.detach().clone(), pl_module.p.detach().clone()))


def fitted(strategy: HypergradientStrategy, module: Any = None, **options: Any) -> tuple[Any, Watch]:
    module, watch = module or Weighted(), Watch()
    trainer(watch, strategy, **options).fit(module, listed(EPISODES))
    return module, watch


EXACT = {
    "reverse": ReverseUnroll(),
    "checkpointed": ReverseUnroll(checkpoint=1),
    "forward": ForwardUnroll(),
    "differences": ZerothOrder(5, mu=1e-5, scheme="central", directions=Orthogonal()),
}


@pytest.mark.parametrize("strategy", EXACT.values(), ids=EXACT)
def test_is_the_published_loop(strategy: HypergradientStrategy) -> None:
    _, watch = fitted(strategy)
    torch.testing.assert_close(watch.seen, published(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, MOMENTUM])
def test_accumulated_gradients(momentum: float) -> None:
    """φ stays where it was within an accumulation, so that the virtual steps of such a batch are the real ones."""
    _, watch = fitted(ReverseUnroll(), Weighted(momentum), accumulate_grad_batches=2)
    torch.testing.assert_close(watch.seen, published(momentum, every=2))


def test_is_another_algorithm_than_a_warm_start() -> None:
    _, watch = fitted(ReverseUnroll(), Weighted(inner_start="warm"))
    assert (watch.seen[-1][1] - published()[-1][1]).abs().max() > 1e-5


def test_validation_and_checkpoints_see_the_real_steps(tmp_path: Any) -> None:
    class Saved(Weighted):
        def __init__(self) -> None:
            super().__init__()
            self.validated: list[Tensor] = []

        def validation_step(self, batch: Any) -> None:
            self.validated.append(self.w.detach().clone())

        def val_dataloader(self) -> Any:
            return listed([0])

    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            trainer.save_checkpoint(tmp_path / f"{batch_idx}.ckpt")

    module = Saved()
    options = {"val_check_interval": 2, "num_sanity_val_steps": 0}
    trainer(Save(), ReverseUnroll(), **options).fit(module, listed(EPISODES))
    torch.testing.assert_close(module.validated, [published()[number][0] for number in (1, 3, 5)])
    for number in (1, 2):
        saved = torch.load(tmp_path / f"{number}.ckpt", weights_only=False)["state_dict"]
        torch.testing.assert_close((saved["w"], saved["p"]), published()[number])


def test_resumed_between_accumulations(tmp_path: Any) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    def loader() -> EpisodeLoader:
        inner = listed([batch for data in EPISODES for batch in data.inner])
        return EpisodeLoader(inner, listed([data.outer for data in EPISODES]), inner_batches=T)

    trainer(Save(), ReverseUnroll(), accumulate_grad_batches=2).fit(Weighted(), loader())
    module = Weighted()
    resumed = trainer(ReverseUnroll(), accumulate_grad_batches=2)
    resumed.fit(module, loader(), ckpt_path=tmp_path / "saved.ckpt")
    torch.testing.assert_close((module.w.detach(), module.p.detach()), published(every=2)[-1])


def test_an_outer_optimizer_that_evaluates_several_times() -> None:
    """Each evaluation begins where the last real step has ended."""

    class Searched(Weighted):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.outer_parameters(), lr=0.1, max_iter=3)

    module, watch = fitted(ReverseUnroll(), Searched())
    w, velocity = draw(3, seed=1).requires_grad_(), torch.zeros(3).double()
    for data, (theta, p) in zip(EPISODES, watch.seen, strict=True):
        w, velocity = inner_run(data, w, velocity, p, MOMENTUM)
        torch.testing.assert_close(theta, w.detach())


def test_masks_are_those_of_the_virtual_steps() -> None:
    """With an outer rate of zero the real steps are the virtual ones, buffers too: a fit is that of a warm start."""

    class Noisy(Weighted):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.norm, self.drop = nn.BatchNorm1d(3).double(), nn.Dropout(0.4)
            self.register_buffer("count", torch.zeros(()).double())

        def inner_parameters(self) -> list[Tensor]:
            return [self.w, *self.norm.parameters()]

        def inner_loss(self, batch: Any) -> Tensor:
            return super().inner_loss((self.drop(self.norm(batch[0])), batch[1]))

        def outer_loss(self, batch: Any) -> Tensor:
            self.count += 1
            return super().outer_loss(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.outer_parameters(), lr=0.0)

    ends = []
    for start in ("rollback", "warm"):
        torch.manual_seed(3)
        module, _ = fitted(ReverseUnroll(), Noisy(inner_start=start))
        ends.append(module)
    rolled, warm = (module.state_dict() for module in ends)
    assert rolled["count"] == len(EPISODES)
    assert all(torch.equal(rolled[name], value) for name, value in warm.items())
    assert ends[0].fit_context.memory.steps == ends[1].fit_context.memory.steps == T * len(EPISODES)


def test_a_solver_solves_again() -> None:
    class Solved(Weighted):
        def solve_inner(self, batches: Any) -> dict[str, Tensor]:
            x, y = batches[0]
            weights = self.p.sigmoid()[:, None]
            return {"w": torch.linalg.solve(x.T @ (weights * x), x.T @ (weights[:, 0] * y))}

    module, watch = fitted(ImplicitGradient(Dense()), Solved())
    for data, (theta, p) in zip(EPISODES, watch.seen, strict=True):
        (x, y), weights = data.inner[0], p.sigmoid()[:, None]
        torch.testing.assert_close(theta, torch.linalg.solve(x.T @ (weights * x), x.T @ (weights[:, 0] * y)))


@pytest.mark.parametrize("when", ["virtual", "real"])
def test_steps_that_are_not_finite(when: str) -> None:
    class Broken(Weighted):
        calls = 0

        def inner_loss(self, batch: Any) -> Tensor:
            self.calls += 1
            lost = self.trainer.global_step == (2 if when == "virtual" else 3) and batch[0] is EPISODES[2].inner[0][0]
            return super().inner_loss(batch) + (float("nan") if lost else 0.0)

    data = [episode(100 * number) for number in range(1, 7)]
    EPISODES[:] = data
    with pytest.raises(FloatingPointError, match="Expected the inner loss at step 1 of 2 to be finite"):
        fitted(ReverseUnroll(), Broken())
    with pytest.warns(UserWarning, match="Skipped an outer step|Left θ where it was"):
        module, watch = fitted(ReverseUnroll(), Broken(on_nonfinite="skip"))
    assert module.fit_context.memory.skipped == 1
    assert torch.equal(watch.seen[1][0], watch.seen[2][0])
    assert torch.equal(watch.seen[1][1], watch.seen[2][1]) == (when == "virtual")
    assert all(torch.isfinite(value).all() for value in watch.seen[-1])


def test_copies_during_the_fit_are_free_of_it() -> None:
    class Copy(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.copy = copy.deepcopy(pl_module)
            self.size = len(pickle.dumps(pl_module))

    copying = Copy()
    running = trainer(copying, ReverseUnroll())
    module = Weighted()
    running.fit(module, listed(EPISODES))
    loop = running.fit_loop.epoch_loop.automatic_optimization
    assert "run" not in vars(loop)
    torch.testing.assert_close(copying.copy.w, module.w)
    running = trainer(ReverseUnroll())
    running.fit(copying.copy, listed(EPISODES[:1]))


def test_refusals() -> None:
    with pytest.raises(MisconfigurationError, match="Cannot use `inner_start='rollback'` with 2 episodes in a batch"):
        trainer(ReverseUnroll()).fit(Weighted(), listed([EPISODES[:2]]))
    with pytest.raises(MisconfigurationError, match="Cannot use `FSLA` with an inner level that starts anew"):
        trainer(FSLA()).fit(Weighted(momentum=0.0, inner_steps=1), listed(EPISODES))

    class Changed(Weighted):
        def on_train_batch_start(self, *_: Any) -> None:
            self.inner_start = "rollback"

    with pytest.raises(MisconfigurationError, match="Cannot use `inner_start='rollback'` set during the fit"):
        trainer(ReverseUnroll()).fit(Changed(inner_start="warm"), listed(EPISODES))


def test_shared_parameters_alone_have_nothing_to_take_back() -> None:
    class Shared(Weighted):
        def outer_parameters(self) -> list[Tensor]:
            return [self.w, self.p]

    ends = []
    for start in ("rollback", "warm"):
        module, _ = fitted(ReverseUnroll(), Shared(inner_start=start))
        ends.append(module.w.detach())
    assert torch.equal(*ends)

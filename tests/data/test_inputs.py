"""What users hand in: forms that Lightning knows are taken, and what would run and be wrong is pointed out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import StochasticWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bilevel import (
    SGD,
    Adam,
    Episode,
    EpisodeLoader,
    FirstOrder,
    ForwardGradient,
    ImplicitGradient,
    ReverseUnroll,
    TruncatedReverse,
    ZerothOrder,
    hypergradient,
)
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.linear_solvers import Dense
from tests.support.modules import Cleaning, Maml, differing, episode, listed, loader, parameters, tasks, trainer
from tests.support.seeds import seeded


def test_a_plain_loader_of_tasks() -> None:
    """With a batch size, PyTorch would stack the tasks of a batch into one."""
    modules, several = [seeded(Maml), seeded(Maml)], tasks(6)
    for module, source in zip(modules, (DataLoader(several, 3), listed([several[:3], several[3:]])), strict=True):
        assert [len(batch) for batch in source] == [3, 3]
        trainer(ReverseUnroll()).fit(module, source)
    assert differing(*map(parameters, modules)) == []


def test_losses_in_a_mapping() -> None:
    class Mapped(Cleaning):
        def inner_loss(self, batch: Any) -> Any:
            return {"loss": super().inner_loss(batch), "more": 1}

        def outer_loss(self, batch: Any) -> Any:
            return {"loss": super().outer_loss(batch)}

    plain, mapped = (hypergradient(seeded(kind), ReverseUnroll(), episode()) for kind in (Cleaning, Mapped))
    assert differing(plain.grads, mapped.grads) == []


def test_one_inner_batch_for_many_steps_is_pointed_out() -> None:
    inner, outer = (each.dataset for each in reversed(loader().flattened))

    def fit(batch_size: int, inner_steps: int = 3, **options: Any) -> None:
        source = EpisodeLoader(DataLoader(inner, batch_size), DataLoader(outer, 4), **options)
        trainer(ReverseUnroll(), max_steps=1).fit(Cleaning(inner_steps=inner_steps), source)

    with pytest.warns(UserWarning, match=r"^All 3 inner steps of an episode share one inner batch\. `EpisodeLoader"):
        fit(2)
    fit(2, inner_batches=1)
    fit(2, inner_steps=1)
    fit(len(inner))


def test_so_it_is_where_lightning_combines_the_loaders() -> None:
    inner, outer = (DataLoader(each.dataset, 4) for each in reversed(loader().flattened))

    class Own(Cleaning):
        def episodes(self, batch: Any) -> Any:
            return [Episode([batch["inner"]], batch["outer"])]

    def fit(module: Any) -> None:
        trainer(ReverseUnroll(), max_steps=1).fit(module, {"inner": inner, "outer": outer})

    with pytest.warns(UserWarning, match=r"^All 3 inner steps of an episode share one inner batch"):
        fit(Cleaning())
    fit(Cleaning(inner_steps=1))
    fit(Own())


EMPTY = {
    "an outer list": lambda: EpisodeLoader([EXAMPLE], []),
    "an inner list": lambda: EpisodeLoader([], [EXAMPLE]),
    "an outer loader": lambda: EpisodeLoader([EXAMPLE], DataLoader([], batch_size=None)),
    "an outer loader in a mapping": lambda: {"inner": listed([EXAMPLE]), "outer": listed([])},
    "an inner loader in a mapping": lambda: {"inner": listed([]), "outer": listed([EXAMPLE])},
    "both": lambda: {"inner": listed([]), "outer": listed([])},
    "episodes": lambda: listed([]),
}
EXAMPLE = episode().inner[0]


@pytest.mark.filterwarnings("ignore:Total length of")
@pytest.mark.parametrize("name", EMPTY)
def test_a_fit_on_nothing_is_refused(name: str) -> None:
    message = r"^Expected `(EpisodeLoader\((inner|outer)=...\)|the training data.*)` to be "
    with pytest.raises(ValueError, match=message):
        trainer(ReverseUnroll(), max_epochs=2).fit(Cleaning(inner_steps=1), EMPTY[name]())


def test_a_fit_of_no_batches_may_be_meant() -> None:
    trainer(ReverseUnroll(), limit_train_batches=0).fit(Cleaning(), listed([]))


@pytest.mark.parametrize("level", ["inner", "outer"])
def test_a_data_set_is_no_loader(level: str) -> None:
    loaders = {"inner": [torch.zeros(1)], "outer": [torch.zeros(1)], level: TensorDataset(torch.zeros(3))}
    with pytest.raises(ValueError, match=rf"^Expected `EpisodeLoader\({level}=...\)` to be a loader of batches"):
        EpisodeLoader(**loaders)


def test_a_batch_without_brackets_is_pointed_out() -> None:
    with pytest.warns(UserWarning, match=r"^A tuple of 2 tensors came as inner batches"):
        with Silent().adapted((torch.ones(2), torch.ones(2))):
            pass
    with pytest.warns(UserWarning, match=r"^A tuple of 2 tensors came as inner batches"):
        hypergradient(Silent(), ReverseUnroll(), Episode((torch.ones(2), torch.ones(2)), None))
    hypergradient(Silent(), ReverseUnroll(), Episode([torch.ones(2), torch.ones(2)], None))


class Silent(Cleaning):
    """Its losses work, whatever the batch is."""

    def inner_loss(self, batch: Any) -> Tensor:
        return (self.example_weights.mean() - sum(p.mean() for p in self.net.parameters())).square()

    outer_loss = inner_loss


# --- Estimates of nothing ---


def test_a_hypergradient_of_zero_is_pointed_out() -> None:
    with pytest.warns(UserWarning, match=r"^The first hypergradient is exactly zero.* `audit\(module, batch\)`"):
        trainer(FirstOrder(), max_steps=2).fit(Cleaning(), loader())
    trainer(TruncatedReverse(1), max_steps=2).fit(Cleaning(), loader())


class Solved(Cleaning):
    """Ridge regression by a solver that forgets the outer parameters."""

    detached = True

    def __init__(self) -> None:
        super().__init__(net=lambda: nn.Linear(3, 1, bias=False), inner_start="reset")

    def outer_parameters(self) -> Any:
        return [self.example_weights]

    def solve_inner(self, batches: Any) -> Any:
        x, y, index = batches[0]
        weights = self.example_weights[index].sigmoid()[:, None]
        solution = torch.linalg.solve(x.T @ (weights * x) + torch.eye(3), x.T @ (weights * y)).T
        return {"net.weight": self.returned(solution)}

    def returned(self, solution: Tensor) -> Any:
        return solution.detach()


class BlackBox(Solved):
    differentiable_solve = False

    def inner_loss(self, batch: Any) -> Tensor:
        return super().inner_loss(batch) + self.net.weight.square().sum()


def test_a_detached_solution_is_refused() -> None:
    with pytest.raises(MisconfigurationError, match=r"^`Solved.solve_inner\(batches\)` has no derivative: .* detached"):
        hypergradient(Solved(), ReverseUnroll(), episode())
    for strategy in (ZerothOrder(), ImplicitGradient(Dense())):
        assert hypergradient(BlackBox(), strategy, episode()).value > 0


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (Tensor.double, r"to be of torch.float32, got torch.float64. Convert it: `.to\(parameter\)`."),
        (lambda solution: solution.detach().numpy(), r"to be a tensor, got 'ndarray'. Write `torch.as_tensor\(...\)`"),
    ],
    ids=["float64", "NumPy"],
)
def test_solutions_of_another_kind(returned: Any, message: str) -> None:
    module = BlackBox()
    module.returned = returned
    with pytest.raises(ValueError, match=rf"^Expected `BlackBox.solve_inner\(batches\)\['net.weight'\]` {message}"):
        hypergradient(module, ZerothOrder(), episode())


# --- The optimizers of both levels ---


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_a_negative_rate_is_pointed_out(kind: type) -> None:
    with pytest.warns(UserWarning, match=rf"^`{kind.__name__}\(lr=...\)` is negative as a tensor. Is an `.exp\(\)`"):
        hypergradient(Cleaning(lambda lr: kind(lr=lr.log())), ReverseUnroll(), episode())


def test_a_scheduler_of_the_inner_optimizer_is_refused() -> None:
    class Scheduled(Cleaning):
        def configure_inner_optimizer(self) -> Any:
            optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
            return optimizer

    with pytest.raises(MisconfigurationError, match=r"^Cannot use a scheduler .* on the inner optimizer `SGD`"):
        hypergradient(Scheduled(), ReverseUnroll(), episode())


def test_outer_parameters_that_no_optimizer_has() -> None:
    class Partly(Cleaning):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam([self.log_lr], lr=0.05)

    with pytest.warns(UserWarning, match=r"^No optimizer has the outer parameters \['example_weights'\]: they stay"):
        trainer(ReverseUnroll(), max_steps=1).fit(Partly(), loader())


# --- Data ---


@pytest.mark.parametrize("level", ["inner", "outer"])
def test_data_that_are_not_finite_are_named(level: str) -> None:
    good = episode()
    bad = [torch.full_like(part, torch.nan) if part.is_floating_point() else part for part in good.outer]
    spoilt = Episode([good.inner[0], bad], good.outer) if level == "inner" else good._replace(outer=bad)
    if level == "inner":
        spoilt = spoilt._replace(inner=[good.inner[0], [bad[0], bad[1], good.inner[0][2][: len(bad[0])]]])
    where = {"inner": "inner batch 2 of 2", "outer": "outer batch"}[level]
    with pytest.raises(FloatingPointError, match=rf"The {where} itself has nan or inf in it"):
        hypergradient(Cleaning(), ForwardGradient(2), spoilt)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((torch.ones(2), torch.ones(2)), r"^Expected `the training batch` to be an `Episode`, .* got 'tuple'"),
        (Episode([], None), r"^Expected `Episode\(inner=...\)` to be a list of at least one inner batch, got 'none'"),
        (Episode(None, None), r"^Expected `Episode\(inner=...\)` to be a list of at least one inner batch, got 'None"),
    ],
    ids=["a tuple", "no batch", "None"],
)
def test_what_is_no_episode(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hypergradient(Cleaning(), ReverseUnroll(), given)


def test_episodes_in_any_iterable() -> None:
    several = tasks(3)
    expected = hypergradient(seeded(Maml), ReverseUnroll(), several)
    found = hypergradient(seeded(Maml), ReverseUnroll(), (each for each in several))
    assert differing(found.grads, expected.grads) == []
    (inner,), outer = several[0]
    one, mapped = (
        hypergradient(seeded(Maml), ReverseUnroll(), each) for each in (several[0], {"inner": inner, "outer": outer})
    )
    assert differing(mapped.grads, one.grads) == []


def test_what_is_no_strategy() -> None:
    with pytest.raises(ValueError, match=r"^Expected `hypergradient\(strategy=...\)` to be a strategy such as"):
        hypergradient(Cleaning(), ReverseUnroll, episode())  # the class


def test_norms_of_the_wrong_size() -> None:
    """Lightning's batch norm, or ours: the message is PyTorch's."""
    module = Cleaning(net=lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(5), nn.Linear(4, 1)))
    with pytest.raises(RuntimeError, match="running_mean should contain 4 elements not 5"):
        hypergradient(module, ReverseUnroll(), episode())


def test_averaged_weights_of_a_net_with_batch_norm() -> None:
    """Lightning then makes a pass without training for the statistics; the inner level must not train on in it."""
    module = Cleaning(net=lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
    averaging = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2)
    trainer(averaging, ReverseUnroll(), max_epochs=4).fit(module, loader())
    assert averaging._average_model is not None
    for mine, average in zip(module.net.parameters(), averaging._average_model.net.parameters(), strict=True):
        assert torch.equal(mine, average)
    assert module.net[1].running_mean.abs().max() > 0


def test_a_mapping_of_inner_and_outer_loaders():
    inner, outer = loader().flattened[::-1]
    modules = [seeded(lambda: Cleaning(inner_steps=1)), seeded(lambda: Cleaning(inner_steps=1))]
    for module, source in zip(modules, ({"inner": inner, "outer": outer}, EpisodeLoader(inner, outer, 1)), strict=True):
        trainer(ReverseUnroll()).fit(module, source)
    assert differing(*map(parameters, modules)) == []


LISTS = {
    "episodes": lambda: tasks(2),
    "lists of episodes": lambda: [tasks(2), tasks(2)],
    "one episode": lambda: tasks(1)[0],
    "two levels": lambda: {"inner": tasks(1)[0].inner, "outer": listed([tasks(1)[0].outer])},
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_that_lightning_takes_apart_are_refused(name):
    """It would train on single rows of the batches, in silence."""
    module = Maml()
    before = parameters(module)
    with pytest.raises(ValueError, match=r"^Expected `the training data` to be a .*loader.*Lightning takes a list for"):
        trainer(ReverseUnroll()).fit(module, LISTS[name]())
    assert differing(before, parameters(module)) == []


def test_a_mapping_of_several_inner_loaders():
    class Module(Maml):
        def episodes(self, batch):
            return [Episode(batch["inner"], batch["outer"])]

    module = Module()
    inner, outer = [listed([tasks(1)[0].outer] * 2) for _ in range(2)], listed([tasks(1)[0].outer] * 2)
    fit = trainer(ReverseUnroll())
    fit.fit(module, {"inner": inner, "outer": outer})
    assert fit.global_step == 2

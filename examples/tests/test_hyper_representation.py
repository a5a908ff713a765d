"""The hyper-representation example: its closed forms, its directions, its data, its clock, and that it learns."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import hyper_representation as example
from hyper_representation import Matrix, Regression, TwoLayers, Unit
from lightning_bilevel import SGD, Episode, FirstOrder, ImplicitGradient, ReverseUnroll, ZerothOrder, hypergradient
from lightning_bilevel.directions import Orthogonal
from lightning_bilevel.linear_solvers import Dense
from tests.support.seeds import key_of


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def regression(inner_steps: int, kind: type[Regression] = Regression, layers: int = 1) -> tuple[Regression, Episode]:
    shapes = [(3, 4), (4, 4)][:layers]
    embedding = (Matrix, TwoLayers)[layers - 1](*(normal(*shape, seed=i) for i, shape in enumerate(shapes)))
    parts = [(normal(9, 3, seed=seed), normal(9, seed=seed + 1)) for seed in (10, 20, 30)]
    module = kind(embedding, normal(4, seed=5), parts[2], inner_steps, 0.1, 0.01, 0.3)
    return module, Episode([parts[0]], parts[1])


def by_hand(module: Regression, episode: Episode) -> torch.Tensor:
    """Return dΦ/dA of X ↦ X A with a ridge head, from the implicit function theorem with all products written out."""
    a = module.embedding.matrix.detach()
    (x, y), (outer_x, outer_y) = episode.inner[0], episode.outer
    n, gamma = len(y), module.penalty
    gram = a.T @ x.T @ x @ a / n + gamma * torch.eye(4, dtype=a.dtype)
    w = torch.linalg.solve(gram, a.T @ x.T @ y / n)
    outer_residual, residual = outer_x @ a @ w - outer_y, x @ a @ w - y
    direct = torch.outer(outer_x.T @ outer_residual, w) / n
    v = torch.linalg.solve(gram, a.T @ outer_x.T @ outer_residual / n)
    return direct - (torch.outer(x.T @ residual, v) + torch.outer(x.T @ x @ a @ v, w)) / n


def test_four_ways_to_the_hypergradient_of_the_linear_embedding() -> None:
    module, episode = regression(inner_steps=2000)
    expected = by_hand(module, episode)
    for strategy in (ReverseUnroll(), ImplicitGradient(Dense())):
        assert torch.allclose(hypergradient(module, strategy, episode).grads["embedding.matrix"], expected)
    (grad,) = torch.autograd.grad(module.exact_loss(episode), [module.embedding.matrix])
    assert torch.allclose(grad, expected)
    judged = module.judge(episode)
    assert judged["exact_norm"] == pytest.approx(expected.norm().item())
    assert judged["exact_loss"] == pytest.approx(hypergradient(module, FirstOrder(), episode).value.item())


class OneDevice(TorchDispatchMode):
    """Fails where an operation takes arrays of two devices, as accelerators do; the meta device lets some pass."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.dim()]
        assert len({tensor.device for tensor in tensors}) < 2, f"{func} of tensors on two devices"
        return func(*args, **(kwargs or {}))


def test_the_exact_loss_is_computed_where_the_tensors_are() -> None:
    module, episode = regression(inner_steps=2)
    there = Episode(*tree_map(lambda x: x.to("meta"), (episode.inner, episode.outer)))
    with OneDevice():
        assert module.to("meta").exact_loss(there).device.type == "meta"


def test_after_few_steps_the_exact_head_is_another_problem() -> None:
    module, episode = regression(inner_steps=2)
    unrolled = hypergradient(module, ReverseUnroll(), episode).grads["embedding.matrix"]
    assert (unrolled - by_hand(module, episode)).norm() > 0.1 * unrolled.norm()


@pytest.mark.parametrize("layers", [1, 2])
def test_the_solver_takes_gradient_steps(layers: int) -> None:
    class Loop(Regression):
        solve_inner = example.BilevelModule.solve_inner

        def configure_inner_optimizer(self):
            return SGD(lr=self.inner_lr)

    (module, episode), (loop, _) = (regression(7, kind, layers) for kind in (Regression, Loop))
    ours, theirs = (hypergradient(each, ReverseUnroll(), episode) for each in (module, loop))
    assert torch.allclose(ours.state.params["head"], theirs.state.params["head"])
    for name, grad in theirs.grads.items():
        assert torch.allclose(ours.grads[name], grad)


def test_unit_directions_count_the_response_for_its_share() -> None:
    like = {"a": torch.zeros(2, 3, dtype=torch.float64), "b": torch.zeros(5, dtype=torch.float64)}
    drawn = Unit().draw(key_of(seed=1), 0, 20_000, like)
    for name, value in like.items():
        u = drawn[name].flatten(1)
        assert torch.allclose(u.norm(dim=1), torch.ones(len(u), dtype=u.dtype))
        assert torch.allclose(u.T @ u / len(u), torch.eye(value.numel(), dtype=u.dtype) / value.numel(), atol=0.01)


def test_one_unit_direction_is_nearly_the_gradient_with_the_head_held_fixed() -> None:
    setting = example.PROBLEMS["linear"]
    module, episode = example.synthetic("linear", setting, setting.outer_lr, full=False, seed=0)
    grads = {
        name: hypergradient(module, example.STRATEGIES[name](setting), episode).grads["embedding.matrix"].flatten()
        for name in ("reverse", "pzobo", "pzobo-unit", "first-order")
    }

    def cosine(one: str, other: str) -> float:
        return torch.cosine_similarity(grads[one], grads[other], dim=0).item()

    assert cosine("pzobo-unit", "first-order") > 0.999
    assert 0.5 < cosine("first-order", "reverse") < 0.9
    assert abs(cosine("pzobo", "reverse")) < 0.1
    assert grads["pzobo"].norm() > 10 * grads["reverse"].norm()


def test_pzobo_as_the_paper_has_it_is_unbiased() -> None:
    """With as many orthogonal directions as there are parameters nothing is left to chance."""
    module, episode = regression(inner_steps=5)
    exact = hypergradient(module, ReverseUnroll(), episode).grads["embedding.matrix"]
    for kind in (example.PZOBO, ZerothOrder):
        strategy = kind(num_directions=12, mu=1e-6, directions=Orthogonal())
        assert torch.allclose(hypergradient(module, strategy, episode).grads["embedding.matrix"], exact, atol=1e-4)


def test_the_hessian_of_the_head_has_the_bound_that_is_claimed() -> None:
    setting = example.PROBLEMS["lenet"]
    torch.manual_seed(0)
    module = example.LeNet((torch.zeros(0), torch.zeros(0)), 1, setting.inner_lr, 0.1, setting.penalty)
    features = module.body(100 * torch.randn(4, 1, 28, 28))  # saturated, so as long as they can be
    labels = torch.tensor([0, 1, 0, 1])

    def loss(weight: torch.Tensor) -> torch.Tensor:
        logits = features.detach() @ weight[:-10].view(84, 10) + weight[-10:]
        return torch.nn.functional.cross_entropy(logits, labels) + setting.penalty / 2 * weight.square().sum()

    bound = 85 / 2 + setting.penalty
    pushed = torch.zeros(850)
    pushed[-10:-8] = 20.0  # two classes at probability one half each: the worst case
    curvature = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, pushed)).max()
    assert bound / 4 < curvature < bound
    assert setting.inner_lr < 2 / bound


def test_no_image_is_in_two_parts() -> None:
    data = example.images(None, seed=0)
    parts = [part[0].flatten(1) for part in (data.inner, data.outer, data.test)]
    assert [len(part) for part in parts] == [650, 650, 497]
    distinct = len(torch.cat(parts).unique(dim=0))
    assert distinct > 1790  # of 1,797
    assert sum(len(part.unique(dim=0)) for part in parts) == distinct


def test_stocbio_has_batches_of_its_own() -> None:
    args = example.arguments(["--steps", "1"])
    sizes = {}
    for strategy in ("aid-fp", "stocbio"):
        _, loader = example.prepare("lenet", strategy, example.PROBLEMS["lenet"]._replace(steps=2), args)
        episodes = list(loader)
        assert len(episodes) == 2
        sizes[strategy] = [len(x) for x, _ in episodes[0].inner]
    assert sizes == {"aid-fp": [64] * 10, "stocbio": [64] * 12}


def run(folder: Path, *options: str) -> list[dict]:
    return example.main([*options, "--quiet", "--output", str(folder)])["rows"]


def test_linear_embedding_is_learned(tmp_path: Path) -> None:
    rows = run(tmp_path, "--problem", "linear", "--strategy", "reverse", "pzobo-unit", "hozog", "--steps", "41")
    reverse, unit, hozog = rows
    assert reverse["cosine"] == pytest.approx(1, abs=1e-5)
    assert reverse["curves"]["true_norm"][0] == list(range(0, 41, 5))
    for row in (reverse, unit):
        assert row["outer_loss"] < row["curves"]["outer_loss"][1][0] / 500
        assert row["curves"]["true_norm"][1][-1] < row["curves"]["true_norm"][1][0] / 50
        assert row["seconds_to_mark"] > 0
    assert hozog["outer_loss"] > 20 * unit["outer_loss"]
    assert hozog["seconds_to_mark"] is None
    assert (
        reverse["first_exact_loss"] < reverse["curves"]["outer_loss"][1][0] / 1000
    )  # the start is good for an exact head


def test_seconds_end_a_run(tmp_path: Path) -> None:
    (row,) = run(tmp_path, "--problem", "two-layer", "--strategy", "first-order", "--seconds", "0")
    assert row["curves"]["outer_loss"][0] == [0]


def test_comparisons_are_not_part_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(example, "time", SimpleNamespace(process_time=lambda: next(ticks)))
    (row,) = run(tmp_path, "--problem", "linear", "--strategy", "first-order", "--steps", "4", "--every", "2")
    # A look at the clock takes 1: a step has two, at its ends, and two more inside where it is compared.
    assert row["curves"]["cpu_seconds"][1] == [0, 2, 3, 5]


def test_several_seeds_make_a_band(tmp_path: Path) -> None:
    options = ["--problem", "linear", "--strategy", "first-order", "--steps", "6"]
    rows = [row for seed in (0, 1) for row in run(tmp_path, *options, "--seed", str(seed))]
    rows[1]["curves"]["outer_loss"] = ([0, 1], [1.0, 2.0])  # the shorter one counts
    path = tmp_path / "band.png"
    example.draw(path, rows)
    assert path.stat().st_size > 10_000


def test_a_strategy_that_is_not_for_the_problem(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.main(["--problem", "linear", "--strategy", "stocbio"])
    assert "none of the strategies stocbio is for linear" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["reverse", "aid-fp", "stocbio", "pzobo-unit"])
def test_lenet_learns_digits(strategy: str, tmp_path: Path) -> None:
    (row,) = run(tmp_path, "--problem", "lenet", "--strategy", strategy)
    assert row["test_accuracy"] > 0.8

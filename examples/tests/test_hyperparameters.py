"""The hyperparameter example: its sparse product, its data, what it is compared with, and that it gains something."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse
import sklearn.datasets
import torch

import hyperparameters as example
from hyperparameters import Part, Penalties, Sparse, SparseProduct
from lightning_bilevel import Episode, ForwardUnroll, ImplicitGradient, ReverseUnroll, hypergradient
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.linear_solvers import Neumann


def sparse_rows(n: int, p: int, seed: int = 0) -> scipy.sparse.csr_matrix:
    return scipy.sparse.random(n, p, density=0.4, format="csr", random_state=np.random.default_rng(seed))


def pair(x: scipy.sparse.csr_matrix) -> Sparse:
    return Sparse(*(matrix.double() for matrix in example.tensors(Part(x, np.zeros(x.shape[0], np.int64)))[0]))


def test_sparse_product_has_all_derivatives() -> None:
    x = sparse_rows(6, 4)
    sparse, dense = pair(x), torch.tensor(x.toarray()).float().double()
    w = torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.allclose(example.product(sparse, w), dense @ w)
    assert torch.autograd.gradcheck(lambda w: SparseProduct.apply(w, *sparse), w)
    assert torch.autograd.gradgradcheck(lambda w: SparseProduct.apply(w, *sparse).exp(), w)


def test_sparse_product_of_many() -> None:
    sparse = pair(sparse_rows(6, 4))
    w = torch.rand(5, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    many = torch.func.vmap(lambda w: SparseProduct.apply(w, *sparse))(w)
    assert torch.allclose(many, torch.stack([SparseProduct.apply(each, *sparse) for each in w]))


@pytest.mark.filterwarnings("ignore:`ConjugateGradient")  # four iterations for 21 unknowns
@pytest.mark.parametrize("name", example.PENALTIES)
def test_sparse_and_dense_features_give_one_hypergradient(name: str) -> None:
    x, y = sparse_rows(20, 6), np.arange(20) % 3
    estimates = []
    for features in (x, x.toarray()):
        torch.manual_seed(0)
        module = Penalties(6, 3, inner_lr=0.5, outer_lr=1.0)
        batch = example.tensors(Part(features, y))
        strategy = example.PENALTIES[name].strategy(0.5, 4)
        estimates.append(hypergradient(module, strategy, Episode([batch], batch)).grads["log_penalties"])
    assert torch.allclose(*estimates, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_what_scikit_learn_solves_is_the_inner_problem(kind: str) -> None:
    """At its solution the inner loss of the module, with the same penalties, has gradient 0."""
    x, y = sparse_rows(40, 5), np.arange(40) % 3
    part = Part(x if kind == "sparse" else x.toarray(), y)
    penalties = np.array([0.01, 0.1, 0.02, 1.0, 0.05])
    model, scale = example.solve(part, penalties)
    module = Penalties(5, 3, inner_lr=0.5, outer_lr=1.0)
    with torch.no_grad():
        module.log_penalties.copy_(torch.tensor(penalties).log())
        module.weight.copy_(torch.tensor((model.coef_ * scale).T))
        module.bias.copy_(torch.tensor(model.intercept_))
    grads = torch.autograd.grad(module.inner_loss(example.tensors(part)), [module.weight, module.bias])
    assert max(grad.abs().max() for grad in grads) < 1e-3
    assert torch.autograd.grad(module.outer_loss(example.tensors(part)), module.weight)[0].abs().max() > 5e-3


def test_a_penalty_stays_where_gradient_descent_is_stable() -> None:
    module = Penalties(3, 2, inner_lr=0.5, outer_lr=1.0)
    with torch.no_grad():
        module.log_penalties.copy_(torch.tensor([50.0, 0.0, -50.0]))
    assert module.penalties.tolist() == pytest.approx([2.0, 1.0, 1e-7])


def test_one_penalty_per_feature_beats_one_for_all(tmp_path: Path) -> None:
    argv = ["--quiet", "--task", "penalties", "--strategy", "reverse", "aid-cg", "--output", str(tmp_path)]
    grid, *learned = example.main(argv)["penalties"]
    assert [row["method"] for row in learned] == ["reverse", "aid-cg"]
    for row in learned:
        assert row["test loss"] < 0.8 * grid["test loss"]
        assert row["test accuracy"] > grid["test accuracy"] + 0.01
        pixels, noise = np.log(row["penalties"]).reshape(2, 64).mean(1)
        assert noise > pixels + 0.5


def test_learning_rate_and_momentum_are_found(tmp_path: Path) -> None:
    argv = ["--quiet", "--task", "learning-rate", "--strategy", "reverse", "--output", str(tmp_path)]
    grid, reverse = example.main(argv)["learning rate"]
    assert reverse["validation loss"] < 1.02 * grid["validation loss"]
    assert 0 < reverse["momentum"] < 1


def test_a_strategy_that_is_not_for_the_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.main(["--task", "penalties", "--strategy", "forward", "--output", str(tmp_path)])
    assert "none of the strategies forward is for the task penalties" in capsys.readouterr().err


def test_forward_and_reverse_mode_agree_on_the_learning_rate() -> None:
    data = example.noisy_digits(0)
    module = example.LearningRate(*data.sizes, lr=0.1, inner_steps=5)
    episode = Episode([example.tensors(data.train)], example.tensors(data.validation))
    forward, reverse = (
        hypergradient(module, strategy, episode).grads for strategy in (ForwardUnroll(), ReverseUnroll())
    )
    for name in ("log_lr", "momentum_logit"):
        assert forward[name].item() == pytest.approx(reverse[name].item(), rel=1e-3)
        assert forward[name].abs() > 1e-3


def test_the_implicit_gradient_does_not_see_a_learning_rate() -> None:
    data = example.noisy_digits(0)
    module = example.LearningRate(*data.sizes, lr=0.1)
    episode = Episode([example.tensors(data.train)], example.tensors(data.validation))
    with pytest.raises(MisconfigurationError, match=r"^Cannot use `ImplicitGradient` with an inner optimizer that"):
        hypergradient(module, ImplicitGradient(Neumann(5, step_size=0.1)), episode)


def test_the_noise_of_the_digits_is_their_own_pixels() -> None:
    data = example.noisy_digits(0)
    x = np.concatenate([part.x for part in (data.train, data.validation, data.test)])
    assert x.shape == (1797, 128)
    assert np.array_equal(np.sort(x[:, :64], axis=0), np.sort(x[:, 64:], axis=0))
    assert not np.array_equal(x[:, :64], x[:, 64:])


def test_newsgroups_from_a_file(tmp_path: Path) -> None:
    arrays = {"shape": np.array([7])}
    for name, n in (("train", 20), ("test", 6)):
        x = sparse_rows(n, 7, seed=n)
        arrays |= {f"{name}_data": x.data.astype(np.float16), f"{name}_indices": x.indices, f"{name}_indptr": x.indptr}
        arrays[f"{name}_y"] = np.arange(n, dtype=np.uint8) % 4
    np.savez(tmp_path / "tfidf4000.npz", **arrays)
    data = example.newsgroups(0, tmp_path)
    assert [part.x.shape for part in (data.train, data.validation, data.test)] == [(10, 7), (10, 7), (6, 7)]
    assert np.abs(data.test.x.toarray() - sparse_rows(6, 7, seed=6).toarray()).max() < 1e-3
    assert data.sizes[1] == 4


def test_newsgroups_from_scikit_learn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fetch(subset, data_home, normalize):
        assert data_home == tmp_path
        return SimpleNamespace(data=sparse_rows({"train": 20, "test": 6}[subset], 30), target=np.arange(20) % 4)

    monkeypatch.setattr(sklearn.datasets, "fetch_20newsgroups_vectorized", fetch)
    train, test = example.fetch_newsgroups(tmp_path, num_features=8)
    assert train.x.shape == (20, 8)
    assert test.x.shape == (6, 8)
    assert np.sqrt(train.x.multiply(train.x).sum(1)).max() == pytest.approx(1)


def test_newsgroups_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fetch(**options):
        raise OSError("no route")

    monkeypatch.setattr(sklearn.datasets, "fetch_20newsgroups_vectorized", fetch)
    with pytest.raises(FileNotFoundError, match=r"^Expected `tfidf4000.npz` in"):
        example.newsgroups(0, tmp_path)

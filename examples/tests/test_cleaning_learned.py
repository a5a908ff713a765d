"""What data cleaning learns: weights in a table, by a net of loss and label, or how labels go wrong."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cleaning import baselines
from cleaning.baselines import Examples, Task
from data_cleaning import WEIGHTS, CleaningData, DataCleaning, MatrixCleaning
from lightning_bilevel import Episode, ReverseUnroll, hypergradient

NUM_EXAMPLES, NUM_TRUSTED = 12, 6


def problem(weights: str, inner_steps: int, inside: bool) -> tuple[DataCleaning, Episode]:
    """Return a small module in float64, with outer parameters that are not all alike, and an episode."""
    generator = torch.Generator().manual_seed(0)
    module = WEIGHTS[weights](num_examples=NUM_EXAMPLES, num_pixels=3, inner_steps=inner_steps, inner_lr=0.5).double()
    with torch.no_grad():
        for parameter in module.outer_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def draw(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, 3, generator=generator, dtype=torch.float64)
        return x, torch.randint(10, (count,), generator=generator)

    (x, y), trusted = draw(NUM_EXAMPLES), draw(NUM_TRUSTED)
    index = torch.arange(NUM_EXAMPLES)
    if inside:
        x, y, index = (torch.cat(pair) for pair in zip((x, y, index), (*trusted, -torch.ones(6).long()), strict=True))
    return module, Episode([(x, y, index)], draw(NUM_TRUSTED))


def outer_loss_by_hand(module: DataCleaning, episode: Episode) -> float:
    """Return the outer loss after the inner steps, by plain gradient descent on the module itself."""
    before = {name: value.clone() for name, value in module.net.state_dict().items()}
    for _ in range(module.inner_steps):
        grads = torch.autograd.grad(module.inner_loss(episode.inner[0]), list(module.net.parameters()))
        with torch.no_grad():
            for parameter, grad in zip(module.net.parameters(), grads, strict=True):
                parameter.sub_(module.hparams.inner_lr * grad)
    loss = module.outer_loss(episode.outer).item()
    module.net.load_state_dict(before)
    return loss


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(("weights", "inner_steps"), [("table", 3), ("matrix", 3), ("net", 1)])
def test_hypergradients_agree_with_finite_differences(weights: str, inner_steps: int, inside: bool) -> None:
    """Those of the weight net do at one inner step: its losses are numbers, as in Meta-Weight-Net."""
    module, episode = problem(weights, inner_steps, inside)
    grads = hypergradient(module, ReverseUnroll(), episode).grads
    for name, parameter in module.named_parameters():
        if name not in grads:
            continue
        entries = parameter.data.view(-1)
        for entry in range(0, len(entries), max(1, len(entries) // 7)):
            value, found = entries[entry].item(), []
            for offset in (1e-5, -1e-5):
                entries[entry] = value + offset
                found.append(outer_loss_by_hand(module, episode))
            entries[entry] = value
            difference = (found[0] - found[1]) / 2e-5
            assert grads[name].view(-1)[entry].item() == pytest.approx(difference, rel=1e-5, abs=1e-9)


def test_trusted_examples_inside_count_as_their_share() -> None:
    module, episode = problem("table", 1, inside=True)
    x, y, index = episode.inner[0]
    noisy, trusted = slice(0, NUM_EXAMPLES), slice(NUM_EXAMPLES, None)
    parts = module.inner_loss((x[noisy], y[noisy], index[noisy])), module.outer_loss((x[trusted], y[trusted]))
    torch.testing.assert_close(module.inner_loss((x, y, index)), parts[0] + 0.3 * parts[1])


def test_the_data_put_trusted_examples_inside() -> None:
    data = CleaningData(num_train=40, num_validation=10, inside=True)
    data.setup()
    (batch,), (x, y) = next(iter(data.train_dataloader()))
    assert (batch[2] < 0).sum() == 10
    order = batch[2].argsort(stable=True)
    assert set(map(tuple, batch[0][order[:10]].tolist())) == set(map(tuple, x.tolist()))
    assert len(y) == 10


def test_labels_move_to_the_next_digit() -> None:
    moved, alike = CleaningData(moved=True, corruption=0.6), CleaningData(corruption=0.0)
    moved.setup()
    alike.setup()
    given, right = moved.train.tensors[1], alike.train.tensors[1]
    assert moved.is_wrong.float().mean() == pytest.approx(0.6)
    assert torch.equal(given, torch.where(moved.is_wrong, (right + 1) % 10, right))


def test_a_matrix_that_knows_tells_wrong_labels() -> None:
    """At a net that is certain, the logit is that of the matrix's probability of the label, or hopeless."""
    module = MatrixCleaning(num_pixels=10)
    module.net = torch.nn.Linear(10, 10, bias=False)
    with torch.no_grad():
        module.net.weight.copy_(30 * torch.eye(10))
        module.matrix.copy_((0.4 * torch.eye(10) + 0.6 * torch.eye(10).roll(1, 1) + 1e-9).log())
    x, y = torch.eye(10), torch.arange(10)
    assert (module.learned_logits(Examples(x, y)) > 10).all()
    assert (module.learned_logits(Examples(x, (y + 1) % 10)) < -10).all()


def test_the_matrix_starts_from_an_estimate() -> None:
    """Of each class, two in five labels are the next; a tenth of all alike is mixed in."""
    y = torch.arange(400) % 10
    x = torch.eye(10)[y]
    given = torch.where(torch.arange(400) // 10 % 5 < 2, (y + 1) % 10, y)
    task = Task(torch.nn.Linear(10, 10), Examples(x, given), Examples(torch.eye(10), torch.arange(10)), 900)
    module = MatrixCleaning(num_pixels=10)
    module.start_from(task)
    matrix = module.matrix.softmax(-1)
    torch.testing.assert_close(matrix.diagonal(), torch.full((10,), 0.9 * 0.6 + 0.01), atol=0.05, rtol=0)
    torch.testing.assert_close(matrix.roll(-1, 1).diagonal(), torch.full((10,), 0.9 * 0.4 + 0.01), atol=0.05, rtol=0)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_kind_runs(weights: str, tmp_path: Path) -> None:
    argv = ["--smoke", "--quiet", "--output", str(tmp_path), "--weights", weights, "--inside", "--moved"]
    argv += ["--num-train", "60", "--num-trusted", "20"]
    found = importlib.import_module("data_cleaning").main(argv)
    assert set(found["methods"]) == {
        *baselines.BASELINES,
        "learned, without trusted",
        "learned, with trusted",
        "right labels only",
    }
    assert all(0 <= value <= 1 for value in found["methods"].values())

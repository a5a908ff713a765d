"""What one would do about wrong labels without an outer level, given the same few trusted examples.

Every baseline trains the same net from the same start, by as many steps of gradient descent on all its examples. What
it chooses (when to stop, a rate, a share), it chooses by the accuracy on trusted examples that the net has not been
trained on. The test examples are not among the arguments.

>>> import torch
>>> x, y = torch.randn(6, 2), torch.arange(6) % 2
>>> task = Task(torch.nn.Linear(2, 2), Examples(x[:4], y[:4]), Examples(x[4:], y[4:]), steps=3)
>>> agreement(task)(x).shape
torch.Size([6, 2])
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MARKS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
"""Parts of all steps after which a net may be stopped."""

RATES = (0.03, 0.1, 0.3, 1.0)
"""Of fine-tuning, as parts of the rate."""

SHARES = (0.3, 0.4, 0.5)
"""Of the noisy examples that may be kept."""

IMPORTANCES = (1.0, 10.0, 30.0)
"""Weights of a trusted example beside those of the noisy ones."""

FOLDS = 5


class Examples(NamedTuple):
    """Examples, each with a weight or all alike.

    Attributes:
        x: (n, ...).
        y: (n,), labels.
        weights: (n,), not negative.
    """

    x: Tensor
    y: Tensor
    weights: Tensor | None = None

    def take(self, index: Tensor) -> Examples:
        """Return those at ``index``."""
        return Examples(self.x[index], self.y[index])

    def weighted(self, weights: Tensor | float) -> Examples:
        """Return the same with these weights."""
        return Examples(self.x, self.y, torch.as_tensor(weights).expand(len(self.y)).to(self.x))

    def __add__(self, other: Examples) -> Examples:  # type: ignore[override]
        """Return the examples of both."""
        first, second = (each if each.weights is not None else each.weighted(1.0) for each in (self, other))
        return Examples(*(torch.cat(pair) for pair in zip(first, second, strict=True)))


class Task(NamedTuple):
    """What a method may see.

    Attributes:
        start: the net before training; it is left as it is.
        noisy: examples, an unknown part of whose labels is wrong.
        trusted: examples whose labels are right.
        steps: of gradient descent, for one net.
        lr: its rate.
    """

    start: nn.Module
    noisy: Examples
    trusted: Examples
    steps: int
    lr: float = 1.0


Loss = Callable[[nn.Module], Tensor]


def cross_entropy(examples: Examples) -> Loss:
    """Return the mean loss of a net on examples, weighted where they have weights."""

    def loss(net: nn.Module) -> Tensor:
        losses = F.cross_entropy(net(examples.x), examples.y, reduction="none")
        if examples.weights is None:
            return losses.mean()
        return (examples.weights * losses).sum() / examples.weights.sum()

    return loss


def descent(start: nn.Module, loss: Loss, steps: int, lr: float, marks: Sequence[float] = (1,)) -> Iterator[nn.Module]:
    """Yield the net after these parts of all steps, from a copy of ``start``: the same net, trained on."""
    net = copy.deepcopy(start)
    optimizer = torch.optim.SGD(net.parameters(), lr)
    stops = {max(1, round(mark * steps)) for mark in marks}
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss(net).backward()
        optimizer.step()
        if step in stops:
            yield net


def train(task: Task, examples: Examples) -> nn.Module:
    """Return the net, trained on these examples instead."""
    (net,) = descent(task.start, cross_entropy(examples), task.steps, task.lr)
    return net


@torch.no_grad()
def accuracy(net: nn.Module, examples: Examples) -> float:
    """Return the share of examples that the net classifies as they are labelled."""
    return (net(examples.x).argmax(-1) == examples.y).float().mean().item()


def folds(examples: Examples, count: int) -> Iterator[tuple[Examples, Examples]]:
    """Yield what to train on and what is held out, ``count`` times; each example is held out once."""
    index = torch.arange(len(examples.y))
    for fold in range(min(count, len(index))):
        held_out = index % count == fold
        yield examples.take(~held_out), examples.take(held_out)


def stopped_early(task: Task) -> nn.Module:
    """Train on the noisy examples; stop where the trusted ones, unseen by the net, are classified best."""
    nets = descent(task.start, cross_entropy(task.noisy), task.steps, task.lr, MARKS)
    return max(map(copy.deepcopy, nets), key=lambda net: accuracy(net, task.trusted))


def together(task: Task) -> nn.Module:
    """Train on noisy and trusted examples at once; what a trusted one counts is chosen on a held-out half."""
    fit, held_out = next(folds(task.trusted, 2))

    def held_out_accuracy(importance: float) -> float:
        return accuracy(train(task, task.noisy + fit.weighted(importance)), held_out)

    return train(task, task.noisy + task.trusted.weighted(max(IMPORTANCES, key=held_out_accuracy)))


def fine_tuned(task: Task, pretrained: nn.Module | None = None) -> nn.Module:
    """Train on the noisy examples, then on the trusted ones; rate and steps are chosen by cross-validation.

    Args:
        task: the task.
        pretrained: the net to go on from; by default, the net after all steps on the noisy examples.
    """
    pretrained = pretrained or train(task, task.noisy)
    found: dict[tuple[float, float], float] = {(0, 0): FOLDS * accuracy(pretrained, task.trusted)}
    for fit, held_out in folds(task.trusted, FOLDS):
        for rate in RATES:
            nets = descent(pretrained, cross_entropy(fit), task.steps, rate * task.lr, MARKS)
            for mark, net in zip(MARKS, nets, strict=False):
                found[rate, mark] = found.get((rate, mark), 0) + accuracy(net, held_out)
    rate, mark = max(found, key=lambda choice: found[choice])
    steps = max(1, round(mark * task.steps))
    if not mark:
        return pretrained
    return next(descent(pretrained, cross_entropy(task.trusted), steps, rate * task.lr))


@torch.no_grad()
def agrees(net: nn.Module, noisy: Examples) -> Tensor:
    """Return which labels are those that the net would give."""
    return net(noisy.x).argmax(-1) == noisy.y


def agreement(task: Task, rounds: int = 1) -> nn.Module:
    """Keep the noisy examples with whose labels a net of the trusted ones agrees; train on them and the trusted ones.

    Args:
        task: the task.
        rounds: how often; from the second one on, the net of the round before is asked.
    """
    net = train(task, task.trusted)
    for _ in range(rounds):
        net = train(task, task.noisy.take(agrees(net, task.noisy)) + task.trusted)
    return net


@torch.no_grad()
def smallest(net: nn.Module, examples: Examples, share: float) -> Tensor:
    """Return the indices of the share of examples whose losses are the smallest."""
    losses = F.cross_entropy(net(examples.x), examples.y, reduction="none")
    return losses.argsort()[: max(1, round(share * len(losses)))]


def small_losses(task: Task, judge: Callable[[Task], nn.Module]) -> nn.Module:
    """Keep the noisy examples with the smallest losses under a judge; train on them and the trusted ones.

    The share is chosen on a held-out half of the trusted examples, which neither the judge nor the net has seen then.

    Args:
        task: the task.
        judge: from a task to the net whose losses count: :func:`stopped_early`, or :func:`trusted_alone`.
    """
    fit, held_out = next(folds(task.trusted, 2))
    half = task._replace(trusted=fit)
    half_judge = judge(half)

    def kept(task: Task, net: nn.Module, share: float) -> nn.Module:
        return train(task, task.noisy.take(smallest(net, task.noisy, share)) + task.trusted)

    share = max(SHARES, key=lambda share: accuracy(kept(half, half_judge, share), held_out))
    return kept(task, judge(task), share)


def trusted_alone(task: Task) -> nn.Module:
    """Train on the trusted examples."""
    return train(task, task.trusted)


def corruption_of(net: nn.Module, trusted: Examples) -> Tensor:
    """Return C (classes, classes), C[i, j] the probability that an example of class i is labelled j, row by row.

    It is the mean of what a net of the noisy labels says of the trusted examples of class i; without one, i itself.
    """
    said = net(trusted.x).softmax(-1).detach()
    corruption = torch.eye(said.shape[1]).to(said)
    for label in trusted.y.unique():
        corruption[label] = said[trusted.y == label].mean(0)
    return corruption


def through(corruption: Tensor, noisy: Examples, trusted: Examples) -> Loss:
    """Return the mean loss of a net that explains noisy labels by softmax(logits) C and trusted ones as they are."""

    def loss(net: nn.Module) -> Tensor:
        likelihood = (net(noisy.x).softmax(-1) @ corruption).gather(1, noisy.y.unsqueeze(1)).clamp_min(1e-6)
        right = F.cross_entropy(net(trusted.x), trusted.y, reduction="sum")
        return (right - likelihood.log().sum()) / (len(noisy.y) + len(trusted.y))

    return loss


def loss_correction(task: Task) -> nn.Module:
    """Train on the noisy labels through what is known of how labels go wrong: gold loss correction.

    After how many steps the net of the noisy labels is asked is chosen on a held-out half of the trusted examples.
    (Hendrycks, Mazeika, Wilson and Gimpel: Using Trusted Data to Train Deep Networks on Labels Corrupted by Severe
    Noise, NeurIPS 2018.)
    """
    nets = descent(task.start, cross_entropy(task.noisy), task.steps, task.lr, MARKS[2:])
    fit, held_out = next(folds(task.trusted, 2))

    def corrected(net: nn.Module, trusted: Examples) -> nn.Module:
        loss = through(corruption_of(net, trusted), task.noisy, trusted)
        return next(descent(task.start, loss, task.steps, task.lr))

    noisy_net = max(map(copy.deepcopy, nets), key=lambda net: accuracy(corrected(net, fit), held_out))
    return corrected(noisy_net, task.trusted)


BASELINES: dict[str, Callable[[Task], nn.Module]] = {
    "noisy": lambda task: train(task, task.noisy),
    "noisy, stopped early": stopped_early,
    "trusted alone": trusted_alone,
    "noisy and trusted": together,
    "noisy, then fine-tuned": fine_tuned,
    "agreement": agreement,
    "agreement, 3 rounds": lambda task: agreement(task, rounds=3),
    "small losses": lambda task: small_losses(task, stopped_early),
    "small losses, trusted net": lambda task: small_losses(task, trusted_alone),
    "loss correction": loss_correction,
}
"""From a name to a function from a task to a trained net."""

"""Seven hyperparameters of a perceptron by hypergradients, by random search and by TPE, in the same CPU seconds.

200 digits to train on, 200 to validate, the others to test; a net 64-128-128-10, trained by Adam for 300 steps of 64
images. Outer are the learning rate, a weight decay for each layer, noise on the images, label smoothing and mixup, all
on log scales between the ends in `RANGES`. Two ways to use a hypergradient, both from `DEFAULT`:

warm      an outer step after every 20 inner steps, of one long run that goes on (`ReverseUnroll`).
fresh     an outer step after 100 steps of a net that starts anew (`ReverseUnroll`).

The searches train a net for 300 steps at each point, `DEFAULT` the first of them, for as many CPU seconds as the slower
of these two takes. What is found is judged by three nets that are trained anew.

    python benchmarks/papers/few_hyperparameters.py
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from support import fits, script
from support.results import keep
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import report
from image_data import load_digits
from lightning_bilevel import Adam, BilevelModule, Episode, ReverseUnroll
from tuning.baselines import SEARCHES

RANGES = {
    "lr": (1e-4, 2e-2),
    "decay 0": (1e-6, 1e-1),
    "decay 1": (1e-6, 1e-1),
    "decay 2": (1e-6, 1e-1),
    "noise": (1e-3, 1.0),
    "smoothing": (1e-3, 0.6),
    "mixup": (1e-3, 0.6),
}
DEFAULT = {
    "lr": 1e-3,
    **dict.fromkeys(("decay 0", "decay 1", "decay 2"), 1e-4),
    **dict.fromkeys(("noise", "smoothing", "mixup"), 1e-2),
}
LOW, HIGH = (torch.tensor([ends[side] for ends in RANGES.values()]).log() for side in (0, 1))
STEPS, BATCH = 300, 64
"""Steps of a training, and images of a step."""


class Batch(NamedTuple):
    """Images, labels, and all that is drawn for a step: noise, and which other image each is mixed with."""

    x: Tensor
    y: Tensor
    noise: Tensor
    other: Tensor


class Data(NamedTuple):
    """Images and labels to train on, to validate and to test."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def digits(seed: int) -> Data:
    x, y, *_ = load_digits(seed, num_test=0)
    return Data(*((x[part], y[part]) for part in (slice(200), slice(200, 400), slice(400, None))))


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def batches(data: Data, generator: torch.Generator) -> Iterator[Batch]:
    """Yield batches without end."""
    x, y = data.train
    while True:
        index = torch.randint(len(y), (BATCH,), generator=generator)
        yield Batch(
            x[index], y[index], torch.randn(BATCH, 64, generator=generator), torch.randperm(BATCH, generator=generator)
        )


def training_loss(net: nn.Sequential, batch: Batch, at: dict[str, Tensor]) -> Tensor:
    """Return the loss of a training step at these hyperparameters."""

    def mixed(values: Tensor) -> Tensor:
        return (1 - at["mixup"]) * values + at["mixup"] * values[batch.other]

    targets = (1 - at["smoothing"]) * mixed(F.one_hot(batch.y, 10).float()) + at["smoothing"] / 10
    outputs = net(mixed(batch.x + at["noise"] * batch.noise))
    decay = sum(at[f"decay {i}"] * sum(each.square().sum() for each in net[2 * i].parameters()) for i in range(3))
    return -(targets * outputs.log_softmax(1)).sum(1).mean() + decay


def named(point: Tensor) -> dict[str, Tensor]:
    """Return hyperparameters by name, from a point of the unit cube."""
    return dict(zip(RANGES, (LOW + point * (HIGH - LOW)).exp(), strict=True))


def start() -> Tensor:
    """Return the point of `DEFAULT`."""
    return (torch.tensor(list(DEFAULT.values())).log() - LOW) / (HIGH - LOW)


class Tuned(BilevelModule):
    """A point of the unit cube is outer, a perceptron inner."""

    def __init__(self, inner_steps: int, inner_start: str, outer_lr: float) -> None:
        super().__init__(inner_steps=inner_steps, inner_start=inner_start)
        self.net, self.point, self.outer_lr = perceptron(), nn.Parameter(start()), outer_lr

    def inner_parameters(self):
        return self.net

    def outer_parameters(self):
        return [self.point]

    def inner_loss(self, batch: Batch) -> Tensor:
        return training_loss(self.net, batch, named(self.point))

    def outer_loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_inner_optimizer(self) -> Adam:
        return Adam(lr=named(self.point)["lr"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([self.point], lr=self.outer_lr)

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            self.point.clamp_(0, 1)


class Episodes(IterableDataset):
    """Episodes without end: so many steps, and all validation examples."""

    def __init__(self, data: Data, inner_steps: int, seed: int) -> None:
        self.data, self.inner_steps, self.seed = data, inner_steps, seed

    def __iter__(self) -> Iterator[Episode]:
        drawn = batches(self.data, torch.Generator().manual_seed(self.seed))
        while True:
            yield Episode([next(drawn) for _ in range(self.inner_steps)], self.data.validation)


class Setting(NamedTuple):
    """How a hypergradient is used: inner steps, outer steps, where a run starts, Adam's rate in the unit cube."""

    inner_steps: int
    outer_steps: int
    inner_start: str
    outer_lr: float


LEARNED = {"warm": Setting(20, 150, "warm", 0.03), "fresh": Setting(100, 20, "reinit", 0.05)}


def learned(data: Data, setting: Setting, seed: int, outer_steps: int | None) -> Tensor:
    """Return the point that hypergradients lead to."""
    pl.seed_everything(seed, verbose=False)
    module = Tuned(setting.inner_steps, setting.inner_start, setting.outer_lr)
    episodes = DataLoader(Episodes(data, setting.inner_steps, seed), batch_size=None)
    with report.screen():
        fits.fit(module, episodes, ReverseUnroll(), max_steps=outer_steps or setting.outer_steps, max_epochs=-1)
    return module.point.detach()


def trained(data: Data, point: Tensor, seed: int, steps: int) -> nn.Sequential:
    """Return a net that plain PyTorch trains at a point."""
    torch.manual_seed(seed)
    net, at = perceptron(), named(point)
    optimizer = torch.optim.Adam(net.parameters(), lr=at["lr"].item())
    drawn = batches(data, torch.Generator().manual_seed(seed))
    for _ in range(steps):
        optimizer.zero_grad()
        training_loss(net, next(drawn), at).backward()
        optimizer.step()
    return net


@torch.no_grad()
def loss(net: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    return F.cross_entropy(net(part[0]), part[1]).item()


@torch.no_grad()
def accuracy(net: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    return (net(part[0]).argmax(1) == part[1]).float().mean().item()


def worth(data: Data, point: Tensor, seed: int, steps: int) -> dict[str, Any]:
    """Return what three nets reach that are trained anew at a point."""
    nets = [trained(data, point, 1000 * (seed + 1) + number, steps) for number in range(3)]
    return {
        "validation loss": fmean(loss(net, data.validation) for net in nets),
        "test loss": fmean(loss(net, data.test) for net in nets),
        "test accuracy": fmean(accuracy(net, data.test) for net in nets),
        "at": {name: value.item() for name, value in named(point).items()},
    }


def compared(seed: int, steps: int, outer_steps: int | None) -> dict[str, Any]:
    """Return a row for each method."""
    data, found = digits(seed), {"default": (start(), 0.0)}
    for name, setting in LEARNED.items():
        began = time.process_time()
        point = learned(data, setting, seed, outer_steps)
        found[name] = point, time.process_time() - began
    budget = max(seconds for _, seconds in found.values())
    for name, search in SEARCHES.items():
        began = time.process_time()
        point, trials = search(
            lambda point: loss(trained(data, torch.tensor(point), seed, steps), data.validation),
            [(0.0, 1.0)] * len(RANGES),
            budget,
            seed,
            start().tolist(),
        )
        print(name, trials, "trials", flush=True)
        found[name] = torch.tensor(point), time.process_time() - began
    return {
        name: {"CPU seconds": seconds, **worth(data, point, seed, steps)} for name, (point, seconds) in found.items()
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script.options(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    parser.add_argument("--steps", type=int, default=STEPS, help="of a training (%(default)s)")
    parser.add_argument("--outer-steps", type=int, help="of both ways, in place of their own")
    args = script.begin(parser, argv)
    results: dict[str, Any] = {}
    for seed in args.seeds:
        found = compared(seed, args.steps, args.outer_steps)
        print(seed, {name: f"{row['validation loss']:.3f}" for name, row in found.items()}, flush=True)
        results = keep("few_hyperparameters", {"steps": args.steps, "default": DEFAULT}, found, str(seed))
    return results


if __name__ == "__main__":
    main()

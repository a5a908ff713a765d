"""Learn the representation under a regression or a classifier, with hypergradients of different cost.

The inner level fits a linear head, the outer level learns what is under it: a matrix, a net of two sigmoid layers, or
the body of a LeNet. The head is judged on data that it was not fitted to. PZOBO, HOZOG, both kinds of AID, stocBiO,
reverse mode and, to compare with, the gradient of the outer loss alone with the head held fixed (`first-order`) start
from the same point. Their losses and the norm of the exact hypergradient are drawn against steps and CPU seconds.

    python examples/hyper_representation.py
    python examples/hyper_representation.py --problem two-layer --strategy pzobo reverse --full
    python examples/hyper_representation.py --problem lenet --data-dir FOLDER_WITH_MNIST --seconds 60

`linear` and `two-layer` draw their data. `lenet` takes scikit-learn's digits, enlarged to 28×28, or MNIST. A third part
of the data, for the test numbers, is seen by neither level. PZOBO, arXiv 2110.07004, sections 4.1 and 4.2; settings
that the text leaves out are those of the published code.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import report
from image_data import load_digits, load_mnist
from lightning_bilevel import (
    PZOBO,
    SGD,
    BilevelModule,
    Episode,
    EpisodeLoader,
    FirstOrder,
    Hypergradient,
    HypergradientMonitor,
    HypergradientStrategy,
    ImplicitGradient,
    ReverseUnroll,
    ZerothOrder,
    tree,
)
from lightning_bilevel.directions import Gaussian
from lightning_bilevel.linear_solvers import ConjugateGradient, Neumann
from representation import baselines

Pair = tuple[Tensor, Tensor]
Curves = Mapping[str, tuple[list[int], list[float]]]


class Regression(BilevelModule):
    """A linear head (inner) on an embedding (outer): equation 8 of the paper.

    The inner run is gradient descent from one fixed start. The embedding does not change meanwhile, so that it is
    computed once, in :meth:`solve_inner`.

    Args:
        embedding: from (n, inputs) to (n, features).
        head: where the inner run starts, (features,).
        test: examples that neither level sees.
        inner_steps: of the head for each step of the embedding.
        inner_lr: learning rate of the head.
        outer_lr: of Adam for the embedding.
        penalty: γ of γ/2 ‖w‖² in the inner loss.
    """

    def __init__(
        self,
        embedding: nn.Module,
        head: Tensor,
        test: Pair,
        inner_steps: int,
        inner_lr: float,
        outer_lr: float,
        penalty: float,
    ) -> None:
        super().__init__(inner_steps=inner_steps, inner_start="reset")
        self.embedding, self.head = embedding, nn.Parameter(head)
        self.test, self.inner_lr, self.outer_lr, self.penalty = test, inner_lr, outer_lr, penalty

    def inner_parameters(self):
        return [self.head]

    def inner_loss(self, batch):
        return self.outer_loss(batch) + self.penalty / 2 * self.head.square().sum()

    def outer_loss(self, batch):
        x, y = batch
        return (self.embedding(x) @ self.head - y).square().mean() / 2

    def solve_inner(self, batches):
        (x, y), w = batches[0], self.head
        z = self.embedding(x)
        for _ in range(self.inner_steps):
            w = w - self.inner_lr * (z.T @ (z @ w - y) / len(y) + self.penalty * w)
        return {"head": w}

    def exact_loss(self, episode: Episode) -> Tensor:
        """Return Φ, the outer loss with the head that minimizes the inner one: a ridge regression, in closed form."""
        (x, y), (outer_x, outer_y) = episode.inner[0], episode.outer
        z = self.embedding(x)
        gram = z.T @ z / len(y) + self.penalty * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        w = torch.linalg.solve(gram, z.T @ y / len(y))
        return (self.embedding(outer_x) @ w - outer_y).square().mean() / 2

    def configure_optimizers(self):
        return torch.optim.Adam(self.embedding.parameters(), lr=self.outer_lr)

    def judge(self, episode: Episode) -> dict[str, float]:
        """Return what the embedding is worth at present: Φ, ‖∇Φ‖, and the loss on the test examples."""
        with torch.enable_grad():
            loss = self.exact_loss(episode)
            grads = torch.autograd.grad(loss, list(self.embedding.parameters()))
        held_out = [part.to(self.device) for part in self.test]
        with torch.no_grad(), self.adapted(episode.inner):
            test = self.outer_loss(held_out).item()
        norm = math.sqrt(sum(grad.square().sum().item() for grad in grads))
        return {"exact_loss": loss.item(), "exact_norm": norm, "test_loss": test}


class LeNet(BilevelModule):
    """The last layer of a LeNet (inner) on the layers before it (outer), on mini-batches.

    The head goes on from where it was. It starts at zero, and a penalty makes its loss strongly convex. Features end in
    tanh: with entries in [-1, 1] the Hessian of the head has eigenvalues below 85/2 + γ, so that the learning rate can
    be chosen once. With a ReLU the outer level makes features so long that gradient descent on the head, and with it
    the Neumann series, becomes unstable.

    Args:
        test: images that neither level sees.
        inner_steps: of the head for each step of the body.
        inner_lr: learning rate of the head.
        outer_lr: of Adam for the body.
        penalty: γ of γ/2 ‖w‖² in the inner loss.
    """

    def __init__(self, test: Pair, inner_steps: int, inner_lr: float, outer_lr: float, penalty: float) -> None:
        super().__init__(inner_steps=inner_steps)
        self.body = nn.Sequential(
            nn.Conv2d(1, 6, 5, padding=2),  # 28×28 is then what LeNet's 32×32 is without
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 120, 5),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(120, 84),
            nn.Tanh(),
        )
        self.head = nn.Linear(84, 10)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.test, self.inner_lr, self.outer_lr, self.penalty = test, inner_lr, outer_lr, penalty

    def inner_parameters(self):
        return self.head

    def inner_loss(self, batch):
        return self.outer_loss(batch) + self.penalty / 2 * sum(p.square().sum() for p in self.head.parameters())

    def outer_loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.head(self.body(x)), y)

    def configure_inner_optimizer(self):
        return SGD(lr=self.inner_lr)

    def configure_optimizers(self):
        return torch.optim.Adam(self.body.parameters(), lr=self.outer_lr)

    def judge(self, episode: Episode) -> dict[str, float]:
        """Return the accuracy on the test images, with the head that the coming outer step will use."""
        x, y = (part.to(self.device) for part in self.test)
        with torch.no_grad(), self.adapted(episode.inner):
            found = torch.cat([self.head(self.body(part)).argmax(1) for part in x.split(1000)])
        return {"test_accuracy": (found == y).float().mean().item()}


class Watch(HypergradientMonitor):
    """Keeps the CPU seconds of a run, compares its estimates with the exact ones, and ends it when its time is up.

    What is logged at a step belongs to the outer parameters before it, and so do the seconds. Comparing and judging is
    not part of them.

    Args:
        every_n_steps: steps from one comparison to the next.
        seconds: the time of the run.
    """

    def __init__(self, every_n_steps: int, seconds: float) -> None:
        super().__init__(every_n_steps=every_n_steps, samples=0)
        self.limit, self.seconds, self._began, self._compared = seconds, 0.0, 0.0, 0.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        metrics = pl_module.judge(batch) if batch_idx % self.every_n_steps == 0 else {}
        pl_module.log_dict({**metrics, "cpu_seconds": self.seconds}, batch_size=1)
        self._began, self._compared = time.process_time(), 0.0

    def compare(self, strategy, estimate, again):
        began, references = time.process_time(), []

        def kept(*which: Any) -> Hypergradient:
            references.append(again(*which))
            return references[-1]

        metrics = super().compare(strategy, estimate, kept)
        metrics["true_norm"] = tree.norm(references[0].grads)
        self._compared += time.process_time() - began
        return metrics

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seconds += time.process_time() - self._began - self._compared
        trainer.should_stop |= self.seconds >= self.limit


class Unit(Gaussian):
    """Gaussian directions of which each tensor is cut to length 1, as the published code of PZOBO has it.

    E[u uᵀ] is then not I: along a tensor of p entries the response counts 1/p of what it should.
    """

    def draw(self, key, start, stop, like):
        directions = super().draw(key, start, stop, like)
        return {name: u / u.flatten(1).norm(dim=1).view(-1, *[1] * (u.dim() - 1)) for name, u in directions.items()}


class Setting(NamedTuple):
    """What a problem is run with.

    Attributes:
        strategies: those that the problem is run with.
        steps: outer steps.
        every: steps from one comparison with the exact hypergradient to the next.
        inner_steps: N.
        inner_lr: learning rate of the head, and the step of the Neumann series.
        outer_lr: of Adam.
        penalty: γ.
        mu: μ of finite differences along Gaussian directions.
        mu_unit: and along those of length 1.
        outer_lrs: learning rates that differ, by strategy.
        more_inner_steps: N where it differs, by strategy.
    """

    strategies: Sequence[str]
    steps: int
    every: int
    inner_steps: int
    inner_lr: float
    outer_lr: float
    penalty: float
    mu: float
    mu_unit: float
    outer_lrs: Mapping[str, float] = {}
    more_inner_steps: Mapping[str, int] = {}


SHALLOW = ("reverse", "aid-fp", "aid-cg", "pzobo", "pzobo-unit", "hozog", "first-order")
PROBLEMS = {
    "linear": Setting(
        SHALLOW,
        steps=100,
        every=5,
        inner_steps=20,
        inner_lr=0.001,
        outer_lr=0.05,
        penalty=0.1,
        mu=0.02,
        mu_unit=0.01,
        outer_lrs={"hozog": 0.1, "pzobo": 0.1},
    ),
    "two-layer": Setting(
        SHALLOW,
        steps=100,
        every=10,
        inner_steps=10,
        inner_lr=0.001,
        outer_lr=0.01,
        penalty=0.001,
        mu=0.01,
        mu_unit=0.1,
        outer_lrs={"hozog": 0.2, "pzobo": 0.2},
        more_inner_steps={"aid-cg": 30},
    ),
    "lenet": Setting(
        ("reverse", "aid-fp", "aid-cg", "stocbio", "pzobo", "pzobo-unit", "hozog", "first-order"),
        steps=60,
        every=10,
        inner_steps=10,
        inner_lr=0.04,
        outer_lr=0.001,
        penalty=0.001,
        mu=0.001,
        mu_unit=0.01,
    ),
}
"""All but the penalty and the inner learning rate of `lenet`, `mu`, and the larger rate of `pzobo` is published."""

STRATEGIES: dict[str, Callable[[Setting], HypergradientStrategy]] = {
    "reverse": lambda s: ReverseUnroll(),
    "aid-fp": lambda s: ImplicitGradient(Neumann(s.inner_steps, step_size=s.inner_lr)),
    "aid-cg": lambda s: ImplicitGradient(ConjugateGradient(s.inner_steps, tol=1e-4)),
    "stocbio": lambda s: ImplicitGradient(Neumann(3, step_size=s.inner_lr)),
    "pzobo": lambda s: PZOBO(mu=s.mu),
    "pzobo-unit": lambda s: PZOBO(mu=s.mu_unit, directions=Unit()),
    "hozog": lambda s: ZerothOrder(mu=s.mu),
    "first-order": lambda s: FirstOrder(),
}
SPARE = {"stocbio": 2}
"""Inner batches of their own for the Hessian products and for the mixed one."""


class TwoLayers(nn.Module):
    """X ↦ σ(σ(X A) B)."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(first), nn.Parameter(second)

    def forward(self, x):
        return torch.sigmoid(torch.sigmoid(x @ self.first) @ self.second)


class Matrix(nn.Module):
    """X ↦ X A."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, x):
        return x @ self.matrix


def synthetic(name: str, setting: Setting, outer_lr: float, full: bool, seed: int) -> tuple[Regression, Episode]:
    """Return a regression on data that an embedding of the same kind made, and its one episode.

    All is drawn from N(0, 1): inputs, embedding and head of the data, and the start; and noise of scale 0.1.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if name == "linear":
        n, sizes, kind = 500, (64, 128), Matrix
    else:
        n, sizes, kind = (5000, (256, 512, 256), TwoLayers) if full else (500, (64, 128, 64), TwoLayers)

    def embedding() -> nn.Module:
        return kind(*(normal(*pair) for pair in itertools.pairwise(sizes)))

    truth, head = embedding(), normal(sizes[-1])
    with torch.no_grad():
        parts = [(x := normal(n, sizes[0]), truth(x) @ head + 0.1 * normal(n)) for _ in range(3)]
    inner, outer, test = parts
    rates = (setting.inner_steps, setting.inner_lr, outer_lr, setting.penalty)
    return Regression(embedding(), normal(sizes[-1]), test, *rates), Episode([inner], outer)


class Images(NamedTuple):
    """Images (n, 1, 28, 28) and labels, for the two levels and for the test."""

    inner: Pair
    outer: Pair
    test: Pair
    batch_size: int


def images(folder: Path | None, seed: int) -> Images:
    """Return digits, 650 for each level and 497 to test, or MNIST, 10,000, 50,000 and the 10,000 of its test set."""
    split = load_digits(seed) if folder is None else load_mnist(folder)
    if folder is None:
        train_x, test_x = (
            F.interpolate(x.view(-1, 1, 8, 8), size=28, mode="bilinear") for x in (split.train_x, split.test_x)
        )
        size, batch_size = 650, 64
    else:
        train_x, test_x = split.train_x[:, None], split.test_x[:, None]
        size, batch_size = 10_000, 256
    mean, scale = train_x.mean(), train_x.std()
    train_x, test_x = (train_x - mean) / scale, (test_x - mean) / scale
    order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(seed))
    inner, outer = ((train_x[part], split.train_y[part]) for part in (order[:size], order[size:]))
    return Images(inner, outer, (test_x, split.test_y), batch_size)


def batches(pair: Pair, size: int, count: int, seed: int) -> DataLoader:
    """Return a loader of ``count`` batches drawn without replacement, pass after pass."""
    dataset = TensorDataset(*pair)
    generator = torch.Generator().manual_seed(seed)
    order = RandomSampler(dataset, num_samples=size * count, generator=generator)
    return DataLoader(dataset, sampler=BatchSampler(order, size, drop_last=True), batch_size=None)


def prepare(name: str, strategy: str, setting: Setting, args: argparse.Namespace) -> tuple[BilevelModule, Any]:
    """Return the module and the loader of one run; those of other strategies start alike."""
    outer_lr = setting.outer_lrs.get(strategy, setting.outer_lr)
    if name != "lenet":
        module, episode = synthetic(name, setting, outer_lr, args.full, args.seed)
        return module, DataLoader([episode] * setting.steps, batch_size=None)
    data = images(args.data_dir, args.seed)
    pl.seed_everything(args.seed, verbose=False)
    count = setting.inner_steps + SPARE.get(strategy, 0)
    loader = EpisodeLoader(
        inner=batches(data.inner, data.batch_size, count * setting.steps, args.seed),
        outer=batches(data.outer, data.batch_size, setting.steps, args.seed + 1),
        inner_batches=count,
    )
    return LeNet(data.test, setting.inner_steps, setting.inner_lr, outer_lr, setting.penalty), loader


def learn(name: str, strategy: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one strategy on one problem; return its curves and what they come to."""
    setting = PROBLEMS[name]
    setting = setting._replace(inner_steps=setting.more_inner_steps.get(strategy, setting.inner_steps))
    chosen = {key: value for key in ("steps", "every", "inner_steps") if (value := getattr(args, key)) is not None}
    setting = setting._replace(**chosen)
    module, loader = prepare(name, strategy, setting, args)
    pl.seed_everything(args.seed, verbose=False)
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[STRATEGIES[strategy](setting), Watch(setting.every, args.seconds)],
        accelerator=args.accelerator,
        logger=CSVLogger(args.output, name=f"log/{name}-{strategy}", version=""),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=not args.quiet,
    )
    with warnings.catch_warnings():
        # That N iterations do not meet the tolerance is known, and that HOZOG's first difference may round to zero: the
        # head of the LeNet starts at zero, and its loss hardly depends on the body yet.
        warnings.filterwarnings("ignore", "`ConjugateGradient.*reached a relative residual")
        warnings.filterwarnings("ignore", "The first hypergradient is exactly zero")
        trainer.fit(module, loader)
    curves = measured(report.logged(trainer.logger.log_dir), setting.every)
    row = {
        "problem": name,
        "title": title_of(name, args),
        "strategy": strategy,
        "seed": args.seed,
        "inner_steps": setting.inner_steps,
    }
    row["outer_parameters"] = sum(parameter.numel() for parameter in module.outer_parameters())
    return {**row, **summary(curves), "curves": curves}


def without(name: str, seconds: float, args: argparse.Namespace) -> dict[str, Any]:
    """Return what one level leads to: ridge regression on the inputs, or body and head trained for as many seconds."""
    row = {"problem": name, "seed": args.seed, "inner_steps": 0, "title": title_of(name, args)}
    began = time.process_time()
    if name != "lenet":
        module, episode = synthetic(name, PROBLEMS[name], 0.0, args.full, args.seed)
        row |= {"strategy": "ridge", **baselines.ridge(episode.inner[0], episode.outer, module.test)}
    else:
        data = images(args.data_dir, args.seed)
        module, _ = prepare(name, "reverse", PROBLEMS[name]._replace(steps=1), args)
        both = torch.cat([data.inner[0], data.outer[0]]), torch.cat([data.inner[1], data.outer[1]])
        net = nn.Sequential(module.body, module.head)
        batch_size = data.batch_size
        began = time.process_time()
        baselines.jointly(net, net.parameters(), F.cross_entropy, both, batch_size, seconds, args.seed)
        with torch.no_grad():
            outer = torch.cat([net(part) for part in data.outer[0].split(1000)])
            found = torch.cat([net(part).argmax(1) for part in data.test[0].split(1000)])
        accuracy = (found == data.test[1]).float().mean().item()
        row |= {"strategy": "jointly", "test_accuracy": accuracy}
        row["outer_loss"] = F.cross_entropy(outer, data.outer[1]).item()
    return {**row, "CPU seconds": time.process_time() - began}


def title_of(name: str, args: argparse.Namespace) -> str:
    on = "" if name != "lenet" else " on MNIST" if args.data_dir else " on digits"
    return TITLES[name] + on


def measured(logged: Curves, every: int) -> Curves:
    """Return the curves at the steps that they were measured at: Lightning repeats them at all steps that follow."""
    each = {"cpu_seconds", "hypergradient_norm", "outer_loss"}
    return {name: curve if name in each else (curve[0][::every], curve[1][::every]) for name, curve in logged.items()}


def summary(curves: Curves) -> dict[str, float | None]:
    """Return the last values of the curves, mean cosine and milliseconds of a step, and if and when a mark was reached.

    The mark is 1% of the first outer loss, or where there is a test accuracy, one of 85%.
    """
    seconds = dict(zip(*curves["cpu_seconds"], strict=True))
    values = {name: curves[name][1][-1] for name in ("exact_loss", "test_loss", "test_accuracy") if name in curves}
    steps, losses = curves["outer_loss"]
    if "test_accuracy" in curves:
        reached = [step for step, value in zip(*curves["test_accuracy"], strict=True) if value >= 0.85]
        values["outer_loss"] = float(np.mean(losses[-10:]))  # of mini-batches
    else:
        reached = [step for step, value in zip(steps, losses, strict=True) if value <= losses[0] / 100]
        values["outer_loss"] = losses[-1]
        values["first_exact_loss"] = curves["exact_loss"][1][0]
    return {
        **values,
        "cosine": float(np.mean(curves["hypergradient_cosine"][1])),
        "milliseconds": 1000 * seconds[steps[-1]] / max(1, steps[-1]),
        "seconds_to_mark": seconds[reached[0]] if reached else None,
    }


LINES: dict[str, dict[str, Any]] = {
    "reverse": {"color": report.BLUE, "lw": 2.5},
    "aid-fp": {"color": "#56B4E9", "lw": 1.5},
    "aid-cg": {"color": report.GREEN, "lw": 1.5},
    "stocbio": {"color": "#CC79A7", "lw": 1.5},
    "pzobo": {"color": report.VERMILION, "lw": 1.5, "ls": (0, (1, 1))},
    "pzobo-unit": {"color": report.VERMILION, "lw": 3},
    "hozog": {"color": "#E69F00", "lw": 1.5},
    "first-order": {"color": "black", "lw": 1.2, "ls": (0, (3, 3))},
}
"""`pzobo-unit` and `first-order` nearly coincide: the dashes of one lie on the other."""

TITLES = {"linear": "Linear embedding", "two-layer": "Two-layer net", "lenet": "LeNet"}


def draw(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw a line of panels for each title; rows that differ in their seed make a band around a mean."""
    titles = list(dict.fromkeys(row["title"] for row in rows))
    figure = Figure(figsize=(11, 3.6 * len(titles)))
    for panels, title in zip(figure.subplots(len(titles), 3, squeeze=False), titles, strict=True):
        mine = [row for row in rows if row["title"] == title]
        deep = mine[0]["problem"] == "lenet"
        score = "test_accuracy" if deep else "outer_loss"
        for strategy in dict.fromkeys(row["strategy"] for row in mine):
            curves = [row["curves"] for row in mine if row["strategy"] == strategy]
            for axes, name in zip(panels, ("outer_loss", score, "true_norm"), strict=True):
                line(axes, curves, name, seconds=axes is not panels[0], label=strategy, **LINES[strategy])
        panels[0].set(title=f"{title}: outer loss", xlabel="outer step", yscale="log")
        panels[1].set(title="Outer loss", xlabel="CPU seconds", yscale="log")
        panels[2].set(title="Norm of the exact hypergradient", xlabel="CPU seconds", yscale="log")
        if deep:
            panels[1].set(title="Test accuracy (%)", yscale="linear")
        else:
            for axes in panels[:2]:
                exact = float(np.mean([row["first_exact_loss"] for row in mine]))
                axes.axhline(exact, color=report.GREY, ls="--", lw=1, label="exact head at the start")
        handles = panels[0].get_legend_handles_labels()
        panels[2].legend(*handles, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.savefig(path)


def line(axes: Any, curves: Sequence[Curves], name: str, seconds: bool, **style: Any) -> None:
    """Draw the mean of some runs, and where there are several, a band from the least to the largest."""
    steps = min((each[name][0] for each in curves), key=len)
    times = [dict(zip(*each["cpu_seconds"], strict=True)) for each in curves]
    x = [float(np.mean([each[step] for each in times])) for step in steps] if seconds else steps
    y = np.array([each[name][1][: len(steps)] for each in curves])
    if name == "test_accuracy":
        y, middle = 100 * y, 100 * y.mean(0)
    else:
        y = np.array([smooth(each) for each in y]) if "test_accuracy" in curves[0] and name == "outer_loss" else y
        middle = np.exp(np.log(y).mean(0))
    axes.plot(x, middle, **style)
    if len(y) > 1:
        axes.fill_between(x, y.min(0), y.max(0), color=style["color"], alpha=0.15, lw=0)


def smooth(values: np.ndarray, width: int = 9) -> np.ndarray:
    """Return running means over what there is of ``width`` neighbours."""
    window = np.ones(min(width, len(values)))
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a run, with what they lead to as ``cases``: pairs of a problem and a strategy."""
    parser = report.options(__doc__)
    parser.add_argument("--problem", choices=PROBLEMS, nargs="+", default=list(PROBLEMS), help="some of them (all)")
    parser.add_argument(
        "--strategy", choices=STRATEGIES, nargs="+", default=list(STRATEGIES), help="some of them (all)"
    )
    parser.add_argument("--data-dir", type=Path, help="folder with the four MNIST files, for lenet")
    parser.add_argument(
        "--full", action="store_true", help="two-layer in the paper's size: 5,000 examples, 256-512-256"
    )
    parser.add_argument("--steps", type=int, help="outer steps (100; 60 for lenet)")
    parser.add_argument("--inner-steps", type=int, help="inner steps for each outer step")
    parser.add_argument("--every", type=int, help="steps from one comparison with the exact hypergradient to the next")
    parser.add_argument("--seconds", type=float, default=math.inf, help="CPU seconds after which a run ends (none)")
    parser.add_argument("--accelerator", default="cpu", help="for the Trainer (%(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    args.cases = [(name, each) for name in args.problem for each in PROBLEMS[name].strategies if each in args.strategy]
    if not args.cases:
        parser.error(f"none of the strategies {', '.join(args.strategy)} is for {', '.join(args.problem)}")
    if args.smoke:
        args.steps, args.every, args.inner_steps = args.steps or 2, args.every or 2, args.inner_steps or 5
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; return its results."""
    args = arguments(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    with report.screen():
        rows = [learn(*case, args) for case in args.cases]
        others = [without(name, longest(rows, name), args) for name in dict(args.cases)]
        path = args.output / "hyper_representation.png"
        draw(path, rows)
    results = {"seed": args.seed, "rows": rows, "without": others}
    report.write_json(path.with_suffix(".json"), results)
    show(rows + others, [path, path.with_suffix(".json")])
    return results


def longest(rows: Sequence[Mapping[str, Any]], problem: str) -> float:
    """Return the CPU seconds of the slowest run of a problem."""
    curves = [row["curves"]["cpu_seconds"][1] for row in rows if row["problem"] == problem]
    return max(curve[-1] for curve in curves)


def show(rows: Sequence[Mapping[str, Any]], files: Sequence[Path]) -> None:
    """Print a table for each problem."""
    for problem in dict.fromkeys(row["problem"] for row in rows):
        mine = [row for row in rows if row["problem"] == problem]
        deep = problem == "lenet"
        keys = ("outer_loss", "test_accuracy") if deep else ("outer_loss", "exact_loss", "test_loss")
        mark = "s to 85%" if deep else "s to 1%"
        cells = [[row["strategy"], *(f"{row[key]:.3g}" if key in row else "" for key in keys)] for row in mine]
        for row, line in zip(mine, cells, strict=True):
            if "cosine" in row:
                mark_at = "-" if row["seconds_to_mark"] is None else f"{row['seconds_to_mark']:.2f}"
                line += [f"{row['cosine']:.2f}", f"{row['milliseconds']:.1f}", mark_at]
        columns = ["strategy", *(key.replace("_", " ") for key in keys), "cosine", "ms a step", mark]
        report.print_table(f"{mine[0]['title']}, {mine[0]['outer_parameters']:,} outer parameters", columns, cells)
    for file in files:
        print(f"wrote {file}")


if __name__ == "__main__":
    main()

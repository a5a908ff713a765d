"""Learn a start from which a net draws an unseen digit in three steps.

A small net takes the coordinates of a pixel and returns its ink: trained on the pixels of one image, it draws that
image. From an ordinary start that takes a hundred gradient steps. Here the start and the learning rate are learned, on
1,200 digits, such that *three* steps of plain gradient descent draw a digit (MAML; Tancik et al., CVPR 2021).

    python examples/learned_start.py
    python examples/learned_start.py --strategy first-order
    python examples/learned_start.py --data-dir FOLDER_WITH_MNIST --width 128

The same net is trained on the same digits from other starts as well: torch's own, and one that was trained on all
1,200 digits for up to as many seconds as the learned one. For each number of steps these take the optimizer (SGD, SGD
with momentum, Adam), rate and schedule, and the length of that training, that are best there on validation digits. The
last layer can also be solved for, by ridge regression, and two answers need no net: the mean digit, and the nearest of
the 1,200. All are judged on digits that none has seen, by the peak signal-to-noise ratio in dB (10 more is a tenth of
the squared error).
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product, starmap
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils.data import DataLoader

import report
from image_data import load_digits, load_mnist
from lightning_bilevel import SGD, BilevelModule, Episode, FirstOrder, HypergradientStrategy, ReverseUnroll

COLUMNS = (1, 2, 3, 10)
"""Steps after which all are compared; the learned start is learned for three."""

STRATEGIES: dict[str, Callable[[], HypergradientStrategy]] = {"reverse": ReverseUnroll, "first-order": FirstOrder}
OURS, PRETRAINED, PLAIN = "learned start and rate", "trained on all digits", "torch's own start"
LAST, MEAN, NEAREST = "trained on all, last layer solved", "the mean digit", "the nearest digit"


class LearnedStart(BilevelModule):
    """A net of pixel coordinates: its start and rate are outer, what it becomes on one image is inner.

    Args:
        side: pixels along an edge of an image.
        width: of the hidden layers.
        frequencies: random ones, whose sines and cosines the net sees (Tancik et al., NeurIPS 2020).
        inner_steps: steps on an image.
        outer_lr: learning rate of the start and of the logarithm of the rate.
    """

    def __init__(
        self, side: int = 8, width: int = 32, frequencies: int = 16, inner_steps: int = 3, outer_lr: float = 2e-3
    ) -> None:
        super().__init__(inner_steps=inner_steps, inner_start="reset")
        self.save_hyperparameters()
        axis = torch.linspace(0, 1, side)
        waves = torch.cartesian_prod(axis, axis) @ (4 * math.pi * torch.randn(2, frequencies))
        self.register_buffer("pixels", torch.cat([waves.sin(), waves.cos()], 1))
        sizes = (2 * frequencies, width, width)
        hidden = [part for a, b in zip(sizes, sizes[1:], strict=False) for part in (nn.Linear(a, b), nn.ReLU())]
        self.net = nn.Sequential(*hidden, nn.Linear(width, 1))
        self.log_lr = nn.Parameter(torch.tensor(0.1).log())

    def inner_parameters(self):
        return self.net

    def outer_parameters(self):
        return [*self.net.parameters(), self.log_lr]

    def inner_loss(self, image):
        return (self.net(self.pixels).flatten() - image).square().mean()

    outer_loss = inner_loss

    def configure_inner_optimizer(self):
        return SGD(lr=self.log_lr.exp())

    def configure_optimizers(self):
        return torch.optim.Adam(self.outer_parameters(), lr=self.hparams.outer_lr)

    def episodes(self, batch):
        return [Episode([image], image) for image in batch]

    @torch.no_grad()
    def drawn(self, images: Tensor, steps: Iterable[int]) -> Tensor:
        """Return what the learned start draws of each image (n, pixels), after each number of steps."""
        stages = []
        for count in steps:
            pictures = []
            for image in images:
                with self.adapted([image], steps=count):
                    pictures.append(self.net(self.pixels).flatten())
            stages.append(torch.stack(pictures))
        return torch.stack(stages)


class Images(NamedTuple):
    """Images (n, pixels) with ink in [0, 1]."""

    train: Tensor
    validation: Tensor
    test: Tensor

    @classmethod
    def load(cls, folder: Path | None, seed: int) -> Images:
        """Return 1,200 to learn from, 100 to choose rates by and 200 to judge by."""
        split = load_mnist(folder) if folder else load_digits(seed, num_test=597)
        train, rest = split.train_x.flatten(1), split.test_x.flatten(1)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        return cls(train[order[:1200]], rest[:100], rest[100:300])


class Rule(NamedTuple):
    """How a net is trained on one image."""

    optimizer: str
    lr: float
    decay: bool

    def make(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """Return the optimizer."""
        kinds = {"SGD": (torch.optim.SGD, {}), "momentum": (torch.optim.SGD, {"momentum": 0.9})}
        kind, options = kinds.get(self.optimizer, (torch.optim.Adam, {}))
        return kind(parameters, self.lr, **options)


RATES = {"SGD": (0.03, 3.0), "momentum": (0.01, 1.0), "Adam": (0.001, 0.1)}
"""Least and largest rate that is tried; seven are."""


def rules() -> list[Rule]:
    """Return all that are tried."""
    tried = []
    for (name, (low, high)), decay in product(RATES.items(), (False, True)):
        tried += [Rule(name, low * (high / low) ** (i / 6), decay) for i in range(7)]
    return tried


def psnr(drawn: Tensor, images: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of each picture (..., pixels)."""
    return -10 * (drawn - images).square().mean(-1).clamp(min=1e-12).log10()


def trained(module: LearnedStart, images: Tensor, rule: Rule, steps: int) -> Tensor:
    """Return what is drawn of each image (n, pixels), (steps + 1, n, pixels): the rule from the module's net as it is.

    All images are taken at once: each has a copy of the net, and the optimizers, which are elementwise, do not notice.
    """
    parameters = {name: p.detach().expand(len(images), *p.shape).clone() for name, p in module.net.named_parameters()}
    optimizer = rule.make([p.requires_grad_() for p in parameters.values()])
    stages: list[Tensor] = []
    for step in range(steps + 1):
        drawn = vmap(lambda each: functional_call(module.net, each, module.pixels).flatten())(parameters)
        stages.append(drawn.detach())
        optimizer.zero_grad()
        (drawn - images).square().mean(-1).sum().backward()
        optimizer.param_groups[0]["lr"] = rule.lr * (1 - step / steps if rule.decay else 1.0)
        optimizer.step()
    return torch.stack(stages)


class Choice(NamedTuple):
    """A start and a rule."""

    start: LearnedStart
    rule: Rule


def best(starts: Sequence[LearnedStart], images: Tensor) -> dict[int, Choice]:
    """Return, for each of ``COLUMNS``, the start and the rule that draw best by then."""
    found: dict[int, tuple[float, Choice]] = {}
    for choice in starmap(Choice, product(starts, rules())):
        whole = None if choice.rule.decay else trained(choice.start, images, choice.rule, max(COLUMNS))
        for steps in COLUMNS:
            end = trained(choice.start, images, choice.rule, steps)[-1] if whole is None else whole[steps]
            score = psnr(end, images).mean().item()
            if score > found.get(steps, (-math.inf, choice))[0]:  # no when it is nan
                found[steps] = score, choice
    return {steps: choice for steps, (_, choice) in found.items()}


def pretrain(start: LearnedStart, images: Tensor, seconds: float) -> list[LearnedStart]:
    """Train the net on all images for so many CPU seconds; return it at a twentieth, at a fifth, and at the end."""
    module, stages = copy.deepcopy(start), []
    optimizer = torch.optim.Adam(module.net.parameters(), lr=1e-3)
    began = time.process_time()
    for share in (0.05, 0.2, 1.0):
        while time.process_time() < began + share * seconds:
            for _ in range(20):
                batch = images[torch.randint(len(images), (64,))]
                optimizer.zero_grad()
                (module.net(module.pixels).flatten() - batch).square().mean().backward()
                optimizer.step()
        stages.append(copy.deepcopy(module))
    return stages


@torch.no_grad()
def solved(module: LearnedStart, images: Tensor, ridge: float) -> Tensor:
    """Return what is drawn with the last layer solved for: ridge regression to the image, around where it was."""
    features = module.net[:-1](module.pixels)
    features = torch.cat([features, torch.ones(len(features), 1)], 1)
    start = module.net(module.pixels).T
    gram = features.T @ features + ridge * torch.eye(features.shape[1])
    return start + (images - start) @ features @ torch.linalg.solve(gram, features.T)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Learn a start, and return how well it and others draw test digits."""
    images = Images.load(args.data_dir, args.seed)
    side = round(images.train.shape[1] ** 0.5)
    torch.set_num_threads(1)  # more gain nothing on a net this small
    pl.seed_everything(args.seed, verbose=False)
    module = LearnedStart(side, args.width)
    plain = copy.deepcopy(module)

    trainer = pl.Trainer(
        max_steps=args.steps,
        max_epochs=-1,
        callbacks=[STRATEGIES[args.strategy]()],
        accelerator=args.accelerator,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=not args.quiet,
    )
    began = time.process_time()
    trainer.fit(module, DataLoader(images.train, batch_size=16, shuffle=True, drop_last=True))
    seconds = time.process_time() - began
    pretrained = pretrain(plain, images.train, seconds)

    test, validation = images.test[: args.tests], images.validation[: args.tests]
    scores = {OURS: dict(zip(COLUMNS, psnr(module.drawn(test, COLUMNS), test), strict=True))}
    chosen = {PRETRAINED: best(pretrained, validation), PLAIN: best([plain], validation)}
    for name, row in chosen.items():
        scores[name] = {k: psnr(trained(start, test, rule, k)[-1], test) for k, (start, rule) in row.items()}
    layers = list(product(pretrained, (1e-6, 1e-4, 1e-2, 1.0)))
    start, ridge = max(layers, key=lambda each: psnr(solved(each[0], validation, each[1]), validation).mean())
    nearest = images.train[torch.cdist(test, images.train).argmin(1)]
    for name, drawn in ((LAST, solved(start, test, ridge)), (MEAN, images.train.mean(0)), (NEAREST, nearest)):
        scores[name] = dict.fromkeys(COLUMNS, psnr(drawn, test))
    return {
        "strategy": args.strategy,
        "seconds": seconds,
        "learned rate": module.log_lr.exp().item(),
        "psnr": {name: {s: each.mean().item() for s, each in row.items()} for name, row in scores.items()},
        "ahead by": {
            name: {s: interval(scores[OURS][s] - each) for s, each in row.items()}
            for name, row in scores.items()
            if name != OURS
        },
        "rules": {name: {k: choice.rule._asdict() for k, choice in row.items()} for name, row in chosen.items()},
        "figure": str(draw(args, module, chosen, test)),
    }


def interval(differences: Tensor) -> tuple[float, float]:
    """Return the mean of paired differences and half its 95% interval."""
    return differences.mean().item(), 1.96 * differences.std().item() / len(differences) ** 0.5


def draw(
    args: argparse.Namespace, module: LearnedStart, chosen: Mapping[str, Mapping[int, Choice]], images: Tensor
) -> Path:
    """Draw two digits from each start, step by step; return the file."""
    stages, shown = (0, *COLUMNS), images[[0, 2]]
    rows = {OURS: module.drawn(shown, stages)}
    for name, row in chosen.items():
        drawn = [trained(start, shown, rule, steps) for steps, (start, rule) in row.items()]
        rows[name] = torch.stack([drawn[2][0], *(each[-1] for each in drawn)])
    figure = Figure(figsize=(9.2, 2.6))
    grids = figure.subplots(len(rows), 2 * len(stages) + 3, gridspec_kw={"wspace": 0.02, "hspace": 0.05})
    side = module.hparams.side
    for line, (name, drawn) in zip(grids, rows.items(), strict=True):
        for axes in line:
            axes.set_axis_off()
        for digit, cells in enumerate((line[: len(stages) + 1], line[len(stages) + 2 :])):
            pictures = [*drawn[:, digit], shown[digit]]
            for cell, picture, title in zip(cells, pictures, [*map(str, stages), "digit"], strict=True):
                cell.imshow(picture.view(side, side).numpy(), cmap="gray_r", vmin=0, vmax=1)
                if name == OURS:
                    cell.set_title("start" if title == "0" else title, size=9, loc="center", pad=3)
        line[0].text(-0.25, 0.5, name, transform=line[0].transAxes, ha="right", va="center", size=9)
    figure.suptitle("An unseen digit after 1, 2, 3 and 10 gradient steps", x=0.01, ha="left", size=12)
    path = args.output / "learned_start.png"
    figure.savefig(path)
    return path


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; return its results."""
    parser = report.options(__doc__)
    parser.add_argument("--strategy", choices=STRATEGIES, default="reverse", help="(%(default)s)")
    parser.add_argument("--data-dir", type=Path, help="folder with the four MNIST files")
    parser.add_argument("--width", type=int, default=32, help="of the net's hidden layers (%(default)s)")
    parser.add_argument("--steps", type=int, default=500, help="outer steps (%(default)s)")
    parser.add_argument("--accelerator", default="cpu", help="for the Trainer (%(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    args.output.mkdir(parents=True, exist_ok=True)
    args.tests = 200
    if args.smoke:
        args.steps, args.tests = 5, 4
    with report.screen():
        content = compare(args)
    path = args.output / "learned_start.json"
    report.write_json(path, content)
    rows = [[name, *(f"{value:.1f}" for value in row.values())] for name, row in content["psnr"].items()]
    title = f"Unseen digits drawn by a net, in dB after 1, 2, 3, 10 steps\n({content['seconds']:.0f} s of learning)"
    report.print_table(title, ["", *map(str, COLUMNS)], rows, [Path(content["figure"]), path])
    return content


if __name__ == "__main__":
    main()

"""Condense a training set into a few images per class (performance matching).

The pixels of the condensed images are the outer parameters, a small convolutional net the inner ones. At every outer
step the net is drawn anew and trained on the condensed images alone; the images are moved so that the trained net does
well on a batch of real ones. In the end new nets are trained on what was found, and tested: beside nets that were
trained on as many real images, on the means of the classes or the centres of clusters in them, which take no time, and
on the whole training set. `--start centres` learns from there on.

    python examples/data_condensation.py
    python examples/data_condensation.py --strategy all
    python examples/data_condensation.py --start centres
    python examples/data_condensation.py --data-dir FOLDER_WITH_MNIST --per-class 10 --strategy checkpointed

Every strategy gets the same CPU seconds, all of which count: cheap estimates take more outer steps. `all` also compares
them after equal numbers of steps. The data are scikit-learn's 1,797 digits (1,300 to train on, 497 to test), or MNIST,
also at fewer pixels with `--pixels`. (FG)2U, arXiv 2406.14095, sections 3.2, 4, E.1 and F.1.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import report
from condensation import baselines
from image_data import load_digits, load_mnist
from lightning_bilevel import (
    SGD,
    BilevelModule,
    EpisodeLoader,
    ForwardGradient,
    HypergradientSchedule,
    HypergradientStrategy,
    ImplicitGradient,
    ReverseUnroll,
    TruncatedReverse,
)
from lightning_bilevel.linear_solvers import Identity, Neumann

NUM_CLASSES = 10
DIRECTIONS = 32  # as in the paper, table F.1


def truncated() -> TruncatedReverse:
    return TruncatedReverse(steps=10)


# Each from the learning rate of the net and, for the last, from the steps of its first phase. On nets this narrow all
# directions at once (mode="forward") are faster than one graph for each.
STRATEGIES: dict[str, Callable[[float, int | None], HypergradientStrategy]] = {
    "truncated": lambda lr, steps: truncated(),
    "hessian-free": lambda lr, steps: ImplicitGradient(Identity(scale=lr)),
    "neumann": lambda lr, steps: ImplicitGradient(Neumann(terms=20, step_size=lr)),
    "forward": lambda lr, steps: ForwardGradient(DIRECTIONS, mode="forward"),
    "guided": lambda lr, steps: ForwardGradient(DIRECTIONS, mode="forward", guide=truncated()),
    "two-phase": lambda lr, steps: HypergradientSchedule(
        [(truncated(), steps), (ForwardGradient(DIRECTIONS, mode="forward"), None)]
    ),
    "reverse": lambda lr, steps: ReverseUnroll(),
    "checkpointed": lambda lr, steps: ReverseUnroll(checkpoint="sqrt"),
}


class Data(NamedTuple):
    """Images (n, 1, side, side) of mean 0 and variance 1 over all training pixels, and labels (n,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def side(self) -> int:
        """Pixels from left to right."""
        return self.train_x.shape[-1]


def load(folder: Path | None, pixels: int | None, seed: int) -> Data:
    """Return MNIST from ``folder``, or the digits; averaged down to ``pixels`` on a side if that is given."""
    split = load_mnist(folder) if folder is not None else load_digits(seed)
    train, test = (x.view(len(x), 1, math.isqrt(x[0].numel()), -1) for x in (split.train_x, split.test_x))
    if pixels is not None:
        train, test = (F.adaptive_avg_pool2d(x, pixels) for x in (train, test))
    center, scale = train.mean(), train.std()
    return Data((train - center) / scale, split.train_y, (test - center) / scale, split.test_y)


def convnet(side: int, width: int) -> nn.Sequential:
    """Return three blocks of convolution, instance normalization, ReLU and mean pooling, and a linear layer.

    The second block leaves images as they are that have less than 8 pixels on a side there, so that the normalization
    of the third still sees 16: (FG)2U and what it cites have images of 28 pixels and more, and pool in every block.
    """
    layers: list[nn.Module] = []
    for block in range(3):
        layers += [nn.Conv2d(width if block else 1, width, 3, padding=1), nn.GroupNorm(width, width), nn.ReLU()]
        if block != 1 or side >= 8:
            layers.append(nn.AvgPool2d(2))
            side //= 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * side * side, NUM_CLASSES))


class Condensation(BilevelModule):
    """A net that is drawn anew for every run (inner), and the images it is trained on (outer).

    Args:
        images: to start from, (n, 1, side, side).
        width: channels of the net.
        inner_steps: steps of the net for each step of the images.
        inner_lr: learning rate of the net.
        outer_lr: learning rate of the images.
    """

    def __init__(self, images: Tensor, width: int, inner_steps: int, inner_lr: float, outer_lr: float) -> None:
        super().__init__(inner_steps=inner_steps, inner_start="reinit")
        self.net = convnet(images.shape[-1], width)
        self.images = nn.Parameter(images.clone())
        self.inner_lr, self.outer_lr = inner_lr, outer_lr

    def inner_parameters(self):
        return self.net

    def inner_loss(self, batch):
        index, y = batch
        return F.cross_entropy(self.net(self.images[index]), y)

    def outer_loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_inner_optimizer(self):
        return SGD(lr=self.inner_lr)

    def configure_optimizers(self):
        return torch.optim.Adam([self.images], lr=self.outer_lr)


class History(pl.Callback):
    """Keeps the images after every outer step, and ends the fit when its CPU seconds are over and its steps taken.

    Args:
        seconds: of CPU.
        least_steps: outer steps to take even if they take longer.
    """

    def __init__(self, seconds: float, least_steps: int) -> None:
        self.limit, self.least_steps = seconds, least_steps
        self.images: list[Tensor] = []
        self.seconds: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Condensation) -> None:
        """Start the clock, which does not count what other programs do on the machine."""
        self._began = time.process_time()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Condensation, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep what there is now, on the CPU: there new nets are trained on it."""
        self.images.append(pl_module.images.detach().to("cpu", copy=True))
        self.seconds.append(time.process_time() - self._began)
        trainer.should_stop = self.seconds[-1] >= self.limit and len(self.seconds) >= self.least_steps

    @property
    def steps_in_time(self) -> int:
        """The outer steps until the seconds were over."""
        return next((step for step, second in enumerate(self.seconds, 1) if second >= self.limit), len(self.seconds))


def labels_of(per_class: int) -> Tensor:
    """Return 0 to 9 again and again, so that ten images make one row of the picture."""
    return torch.arange(NUM_CLASSES).repeat(per_class)


def real_images(data: Data, per_class: int, seed: int) -> Tensor:
    """Return training images drawn by chance, in the order of :func:`labels_of`."""
    order = torch.randperm(len(data.train_y), generator=torch.Generator().manual_seed(seed))
    chosen = [order[data.train_y[order] == label][:per_class] for label in range(NUM_CLASSES)]
    return data.train_x[torch.stack(chosen, 1).flatten()]


def start_of(data: Data, args: argparse.Namespace) -> Tensor:
    """Return the images that ``--start`` names."""
    if args.start == "centres":
        return baselines.centres(data.train_x, data.train_y, args.per_class)
    return real_images(data, args.per_class, args.seed)


def condense(data: Data, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one strategy from the images of ``--start``; return the images, the losses and the seconds of every step.

    "outer steps" are those within the time, and the steps that follow are left out of "losses" and "seconds".
    """
    pl.seed_everything(args.seed, verbose=False)
    labels = labels_of(args.per_class)
    start = start_of(data, args)
    module = Condensation(start, args.width, args.inner_steps, args.inner_lr, args.outer_lr)
    history = History(args.seconds, args.least_steps)
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[STRATEGIES[name](args.inner_lr, args.phase_steps), history],
        accelerator=args.accelerator,
        logger=CSVLogger(args.output, name=f"log/condensation-{name}", version=""),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=not args.quiet,
    )
    inner = DataLoader(TensorDataset(torch.arange(len(labels)), labels), args.inner_batch, shuffle=True)
    real = TensorDataset(data.train_x, data.train_y)
    drawn = RandomSampler(real, num_samples=args.steps * args.outer_batch)
    outer = DataLoader(real, sampler=BatchSampler(drawn, args.outer_batch, drop_last=True), batch_size=None)
    trainer.fit(module, EpisodeLoader(inner=inner, outer=outer, inner_batches=len(inner)))
    losses, steps = report.logged(trainer.logger.log_dir)["outer_loss"][1], history.steps_in_time
    return {
        "strategy": name,
        "outer steps": steps,
        "CPU seconds": history.seconds[steps - 1],
        "losses": losses[:steps],
        "seconds": history.seconds[:steps],
        "start": start,
        "images": history.images,
    }


def test(data: Data, images: Tensor, args: argparse.Namespace) -> list[float]:
    """Return the test accuracies of new nets, trained on ``images`` the way the inner ones were."""
    accuracies = []
    for seed in range(args.nets):
        net = new_net(data, args.width, seed)
        optimizer = torch.optim.SGD(net.parameters(), lr=args.inner_lr)
        train(net, optimizer, images, labels_of(args.per_class), args.test_steps, args.inner_batch, seed)
        accuracies.append(accuracy(net, data))
    return accuracies


def new_net(data: Data, width: int, seed: int) -> nn.Module:
    """Return a net that no strategy has seen, for its seed is none of theirs."""
    with torch.random.fork_rng([]):
        torch.manual_seed(10_000 + seed)
        return convnet(data.side, width)


def train(
    net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int, batch: int, seed: int
) -> None:
    """Take as many steps of batches drawn without replacement; with all examples if they fit in one batch."""
    order = RandomSampler(x, num_samples=steps * batch, generator=torch.Generator().manual_seed(seed))
    batches = [torch.arange(len(x))] * steps if len(x) <= batch else BatchSampler(order, batch, drop_last=True)
    for index in batches:
        optimizer.zero_grad()
        F.cross_entropy(net(x[index]), y[index]).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(net: nn.Module, data: Data) -> float:
    """Return the share of the test images that are classified right."""
    batches = zip(data.test_x.split(500), data.test_y.split(500), strict=True)
    right = [(net(x).argmax(1) == y).sum().item() for x, y in batches]
    return sum(right) / len(data.test_y)


def test_real(data: Data, args: argparse.Namespace) -> list[float]:
    """Return the test accuracies of nets trained on as many real images, a new draw for each net."""
    one = argparse.Namespace(**{**vars(args), "nets": 1})
    return [test(data, real_images(data, args.per_class, 10_000 + net), one)[0] for net in range(args.nets)]


def test_chosen(data: Data, args: argparse.Namespace) -> dict[str, list[float]]:
    """Return, for each baseline that chooses or averages real images, the test accuracies of nets trained on them."""
    chosen = {name: choose(data.train_x, data.train_y, args.per_class) for name, choose in baselines.CHOSEN.items()}
    return {name: test(data, images, args) for name, images in chosen.items()}


def test_whole(data: Data, args: argparse.Namespace) -> list[float]:
    """Return the test accuracies of nets trained on all training images, in batches of 128 and by Adam."""
    accuracies = []
    for seed in range(args.nets):
        net = new_net(data, args.width, seed)
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
        train(net, optimizer, data.train_x, data.train_y, args.whole_steps, 128, seed)
        accuracies.append(accuracy(net, data))
    return accuracies


def compare(data: Data, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the strategies; return their runs with accuracies in the end, and after as many steps as all have taken."""
    runs: list[dict[str, Any]] = []
    for name in args.strategy:
        if name == "two-phase" and args.phase_steps is None:
            cheap = [run["outer steps"] for run in runs if run["strategy"] == "truncated"]
            args.phase_steps = max(1, cheap[0] // 2) if cheap else 20
        runs.append(condense(data, name, args))
    common = min(len(run["images"]) for run in runs)
    for run in runs:
        run["accuracy"] = test(data, run["images"][run["outer steps"] - 1], args)
        run["common steps"] = common
        same = run["outer steps"] == common
        run["accuracy at common steps"] = run["accuracy"] if same else test(data, run["images"][common - 1], args)
    return runs


COLORS = {
    "truncated": "#E69F00",
    "hessian-free": "#CC79A7",
    "neumann": "#56B4E9",
    "forward": report.VERMILION,
    "guided": "#8C564B",
    "two-phase": report.GREEN,
    "reverse": report.BLUE,
    "checkpointed": report.BLUE,
}


class Row(NamedTuple):
    """A row of the picture: a name, ten images (10, side, side), and what is said about them."""

    name: str
    images: Tensor
    note: str = ""


def rows_of(runs: Sequence[Mapping[str, Any]], start: Sequence[float]) -> list[Row]:
    """Return what the picture shows: the first images of every run; of one run all in the end, or how they grow."""
    first, images = runs[0], runs[0]["images"][: runs[0]["outer steps"]]
    if len(runs) > 1:
        ends = [(run["strategy"], run["images"][: run["outer steps"]][-1], percent(run["accuracy"])) for run in runs]
        return [Row("start", first["start"], percent(start)), *(Row(*end) for end in ends)]
    if len(first["start"]) > NUM_CLASSES:
        return [Row("", ten) for ten in images[-1].split(NUM_CLASSES)][:NUM_CLASSES]
    last = first["outer steps"]
    between = sorted({round(last**share) for share in (0.35, 0.7)} - {last})
    grown = [Row(f"step {step}", images[step - 1]) for step in between]
    end = Row(f"step {last}", images[-1], percent(first["accuracy"]))
    return [Row("start", first["start"], percent(start)), *grown, end]


def draw(path: Path, runs: Sequence[Mapping[str, Any]], start: Sequence[float]) -> None:
    """Draw the images, with accuracies beside them, and the losses."""
    rows = rows_of(runs, start)
    figure = Figure(figsize=(11, max(3.6, 0.62 * len(rows) + 0.9)))
    left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
    draw_images(left, rows)
    left.set_title(title(runs, rows))
    for run in runs:
        width = max(1, min(20, len(run["losses"]) // 4))  # every step has another net and another batch
        smooth = torch.tensor(run["losses"]).unfold(0, width, 1).mean(1)
        right.plot(run["seconds"][width - 1 :], smooth, label=run["strategy"], color=COLORS[run["strategy"]])
    right.set(title="Outer loss, running mean", xlabel="CPU seconds", ylabel="cross-entropy of real images")
    if len(runs) > 1:
        right.legend()
    figure.savefig(path)


def draw_images(axes: Any, rows: Sequence[Row]) -> None:
    """Show one line of ten images for each row, on one scale of grey for each image."""
    side = rows[0].images.shape[-1]
    gap = max(1, side // 8)
    cell = side + gap
    sheet = torch.full((cell * len(rows) - gap, cell * NUM_CLASSES - gap), torch.nan)
    for i, row in enumerate(rows):
        flat = row.images[:NUM_CLASSES].flatten(1)
        low, high = flat.quantile(0.01, 1), flat.quantile(0.99, 1)
        shown = (flat - low[:, None]) / (high - low)[:, None]
        for j, image in enumerate(shown.clamp(0, 1).view(-1, side, side)):
            sheet[i * cell : i * cell + side, j * cell : j * cell + side] = image
        middle = i * cell + side / 2 - 0.5
        axes.text(-gap - 0.5, middle, row.name, ha="right", va="center")
        axes.text(sheet.shape[1] + gap - 0.5, middle, row.note, ha="left", va="center", weight="bold")
    axes.imshow(sheet.numpy(), cmap="gray_r", vmin=0, vmax=1)
    axes.set_axis_off()


def title(runs: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> str:
    """Return the title of the images, with the accuracy if the rows do not have it."""
    per_class = len(runs[0]["start"]) // NUM_CLASSES
    told = (
        "and test accuracy in %" if any(row.note for row in rows) else f"test accuracy {percent(runs[0]['accuracy'])} %"
    )
    return f"{per_class} image{'s' if per_class > 1 else ''} per class, {told}"


def percent(accuracies: Sequence[float]) -> str:
    """Return mean and standard deviation over nets, in percent."""
    spread = f" ± {100 * stdev(accuracies):.1f}" if len(accuracies) > 1 else ""
    return f"{100 * mean(accuracies):.1f}{spread}"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = report.options(__doc__)
    parser.add_argument("--strategy", choices=[*STRATEGIES, "all"], nargs="+", default=["reverse"], help="(reverse)")
    parser.add_argument("--data-dir", type=Path, help="folder with the four MNIST files")
    parser.add_argument("--pixels", type=int, help="on a side, to which images are averaged (as many as they have)")
    parser.add_argument("--per-class", type=int, default=1, help="condensed images of each class (%(default)s)")
    parser.add_argument(
        "--start", choices=["real", "centres"], default="real", help="images to go on from (%(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=90, help="CPU seconds of each strategy (%(default)s)")
    parser.add_argument("--steps", type=int, default=10_000, help="outer steps, if these end sooner (%(default)s)")
    parser.add_argument("--least-steps", type=int, default=1, help="outer steps, if those take longer (%(default)s)")
    parser.add_argument("--phase-steps", type=int, help="of two-phase (half of truncated's if it runs too, else 20)")
    parser.add_argument("--inner-steps", type=int, default=100, help="steps of the net (%(default)s)")
    parser.add_argument("--inner-lr", type=float, default=0.1, help="learning rate of the net (%(default)s)")
    parser.add_argument("--outer-lr", type=float, default=0.05, help="learning rate of the images (%(default)s)")
    parser.add_argument("--inner-batch", type=int, default=100, help="condensed images in a batch (%(default)s)")
    parser.add_argument("--outer-batch", type=int, default=256, help="real images in a batch (%(default)s)")
    parser.add_argument("--width", type=int, default=16, help="channels of the net (%(default)s)")
    parser.add_argument("--nets", type=int, default=5, help="new nets to test with (%(default)s)")
    parser.add_argument("--test-steps", type=int, default=100, help="steps of the new nets (%(default)s)")
    parser.add_argument("--whole-steps", type=int, default=400, help="steps on the whole training set (%(default)s)")
    parser.add_argument("--accelerator", default="cpu", help="for the Trainer (%(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options, small ones with ``--smoke``, and "all" spelled out."""
    args = parser().parse_args(argv)
    if "all" in args.strategy:
        args.strategy = [name for name in STRATEGIES if name != "checkpointed"]  # that is reverse in less memory
    if args.smoke:
        args.steps, args.inner_steps, args.width, args.nets = min(args.steps, 3), 4, 4, 2
        args.test_steps, args.whole_steps = 4, 4
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; return its results."""
    args = parse(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # more gain little on nets this small
    data = load(args.data_dir, args.pixels, args.seed)
    name = f"condensation_{'digits' if args.data_dir is None else 'mnist'}_{args.per_class}"
    path = args.output / f"{name}.png"
    with report.screen():
        # That a series of 20 terms diverges where the Hessian of a net is not positive definite is known.
        warnings.filterwarnings("ignore", "`Neumann.*diverges")
        runs = compare(data, args)
        others = {
            "start": test(data, runs[0]["start"], args),
            "real images": test_real(data, args),
            **test_chosen(data, args),
            "whole training set": test_whole(data, args),
        }
        draw(path, runs, others["start"])
    short = [{key: value for key, value in run.items() if key not in ("start", "images")} for run in runs]
    results = {"settings": vars(args), "runs": short, "baselines": others}
    report.write_json(path.with_suffix(".json"), results)
    show(short, others, [path, path.with_suffix(".json")])
    return results


def show(runs: Sequence[Mapping[str, Any]], others: Mapping[str, Sequence[float]], files: Sequence[Path]) -> None:
    """Print the table."""
    rows = [
        [run["strategy"], str(run["outer steps"]), f"{run['CPU seconds']:.0f}"]
        + [percent(run["accuracy"]), percent(run["accuracy at common steps"])]
        for run in runs
    ]
    rows += [[name, "", "", percent(values), ""] for name, values in others.items()]
    columns = ["trained on", "outer steps", "CPU s", "test %", f"test % at step {runs[0]['common steps']}"]
    width = len(columns) - (len(runs) == 1)  # alone, it has no common step
    nets = len(runs[0]["accuracy"])
    title = f"Test accuracy of {nets} new nets, mean ± standard deviation"
    report.print_table(title, columns[:width], [row[:width] for row in rows], files)


if __name__ == "__main__":
    main()

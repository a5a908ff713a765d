"""Find the wrong labels of a training set (hyper-cleaning).

Half of the training labels are wrong. Every training example has a weight, sigmoid(logit); the logits are the outer
parameters, a small net the inner ones. The net is trained on the weighted examples, the weights are trained so that
the net does well on a few hundred validation examples with right labels. Weights of wrong labels fall to 0.

    python examples/data_cleaning.py
    python examples/data_cleaning.py --strategy forward
    python examples/data_cleaning.py --strategy all
    python examples/data_cleaning.py --weights net --inside --num-train 1200 --num-trusted 50
    python examples/data_cleaning.py --data-dir FOLDER_WITH_MNIST

The data are scikit-learn's 1,797 handwritten digits (900 to train on, 400 with right labels to validate, 497 to test),
or MNIST. What one would do without an outer level is in the table, too (cleaning/baselines.py): with 400 trusted
examples it does as well. With fewer, one weight each is too much to learn: `--weights net` learns a function of loss
and label, `--weights matrix` how labels go wrong. Franceschi et al. (ICML 2017), section 5.1; FSLA (arXiv 2112.04660),
section 6.2.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.functional.classification import binary_auroc

import report
from cleaning import baselines, picture
from cleaning.baselines import BASELINES, Examples, Task
from cleaning.weights import WeightNet
from image_data import load_digits, load_mnist
from lightning_bilevel import (
    FSLA,
    PZOBO,
    SGD,
    BilevelModule,
    EpisodeLoader,
    FirstOrder,
    ForwardGradient,
    GammaGreedy,
    HypergradientMonitor,
    HypergradientSchedule,
    HypergradientStrategy,
    ImplicitGradient,
    ReverseUnroll,
    TruncatedReverse,
    ZerothOrder,
)
from lightning_bilevel.linear_solvers import ConjugateGradient, Identity, Neumann, Nystrom


class Setting(NamedTuple):
    """A strategy, and what it wants to be different from the defaults."""

    strategy: Callable[[], HypergradientStrategy]
    options: Mapping[str, float] = {}


# The weights act through the inner loss only, so FirstOrder's estimate is zero here: it shows what no cleaning gives.
SETTINGS = {
    "reverse": Setting(lambda: ReverseUnroll()),
    "checkpointed": Setting(lambda: ReverseUnroll(checkpoint="sqrt")),
    "truncated": Setting(lambda: TruncatedReverse(steps=5)),
    "first-order": Setting(lambda: FirstOrder()),
    "forward": Setting(lambda: ForwardGradient(num_directions=32)),
    "guided": Setting(lambda: ForwardGradient(num_directions=8, guide=TruncatedReverse(steps=5))),
    "remembering": Setting(lambda: ForwardGradient(num_directions=32, guide=TruncatedReverse(steps=1), remember=True)),
    "neumann": Setting(lambda: ImplicitGradient(Neumann(terms=20, step_size=0.5))),
    "cg": Setting(lambda: ImplicitGradient(ConjugateGradient(max_iter=10, damping=0.1))),
    "nystrom": Setting(lambda: ImplicitGradient(Nystrom(rank=10, rho=0.1))),
    "identity": Setting(lambda: ImplicitGradient(Identity(scale=1.0))),
    "gamma-greedy": Setting(lambda: GammaGreedy(gamma=0.99)),
    "pzobo": Setting(lambda: PZOBO(num_directions=32, mu=0.1)),
    "zeroth-order": Setting(lambda: ZerothOrder(num_directions=32, mu=0.1)),
    "fsla": Setting(lambda: FSLA(beta=0.5), {"inner_steps": 1, "steps": 1200, "outer_lr": 0.02}),
    "two-phase": Setting(lambda: HypergradientSchedule([(TruncatedReverse(steps=1), 60), (ReverseUnroll(), None)])),
}


class DataCleaning(BilevelModule):
    """A net (inner) and a weight for each training example (outer).

    Args:
        num_examples: training examples.
        num_pixels: of an image.
        inner_steps: steps of the net for each step of the weights.
        inner_lr: learning rate of the net.
        outer_lr: learning rate of the logits of the weights.
        trusted_share: what trusted examples among the training examples count together, if the data put them there:
            as much as this share of the noisy ones at weight 1.
    """

    def __init__(
        self,
        num_examples: int = 900,
        num_pixels: int = 64,
        inner_steps: int = 10,
        inner_lr: float = 1.0,
        outer_lr: float = 0.1,
        trusted_share: float = 0.3,
    ) -> None:
        super().__init__(inner_steps=inner_steps, inner_start="warm")
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(num_pixels, 64), nn.ReLU(), nn.Linear(64, 10))
        self.logits = nn.Parameter(torch.zeros(num_examples))
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def inner_parameters(self):
        return self.net

    def outer_parameters(self):
        return [self.logits]

    def logits_of(self, losses: Tensor, y: Tensor, index: Tensor) -> Tensor:
        """Return the logits (n,) of the weights of examples with these losses and labels."""
        return self.logits[index]

    def inner_loss(self, batch):
        x, y, index = batch
        losses = F.cross_entropy(self.net(x), y, reduction="none")
        return self.shared_out(self.logits_of(losses, y, index).sigmoid() * losses, losses, index)

    def shared_out(self, noisy: Tensor, trusted: Tensor, index: Tensor) -> Tensor:
        """Return the mean of the losses of noisy examples, and a share of that of trusted ones, whose index is -1."""
        is_trusted = index < 0
        scale = torch.where(is_trusted, self.hparams.trusted_share / is_trusted.sum(), 1 / (~is_trusted).sum())
        return (scale * torch.where(is_trusted, trusted, noisy)).sum()

    def outer_loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_inner_optimizer(self):
        return SGD(lr=self.hparams.inner_lr)

    def configure_optimizers(self):
        return torch.optim.Adam(self.outer_parameters(), lr=self.hparams.outer_lr)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.accuracy(self.net(x), y)
        self.log("test_accuracy", self.accuracy, prog_bar=True)

    @torch.no_grad()
    def learned_logits(self, noisy: Examples) -> Tensor:
        """Return the logits (n,) of what the run has come to think of each training example."""
        losses = F.cross_entropy(self.net(noisy.x), noisy.y, reduction="none")
        return self.logits_of(losses, noisy.y, torch.arange(len(losses)))

    def retrained(self, task: Task) -> nn.Module:
        """Return a net trained from the start with what was learned, and with the trusted examples."""
        weights = self.learned_logits(task.noisy).sigmoid()
        return baselines.train(task, task.noisy.weighted(weights) + task.trusted)


class NetCleaning(DataCleaning):
    """The weight of an example is a function of its loss and label: a small net is the outer level."""

    def __init__(self, *args: Any, outer_lr: float = 0.01, **options: Any) -> None:
        super().__init__(*args, outer_lr=outer_lr, **options)
        del self.logits
        self.weight_net = WeightNet(num_classes=10)

    def outer_parameters(self):
        return list(self.weight_net.parameters())

    def logits_of(self, losses: Tensor, y: Tensor, index: Tensor) -> Tensor:
        return self.weight_net(losses, y)


class MatrixCleaning(DataCleaning):
    """How labels go wrong is the outer level: the probability that class i is labelled j, 100 numbers in all.

    Noisy labels are explained through it, as in `baselines.loss_correction`, from whose estimate it starts.
    """

    def __init__(self, *args: Any, outer_lr: float = 0.05, **options: Any) -> None:
        super().__init__(*args, outer_lr=outer_lr, **options)
        del self.logits
        self.matrix = nn.Parameter(torch.eye(10))

    def start_from(self, task: Task) -> None:
        """Set the matrix to the estimate, each row mixed with a tenth of all labels alike."""
        net = baselines.train(task._replace(steps=max(1, task.steps // 3)), task.noisy)
        estimate = baselines.corruption_of(net, task.trusted)
        with torch.no_grad():
            self.matrix.copy_((0.9 * estimate + 0.1 / len(estimate)).log())

    def outer_parameters(self):
        return [self.matrix]

    def inner_loss(self, batch):
        x, y, index = batch
        logits = self.net(x)
        said = (logits.softmax(-1) @ self.matrix.softmax(-1)).gather(1, y.unsqueeze(1)).squeeze(1)
        return self.shared_out(-said.log(), F.cross_entropy(logits, y, reduction="none"), index)

    @torch.no_grad()
    def learned_logits(self, noisy: Examples) -> Tensor:
        """Return the logits (n,) of the probability, given image and label, that the label is right."""
        joint = self.net(noisy.x).softmax(-1) * self.matrix.softmax(-1)[:, noisy.y].T
        right = joint.gather(1, noisy.y.unsqueeze(1)).squeeze(1)
        return right.log() - (joint.sum(-1) - right).clamp_min(1e-12).log()

    def retrained(self, task: Task) -> nn.Module:
        loss = baselines.through(self.matrix.softmax(-1).detach(), task.noisy, task.trusted)
        return next(baselines.descent(task.start, loss, task.steps, task.lr))


WEIGHTS = {"table": DataCleaning, "net": NetCleaning, "matrix": MatrixCleaning}
OUTER_LR = {"table": 0.1, "net": 0.01, "matrix": 0.05}


class CleaningData(pl.LightningDataModule):
    """Handwritten digits, part of whose training labels are wrong.

    Lightning's validation loop gets the test images, to watch: nothing is chosen by them.

    Args:
        data_dir: folder with the four MNIST files; by default the digits of scikit-learn are taken.
        corruption: share of the training labels that is replaced by another digit.
        moved: to the next digit, rather than to any other one.
        num_train: examples for the inner level; by default 900 digits, or 5,000 of MNIST.
        num_validation: examples with right labels for the outer level; by default 400, or 5,000.
        batch_size: examples in a batch; with at least all of them, a batch is the whole set.
        steps_per_epoch: outer batches in what Lightning calls an epoch.
        inside: whether the inner level is trained on the examples with right labels, too. Their index is -1.
        seed: fixes the split and the wrong labels.
    """

    def __init__(
        self,
        data_dir: str | Path | None = None,
        corruption: float = 0.5,
        moved: bool = False,
        num_train: int | None = None,
        num_validation: int | None = None,
        batch_size: int = 5000,
        steps_per_epoch: int = 20,
        inside: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str | None = None) -> None:
        args = self.hparams
        split = load_mnist(args.data_dir) if args.data_dir else load_digits(args.seed)
        num_train, num_validation = (5000, 5000) if args.data_dir else (900, 400)
        num_train, num_validation = args.num_train or num_train, args.num_validation or num_validation
        generator = torch.Generator().manual_seed(args.seed)
        order = torch.randperm(len(split.train_y), generator=generator)
        train, validation = order[:num_train], order[num_train : num_train + num_validation]
        y = split.train_y[train]
        self.is_wrong = torch.randperm(len(y), generator=generator) < round(args.corruption * len(y))
        offset = torch.ones_like(y) if args.moved else torch.randint(1, 10, y.shape, generator=generator)
        other = (y + offset) % 10
        self.train = TensorDataset(split.train_x[train], torch.where(self.is_wrong, other, y), torch.arange(len(y)))
        self.validation = TensorDataset(split.train_x[validation], split.train_y[validation])
        self.test = TensorDataset(split.test_x, split.test_y)

    def task(self, start: nn.Module, steps: int, lr: float = 1.0) -> Task:
        """Return what every method may see: a start, noisy and trusted examples, and a number of steps."""
        return Task(start, Examples(*self.train.tensors[:2]), Examples(*self.validation.tensors), steps, lr)

    def train_dataloader(self) -> EpisodeLoader:
        inner = self.train
        if self.hparams.inside:
            x, y = self.validation.tensors
            both = zip(inner.tensors, (x, y, torch.full_like(y, -1)), strict=True)
            inner = TensorDataset(*map(torch.cat, both))
        return EpisodeLoader(self._batches(inner), self._batches(self.validation), inner_batches=1)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.test, sampler=BatchSampler(SequentialSampler(self.test), 10_000, False), batch_size=None)

    def _batches(self, dataset: TensorDataset) -> DataLoader:
        """Return a loader that takes a batch from the tensors at once, not example by example."""
        size = min(self.hparams.batch_size, len(dataset))
        order = RandomSampler(dataset, num_samples=self.hparams.steps_per_epoch * size)
        return DataLoader(dataset, sampler=BatchSampler(order, size, drop_last=True), batch_size=None)


def clean(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run one strategy; return what it found and how long it took."""
    setting = SETTINGS[args.strategy]
    chosen = {"steps": 120, "inner_steps": 10, "inner_lr": 1.0, "outer_lr": OUTER_LR[args.weights], **setting.options}
    chosen.update({name: value for name in chosen if (value := getattr(args, name)) is not None})
    data = CleaningData(
        args.data_dir,
        corruption=args.corruption,
        moved=args.moved,
        num_train=args.num_train,
        num_validation=args.num_trusted,
        steps_per_epoch=chosen["steps"],
        inside=args.inside,
        seed=args.seed,
    )
    data.setup()
    pl.seed_everything(args.seed, verbose=False)
    if args.data_dir is None:
        torch.set_num_threads(1)  # more gain nothing on a net this small
    steps, options = chosen["steps"], {name: value for name, value in chosen.items() if name != "steps"}
    sizes = {"num_examples": len(data.train), "num_pixels": data.train.tensors[0][0].numel()}
    module = WEIGHTS[args.weights](**sizes, **options)
    task = data.task(copy.deepcopy(module.net), args.net_steps, chosen["inner_lr"])
    if isinstance(module, MatrixCleaning):
        module.start_from(task)
    start = {name: value.clone() for name, value in module.net.state_dict().items()}

    callbacks: list[pl.Callback] = [setting.strategy()]
    if args.compare:
        callbacks.append(HypergradientMonitor(every_n_steps=max(1, steps // 6), samples=0))
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=callbacks,
        accelerator=args.accelerator,
        logger=CSVLogger(folder, name=f"log/{args.strategy}", version=""),
        log_every_n_steps=1,
        val_check_interval=min(5, steps),
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=not args.quiet,
    )
    began = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - began

    logits = module.cpu().learned_logits(task.noisy)
    everything = torch.full_like(logits, torch.inf)
    x, y = data.validation.tensors
    trusted = TensorDataset(x, y, torch.zeros_like(y))
    weightings = {
        "noisy": (data.train, torch.zeros_like(logits)),
        "validation only": (trusted, everything),
        "cleaned": (data.train, logits),
        "clean only": (data.train, torch.where(data.is_wrong, -torch.inf, torch.inf)),
    }
    accuracy = {
        name: accuracy_of_retrained(DataCleaning(**sizes, **options), start, examples, weights, data, steps)
        for name, (examples, weights) in weightings.items()
    }
    curves = report.logged(trainer.logger.log_dir)
    cosines = [value for value in curves.get("hypergradient_cosine", ([], []))[1] if value == value]  # nan for 0
    figure = folder / ("data_cleaning.png" if args.strategy == "reverse" else f"data_cleaning_{args.strategy}.png")
    share = f"{100 * args.corruption:.0f}% of the training labels are wrong"
    title = f"Cleaning labels with {type(setting.strategy()).__name__}: {share}"
    picture.draw(figure, title, data, logits, curves, accuracy)
    return {
        "strategy": args.strategy,
        **chosen,
        "accuracy": accuracy,
        "methods": {} if args.compare else methods(task, module, logits, data),
        "accuracy of the run's own net": curves["test_accuracy"][1][-1],
        "auroc": binary_auroc(-logits, data.is_wrong.long()).item(),
        "cosine": sum(cosines) / len(cosines) if cosines else None,
        "seconds": seconds,
        "peak memory (MiB)": report.peak_memory(),
        "figure": str(figure),
    }


def methods(task: Task, module: DataCleaning, logits: Tensor, data: CleaningData) -> dict[str, float]:
    """Return the test accuracies of the baselines and of what was learned, each from the same start."""
    nets = {name: baseline(task) for name, baseline in BASELINES.items()}
    nets["learned, without trusted"] = baselines.train(task, task.noisy.weighted(logits.sigmoid()))
    nets["learned, with trusted"] = module.retrained(task)
    nets["right labels only"] = baselines.train(task, task.noisy.take(~data.is_wrong))
    return {name: baselines.accuracy(net, Examples(*data.test.tensors)) for name, net in nets.items()}


@torch.no_grad()
def accuracy_of_retrained(
    module: DataCleaning,
    start: Mapping[str, Tensor],
    examples: TensorDataset,
    logits: Tensor,
    data: CleaningData,
    steps: int,
) -> float:
    """Train the net from ``start`` at fixed weights, for as many steps as in the run; return its test accuracy."""
    module.net.load_state_dict(start)
    module.logits.copy_(logits)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))
    batches = [examples[batch] for batch in order.split(data.hparams.batch_size)]
    x, y = data.test.tensors
    with module.adapted(batches, steps=steps * module.inner_steps):
        return (module.net(x).argmax(-1) == y).float().mean().item()


def compare_all(args: argparse.Namespace, argv: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """Run every strategy in a process of its own, so that each has its own peak memory."""
    rows = []
    for name in SETTINGS:
        print(f"{name} ...", flush=True)
        command = [sys.executable, __file__, *argv, "--strategy", name, "--quiet", "--compare"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows.append(json.loads((folder / f"data_cleaning_{name}.json").read_text()))
    return rows


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; return its results."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = report.options(__doc__)
    parser.add_argument("--strategy", choices=[*SETTINGS, "all"], default="reverse", help="(%(default)s)")
    parser.add_argument("--data-dir", type=Path, help="folder with the four MNIST files")
    parser.add_argument("--corruption", type=float, default=0.5, help="share of wrong labels (%(default)s)")
    parser.add_argument("--weights", choices=list(WEIGHTS), default="table", help="what is learned (%(default)s)")
    parser.add_argument("--inside", action="store_true", help="trusted examples in the inner loss, too")
    parser.add_argument("--moved", action="store_true", help="wrong labels are the next digit, not any other")
    parser.add_argument("--num-train", type=int, help="training examples")
    parser.add_argument("--num-trusted", type=int, help="examples with right labels")
    parser.add_argument("--net-steps", type=int, default=300, help="steps of each net compared (%(default)s)")
    parser.add_argument("--steps", type=int, help="outer steps")
    parser.add_argument("--inner-steps", type=int, help="inner steps for each outer step")
    parser.add_argument("--inner-lr", type=float, help="learning rate of the net")
    parser.add_argument("--outer-lr", type=float, help="learning rate of the weights")
    parser.add_argument("--compare", action="store_true", help="also log the cosine with the exact hypergradient")
    parser.add_argument("--accelerator", default="cpu", help="for the Trainer (%(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.smoke:
        args.steps = args.steps or 6
        args.net_steps = 12
    with report.screen():
        if args.strategy == "all":
            results = compare_all(args, without_strategy(argv), args.output)
        else:
            results = [clean(args, args.output)]
    path = args.output / f"data_cleaning_{args.strategy}.json"
    content = {"results": results} if args.strategy == "all" else results[0]
    report.write_json(path, content)
    show(results, args, [Path(results[0]["figure"]), path] if len(results) == 1 else [path])
    return content


def without_strategy(argv: Sequence[str]) -> list[str]:
    """Return the arguments but ``--strategy all``."""
    rest = [word for word in argv if word != "--strategy=all"]
    return rest[: (at := rest.index("--strategy"))] + rest[at + 2 :] if "--strategy" in rest else rest


def show(results: Sequence[Mapping[str, Any]], args: argparse.Namespace, files: Sequence[Path]) -> None:
    """Print the table."""
    kinds = ("noisy", "validation only", "cleaned", "clean only")
    columns = ["strategy", *(f"{kind} %" for kind in kinds), "AUROC", "seconds", "peak MiB"]
    rows = []
    for row in results:
        accuracy = [f"{100 * row['accuracy'][name]:.1f}" for name in kinds]
        numbers = [f"{row['auroc']:.3f}", f"{row['seconds']:.1f}", f"{row['peak memory (MiB)']:.0f}"]
        rows.append([row["strategy"], *accuracy, *numbers])
        if row["cosine"] is not None:
            rows[-1].append(f"{row['cosine']:.2f}")
    if results[0]["cosine"] is not None:
        columns.append("cosine")
    title = f"Test accuracy, and how well the weights tell wrong labels; {100 * args.corruption:.0f}% are wrong"
    if compared := results[0]["methods"]:
        found = [[name, f"{100 * value:.1f}"] for name, value in compared.items()]
        report.print_table(f"Every method, {args.net_steps} steps of the net each", ["trained on", "test %"], found)
    report.print_table(title, columns, rows, files)


if __name__ == "__main__":
    main()

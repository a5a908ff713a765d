"""Learn hyperparameters of a logistic regression: one penalty per feature, then learning rate and momentum.

First task: the weights of every feature have an L2 penalty of their own, so that there are as many outer parameters as
features. The outer loss is the cross-entropy of validation examples. What is found is compared with the best single
penalty on a grid, for which scikit-learn solves the problem anew at each value.

Second task: learning rate and momentum of the inner optimizer are the outer parameters, and the outer loss is the
validation loss after a fixed number of steps from zero. Grids over both are what is compared with. ImplicitGradient
is out: the minimum of the inner loss does not depend on how it is reached.

What one would do without a hypergradient is in the tables, too (tuning/baselines.py): an L1 penalty, penalties that are
a formula of two numbers, a cosine schedule, found by random search and by Optuna's TPE if it is installed.

    python examples/hyperparameters.py
    python examples/hyperparameters.py --task penalties --strategy pzobo reverse
    python examples/hyperparameters.py --data newsgroups --data-dir FOLDER

The data are scikit-learn's digits, with as many features again that are noise: every pixel once more, but of another
image. Or 20 Newsgroups: `tfidf4000.npz` in the folder, else what scikit-learn's own loader finds or downloads there.
PZOBO, arXiv 2110.07004, section 4.4; Chen et al., Gradient-based Bi-level Optimization for Deep Learning: A Survey,
equations 5 to 9.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import scipy.sparse
import sklearn.datasets
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from pytorch_lightning.loggers import CSVLogger
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch import Tensor, nn
from torch.utils.data import DataLoader

import report
from image_data import load_digits
from lightning_bilevel import (
    PZOBO,
    SGD,
    BilevelModule,
    Episode,
    ForwardUnroll,
    HypergradientStrategy,
    ImplicitGradient,
    ReverseUnroll,
    ZerothOrder,
)
from lightning_bilevel.linear_solvers import ConjugateGradient, Neumann
from tuning import baselines

Matrix = np.ndarray | scipy.sparse.csr_matrix


class Part(NamedTuple):
    """Features (n, p) and labels (n,), as scikit-learn takes them."""

    x: Matrix
    y: np.ndarray


class Data(NamedTuple):
    """Three parts, and what suits them.

    Attributes:
        name: as on the command line.
        train: for the inner level.
        validation: for the outer level.
        test: only looked at in the end.
        inner_lr: a learning rate that is stable with momentum 0.9 and as the step of a Neumann series.
        steps: outer steps.
    """

    name: str
    train: Part
    validation: Part
    test: Part
    inner_lr: float
    steps: int

    @property
    def both(self) -> Part:
        """The examples to train on and those to validate, to fit once more in the end."""
        stack = scipy.sparse.vstack if scipy.sparse.issparse(self.train.x) else np.vstack
        return Part(stack([self.train.x, self.validation.x]), np.concatenate([self.train.y, self.validation.y]))

    @property
    def sizes(self) -> tuple[int, int]:
        """The numbers of features and classes."""
        return self.train.x.shape[1], int(self.train.y.max()) + 1


def noisy_digits(seed: int) -> Data:
    """Return the digits with 64 noise features: 300 examples to train on, 300 to validate, 1,197 to test."""
    x, y, *_ = load_digits(seed, num_test=0)
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.stack([column[torch.randperm(len(y), generator=generator)] for column in x.T], 1)
    x, y = torch.cat([x, shuffled], 1).double().numpy(), y.numpy()
    parts = [Part(x[part], y[part]) for part in (slice(300), slice(300, 600), slice(600, None))]
    return Data("digits", *parts, inner_lr=0.2, steps=60)


def newsgroups(seed: int, folder: Path | None, num_features: int = 4000) -> Data:
    """Return 20 Newsgroups as TF-IDF features: half of the training set is for validation, as PZOBO has it."""
    file = None if folder is None else folder / "tfidf4000.npz"
    train, test = read_npz(file) if file is not None and file.is_file() else fetch_newsgroups(folder, num_features)
    order = np.random.default_rng(seed).permutation(len(train.y))
    halves = np.array_split(order, 2)
    halved = (Part(train.x[half], train.y[half]) for half in halves)
    return Data("newsgroups", *halved, test, inner_lr=25.0, steps=40)


def read_npz(file: Path) -> list[Part]:
    """Return the parts "train" and "test" of a file of compressed sparse rows."""
    arrays = np.load(file)
    return [
        Part(
            scipy.sparse.csr_matrix(
                (arrays[f"{name}_data"].astype(np.float64), arrays[f"{name}_indices"], arrays[f"{name}_indptr"]),
                shape=(len(arrays[f"{name}_y"]), int(arrays["shape"][0])),
            ),
            arrays[f"{name}_y"].astype(np.int64),
        )
        for name in ("train", "test")
    ]


def fetch_newsgroups(folder: Path | None, num_features: int) -> list[Part]:
    """Return the parts as scikit-learn loads them, with the features that most training documents have.

    Raises:
        FileNotFoundError: they are neither in ``folder`` nor to be had from the network.
    """
    try:
        loaded = [
            sklearn.datasets.fetch_20newsgroups_vectorized(subset=name, data_home=folder, normalize=False)
            for name in ("train", "test")
        ]
    except OSError as error:
        raise FileNotFoundError(
            f"Expected `tfidf4000.npz` in `{folder}`, or a network from which scikit-learn can load 20 Newsgroups. "
            "Pass `--data-dir`, or `--data digits`."
        ) from error
    common = np.sort(np.argsort(-loaded[0].data.getnnz(0), kind="stable")[:num_features])
    weigh = TfidfTransformer(sublinear_tf=True).fit(loaded[0].data[:, common])
    return [Part(weigh.transform(part.data[:, common]), part.target) for part in loaded]


class Sparse(NamedTuple):
    """A sparse matrix and its transpose, in compressed rows: both products are fast then."""

    matrix: Tensor
    transposed: Tensor


class SparseProduct(torch.autograd.Function):
    """S w for a constant sparse S; its derivative is again such a product, so it has derivatives of any order.

    ``torch.sparse.mm`` has them too, but transposes the matrix at every call, which takes ten times as long.
    """

    @staticmethod
    def forward(w, matrix, transposed):
        return matrix @ w

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.matrix, ctx.transposed = inputs

    @staticmethod
    def backward(ctx, grad):
        return SparseProduct.apply(grad, ctx.transposed, ctx.matrix), None, None

    @staticmethod
    def vmap(info, in_dims, w, matrix, transposed):
        """Many w are one wide one."""
        w = w.movedim(in_dims[0], 1)
        out = SparseProduct.apply(w.flatten(1), matrix, transposed)
        return out.unflatten(1, w.shape[1:]), 1


def product(x: Tensor | Sparse, w: Tensor) -> Tensor:
    """Return x w."""
    return SparseProduct.apply(w, *x) if isinstance(x, Sparse) else x @ w


def tensors(part: Part) -> tuple[Tensor | Sparse, Tensor]:
    """Return a part as batch of the module, float32."""
    y = torch.from_numpy(part.y)
    if not scipy.sparse.issparse(part.x):
        return torch.from_numpy(part.x).float(), y
    return Sparse(_compressed_rows(part.x), _compressed_rows(part.x.T.tocsr())), y


def _compressed_rows(x: scipy.sparse.csr_matrix) -> Tensor:
    arrays = (x.indptr.astype(np.int64), x.indices.astype(np.int64), x.data.astype(np.float32))
    with warnings.catch_warnings():  # that the layout is in beta
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        return torch.sparse_csr_tensor(*map(torch.from_numpy, arrays), size=x.shape, check_invariants=True)


PENALTY_GRID = np.logspace(-7, -1, 13)
L1_GRID = np.logspace(-6, -2, 13)


class Logistic(BilevelModule):
    """A multinomial logistic regression (inner); what is outer is up to the two kinds below."""

    def __init__(self, num_features: int, num_classes: int, **options: Any) -> None:
        super().__init__(**options)
        self.weight = nn.Parameter(torch.zeros(num_features, num_classes))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def inner_parameters(self):
        return [self.weight, self.bias]

    def forward(self, x):
        return product(x, self.weight) + self.bias

    def outer_loss(self, batch):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def on_train_start(self):
        self._began = time.process_time()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log("cpu_seconds", time.process_time() - self._began, batch_size=1)


class Penalties(Logistic):
    """One log penalty per feature is outer; the inner run continues from one outer step to the next."""

    def __init__(
        self, num_features: int, num_classes: int, inner_lr: float, outer_lr: float, inner_steps: int = 10
    ) -> None:
        super().__init__(num_features, num_classes, inner_steps=inner_steps)
        self.inner_lr, self.outer_lr = inner_lr, outer_lr
        self.log_penalties = nn.Parameter(torch.full((num_features,), -math.log(num_features * num_classes)))

    def outer_parameters(self):
        return [self.log_penalties]

    @property
    def penalties(self) -> Tensor:
        # Below the least of the grid there is nothing to find. Gradient descent is stable up to 2 / lr, and at half of
        # that a weight is 0 for all purposes.
        return self.log_penalties.clamp(math.log(PENALTY_GRID[0]), -math.log(self.inner_lr)).exp()

    def inner_loss(self, batch):
        return self.outer_loss(batch) + (self.penalties @ self.weight.square()).sum() / 2

    def configure_inner_optimizer(self):
        return SGD(lr=self.inner_lr, momentum=0.9)

    def configure_optimizers(self):
        return torch.optim.SGD([self.log_penalties], lr=self.outer_lr)


class LearningRate(Logistic):
    """Learning rate and momentum are outer; every inner run starts from zero."""

    def __init__(
        self, num_features: int, num_classes: int, lr: float, momentum: float = 0.5, inner_steps: int = 20
    ) -> None:
        super().__init__(num_features, num_classes, inner_steps=inner_steps, inner_start="reset")
        self.penalty = 1 / (num_features * num_classes)
        self.log_lr = nn.Parameter(torch.tensor(math.log(lr)))
        self.momentum_logit = nn.Parameter(torch.tensor(momentum).logit())

    def outer_parameters(self):
        return [self.log_lr, self.momentum_logit]

    def inner_loss(self, batch):
        return self.outer_loss(batch) + self.penalty * self.weight.square().sum() / 2

    def configure_inner_optimizer(self):
        return SGD(lr=self.log_lr.exp(), momentum=self.momentum_logit.sigmoid())

    def configure_optimizers(self):
        return torch.optim.Adam(self.outer_parameters(), lr=0.1, betas=(0.8, 0.9))

    def on_train_batch_start(self, batch, batch_idx):
        found = {"lr": self.log_lr.exp().item(), "momentum": self.momentum_logit.sigmoid().item()}
        self.log_dict(found, batch_size=1)


class Setting(NamedTuple):
    """A strategy, and the learning rates of the log penalties that suit the length of its estimates.

    With a warm start, reverse mode and a Neumann series see no further back than their steps and terms, so that their
    estimates are short; conjugate gradients solve for the whole past. Plain gradient descent, not Adam, takes them:
    on thousands of outer parameters Adam's steps, alike for all, fit the noise of the validation examples.

    Attributes:
        strategy: from the data's inner learning rate and the number of inner steps.
        digits: learning rate there.
        newsgroups: and there.
    """

    strategy: Callable[[float, int], HypergradientStrategy]
    digits: float
    newsgroups: float


PENALTIES = {
    "reverse": Setting(lambda lr, steps: ReverseUnroll(), 1000, 3000),
    "aid-fp": Setting(lambda lr, steps: ImplicitGradient(Neumann(steps, step_size=lr)), 3000, 3000),
    "aid-cg": Setting(lambda lr, steps: ImplicitGradient(ConjugateGradient(steps, tol=1e-2)), 300, 200),
    "pzobo": Setting(lambda lr, steps: PZOBO(num_directions=8, mu=0.1), 1000, 300),
    "hozog": Setting(lambda lr, steps: ZerothOrder(num_directions=8, mu=0.1), 1000, 300),
}
LEARNING_RATE: dict[str, Callable[[], HypergradientStrategy]] = {
    "reverse": ReverseUnroll,
    "forward": ForwardUnroll,
    "pzobo": lambda: PZOBO(num_directions=2, mu=1e-2),
    "hozog": lambda: ZerothOrder(num_directions=2, mu=1e-2),
}
STRATEGIES = tuple(dict.fromkeys([*PENALTIES, *LEARNING_RATE]))


def fit(
    module: Logistic, strategy: HypergradientStrategy, data: Data, steps: int, args: Any, name: str, clip: float = 0.0
) -> dict[str, tuple[list[int], list[float]]]:
    """Run one strategy, with hypergradients cut to ``clip`` in each entry if it is not 0; return its curves."""
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[strategy],
        accelerator=args.accelerator,
        logger=CSVLogger(args.output, name=f"log/{name}", version=""),
        log_every_n_steps=1,
        gradient_clip_val=clip or None,
        gradient_clip_algorithm="value",
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=not args.quiet,
    )
    episode = Episode([tensors(data.train)], tensors(data.validation))
    trainer.fit(module, DataLoader([episode] * steps, batch_size=None))
    return report.logged(trainer.logger.log_dir)


def solve(part: Part, penalties: np.ndarray) -> tuple[LogisticRegression, np.ndarray]:
    """Return the minimum of mean cross-entropy + Σ_j penalty_j ‖w_j‖² / 2, and the scale of the features it is for.

    With x_j / √penalty_j in place of x_j it has one penalty, 1, which scikit-learn can solve.
    """
    scale = 1 / np.sqrt(penalties)
    model = LogisticRegression(C=1 / len(part.y), max_iter=5000).fit(scaled(part.x, scale), part.y)
    return model, scale


def scaled(x: Matrix, scale: np.ndarray) -> Matrix:
    """Return x with its columns multiplied."""
    return x @ scipy.sparse.diags(scale) if scipy.sparse.issparse(x) else x * scale


def judge(data: Data, penalties: np.ndarray) -> dict[str, float]:
    """Return what penalties are worth: of the exact minimum on the training part, and on training and validation."""
    model, scale = solve(data.train, penalties)
    both, _ = solve(data.both, penalties)
    test = scaled(data.test.x, scale)
    return {
        "validation loss": loss(model, scaled(data.validation.x, scale), data.validation.y),
        "test loss": loss(model, test, data.test.y),
        "test accuracy": float(model.score(test, data.test.y)),
        "refitted test loss": loss(both, test, data.test.y),
        "refitted test accuracy": float(both.score(test, data.test.y)),
    }


def loss(model: LogisticRegression, x: Matrix, y: np.ndarray) -> float:
    return float(log_loss(y, model.predict_proba(x), labels=model.classes_))


def grid_of_penalties(data: Data, values: Sequence[float]) -> dict[str, Any]:
    """Return the best single penalty by validation loss, and the CPU seconds of the search."""
    began, losses = time.process_time(), []
    for value in values:
        model, scale = solve(data.train, np.full(data.train.x.shape[1], value))
        losses.append(loss(model, scaled(data.validation.x, scale), data.validation.y))
    seconds = time.process_time() - began
    best = float(values[int(np.argmin(losses))])
    worth = judge(data, np.full(data.train.x.shape[1], best))
    return {"method": "grid", "CPU seconds": seconds, "penalty": best, "points": len(values), **worth}


def learn_penalties(data: Data, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the first task: a row of results for the grid and for each strategy."""
    rows = [grid_of_penalties(data, PENALTY_GRID[:: 4 if args.smoke else 1])]
    for name, setting in PENALTIES.items():
        if name not in args.strategy:
            continue
        pl.seed_everything(args.seed, verbose=False)
        outer_lr = getattr(setting, data.name)
        module = Penalties(*data.sizes, data.inner_lr, outer_lr)
        strategy = setting.strategy(data.inner_lr, module.inner_steps)
        # No step changes a penalty by more than about 15%: the first estimates, at weights that are hardly trained, are
        # far too long.
        curves = fit(
            module,
            strategy,
            data,
            args.steps or data.steps,
            args,
            f"{data.name}-penalties-{name}",
            clip=0.15 / outer_lr,
        )
        penalties = module.penalties.detach().cpu().double().numpy()
        curve = {"CPU seconds": curves["cpu_seconds"][1], "validation loss": curves["outer_loss"][1]}
        row = {"method": name, "CPU seconds": curve["CPU seconds"][-1], "curve": curve, "penalties": penalties.tolist()}
        rows.append({**row, **judge(data, penalties)})
    return rows


def penalties_without(data: Data, seconds: float, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each baseline: an L1 penalty, and two numbers of a formula, by searches of so many seconds."""
    rows = [lasso(data, L1_GRID[:: 4 if args.smoke else 1])]
    formula = baselines.by_relevance(data.train.x, data.train.y)

    def validation_loss(point: Sequence[float]) -> float:
        model, scale = solve(data.train, formula(*point))
        return loss(model, scaled(data.validation.x, scale), data.validation.y)

    for name, search in baselines.SEARCHES.items():
        began = time.process_time()
        point, trials = search(validation_loss, [(-14.0, -2.0), (0.0, 2.0)], seconds, args.seed)
        row = {"method": f"F values, {name}", "CPU seconds": time.process_time() - began, "trials": trials}
        rows.append({**row, **judge(data, formula(*point))})
    return rows


def lasso(data: Data, strengths: Sequence[float]) -> dict[str, Any]:
    """Return what the best L1 penalty is worth, by validation loss, and the CPU seconds of the search."""
    began = time.process_time()
    models = [baselines.l1(data.train, strength) for strength in strengths]
    losses = [loss(model, data.validation.x, data.validation.y) for model in models]
    seconds, best = time.process_time() - began, int(np.argmin(losses))
    model, both = models[best], baselines.l1(data.both, strengths[best])
    worth = {"validation loss": losses[best]}
    for prefix, each in (("", model), ("refitted ", both)):
        worth[f"{prefix}test loss"] = loss(each, data.test.x, data.test.y)
        worth[f"{prefix}test accuracy"] = float(each.score(data.test.x, data.test.y))
    return {"method": "L1", "CPU seconds": seconds, "trials": len(models), **worth}


def learn_learning_rate(data: Data, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the second task: a row of results for the grid and for each strategy."""
    rows = [grid_of_learning_rates(data, sizes=(3, 2) if args.smoke else (12, 10))]
    for name, make in LEARNING_RATE.items():
        if name not in args.strategy:
            continue
        pl.seed_everything(args.seed, verbose=False)
        module = LearningRate(*data.sizes, lr=data.inner_lr / 10)
        curves = fit(module, make(), data, args.steps or data.steps, args, f"{data.name}-learning-rate-{name}")
        path = {key: curves[key][1] for key in ("lr", "momentum", "outer_loss")}
        row = {"method": name, "CPU seconds": curves["cpu_seconds"][1][-1], "path": path}
        found = {"lr": module.log_lr.exp().item(), "momentum": module.momentum_logit.sigmoid().item()}
        rows.append({**row, **found, **adapt(module, data)})
    return rows


def grid_of_learning_rates(data: Data, sizes: tuple[int, int]) -> dict[str, Any]:
    """Return the best learning rate and momentum by validation loss, and the CPU seconds of the search."""
    lrs = data.inner_lr * np.logspace(-1.5, 1.25, sizes[0])
    momenta = 1 - np.logspace(0, -2, sizes[1])
    momenta[0] = 0.01
    began = time.process_time()
    modules = [[LearningRate(*data.sizes, lr=lr, momentum=momentum) for lr in lrs] for momentum in momenta]
    losses = np.array([[adapt(module, data, test=False)["validation loss"] for module in row] for row in modules])
    seconds = time.process_time() - began
    i, j = np.unravel_index(np.argmin(losses), losses.shape)
    row = {"method": "grid", "CPU seconds": seconds, "lr": float(lrs[j]), "momentum": float(momenta[i])}
    grid = {"lrs": lrs.tolist(), "momenta": momenta.tolist(), "losses": losses.tolist(), "points": losses.size}
    return {**row, "grid": grid, **adapt(modules[i][j], data)}


def rates_without(data: Data, seconds: float, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each search and schedule, constant or a cosine that falls to 0: the best rate and momentum."""
    rows = []
    for name, search in baselines.SEARCHES.items():
        for cosine in (False, True):
            began = time.process_time()
            ranges = [(math.log(data.inner_lr) + math.log(10) * part for part in (-1.5, 1.75)), (math.log(0.01), 0.0)]
            point, trials = search(
                lambda point, cosine=cosine: descend(data, *point, cosine)["validation loss"],
                [tuple(each) for each in ranges],
                seconds,
                args.seed,
            )
            method = f"{name}, {'cosine' if cosine else 'constant'}"
            row = {"method": method, "CPU seconds": time.process_time() - began, "trials": trials}
            found = {"lr": math.exp(point[0]), "momentum": 1 - math.exp(point[1])}
            rows.append({**row, **found, **descend(data, *point, cosine, test=True)})
    return rows


def descend(data: Data, log_lr: float, log_slack: float, cosine: bool, test: bool = False) -> dict[str, float]:
    """Return what plain PyTorch reaches in the steps of the inner run, with momentum 1 − exp(log_slack)."""
    module = LearningRate(*data.sizes, lr=math.exp(log_lr))
    optimizer = torch.optim.SGD(module.inner_parameters(), math.exp(log_lr), momentum=1 - math.exp(log_slack))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, module.inner_steps)
    batch = tensors(data.train)
    for _ in range(module.inner_steps):
        optimizer.zero_grad()
        module.inner_loss(batch).backward()
        optimizer.step()
        if cosine:
            schedule.step()
    return worth_of(module, data, test)


@torch.no_grad()
def worth_of(module: LearningRate, data: Data, test: bool) -> dict[str, float]:
    """Return the losses of the weights as they are, and the accuracy on test examples."""
    worth = {"validation loss": module.outer_loss(tensors(data.validation)).item()}
    if test:
        x, y = tensors(data.test)
        worth["test loss"] = module.outer_loss((x, y)).item()
        worth["test accuracy"] = (module(x).argmax(-1) == y).float().mean().item()
    return worth


@torch.no_grad()
def adapt(module: LearningRate, data: Data, test: bool = True) -> dict[str, float]:
    """Return what the inner run at the module's learning rate and momentum leads to."""
    with module.adapted([tensors(data.train)]):
        return worth_of(module, data, test)


# Pairs that nearly coincide, reverse and forward mode, PZOBO and HOZOG, are told apart by their dashes.
LINES: dict[str, dict[str, Any]] = {
    "reverse": {"color": report.BLUE, "lw": 2.5},
    "aid-fp": {"color": "#56B4E9", "lw": 1.5},
    "aid-cg": {"color": report.GREEN, "lw": 1.5},
    "pzobo": {"color": report.VERMILION, "lw": 2.5},
    "hozog": {"color": "#E69F00", "lw": 1.5, "ls": (0, (3, 2))},
    "forward": {"color": "#CC79A7", "lw": 1.5, "ls": (0, (3, 2))},
}


def draw(path: Path, data: Data, penalties: Sequence[dict], rates: Sequence[dict]) -> None:
    """Draw, for the tasks that ran, losses against seconds and penalties, and the grid of losses with the paths."""
    count = 2 * bool(penalties) + bool(rates)
    figure = Figure(figsize=(3.7 * count, 3.8))
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    if penalties:
        draw_losses(axes.pop(0), penalties)
        (draw_digits if data.name == "digits" else draw_sorted)(axes.pop(0), penalties)
    if rates:
        draw_paths(axes.pop(0), rates)
    figure.savefig(path)


def draw_losses(axes: Any, rows: Sequence[dict]) -> None:
    """Show the losses of the runs, and the best of the grid where its search ends."""
    grid, *learned = rows
    for row in learned:
        curve = row["curve"]
        axes.plot(curve["CPU seconds"], curve["validation loss"], label=row["method"], **LINES[row["method"]])
    axes.axhline(grid["validation loss"], color=report.GREY, ls="--", lw=1.2)
    axes.plot(grid["CPU seconds"], grid["validation loss"], "o", color=report.GREY, label="best single penalty")
    low = min(min(row["curve"]["validation loss"]) for row in learned)
    axes.set(title="Loss on the validation examples", xlabel="CPU seconds", ylabel="cross-entropy")
    axes.set_ylim(0.9 * min(low, grid["validation loss"]), 2.5 * grid["validation loss"])
    axes.legend()


def draw_digits(axes: Any, rows: Sequence[dict]) -> None:
    """Show the penalties of the pixels and, beside them, of the noise."""
    best = min(rows[1:], key=lambda row: row["validation loss"])
    pixels, noise = np.log10(best["penalties"]).reshape(2, 8, 8)
    image = axes.imshow(np.concatenate([pixels, np.full((8, 1), np.nan), noise], 1), cmap="viridis")
    for column, name in ((3.5, "pixels"), (12.5, "noise")):
        axes.text(column, 8.2, name, ha="center", va="center")
    axes.set(title=f"Penalty of each feature, {best['method']} (log10)", ylim=(8.8, -0.6))
    axes.set_axis_off()
    axes.figure.colorbar(image, ax=axes, shrink=0.5, pad=0.02)


def draw_sorted(axes: Any, rows: Sequence[dict]) -> None:
    """Show how the penalties are spread, against the best single one."""
    for row in rows[1:]:
        axes.plot(np.sort(row["penalties"])[::-1], label=row["method"], **LINES[row["method"]])
    axes.axhline(rows[0]["penalty"], color=report.GREY, ls="--", lw=1.2, label="best single penalty")
    axes.set(title="Penalties, sorted", xlabel="feature", ylabel="penalty", yscale="log")
    axes.legend()


def draw_paths(axes: Any, rows: Sequence[dict]) -> None:
    """Show the loss over learning rate and momentum, and how the runs went through it."""
    grid = rows[0]["grid"]
    slack = 1 - np.array(grid["momenta"])
    levels = np.min(grid["losses"]) * np.geomspace(1, 4, 12)
    axes.contourf(grid["lrs"], slack, grid["losses"], levels=levels, cmap="Greys", extend="max", alpha=0.7)
    axes.plot(
        rows[0]["lr"], 1 - rows[0]["momentum"], "s", color=report.GREY, mec="white", ms=8, label="best of the grid"
    )
    for row in rows[1:]:
        line, path = LINES[row["method"]], row["path"]
        axes.plot(path["lr"], 1 - np.array(path["momentum"]), label=row["method"], **line)
        axes.plot(row["lr"], 1 - row["momentum"], "o", color=line["color"], mec="white")
    axes.set(title="Validation loss, darker is higher", xlabel="learning rate", ylabel="momentum")
    axes.set(xscale="log", yscale="log")
    axes.set_yticks([0.5, 0.2, 0.1, 0.05, 0.02, 0.01], ["0.5", "0.8", "0.9", "0.95", "0.98", "0.99"])
    axes.minorticks_off()
    axes.grid(visible=False)
    axes.legend(loc="upper right", frameon=True, framealpha=0.9, edgecolor="none")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; return its results."""
    parser = report.options(__doc__)
    parser.add_argument("--task", choices=["penalties", "learning-rate", "both"], default="both", help="(%(default)s)")
    parser.add_argument("--strategy", choices=STRATEGIES, nargs="+", default=STRATEGIES, help="some of them (all)")
    parser.add_argument("--data", choices=["digits", "newsgroups"], default="digits", help="(%(default)s)")
    parser.add_argument("--data-dir", type=Path, help="folder of 20 Newsgroups")
    parser.add_argument("--steps", type=int, help="outer steps (60; 40 on newsgroups)")
    parser.add_argument("--accelerator", default="cpu", help="for the Trainer (%(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    tasks = {"penalties": PENALTIES, "learning-rate": LEARNING_RATE}
    tasks = {
        task: known for task, known in tasks.items() if args.task in (task, "both") and known.keys() & args.strategy
    }
    if not tasks:
        parser.error(f"none of the strategies {', '.join(args.strategy)} is for the task {args.task}")
    args.output.mkdir(parents=True, exist_ok=True)
    if args.smoke:
        args.steps = args.steps or 3
    torch.set_num_threads(1)  # the products are small: more threads gain nothing
    data = noisy_digits(args.seed) if args.data == "digits" else newsgroups(args.seed, args.data_dir)
    with report.screen():
        # That a few iterations do not meet the tolerance is known, and what AID with a warm start counts on.
        warnings.filterwarnings("ignore", "`ConjugateGradient.*reached a relative residual")
        penalties = learn_penalties(data, args) if "penalties" in tasks else []
        rates = learn_learning_rate(data, args) if "learning-rate" in tasks else []
        # Searches get the seconds of the slowest exact strategy, or of the grid where that takes longer.
        without = {
            "penalties": penalties_without(data, longest(penalties), args) if penalties else [],
            "learning rate": rates_without(data, longest(rates), args) if rates else [],
        }
        path = args.output / f"hyperparameters_{args.data}.png"
        draw(path, data, penalties, rates)
    results = {"data": args.data, "seed": args.seed, "penalties": penalties, "learning rate": rates, "without": without}
    report.write_json(path.with_suffix(".json"), results)
    show(penalties + without["penalties"], rates + without["learning rate"], [path, path.with_suffix(".json")])
    return results


def longest(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the most CPU seconds that the grid or a strategy took, not counting those that take differences."""
    return max(row["CPU seconds"] for row in rows if row["method"] not in ("pzobo", "hozog"))


def show(penalties: Sequence[Mapping[str, Any]], rates: Sequence[Mapping[str, Any]], files: Sequence[Path]) -> None:
    """Print a table for each task."""
    if penalties:
        keys = ("validation loss", "test loss", "test accuracy", "refitted test loss", "refitted test accuracy")
        table(f"One penalty per feature, against the best of {penalties[0]['points']}", penalties, keys)
    if rates:
        keys = ("lr", "momentum", "validation loss", "test loss", "test accuracy")
        table(f"Learning rate and momentum, against a grid of {rates[0]['grid']['points']}", rates, keys)
    for file in files:
        print(f"wrote {file}")


def table(title: str, rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    cells = [[row["method"], f"{row['CPU seconds']:.1f}", *(f"{row[key]:.3f}" for key in keys)] for row in rows]
    report.print_table(title, ["method", "CPU s", *keys], cells)


if __name__ == "__main__":
    main()

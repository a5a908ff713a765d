"""Find the coefficient of a differential equation from 64 observations of its solution.

The outer parameter is log ν; the inner level is the solution at that ν, so that every ν tried is positive. The loss is
the mean squared difference at 8 × 8 observed points. The solver is a black box that nothing differentiates: ZerothOrder
needs two solutions a step.

    python examples/pde_discovery.py
    python examples/pde_discovery.py --equation kdv
    python examples/pde_discovery.py --equation all
    python examples/pde_discovery.py --inner pinn

Burgers (ν = 0.01/π), Allen–Cahn (ν = 0.001) and Korteweg–de Vries (ν = 0.0025) are those of (FG)²U, arXiv 2406.14095,
appendix E.3, with its ranges of starts. For one number a search needs no gradient: a grid with Brent's method is in the
table, too (pde/search.py), and wins. The observations come from a finer grid than the solver's. With `--inner pinn`
the inner level is a physics-informed net (9 layers of width 20), trained for 1,000 steps on the residual of the
equation, and the hypergradient is ForwardGradient's, in memory that does not grow with the steps.
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
import torch
from matplotlib.figure import Figure
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

import report
from lightning_bilevel import (
    SGD,
    Adam,
    BilevelModule,
    Episode,
    ForwardGradient,
    HypergradientStrategy,
    ZerothOrder,
)
from lightning_bilevel.errors import value_error
from pde import pinn
from pde.equations import EQUATIONS, grid, observe
from pde.search import Search, adam, search
from pde.spectral import SCHEMES, solve


class Discovery(BilevelModule):
    """log ν (outer), and a solution at ν (inner): what both kinds of inner level share.

    A step that leads out of the range that the starts are drawn from, or below what the solver's grid resolves, ends at
    the edge, with a warning.

    Args:
        equation: a key of ``EQUATIONS``.
        start: the first ν.
        steps: outer steps, in which the learning rate falls to 0 along a cosine.
        outer_lr: the learning rate of log ν.
        options: of ``BilevelModule``.
    """

    def __init__(self, equation: str, start: float, steps: int, outer_lr: float, **options: Any) -> None:
        super().__init__(**options)
        if not 0 < start < math.inf:
            raise value_error("Discovery(start=...)", "a positive number", start, "ν is the exponential of log ν.")
        self.save_hyperparameters()
        self.equation = EQUATIONS[equation]
        self.log_nu = nn.Parameter(torch.tensor(math.log(start), dtype=torch.float64))
        self._warned = False

    @property
    def nu(self) -> Tensor:
        return self.log_nu.exp()

    def outer_parameters(self):
        return [self.log_nu]

    def configure_optimizers(self):
        optimizer, schedule = adam(self.log_nu, self.hparams.outer_lr, self.hparams.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        low, high = self.equation.smallest, max(self.equation.largest_start, self.hparams.start)
        nu = self.nu.item()
        if not low <= nu <= high:
            with torch.no_grad():
                self.log_nu.clamp_(math.log(low), math.log(high))
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"A step led to nu = {nu:.3g}, outside [{low:g}, {high:g}]; the edge is taken, now and later.",
                    stacklevel=2,
                )
        self.log("nu", self.nu.item())


class SpectralDiscovery(Discovery):
    """The inner level is a spectral solver, which is called, not differentiated; θ is the field (256, 512)."""

    differentiable_solve = False

    def __init__(self, equation: str, start: float, steps: int = 150, outer_lr: float = 0.2) -> None:
        super().__init__(equation, start, steps, outer_lr, inner_start="reset")
        self.u = nn.Parameter(torch.zeros(*map(len, grid()), dtype=torch.float64))

    def inner_parameters(self):
        return [self.u]

    def solve_inner(self, batches):
        return {"u": torch.from_numpy(solve(self.hparams.equation, self.nu.item())).to(self.u.device)}

    def outer_loss(self, observed):
        return (observe(self.u) - observed).square().mean()


class PINNDiscovery(Discovery):
    """The inner level is a physics-informed net, trained on the residual and the boundary."""

    def __init__(
        self,
        equation: str,
        start: float,
        steps: int = 12,
        outer_lr: float = 0.6,
        inner_steps: int = 1000,
        inner_lr: float = 1e-3,
        inner_optimizer: str = "adam",
        inner_start: str = "warm",
    ) -> None:
        super().__init__(equation, start, steps, outer_lr, inner_steps=inner_steps, inner_start=inner_start)
        self.net = pinn.Net(order=self.equation.order)
        t, x = grid()
        t, x = np.broadcast_arrays(observe(t[:, None]), observe(x[None]))
        t, x = (torch.tensor(part.ravel()) for part in (t, x))
        self.register_buffer("observed_at", torch.stack([t, x, self.equation.initial(x)]).float())

    def inner_parameters(self):
        return self.net

    def inner_loss(self, points):
        return pinn.loss(self.equation, self.net, points, self.nu.to(points))

    def outer_loss(self, observed):
        return (pinn.field(self.net, *self.observed_at) - observed.flatten()).square().mean()

    def configure_inner_optimizer(self):
        return {"adam": Adam, "sgd": SGD}[self.hparams.inner_optimizer](lr=self.hparams.inner_lr)

    @torch.no_grad()
    def solution(self) -> np.ndarray:
        t, x = (torch.tensor(part) for part in grid())
        t, x = (part.flatten() for part in torch.meshgrid(t, x, indexing="ij"))
        points = torch.stack([t, x, self.equation.initial(x)]).float().to(self.device)
        return pinn.field(self.net, *points).view(*map(len, grid())).cpu().double().numpy()


OUTER, INNER = ("steps", "outer_lr"), ("inner_steps", "inner_lr", "inner_optimizer", "inner_start")
KINDS: dict[str, tuple[type[Discovery], tuple[str, ...]]] = {
    "spectral": (SpectralDiscovery, OUTER),
    "pinn": (PINNDiscovery, OUTER + INNER),
}
"""The modules by ``--inner``, and which options of the command line are theirs."""


class Found(NamedTuple):
    """What one start led to.

    Attributes:
        row: numbers for the table and the JSON.
        u: the solution at the end.
        curve: ν after each outer step, the start first.
    """

    row: dict[str, Any]
    u: np.ndarray
    curve: list[float]


def reference(name: str) -> np.ndarray:
    """Return the solution at the true ν, from twice as many points and four times as many steps as the solver takes."""
    scheme = SCHEMES[name]
    return solve(name, EQUATIONS[name].nu, points=2 * scheme.points, steps=4 * scheme.steps)


def draw_starts(name: str, count: int, seed: int) -> list[float]:
    """Draw starts uniformly from (0, ``largest_start``], those below ``smallest`` again."""
    equation, generator, starts = EQUATIONS[name], torch.Generator().manual_seed(seed), []
    while len(starts) < count:
        start = equation.largest_start * (1 - torch.rand((), generator=generator, dtype=torch.float64).item())
        starts += [start] if start >= equation.smallest else []
    return starts


def discover(args: argparse.Namespace, name: str, start: float, truth: np.ndarray, number: int) -> Found:
    """Run from one start."""
    pl.seed_everything(args.seed + number, verbose=False)
    torch.set_num_threads(1)  # the arrays are small: more threads gain nothing
    kind, names = KINDS[args.inner]
    options = {option: value for option in names if (value := getattr(args, option)) is not None}
    module = kind(name, start, **options)
    observed = torch.tensor(observe(truth))
    strategy: HypergradientStrategy = ZerothOrder(num_directions=1, mu=1e-4)
    inner: list[Any] = [observed]  # the spectral solver takes no data
    if args.inner == "pinn":
        generator = torch.Generator().manual_seed(args.seed + number)
        inner = [pinn.collocation(module.equation, args.points, generator) for _ in range(20)]
        observed, strategy = observed.float(), ForwardGradient(num_directions=1)
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[strategy],
        accelerator=args.accelerator,
        logger=CSVLogger(args.output, name=f"log/{name}-{args.inner}-{number}", version=""),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=not args.quiet,
    )
    began, cpu = time.perf_counter(), time.process_time()
    trainer.fit(module, DataLoader([Episode(inner, observed)] * module.hparams.steps, batch_size=None))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu

    logged, nu = report.logged(trainer.logger.log_dir), module.nu.item()
    u = module.solution() if args.inner == "pinn" else solve(name, nu)
    row = {
        "equation": name,
        "inner": args.inner,
        "start": start,
        "nu": nu,
        "error of nu": abs(nu / module.equation.nu - 1),
        "error of u": float(np.linalg.norm(u - truth) / np.linalg.norm(truth)),
        "loss": logged["outer_loss"][1][-1],
        "steps": module.hparams.steps,
        "seconds": seconds,
        "CPU seconds": cpu,
        "peak memory (MiB)": report.peak_memory(),
    }
    return Found(row, u, [start, *logged["nu"][1]])


def without(name: str, truth: np.ndarray, find: Callable[[np.ndarray], Search], start: float | None) -> dict[str, Any]:
    """Return what is found from the observations without a hypergradient, and what it takes."""
    began, cpu = time.perf_counter(), time.process_time()
    found = find(observe(truth))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    u = solve(name, found.nu)
    return {
        "equation": name,
        "start": start,
        "nu": found.nu,
        "error of nu": abs(found.nu / EQUATIONS[name].nu - 1),
        "error of u": float(np.linalg.norm(u - truth) / np.linalg.norm(truth)),
        "loss": found.loss,
        "solutions": found.solutions,
        "seconds": seconds,
        "CPU seconds": cpu,
    }


def searched(name: str, truth: np.ndarray) -> dict[str, Any]:
    """Return what a search over ν finds."""
    return without(name, truth, lambda observed: search(name, observed), None)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = report.options(__doc__)
    parser.add_argument("--equation", choices=[*EQUATIONS, "all"], default="burgers", help="(%(default)s)")
    parser.add_argument("--inner", choices=KINDS, default="spectral", help="solver (%(default)s)")
    parser.add_argument("--starts", type=int, help="starts drawn from the paper's range (5, or 1 with a net)")
    parser.add_argument("--start", type=float, help="this start in place of drawn ones")
    parser.add_argument("--steps", type=int, help="outer steps (150, or 12 with a net)")
    parser.add_argument("--outer-lr", type=float, help="learning rate of log nu (0.2, or 0.6 with a net)")
    parser.add_argument("--inner-steps", type=int, help="of the net for each outer step (1000)")
    parser.add_argument("--inner-lr", type=float, help="of the net (1e-3)")
    parser.add_argument("--inner-optimizer", choices=["adam", "sgd"], help="of the net (adam)")
    parser.add_argument("--inner-start", choices=["warm", "reset"], help="where each inner run begins (warm)")
    parser.add_argument("--points", type=int, default=256, help="of the residual in each inner step (%(default)s)")
    parser.add_argument("--accelerator", default="cpu", help="for the Trainer, of a device with float64 (%(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(argv)


def draw(path: Path, found: Mapping[str, Sequence[Found]], truths: Mapping[str, np.ndarray]) -> None:
    """Draw, for each equation, the field with its observations, profiles before and after, and ν against steps."""
    figure = Figure(figsize=(11, 3.6 * len(found)))
    t, x = grid()
    for row, (name, runs) in zip(figure.subplots(len(found), 3, squeeze=False), found.items(), strict=True):
        equation, truth, best = EQUATIONS[name], truths[name], min(runs, key=lambda run: run.row["loss"])
        left, middle, right = row
        limit = float(np.abs(truth).max())
        image = left.pcolormesh(
            t, x, truth.T, cmap="RdBu_r", vmin=-limit, vmax=limit, shading="nearest", rasterized=True
        )
        where = np.broadcast_arrays(observe(t[:, None]), observe(x[None]))
        left.scatter(*where, s=14, color="white", edgecolor="black", linewidth=0.6, clip_on=False, zorder=3)
        left.set(title=f"{equation.title}: {equation.formula}", xlabel="t", ylabel="x")
        left.grid(visible=False)
        figure.colorbar(image, ax=left, pad=0.02)

        for when, shade in ((63, 0.4), (255, 1.0)):
            middle.plot(x, truth[when], color=report.GREY, lw=4, alpha=0.35 * shade + 0.1)
            middle.plot(x, best.u[when], color=report.BLUE, lw=1.5, alpha=shade, label=f"found, t = {t[when]:.2g}")
            middle.plot(observe(x[None])[0], observe(truth)[(when + 1) // 32 - 1], "o", ms=4, color=report.VERMILION)
        middle.plot([], [], color=report.GREY, lw=4, alpha=0.45, label="true")
        middle.plot([], [], "o", ms=4, color=report.VERMILION, label="observed")
        low, high = middle.get_ylim()
        middle.set(title=f"Solution, error {best.row['error of u']:.1g}", xlabel="x", ylabel="u")
        middle.set_ylim(low, high + 0.25 * (high - low))  # room for the legend
        middle.legend(loc="upper center", ncols=2, handlelength=1.2, columnspacing=0.8, handletextpad=0.5)

        for run in runs:
            right.plot(run.curve, color=report.BLUE, lw=1.5, alpha=1 if run is best else 0.45)
            right.plot(0, run.curve[0], "o", ms=4, color=report.BLUE, clip_on=False)
        right.axhline(equation.nu, color=report.VERMILION, ls="--", lw=1.2, label=rf"true $\nu$ = {equation.nu:.3g}")
        right.set(title=rf"$\nu$ from {len(runs)} starts", xlabel="outer step", ylabel=r"$\nu$", yscale="log")
        right.legend()
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; return its results."""
    args = arguments(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    count = args.starts or (5 if args.inner == "spectral" else 1)
    if args.smoke:
        count, args.steps, args.inner_steps = args.starts or 2, args.steps or 3, args.inner_steps or 3
    names = list(EQUATIONS) if args.equation == "all" else [args.equation]
    found, truths = {}, {}
    with report.screen():
        for name in names:
            truths[name] = reference(name)
            starts = draw_starts(name, count, args.seed) if args.start is None else [args.start]
            found[name] = [discover(args, name, start, truths[name], number) for number, start in enumerate(starts)]
        stem = args.output / f"pde_discovery_{args.equation}_{args.inner}"
        draw(stem.with_suffix(".png"), found, truths)
    results = {"results": [run.row for runs in found.values() for run in runs], "seed": args.seed}
    results["search"] = [searched(name, truths[name]) for name in names]
    results["curves"] = {name: [run.curve for run in runs] for name, runs in found.items()}
    report.write_json(stem.with_suffix(".json"), results)
    show(results["results"] + results["search"], [stem.with_suffix(".png"), stem.with_suffix(".json")])
    return results


def show(rows: Sequence[Mapping[str, Any]], files: Sequence[Path]) -> None:
    """Print the table."""
    columns = ["equation", "true nu", "start", "found", "error of nu", "of u", "loss", "CPU s"]
    lines = [
        [
            row["equation"],
            f"{EQUATIONS[row['equation']].nu:.3g}",
            "search" if row["start"] is None else f"{row['start']:.3g}",
            f"{row['nu']:.3g}",
            *(f"{row[key]:.0e}" for key in ("error of nu", "error of u", "loss")),
            f"{row['CPU seconds']:.1f}",
        ]
        for row in rows
    ]
    report.print_table("The coefficient found from 64 observations; errors are relative", columns, lines, files)


if __name__ == "__main__":
    main()

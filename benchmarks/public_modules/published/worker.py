"""Wraps the modules of one package, in its environment: ``python -m published.worker PACKAGE [PATTERN]``.

The last line that it prints is a JSON list of rows.
"""

from __future__ import annotations

import ast
import copy
import inspect
import json
import logging
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable
from fnmatch import fnmatch
from importlib import import_module, metadata
from typing import Any

import torch
from torch.utils.data import DataLoader

PACKAGE = import_module(f"published.{sys.argv[1]}")  # before the library, which follows its namespace of Lightning

from lightning_bilevel import (  # noqa: E402
    PZOBO,
    SGD,
    EpisodeLoader,
    FirstOrder,
    ForwardGradient,
    HypergradientStrategy,
    ImplicitGradient,
    ReverseUnroll,
    bilevel,
)
from lightning_bilevel.errors import MisconfigurationError  # noqa: E402
from lightning_bilevel.host import NAMESPACE, Callback, Trainer  # noqa: E402
from lightning_bilevel.linear_solvers import Neumann  # noqa: E402
from published import STEPS, Row, cast, oracle  # noqa: E402

seed_everything = import_module(NAMESPACE).seed_everything
is_overridden = import_module(f"{NAMESPACE}.utilities.model_helpers").is_overridden

STRATEGIES: dict[str, Callable[[float], HypergradientStrategy]] = {
    "ReverseUnroll": lambda lr: ReverseUnroll(),
    "ForwardGradient": lambda lr: ForwardGradient(2),
    "PZOBO": lambda lr: PZOBO(2),
    "ImplicitGradient": lambda lr: ImplicitGradient(Neumann(3, step_size=lr)),
}
STEP_SIZES = {torch.float64: (1e-3, 1e-4, 1e-5, 1e-6), torch.float32: (1.0, 0.1, 0.01)}
QUIET = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")


class Watch(Callback):
    """The module's state before the first outer step, and the gradients that its optimizer got there."""

    def __init__(self) -> None:
        self.state: dict[str, torch.Tensor] = {}
        self.grads: dict[str, torch.Tensor] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if not self.state:
            self.state = copy.deepcopy(pl_module.module.state_dict())

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if not self.grads:
            named = pl_module.module.named_parameters(remove_duplicate=False)
            self.grads = {name: each.grad.clone() for name, each in named if each.grad is not None}


def fit(
    make: Callable[[], Row], strategy: Callable[[float], HypergradientStrategy], dtype: torch.dtype, steps: int
) -> Watch:
    """Train a new module of a row for some outer steps."""
    seed_everything(0, verbose=False)
    row, watch = make(), Watch()
    wrapped = bilevel(
        row.module, inner=row.inner, outer=row.outer, inner_optimizer=SGD(lr=row.lr), inner_steps=STEPS, **row.losses
    )
    inner, outer = cast(row.batches, dtype)
    trainer = Trainer(
        max_steps=steps,
        callbacks=[strategy(row.lr), watch],
        precision="64-true" if dtype == torch.float64 else "32-true",
        accelerator="cpu",
        limit_val_batches=1,
        num_sanity_val_steps=0,
        **dict.fromkeys(QUIET, False),
    )
    validates = row.validates and is_overridden("validation_step", row.module)
    own = DataLoader([outer], batch_size=None, collate_fn=copy.deepcopy) if validates else None
    trainer.fit(wrapped, EpisodeLoader([inner], [outer]), own)
    if trainer.global_step < steps:
        raise RuntimeError(f"The fit ended after {trainer.global_step} steps.")
    if all(torch.equal(each, watch.state[name]) for name, each in oracle.named(row.module, row.outer).items()):
        raise RuntimeError("No outer parameter has changed.")
    return watch


def agreement(make: Callable[[], Row], dtype: torch.dtype) -> dict[str, Any]:
    """Compare ReverseUnroll's hypergradient with central differences along a random direction, without dropout.

    Of several step sizes the one counts that agrees best: a small one is of no use where h depends weakly on φ, a large
    one where it is curved or has kinks, and none makes a wrong derivative right.
    """
    with oracle.deterministic_and_precise():
        watch, direct = (
            fit(lambda: oracle.without_dropout(make()), lambda lr, kind=kind: kind(), dtype, 1)
            for kind in (ReverseUnroll, FirstOrder)
        )
        seed_everything(0, verbose=False)
        row, trainer = make(), Trainer(logger=False, accelerator="cpu")
        trainer.training = True

        def new() -> Any:
            seed_everything(0, verbose=False)  # some keep what they have drawn in plain attributes
            module = oracle.without_dropout(make()).module.to(dtype)
            module.trainer = trainer
            return module

        generator = torch.Generator().manual_seed(1)
        drawn = {
            name: torch.randn(each.shape, generator=generator, dtype=torch.float64)
            for name, each in oracle.named(row.module, row.outer).items()
        }
        norm = sum(each.square().sum() for each in drawn.values()) ** 0.5
        direction = {name: (each / norm).to(dtype) for name, each in drawn.items()}
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            losses = {name: loss if callable(loss) else _method(loss) for name, loss in row.losses.items()}
            problem = oracle.Problem(
                new, watch.state, cast(row.batches, dtype), row.inner, row.outer, direction, row.lr, STEPS, **losses
            )
            if row.detaches:
                differences = [problem.backward()]
            else:
                differences = [problem.difference(each) for each in STEP_SIZES[dtype]]
        finally:
            torch.set_default_dtype(default)
    found, short = (
        sum((seen.grads[name] * direction[name]).sum().item() for name in seen.grads if name in direction)
        for seen in (watch, direct)
    )
    if "--traceback" in sys.argv:
        print(found, short, differences, file=sys.stderr)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "with": "a plain backward pass" if row.detaches else "central differences",
        "error": min(abs(found - each) / abs(each) for each in differences),
        "through the inner run": abs(found - short) / abs(found),
    }


def _method(name: str) -> Callable[[Any, Any], Any]:
    return lambda module, batch: getattr(module, name)(batch)


def lines(make: Callable[[], Row], row: Row) -> list[str]:
    """Return the three lines: the module is made as in the source of its row, the others follow from it."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(make)))
    (module,) = (
        ast.unparse(each)
        for each in ast.walk(tree)
        if isinstance(each, ast.Assign) and "module" in ast.unparse(each.targets[0]).strip("()").split(", ")
    )
    losses = "".join(f", {name}={getattr(each, '__name__', repr(each))}" for name, each in row.losses.items())
    return [
        module,
        f"wrapped = bilevel(module, inner={row.inner!r}, outer={row.outer!r}{losses}, "
        f"inner_optimizer=SGD(lr={row.lr}), inner_steps={STEPS})".replace("'", '"'),
        f"Trainer(max_steps={STEPS}, callbacks=[ReverseUnroll()]).fit(wrapped, EpisodeLoader(inner, outer))",
    ]


def said(run: Callable[[], Any]) -> str:
    """Return ``ok``, or what was refused or failed and why."""
    try:
        run()
    except (MisconfigurationError, ValueError, FloatingPointError) as error:
        ours = any("lightning_bilevel" in frame.filename for frame in traceback.extract_tb(error.__traceback__)[-2:])
        return f"{'refused' if ours else 'failed'}: {_first(error)}"
    except Exception as error:  # noqa: BLE001 - of any package
        if "--traceback" in sys.argv:
            traceback.print_exc()
        return f"failed: {_first(error)}"
    return "ok"


def _first(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def examined(name: str, make: Callable[[], Row]) -> dict[str, Any]:
    """Return the row of a module."""
    row = make()
    found: dict[str, Any] = {
        "package": PACKAGE.DISTRIBUTION,
        "version": metadata.version(PACKAGE.DISTRIBUTION),
        "class": name,
        "lines": lines(make, row),
    }
    for dtype in (torch.float64, torch.float32):
        problem = said(lambda dtype=dtype: found.update(agreement=agreement(make, dtype)))
        torch.set_default_dtype(torch.float32)
        if problem == "ok":
            break
        found.setdefault("no agreement", {})[str(dtype).removeprefix("torch.")] = problem
    found["strategies"] = {
        kind: said(lambda strategy=strategy: fit(make, strategy, torch.float32, STEPS))
        for kind, strategy in STRATEGIES.items()
    }
    return found


def main() -> None:
    """Examine the rows whose names match, and print what was found."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    pattern = next((each for each in sys.argv[2:] if not each.startswith("--")), "*")
    rows = [examined(name, make) for name, make in PACKAGE.ROWS.items() if fnmatch(name, pattern)]
    print(json.dumps(rows))


if __name__ == "__main__":
    main()

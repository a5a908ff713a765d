"""One process that imports Lightning in one way: ``python namespace.py CASE FOLDER`` prints what happened there.

It imports nothing of Lightning by itself, and nothing that does.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import warnings
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

OLD, NEW, LIBRARY = "pytorch_lightning", "lightning.pytorch", "lightning_bilevel"


def imported(*names: str) -> list[Any]:
    """Import packages in this order."""
    return [importlib.import_module(name) for name in names]


def loaded() -> list[str]:
    """Return which of the two packages are imported, with their parts that go by other names."""
    roots = {name.split(".")[0] for name in sys.modules}
    return sorted(roots & {"lightning", "lightning_fabric", "pytorch_lightning"})


# ---------------------------------------------------------------------------------------------------------------------
# A problem, in any namespace
# ---------------------------------------------------------------------------------------------------------------------


def bilevel_module(library: Any) -> Any:
    """Return a bilevel module: ridge regression with a learned penalty."""

    class Ridge(library.BilevelModule):
        def __init__(self, inner_steps: int = 2) -> None:
            super().__init__(inner_steps=inner_steps, inner_start="warm")
            self.net, self.log_penalty = nn.Linear(3, 1), nn.Parameter(torch.zeros(()))

        def inner_parameters(self) -> Any:
            return self.net

        def inner_loss(self, batch: Any) -> Any:
            return self.outer_loss(batch) + self.log_penalty.exp() * self.net.weight.square().sum()

        def outer_loss(self, batch: Any) -> Any:
            return (self.net(batch[0]) - batch[1]).square().mean()

        def configure_inner_optimizer(self) -> Any:
            return library.Adam(lr=0.1)

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.outer_parameters(), lr=0.1)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            with self.adapted([batch]):
                self.log("loss", self.outer_loss(batch))

    torch.manual_seed(0)
    return Ridge()


def plain_module(pl: Any) -> Any:
    """Return a module that knows of no levels."""

    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.scale = nn.Linear(3, 1), nn.Parameter(torch.ones(()))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = (self.scale * self.net(batch[0]) - batch[1]).square().mean()
            self.log("mine", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.1)

    return Net()


def data_module(pl: Any, library: Any) -> Any:
    """Return a data module with eight episodes."""

    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return episodes(library)

        def val_dataloader(self) -> Any:
            return batches()

    return Data()


def batches() -> Any:
    x = torch.linspace(-1, 1, 48).reshape(16, 3).sin()
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)


def episodes(library: Any) -> Any:
    return library.EpisodeLoader(inner=batches(), outer=batches())


def wrapped(library: Any, module: Any) -> Any:
    levels = {"inner": "net", "outer": "scale", "outer_loss": "training_step"}
    return library.bilevel(module, **levels, inner_optimizer=library.SGD(lr=0.1))


def trainer(pl: Any, *callbacks: Any, **options: Any) -> Any:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    quiet |= {"enable_progress_bar": False, "accelerator": "cpu", "max_epochs": 1}
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, **options})


# ---------------------------------------------------------------------------------------------------------------------
# One namespace throughout
# ---------------------------------------------------------------------------------------------------------------------


def use(pl: Any, library: Any, folder: Path) -> dict[str, Any]:
    """Do what a project does, all in one namespace; return what came of it."""
    found: dict[str, Any] = {"base": issubclass(library.BilevelModule, pl.LightningModule)}
    make = lambda: library.ForwardGradient(num_directions=2)  # noqa: E731

    whole = bilevel_module(library)
    trainer(pl, make()).fit(whole, episodes(library))
    save = pl.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    trainer(pl, make(), save, enable_checkpointing=True, max_steps=2).fit(bilevel_module(library), episodes(library))
    resumed = bilevel_module(library)
    trainer(pl, make()).fit(resumed, episodes(library), ckpt_path=str(folder / "step=2.ckpt"))
    found["resume"] = all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))

    shared = bilevel_module(library)
    with_shares = trainer(pl, make(), strategy="ddp_directions", devices=1)
    with_shares.fit(shared, data_module(pl, library))
    found["strategy"] = isinstance(with_shares.strategy, (library.DirectionParallelStrategy, pl.strategies.DDPStrategy))
    found["shared"] = all(map(torch.allclose, whole.state_dict().values(), shared.state_dict().values()))
    (metrics,) = with_shares.validate(shared, batches(), verbose=False)
    found["adapted"] = metrics["loss"]

    module = plain_module(pl)
    before = module.scale.item()
    fit = trainer(pl, library.ReverseUnroll(), library.HypergradientMonitor(every_n_steps=1, samples=0))
    fit.fit(wrapped(library, module), episodes(library))
    found["bilevel"] = module.scale.item() != before and fit.callback_metrics["mine"].item()
    found["monitor"] = fit.callback_metrics["hypergradient_cosine"].item()

    callbacks = [{"class_path": "lightning_bilevel.PZOBO", "init_args": {"num_directions": 2}}]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
    options = {"accelerator": "cpu", "enable_model_summary": False, "callbacks": callbacks, **quiet}
    (cli,) = imported(f"{pl.__name__}.cli")
    arguments = ["fit", f"--trainer={json.dumps(options)}"]
    data = type(data_module(pl, library))
    made = cli.LightningCLI(type(whole), data, save_config_callback=None, args=arguments)
    found["cli"] = made.trainer.global_step
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Both
# ---------------------------------------------------------------------------------------------------------------------


def mix(own: Any, other: Any, library: Any) -> dict[str, Any]:
    """Use objects of ``other`` with the library, which uses ``own``; return what is said to each."""
    own_fit = lambda **options: trainer(own, library.ReverseUnroll(), **options)  # noqa: E731
    other_fit = lambda **options: trainer(other, library.ReverseUnroll(), **options)  # noqa: E731
    tries: dict[str, Callable[[], Any]] = {
        "module in the other's trainer": lambda: other_fit().fit(bilevel_module(library), episodes(library)),
        "wrapped in the other's trainer": lambda: other_fit().fit(
            wrapped(library, plain_module(own)), episodes(library)
        ),
        "the other's module wrapped": lambda: wrapped(library, plain_module(other)),
        "callback in the other's trainer": lambda: other_fit().fit(plain_module(other), episodes(library)),
        "monitor in the other's trainer": lambda: trainer(other, library.HypergradientMonitor()).fit(
            plain_module(other), episodes(library)
        ),
        "the other's data module": lambda: own_fit().fit(
            bilevel_module(library), datamodule=data_module(other, library)
        ),
        "the other's ddp_directions": lambda: other_fit(strategy="ddp_directions"),
        "parallel strategy in the other's trainer": lambda: other_fit(strategy=library.DirectionParallelStrategy()),
        "the other's callback": lambda: trainer(own, library.ReverseUnroll(), other.callbacks.Timer()).fit(
            bilevel_module(library), episodes(library)
        ),
        "nothing mixed": lambda: own_fit().fit(bilevel_module(library), episodes(library)),
    }
    return {name: said(action) for name, action in tries.items()}


def late(library: Any) -> dict[str, Any]:
    """Import a namespace that the library does not use once there is a module, as a notebook does."""
    module = bilevel_module(library)
    (other,) = imported(library.host.OTHER)
    strategy = library.ReverseUnroll()
    return {"said": said(lambda: trainer(other, strategy).fit(module, episodes(library)))}


def said(action: Callable[[], Any]) -> list[str] | None:
    """Return the type and text of the error that ``action`` raises, if any."""
    try:
        action()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None


def without_old() -> None:
    """Let ``pytorch_lightning`` not be installed."""
    find = PathFinder.find_spec

    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.split(".")[0] in ("pytorch_lightning", "lightning_fabric") else find(name, path, target)

    PathFinder.find_spec = find_spec  # type: ignore[method-assign]


CASES: dict[str, tuple[str, ...]] = {
    OLD: (OLD, LIBRARY),
    NEW: (NEW, LIBRARY),
    "only lightning installed": (LIBRARY,),
    "both, then the library": (OLD, NEW, LIBRARY),
    "the library, then lightning": (LIBRARY, NEW, OLD),
    "lightning, the library, pytorch_lightning": (NEW, LIBRARY, OLD),
    "a module, then lightning": (LIBRARY, NEW),
}
"""The order of the imports."""


def main(case: str, folder: Path) -> dict[str, Any]:
    """Import the library in its turn, and do in one namespace, or in both, what a project does."""
    order = CASES[case]
    if case == "only lightning installed":
        without_old()
    if case == "a module, then lightning":
        return late(*imported(*order[:1]))
    position = order.index(LIBRARY)
    library = imported(*order[: position + 1])[-1]
    report = {"namespace": library.host.NAMESPACE, "loaded": loaded()}
    later = imported(*order[position + 1 :])
    if later:
        own, other = imported(library.host.NAMESPACE, library.host.OTHER)
        report |= mix(own, other, library)
    elif case in (OLD, NEW):
        report |= use(imported(case)[0], library, folder)
    return report


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in (OLD, NEW):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = main(sys.argv[1], Path(sys.argv[2]))
    report["warnings"] = [str(each.message) for each in caught if "lightning_bilevel uses" in str(each.message)]
    print(json.dumps(report))

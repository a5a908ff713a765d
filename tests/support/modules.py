"""Tiny bilevel modules, their data and a quiet Trainer, for the tests that run a real fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, TensorDataset

from lightning_bilevel import SGD, BilevelModule, Episode, EpisodeLoader

FEATURES, EXAMPLES = 3, 8


class Cleaning(BilevelModule):
    """Example weights are the outer parameters, a net the inner ones; with a learned learning rate for it.

    Args:
        optimizer: from the learned learning rate to the inner optimizer.
        net: the inner net.
        options: of ``BilevelModule``.
    """

    def __init__(
        self,
        optimizer: Callable[[Tensor], Any] = lambda lr: SGD(lr=lr, momentum=0.9),
        net: Callable[[], nn.Module] = lambda: nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, 1)),
        **options: Any,
    ) -> None:
        super().__init__(**{"inner_steps": 3, **options})
        self.net = net()
        self.example_weights = nn.Parameter(torch.zeros(EXAMPLES))
        self.log_lr = nn.Parameter(torch.tensor(-2.0))
        self.optimizer = optimizer
        self.values: list[Tensor] = []

    def inner_parameters(self) -> Any:
        return self.net.parameters()

    def inner_loss(self, batch: Any) -> Tensor:
        x, y, index = batch
        return (self.example_weights[index].sigmoid() * (self.net(x) - y).square().mean(1)).mean()

    def outer_loss(self, batch: Any) -> Tensor:
        return F.mse_loss(self.net(batch[0]), batch[1])

    def configure_inner_optimizer(self) -> Any:
        return self.optimizer(self.log_lr.exp())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.outer_parameters(), lr=0.05)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(self.trainer.callback_metrics.get("outer_loss", torch.tensor(0.0)).clone())


class Maml(BilevelModule):
    """The whole net is the initialization that is learned.

    Args:
        net: the net; at first a small one.
        loss: of outputs and targets, in both levels.
        options: of ``BilevelModule``.
    """

    def __init__(
        self, net: nn.Module | None = None, loss: Callable[[Tensor, Tensor], Tensor] = F.mse_loss, **options: Any
    ) -> None:
        super().__init__(**{"inner_steps": 2, **options})
        self.net = net or nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, 1))
        self.loss = loss

    def inner_parameters(self) -> Any:
        return self.net

    def outer_parameters(self) -> Any:
        return self.net

    def inner_loss(self, batch: Any) -> Tensor:
        return self.loss(self.net(batch[0]), batch[1])

    outer_loss = inner_loss

    def configure_inner_optimizer(self) -> Any:
        return SGD(lr=0.1)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.05)


class NoLevels(LightningModule):
    """No bilevel module."""

    def training_step(self, batch: Any) -> None: ...

    def configure_optimizers(self) -> None: ...


class Calls(Callback):
    """Keeps what a function of the module returned after every training batch."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        self.read, self.seen = read, []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.seen.append(self.read(pl_module))


def examples(seed: int, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs, targets and positions of a small regression set."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(EXAMPLES, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
    return x, x.sum(1, keepdim=True).sin(), torch.arange(EXAMPLES)


def loader(inner_batches: int = 2, *, shuffle: bool = False, **sizes: Any) -> EpisodeLoader:
    """Return four episodes, of ``inner_batches`` inner batches each, which are larger than the outer ones."""
    inner = DataLoader(TensorDataset(*examples(0)), batch_size=3, shuffle=shuffle, drop_last=True)
    outer = DataLoader(TensorDataset(*examples(1)[:2]), batch_size=2, shuffle=shuffle)
    return EpisodeLoader(inner, outer, inner_batches, **sizes)


def episode() -> Episode:
    """Return the first of them."""
    return next(iter(loader()))


def tasks(count: int, *, dtype: torch.dtype = torch.float32) -> list[Episode]:
    """Return few-shot episodes of equal shapes, one support and one query batch each."""
    pairs = [examples(seed, dtype=dtype)[:2] for seed in range(2 * count)]
    return [Episode([support], query) for support, query in zip(pairs[::2], pairs[1::2], strict=True)]


def listed(batches: Sequence[Any]) -> DataLoader[Any]:
    """Return a loader of the batches as they are."""
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    """Return a Trainer on the CPU that writes nothing, of one epoch."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    quiet |= {"enable_progress_bar": False, "accelerator": "cpu", "max_epochs": 1}
    return Trainer(callbacks=list(callbacks), **{**quiet, **options})


def parameters(module: nn.Module) -> dict[str, Tensor]:
    """Return clones of all parameters and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Return the names at which two state dicts are not equal bit for bit."""
    assert set(a) == set(b)
    return [name for name, value in a.items() if not torch.equal(value, b[name])]


def identical(a: Any, b: Any) -> bool:
    """Return whether two nested containers hold equal values, tensors bit for bit."""
    leaves_a, structure_a = tree_flatten(a)
    leaves_b, structure_b = tree_flatten(b)
    same = [torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(leaves_a, leaves_b, strict=True)]
    return structure_a == structure_b and all(same)


def flags(module: nn.Module) -> dict[str, bool]:
    """Return which parameters require gradients."""
    return {name: parameter.requires_grad for name, parameter in module.named_parameters()}


def functional_net(theta: Sequence[Tensor], x: Tensor) -> Tensor:
    """Evaluate the net of the modules above, written with torch only."""
    return F.linear(F.linear(x, theta[0], theta[1]).tanh(), theta[2], theta[3])


def episodes_of(loader: Any) -> Iterator[Episode]:
    """Go round and round a loader."""
    while True:
        yield from loader

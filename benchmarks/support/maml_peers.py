"""MAML with other libraries: one function a library, each in the way of that library's own examples."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import higher
import torch
import torchopt
from torch import Tensor, nn

from few_shot.learners import MetaLearner
from lightning_bilevel import Episode

LEARN2LEARN = importlib.util.find_spec("learn2learn")
if LEARN2LEARN is not None:
    # Its top-level package is not executed: that imports torchvision and gym, for nothing that MAML needs.
    sys.modules["learn2learn"] = importlib.util.module_from_spec(LEARN2LEARN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from learn2learn.algorithms import MAML
    for name in [name for name in sys.modules if name.split(".")[0] == "learn2learn"]:
        del sys.modules[name]  # or whoever imports it next finds the package without its contents

try:
    import iteryne
except ModuleNotFoundError:
    iteryne = None

Gradient = Callable[[MetaLearner, Sequence[Episode]], None]
"""Adds the meta-gradient to ``.grad`` of the net's parameters."""


def with_higher(module: MetaLearner, tasks: Sequence[Episode]) -> None:
    inner = torch.optim.SGD(module.net.parameters(), lr=module.hparams.inner_lr)
    for task in tasks:
        with higher.innerloop_ctx(module.net, inner, copy_initial_weights=False) as (net, optimizer):
            for _ in range(module.inner_steps):
                optimizer.step(loss(module, net, task.inner[0]))
            (loss(module, net, task.outer) / len(tasks)).backward()


def with_torchopt(module: MetaLearner, tasks: Sequence[Episode]) -> None:
    optimizer = torchopt.MetaSGD(module.net, lr=module.hparams.inner_lr)
    start, state = torchopt.extract_state_dict(module.net), torchopt.extract_state_dict(optimizer)
    for task in tasks:
        for _ in range(module.inner_steps):
            optimizer.step(loss(module, module.net, task.inner[0]))
        (loss(module, module.net, task.outer) / len(tasks)).backward()
        torchopt.recover_state_dict(module.net, start)
        torchopt.recover_state_dict(optimizer, state)


def with_learn2learn(module: MetaLearner, tasks: Sequence[Episode]) -> None:
    maml = MAML(module.net, lr=module.hparams.inner_lr)
    for task in tasks:
        net = maml.clone()
        for _ in range(module.inner_steps):
            net.adapt(loss(module, net, task.inner[0]))
        (loss(module, net, task.outer) / len(tasks)).backward()


def with_iteryne(module: MetaLearner, tasks: Sequence[Episode]) -> None:
    maml = iteryne.MAML(module.net, inner_lr=module.hparams.inner_lr, inner_steps=module.inner_steps)
    for task in tasks:
        learner = maml.clone().adapt_on(module.loss, *task.inner[0])
        (module.loss(learner(task.outer[0]), task.outer[1]) / len(tasks)).backward()


def with_parallel_metalearn(module: MetaLearner, tasks: Sequence[Episode]) -> None:
    support, query = ([torch.stack(part) for part in zip(*batches, strict=True)] for batches in _levels(tasks))
    maml = vars(module).get("parallel") or vars(module).setdefault("parallel", _parallel(module))
    maml.step(iter([(*support, *query)]))


def _levels(tasks: Sequence[Episode]) -> tuple[list[Any], list[Any]]:
    return [task.inner[0] for task in tasks], [task.outer for task in tasks]


def _parallel(module: MetaLearner) -> Any:
    """Return parallel-metalearn's MAML of a learner; whoever calls it takes the outer step."""
    from metalearn.algorithms import MAML as Parallel
    from metalearn.inner_optimizers.optimizers import InnerSGD
    from metalearn.loss.base import BaseLoss

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = module.net

        def forward(self, x: Tensor, **options: Any) -> dict[str, Any]:
            return {"logits": self.net(x), "buffers": dict(self.named_buffers())}

        def get_fast_weights(self) -> dict[str, Tensor]:
            return dict(self.named_parameters())

    class Loss(BaseLoss):  # type: ignore[misc, no-any-unimported]
        def forward(self, out_dict: Any, targets: Tensor, model_states: Any = None, **options: Any) -> Any:
            value = module.loss(out_dict["logits"], targets)
            return value, value.detach()

    class Held(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            """Leave the parameters to the benchmark's Adam."""

    net, rate = Net(), module.hparams.inner_lr
    inner = InnerSGD(net.get_fast_weights(), inner_lr=rate, max_inner_steps=module.inner_steps, learn_lr=False)
    held = Held(net.parameters(), lr=rate)
    return Parallel(
        model=net, optimizer=held, inner_optimizer=inner, support_loss_fn=Loss(), inner_steps=module.inner_steps
    )


PEERS: dict[str, Gradient] = {"higher": with_higher, "TorchOpt": with_torchopt}
if LEARN2LEARN is not None:
    PEERS["learn2learn"] = with_learn2learn
if iteryne is not None:
    PEERS["iteryne"] = with_iteryne
if importlib.util.find_spec("metalearn") is not None:
    PEERS["parallel-metalearn"] = with_parallel_metalearn


def loss(module: MetaLearner, net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return module.loss(net(batch[0]), batch[1])

"""MAML with other libraries: one function a library, each in the way of that library's own examples."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence

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


PEERS: dict[str, Gradient] = {"higher": with_higher, "TorchOpt": with_torchopt}
if LEARN2LEARN is not None:
    PEERS["learn2learn"] = with_learn2learn


def loss(module: MetaLearner, net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return module.loss(net(batch[0]), batch[1])

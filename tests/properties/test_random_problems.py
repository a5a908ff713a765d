"""Problems whose parts are drawn at random, against a loop in plain PyTorch: what only goes wrong together.

Levels that share parameters or do not, starts that are computed from φ, inner optimizers with learned rates, decay and
clipping, a proximal term, weights of the outer loss, one episode or several.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad

from lightning_bilevel import SGD, Adam, BilevelModule, Episode, ForwardUnroll, ReverseUnroll, hypergradient
from lightning_bilevel.inner_optimizers import PerStep
from lightning_bilevel.tree import Params
from tests.support.problems import assert_close, draw

PROBLEMS = 30
EXAMPLES = 5
CHOICES: dict[str, list[Any]] = {
    "steps": [1, 2, 3],
    "batches": [1, 2],
    "episodes": [1, 1, 2, 3],
    "chunk": [None, 1, 2],
    "inner": ["all", "head", "some"],
    "shared": ["all", "one", "none"],
    "start": ["own", "own", "generated", "another's", "from data"],
    "optimizer": ["gradient descent", "momentum", "Nesterov", "Adam"],
    "rate": ["constant", "learned", "by parameter", "by step"],
    "decay": [0.0, 0.1],
    "max_norm": [None, None, 0.05],
    "proximal": [0.0, 0.0, 0.5],
    "weights": [None, None, "constant", "learned"],
    "reads": [False, True],
}


class Drawn(BilevelModule):
    """A small net with what is chosen."""

    def __init__(self, choice: dict[str, Any]) -> None:
        proximal = choice["proximal"] if choice["shared"] != "none" else 0.0
        options = {"inner_start": "reset", "episode_chunk_size": choice["chunk"], "allow_unused": True}
        super().__init__(inner_steps=choice["steps"], proximal=proximal, **options)
        self.choice = choice
        self.encoder, self.head = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
        self.generator, self.another = nn.Linear(4, 2).double(), nn.Parameter(draw(2, 4, seed=7) / 3)
        self.logits, self.rate = nn.Parameter(draw(EXAMPLES, seed=8) / 3), nn.Parameter(torch.tensor(0.3).double())
        self.at_steps = nn.Parameter(draw(choice["steps"], seed=9))
        with torch.no_grad():
            layers = [*self.encoder.parameters(), *self.head.parameters(), *self.generator.parameters()]
            for number, weight in enumerate(layers):
                weight.copy_(draw(*weight.shape, seed=20 + number) / 2)

    def inner_parameters(self) -> list[nn.Parameter]:
        every = [*self.head.parameters(), *self.encoder.parameters()]
        return every[: {"all": 4, "head": 2, "some": 3}[self.choice["inner"]]]

    def outer_parameters(self) -> list[nn.Parameter]:
        inner = self.inner_parameters()
        shared = inner[: {"all": 4, "one": 1, "none": 0}[self.choice["shared"]]]
        left = [p for p in self.encoder.parameters() if all(p is not each for each in inner)]
        return [self.logits, self.rate, self.another, self.at_steps, *self.generator.parameters(), *shared, *left]

    def starts(self, batches: Any = ()) -> dict[str, Tensor]:
        match self.choice["start"]:
            case "generated":
                return {"head.weight": self.generator.weight.tanh() + self.encoder.bias}
            case "another's":
                return {"head.weight": self.another}
            case "from data":
                hidden = torch.stack([self.encoder(x).tanh().mean(0) for x, *_ in batches]).mean(0)
                return {"head.weight": torch.stack([hidden, -hidden]) + self.generator.bias[:, None]}
        return {}

    def inner_loss(self, batch: Any) -> Tensor:
        x, y, index = batch
        losses = F.cross_entropy(self.head(self.encoder(x).tanh()), y, reduction="none")
        read = (self.head.weight * self.another).sum().sin() / 10 if self.choice["reads"] else 0.0
        return (self.logits[index].exp() * losses).mean() + read

    def outer_loss(self, batch: Any) -> Tensor:
        loss = F.cross_entropy(self.head(self.encoder(batch[0]).tanh()), batch[1])
        return loss + self.logits.square().sum() / 20 if self.choice["reads"] else loss

    def outer_loss_weights(self) -> Tensor | None:
        match self.choice["weights"]:
            case "constant":
                return torch.arange(1.0, self.inner_steps + 1).double() / 10
            case "learned":
                return self.at_steps.softmax(0)
        return None

    def rate_at(self, step: int) -> Tensor:
        return self.rate * step / self.inner_steps

    def configure_inner_optimizer(self) -> Any:
        rate: Any = {
            "constant": 0.3,
            "learned": self.rate,
            "by parameter": {"head.*": self.rate, "*": 0.1},
            "by step": PerStep([self.rate_at(step) for step in range(1, self.inner_steps + 1)]),
        }[self.choice["rate"]]
        options = {"weight_decay": self.choice["decay"], "max_norm": self.choice["max_norm"]}
        if self.choice["optimizer"] == "Adam":
            return Adam(rate, **options)
        momentum = 0.0 if self.choice["optimizer"] == "gradient descent" else 0.7
        return SGD(rate, momentum=momentum, nesterov=self.choice["optimizer"] == "Nesterov", **options)


class Hooked(Drawn):
    def initial_inner_parameters(self) -> dict[str, Tensor]:
        return self.starts()


class FromData(Drawn):
    def initial_inner_parameters(self, batches: Any) -> dict[str, Tensor]:
        return self.starts(batches)


KINDS = {"own": Drawn, "from data": FromData}


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(EXAMPLES, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(2, (EXAMPLES,), generator=generator), torch.arange(EXAMPLES)


class Loss(nn.Module):
    """A loss of a module as what ``functional_call`` calls."""

    def __init__(self, module: Drawn, name: str) -> None:
        super().__init__()
        self.module, self.name = module, name

    def forward(self, batch: Any) -> Tensor:
        value: Tensor = getattr(self.module, self.name)(batch)
        return value

    def at(self, tensors: Params, batch: Any) -> Tensor:
        value: Tensor = functional_call(self, {f"module.{name}": value for name, value in tensors.items()}, (batch,))
        return value


def by_hand(module: Drawn, episodes: list[Episode]) -> Params:
    """Return the gradient of the mean outer loss by a loop of updates that are written out."""
    everything, choice = dict(module.named_parameters()), module.choice
    names = {id(parameter): name for name, parameter in everything.items()}
    inner, outer = ([names[id(p)] for p in ps] for ps in (module.inner_parameters(), module.outer_parameters()))
    total = torch.zeros(()).double()
    for episode in episodes:
        theta = {name: everything[name] if name in outer else everything[name].detach() for name in inner}
        theta |= module.starts(episode.inner)
        memory: dict[str, Any] = {name: (0.0, 0.0) for name in inner}
        values = []
        for step in range(1, choice["steps"] + 1):
            data = episode.inner[(step - 1) % len(episode.inner)]

            def loss(theta: Params, data: Any = data) -> Tensor:
                near = [(theta[name] - everything[name]).square().sum() for name in inner if name in outer]
                return Loss(module, "inner_loss").at({**everything, **theta}, data) + module.proximal / 2 * sum(near)

            grads = grad(loss)(theta)
            if (most := choice["max_norm"]) is not None:
                norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
                grads = {name: g * (most / (norm + 1e-6)).clamp(max=1.0) for name, g in grads.items()}
            theta = {name: updated(module, name, theta[name], grads[name], memory, step) for name in inner}
            values.append(Loss(module, "outer_loss").at({**everything, **theta}, episode.outer))
        weights = module.outer_loss_weights()
        total = total + (values[-1] if weights is None else (weights * torch.stack(values)).sum()) / len(episodes)
    found = torch.autograd.grad(total, [everything[name] for name in outer], materialize_grads=True)
    return dict(zip(outer, found, strict=True))


def updated(module: Drawn, name: str, p: Tensor, g: Tensor, memory: dict[str, Any], step: int) -> Tensor:
    choice = module.choice
    of_head = module.rate if name.startswith("head") else 0.1
    rates = {"constant": 0.3, "learned": module.rate, "by parameter": of_head, "by step": module.rate_at(step)}
    rate, g = rates[choice["rate"]], g + choice["decay"] * p
    first, second = memory[name]
    if choice["optimizer"] == "Adam":
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g.square()
        memory[name] = first, second
        return p - rate * first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    if choice["optimizer"] != "gradient descent":
        memory[name] = first, second = 0.7 * first + g, 0.0
        g = g + 0.7 * first if choice["optimizer"] == "Nesterov" else first
    return p - rate * g


@pytest.mark.parametrize("seed", range(PROBLEMS))
def test_exact_strategies(seed: int) -> None:
    draws = random.Random(seed)
    choice = {name: draws.choice(values) for name, values in CHOICES.items()}
    generator = torch.Generator().manual_seed(seed)
    episodes = [
        Episode([batch(generator) for _ in range(choice["batches"])], batch(generator))
        for _ in range(choice["episodes"])
    ]

    def module() -> Drawn:
        return KINDS.get(choice["start"], Hooked)(choice)

    expected = by_hand(module(), episodes)
    for strategy in (ReverseUnroll(), ReverseUnroll(checkpoint=1), ForwardUnroll()):
        found = hypergradient(module(), strategy, episodes).grads
        assert_close({name: found[name] for name in expected}, expected, 1e-7)

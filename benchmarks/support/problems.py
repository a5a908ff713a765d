"""The problems that benchmarks share: a net inside and a weight for each training example outside, and MAML."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from few_shot.nets import cnn
from lightning_bilevel import SGD, BilevelModule, Episode

RATE = 0.01


class Weighted(BilevelModule):
    """Descent on the weighted loss of a net; the outer parameters are the logits of the weights.

    Args:
        net: from inputs to scores, ``(examples, classes)`` or ``(examples, classes, places)``.
        num_weights: N.
        inner_steps: T.
        inner_start: where each run starts.
        **options: of :class:`BilevelModule`.
    """

    def __init__(
        self, net: nn.Module, num_weights: int, inner_steps: int, inner_start: Any = "reset", **options: Any
    ) -> None:
        super().__init__(inner_steps, inner_start, **options)
        self.net = net
        self.logits = nn.Parameter(torch.zeros(num_weights))

    def inner_parameters(self) -> Any:
        return self.net

    def inner_loss(self, batch: Any) -> Tensor:
        x, y, index = batch
        losses = F.cross_entropy(self.net(x), y, reduction="none").reshape(len(index), -1).mean(1)
        return (self.logits[index].sigmoid() * losses).mean()

    def outer_loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_inner_optimizer(self) -> Any:
        return SGD(lr=RATE)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.outer_parameters(), lr=0.1)


class Maml(BilevelModule):
    """MAML: the net is the start of the inner level.

    Args:
        net: from inputs to outputs.
        loss: of outputs and targets.
        inner_steps: T.
    """

    def __init__(self, net: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], inner_steps: int) -> None:
        super().__init__(inner_steps)
        self.net, self.loss = net, loss

    def inner_parameters(self) -> Any:
        return self.net

    def outer_parameters(self) -> Any:
        return self.net

    def inner_loss(self, batch: Any) -> Tensor:
        return self.loss(self.net(batch[0]), batch[1])

    def outer_loss(self, batch: Any) -> Tensor:
        return self.inner_loss(batch)

    def configure_inner_optimizer(self) -> Any:
        return SGD(lr=RATE)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class NextToken(nn.Module):
    """A GPT-2 that is not trained, from tokens to scores of the next ones, ``(texts, vocabulary, places)``."""

    def __init__(self, layers: int = 2, width: int = 64, vocabulary: int = 512, window: int = 32) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel  # takes seconds, and most nets do without it

        super().__init__()
        config = GPT2Config(
            vocab_size=vocabulary, n_positions=window, n_embd=width, n_layer=layers, n_head=4,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        self.lm = GPT2LMHeadModel(config)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm(input_ids=tokens, use_cache=False).logits.mT


class Net(NamedTuple):
    """A net and its data.

    Attributes:
        text: what it is.
        make: builds it.
        examples: in a batch.
        draw: inputs and targets of that many examples.
    """

    text: str
    make: Callable[[], nn.Module]
    examples: int
    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


def _vectors(size: int, classes: int) -> Callable[[int, torch.Generator], tuple[Tensor, Tensor]]:
    return lambda n, g: (torch.randn(n, size, generator=g), torch.randint(classes, (n,), generator=g))


def _images(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 1, 28, 28, generator=generator), torch.randint(5, (n,), generator=generator)


def _texts(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(512, (n, 33), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def perceptron(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def perceptron_net(*sizes: int, examples: int) -> Net:
    text = f"MLP {'-'.join(map(str, sizes))}, {examples} examples"
    return Net(text, lambda: perceptron(*sizes), examples, _vectors(sizes[0], sizes[-1]))


NETS = {
    "small MLP": perceptron_net(1, 40, 40, 5, examples=10),
    "MLP": perceptron_net(784, 256, 10, examples=100),
    "CNN": Net("4 blocks of 32 channels on 28×28, 25 examples", lambda: cnn(5, channels=32), 25, _images),
    "GPT-2": Net("GPT-2, 2 layers of width 64, 8 texts of 32 tokens", NextToken, 8, _texts),
}


def module(net: Net, inner_steps: int, num_weights: int | None = None, **options: Any) -> Weighted:
    """Return the problem with one weight per example of a batch, or ``num_weights`` of them."""
    torch.manual_seed(0)
    return Weighted(net.make(), num_weights or net.examples, inner_steps, **options)


def episodes(net: Net, count: int, num_weights: int | None = None) -> list[Episode]:
    """Return episodes of one inner and one outer batch; the examples' weights are any of ``num_weights``."""
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(net.examples)
    if num_weights:
        index = torch.randint(num_weights, (net.examples,), generator=generator)
    draws = (net.draw(net.examples, generator) for _ in range(2 * count))
    return [Episode([(*inner, index)], outer) for inner, outer in zip(draws, draws, strict=True)]


def plain_run(problem: Weighted, episode: Episode) -> None:
    """Take the inner steps as any PyTorch program would: backward, and in place. The parameters return afterwards."""
    parameters = list(problem.net.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    for _ in range(problem.inner_steps):
        grads = torch.autograd.grad(problem.inner_loss(episode.inner[0]), parameters)
        with torch.no_grad():
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.sub_(grad, alpha=RATE)
    with torch.no_grad():
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)


def sinusoids(count: int, inner_steps: int = 5) -> tuple[Maml, list[Episode]]:
    """Return MAML with a perceptron 1-40-40-1, and tasks of 10 + 10 points."""
    torch.manual_seed(0)
    learner = Maml(perceptron(1, 40, 40, 1), F.mse_loss, inner_steps)
    generator = torch.Generator().manual_seed(0)
    tasks = []
    for _ in range(count):
        x, amplitude, phase = (torch.rand(size, generator=generator) for size in ((20, 1), (1,), (1,)))
        x, y = 10 * x - 5, (0.1 + 4.9 * amplitude) * torch.sin(10 * x - 5 + torch.pi * phase)
        tasks.append(Episode([(x[:10], y[:10])], (x[10:], y[10:])))
    return learner, tasks

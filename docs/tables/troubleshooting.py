"""Operations and what they allow, found by audits of a small net that uses each; and one audit as it is printed."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_bilevel import PZOBO, SGD, BilevelModule, Episode, ForwardGradient, ReverseUnroll, audit


class Net(BilevelModule):
    """Learned example weights; an operation follows the net in both losses."""

    def __init__(self, net: nn.Module, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__(inner_steps=100, inner_start="reset")
        self.net, self.operation = net, operation
        self.example_weights = nn.Parameter(torch.zeros(8))

    def inner_parameters(self):
        return self.net

    def error(self, batch):
        return (self.operation(self.net(batch[0])) - batch[1]).square().mean(1)

    def inner_loss(self, batch):
        return (self.example_weights.sigmoid() * self.error(batch)).mean()

    def outer_loss(self, batch):
        return self.error(batch).mean()

    def configure_inner_optimizer(self):
        return SGD(lr=0.1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.rnn(x.unsqueeze(-1))[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(1, 1, batch_first=True), nn.Linear(3, 1)

    def forward(self, x):
        x = x.unsqueeze(-1)
        return self.head(self.attention(x, x, x)[0].squeeze(-1))


def _ctc_loss(x: Tensor) -> Tensor:
    log_probs = torch.cat([x, -x, 2 * x], 1).log_softmax(1).unsqueeze(1)
    return x + F.ctc_loss(log_probs, torch.tensor([[1, 2]]), torch.tensor([8]), torch.tensor([2]))


def _grid_sample(x: Tensor) -> Tensor:
    image, grid = x.view(1, 1, 8, 1).expand(1, 1, 8, 8), x.tanh().view(1, 8, 1, 1).expand(1, 8, 8, 2)
    return x + F.grid_sample(image, grid, align_corners=False).mean()


def _item(x: Tensor) -> Tensor:
    return 2 * x if x.sum().item() > 0 else x


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "`cdist`": lambda x: torch.cdist(x, x),
    "`ctc_loss`": _ctc_loss,
    "`grid_sample`": _grid_sample,
    "`huber_loss`": lambda x: F.huber_loss(x, torch.ones_like(x), reduction="none"),
    "`smooth_l1_loss`": lambda x: F.smooth_l1_loss(x, torch.ones_like(x), reduction="none"),
    "`mse_loss` with its default reduction": lambda x: x + F.mse_loss(x, torch.ones_like(x)),
    "`.item()`, `if` on a tensor": _item,
    "`torch.utils.checkpoint`, `use_reentrant=False`": lambda x: checkpoint(torch.tanh, x, use_reentrant=False),
    "`torch.utils.checkpoint`, `use_reentrant=True`": lambda x: checkpoint(torch.tanh, x, use_reentrant=True),
}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "`nn.BatchNorm1d` with running statistics": lambda: nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1)),
    "`nn.Dropout`": lambda: nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.1)),
    "`nn.LSTM`": Recurrent,
    "`nn.MultiheadAttention`": Attention,
    "`weight_norm`": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 1)),
}


def tables() -> dict[str, str]:
    """Return the table of operations, and an audit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.randn(8, 3)
        batch = x, x.sum(1, keepdim=True)
        episode = Episode([batch], batch)
        nets = {name: Net(nn.Linear(3, 1), operation) for name, operation in OPERATIONS.items()}
        nets |= {name: Net(build(), nn.Identity()) for name, build in LAYERS.items()}
        heads = ["operation", "double backward", "forward mode", "vectorized"]
        rows = [[name, *_answers(net, episode)] for name, net in nets.items()]
        example = audit(nets["`cdist`"], episode, verbose=False)
    lines = [heads, ["---"] * len(heads), *rows]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    printed = f"```{{code-block}} text\n:class: terminal\n\n{example}\n```"
    return {"operations": f"{table}\n\nPyTorch {torch.__version__}, CPU.", "audit": printed}


def _answers(net: Net, episode: Episode) -> list[str]:
    strategies = [ReverseUnroll(), ForwardGradient(mode="forward"), PZOBO(2)]
    return [row.verdict for row in audit(net, episode, strategies, verbose=False).rows]

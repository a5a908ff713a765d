"""The language model that is adapted, and the model of the weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from camels_lm.encoding import Tokens
from camels_lm.losses import at_least_single, inputs, logits


def small_lm(vocabulary: int, window: int, width: int, layers: int, end: int, dropout: float = 0.0) -> GPT2LMHeadModel:
    """Return a GPT-2 of this size, not trained.

    Args:
        vocabulary: of its tokenizer.
        window: tokens it can hold.
        width: of the hidden state.
        layers: of attention and feed-forward nets.
        end: id of the token that starts, ends and pads.
        dropout: everywhere.
    """
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=window,
        n_embd=width,
        n_layer=layers,
        n_head=max(1, width // 16),
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return GPT2LMHeadModel(config)


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a causal language model and its tokenizer, by name or from a local folder."""
    return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)


def window_of(lm: PreTrainedModel, most: int | None = None) -> int:
    """Return how many tokens the model can hold, or ``most`` if that is less."""
    own = getattr(lm.config, "max_position_embeddings", None) or most
    return min(own, most or own)


class WeightModel(nn.Module):
    """Weights of tokens: language model body → linear → GELU → linear → softplus.

    The last layer starts at zero, so all weights start at softplus(0) with β = 3, which is ln 2 / 3.

    Args:
        body: a causal language model without its head; the weight of a token sees it and what is before it.
        width: of the hidden layer.
    """

    def __init__(self, body: PreTrainedModel, width: int = 128) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Sequential(nn.Linear(body.config.hidden_size, width), nn.GELU(), nn.Linear(width, 1))
        nn.init.zeros_(self.head[-1].weight)
        nn.init.zeros_(self.head[-1].bias)

    def forward(self, tokens: Tokens) -> Tensor:
        """Return a weight for each token, shape ``(rows, length)``."""
        hidden = self.body(**inputs(tokens)).last_hidden_state
        return F.softplus(at_least_single(self.head(hidden).squeeze(-1)), beta=3)


def with_dropout(model: nn.Module, dropout: float) -> nn.Module:
    """Set every dropout layer of a model, and put it into the mode where they work; at 0 into the other."""
    for child in model.modules():
        if isinstance(child, nn.Dropout):
            child.p = dropout
    return model.train(dropout > 0)


def number_of_parameters(model: nn.Module) -> int:
    """Return the number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def log_probs(lm: nn.Module, tokens: Tokens) -> Tensor:
    """Return what a language model expects, without dropout, shape ``(rows, length, vocabulary)``."""
    training = lm.training
    lm.eval()
    try:
        return logits(lm, tokens).log_softmax(-1)
    finally:
        lm.train(training)

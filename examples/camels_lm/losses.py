"""The losses, all of them means over the tokens that count: padding never does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camels_lm.encoding import Tokens


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of ``values`` where ``mask``; 0 where there is nothing.

    >>> masked_mean(torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([True, True, False])).item()
    2.0
    """
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def logits(lm: nn.Module, tokens: Tokens) -> Tensor:
    """Return the logits of the next token, at least in float32, shape ``(rows, length, vocabulary)``.

    Positions count from the first token of a row, so that padding on the left changes nothing.
    """
    return at_least_single(lm(**inputs(tokens)).logits)


def at_least_single(values: Tensor) -> Tensor:
    """Return values in float32 where they are in half precision."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def inputs(tokens: Tokens) -> dict[str, Tensor | bool]:
    """Return the keyword arguments of a model of transformers."""
    if tokens.mask is None:
        return {"input_ids": tokens.ids, "use_cache": False}
    mask = tokens.mask.long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": tokens.ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}


def token_nll(lm: nn.Module, tokens: Tokens) -> Tensor:
    """Return −log p(x_i | x_{<i}) for i from 1, shape ``(rows, length − 1)``; what is padding means nothing."""
    predictions = logits(lm, tokens)[:, :-1]
    return F.cross_entropy(predictions.transpose(1, 2), tokens.ids[:, 1:], reduction="none")


def predicted(tokens: Tokens) -> Tensor:
    """Return which tokens are predicted from one before them, shape ``(rows, length − 1)``."""
    present = tokens.present
    return present[:, 1:] & present[:, :-1]


def weighted_nll(lm: nn.Module, tokens: Tokens, weights: Tensor) -> Tensor:
    """Return the mean over tokens of weight × NLL: equation 44 of (FG)²U.

    Args:
        lm: a causal language model.
        tokens: passages.
        weights: of each token, shape ``(rows, length)``; that of the first token is not used.
    """
    return masked_mean(weights[:, 1:] * token_nll(lm, tokens), predicted(tokens))


def answer_nll(lm: nn.Module, tokens: Tokens) -> Tensor:
    """Return the mean NLL of the answers' tokens: the first term of equation 43."""
    return masked_mean(token_nll(lm, tokens), predicted(tokens) & tokens.marked[:, 1:])


def nll_of_each_answer(lm: nn.Module, tokens: Tokens) -> Tensor:
    """Return the mean NLL of each row's answer, shape ``(rows,)``."""
    counts = predicted(tokens) & tokens.marked[:, 1:]
    return torch.where(counts, token_nll(lm, tokens), 0.0).sum(-1) / counts.sum(-1)


def divergence(lm: nn.Module, tokens: Tokens, base_log_probs: Tensor) -> Tensor:
    """Return KL(lm ‖ base), meaned over tokens: the second term of equation 43.

    Args:
        lm: the adapted language model.
        tokens: text that is unrelated to what it was adapted to.
        base_log_probs: of the language model before, shape ``(rows, length, vocabulary)``.
    """
    log_probs = logits(lm, tokens).log_softmax(-1)
    return masked_mean((log_probs.exp() * (log_probs - base_log_probs)).sum(-1), tokens.present)

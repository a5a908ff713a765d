"""Tiny documents, language models and episodes of the CaMeLS example."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch

from camels_lm import encoding, models, stages, synthetic
from camels_lm.documents import Splits
from camels_lm.encoding import EncodedDocument, Encoder, Tokens
from lightning_bilevel import Episode
from tests.support.seeds import forked

WINDOW = 128


@cache
def splits() -> Splits:
    return synthetic.documents((30, 16, 4, 4), seed=0)


@cache
def encoder() -> Encoder:
    return Encoder(encoding.new_tokenizer(splits().pretraining, 320, WINDOW), WINDOW)


@cache
def encoded(split: str) -> list[EncodedDocument]:
    return encoder().documents(getattr(splits(), split), split)


def language_model(dropout: float = 0.0) -> Any:
    with forked(0):
        lm = models.small_lm(len(encoder().tokenizer), WINDOW, 16, 1, encoder().tokenizer.eos_token_id, dropout)
    return lm.double().train(dropout > 0)


def weight_model(seed: int = 0) -> models.WeightModel:
    with forked(seed):
        weights = models.WeightModel(copy.deepcopy(language_model().base_model), width=4).double()
        torch.nn.init.normal_(weights.head[-1].weight)  # where it is zero, the layers before have no gradient
    return weights


def meta_training(dropout: float = 0.0, **options: Any) -> stages.MetaTraining:
    options = {"inner_lr": 0.5, "outer_lr": 1e-2, **options}
    return stages.MetaTraining(language_model(), weight_model(), dropout=dropout, **options)


def an_episode(depth: int = 2, side: str = "right", **options: Any) -> Episode:
    """Return an episode whose passages are padded, too."""
    read = encoded("training")
    rows = [document.row for document in read]
    inner = [encoder().padded([rows[2 * i], rows[2 * i + 1]], side) for i in range(depth)]
    asked = [question.row for document in read[: 2 * depth] for question in document.questions]
    others = [document.row for document in encoded("pretraining")[:3]]
    return Episode(inner, stages.Judgement(encoder().padded(asked, side), encoder().padded(others, side)))


def alone(tokens: Tokens) -> list[Tokens]:
    """Return the rows of a batch, each without its padding."""
    return [
        Tokens(ids[mask][None], None, marked[mask][None])
        for ids, mask, marked in zip(tokens.ids, tokens.present, tokens.marked, strict=True)
    ]

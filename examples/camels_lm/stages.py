"""The stages of a run as Lightning modules: train the language model, train the weights, adapt to a stream."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.text import SQuAD
from transformers import PreTrainedModel

from camels_lm.encoding import EncodedDocument, EncodedQuestion, Encoder, Row, Tokens
from camels_lm.loading import Batches, Numbered, drawn
from camels_lm.losses import answer_nll, divergence, masked_mean, nll_of_each_answer, predicted, token_nll, weighted_nll
from camels_lm.models import WeightModel, log_probs, with_dropout
from camels_lm.salience import Salience
from lightning_bilevel import SGD, BilevelModule, Episode
from lightning_bilevel.errors import value_error

LAST_RATE = 0.25
"""Of the first outer learning rate, what is left of it: (FG)²U has 2.5e-6 in its phase, CaMeLS 1e-5."""


class TextBatch(NamedTuple):
    """What the language model is trained on: passages, and questions with answers where they are to be learned."""

    passages: Tokens
    questions: Tokens | None


class LanguageModelTraining(pl.LightningModule):
    """Trains the language model on passages, and on the answers to questions.

    Args:
        lm: trained in place.
        steps: of AdamW, with one cycle of the learning rate.
        lr: its maximum.
    """

    def __init__(self, lm: PreTrainedModel, steps: int, lr: float) -> None:
        super().__init__()
        self.lm, self.steps, self.lr = lm, steps, lr

    def training_step(self, batch: TextBatch, batch_idx: int) -> Tensor:
        loss = masked_mean(token_nll(self.lm, batch.passages), predicted(batch.passages))
        self.log("passage_nll", loss.detach(), prog_bar=True, batch_size=1)
        if batch.questions is not None:
            answers = answer_nll(self.lm, batch.questions)
            self.log("answer_nll", answers.detach(), prog_bar=True, batch_size=1)
            loss = loss + answers
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=max(self.steps, 2))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def text_batches(
    encoder: Encoder, documents: Sequence[EncodedDocument], steps: int, size: int, seed: int, questions: bool
) -> Batches[TextBatch]:
    """Return batches of ``size`` passages, and of twice as many questions if they are wanted."""
    asked = [question.row for document in documents for question in document.questions]

    def make(number: int) -> TextBatch:
        passages = [document.row for document in drawn(documents, size, seed, "passages", number)]
        answered = encoder.padded(drawn(asked, 2 * size, seed, "questions", number)) if questions else None
        return TextBatch(encoder.padded(passages), answered)

    return Batches(Numbered(make, steps))


class Judgement(NamedTuple):
    """The outer batch.

    Attributes:
        questions: about the documents of the episode.
        unrelated: passages of other articles.
        base_log_probs: what the language model expected there before the episode; ``None`` until it is known.
    """

    questions: Tokens
    unrelated: Tokens
    base_log_probs: Tensor | None = None


class MetaTraining(BilevelModule):
    """Trains the weights: the language model is the inner level, the weight model the outer one.

    An inner step is one SGD step on one document, so an episode of T documents is T inner steps. The language model
    goes on from episode to episode, and returns to where it started before an episode would take it beyond
    ``reset_every`` documents.

    Args:
        lm: the language model at its start.
        weights: the weight model.
        inner_lr: of SGD.
        outer_lr: of Adam, at first.
        locality: c, the factor of the divergence on unrelated text.
        reset_every: documents.
        phase_steps: outer steps over which the outer learning rate falls linearly to a quarter, where it stays: all
            steps, or those of the first phase of two.
        dropout: of the language model and the weight model.
        spare: batches at the end of an episode that are no steps: see :func:`episodes`.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        weights: WeightModel,
        inner_lr: float,
        outer_lr: float,
        locality: float = 0.1,
        reset_every: int = 24,
        phase_steps: int = 250,
        dropout: float = 0.0,
        spare: int = 0,
    ) -> None:
        super().__init__(inner_steps=1, inner_start="warm")
        self.lm, self.weights = with_dropout(lm, dropout), with_dropout(weights, dropout)
        self.inner_lr, self.outer_lr, self.locality, self.reset_every = inner_lr, outer_lr, locality, reset_every
        self.phase_steps, self.spare = phase_steps, spare
        self.register_buffer("documents", torch.tensor(0))  # since the language model was at its start
        self._start = {name: value.detach().clone() for name, value in lm.named_parameters()}

    def inner_parameters(self):
        return self.lm

    def outer_parameters(self):
        return self.weights

    def inner_loss(self, passage: Tokens) -> Tensor:
        return weighted_nll(self.lm, passage, self.weights(passage))

    def outer_loss(self, batch: Judgement) -> Tensor:
        loss = answer_nll(self.lm, batch.questions)
        if self.locality:
            loss = loss + self.locality * divergence(self.lm, batch.unrelated, batch.base_log_probs)
        return loss

    def configure_inner_optimizer(self):
        return SGD(lr=self.inner_lr)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.weights.parameters(), lr=self.outer_lr)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, LAST_RATE, total_iters=self.phase_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch: Episode, batch_idx: int) -> None:
        self.inner_steps = len(batch.inner) - self.spare
        if self.documents + self.inner_steps > self.reset_every:
            self.documents.zero_()
            with torch.no_grad():
                for name, value in self.lm.named_parameters():
                    value.copy_(self._start[name])
        self.documents += self.inner_steps

    def episodes(self, batch: Episode) -> list[Episode]:
        """Add what the language model expects of the unrelated text before this episode."""
        if not self.locality or batch.outer.base_log_probs is not None:
            return [batch]
        base_log_probs = log_probs(self.lm, batch.outer.unrelated)
        return [batch._replace(outer=batch.outer._replace(base_log_probs=base_log_probs))]


def episodes(
    encoder: Encoder,
    documents: Sequence[EncodedDocument],
    unrelated: Sequence[EncodedDocument],
    depths: Sequence[int],
    seed: int,
    num_unrelated: int = 4,
    most_questions: int = 64,
    spare: int = 0,
) -> Batches[Episode]:
    """Return one episode for each depth: so many documents, their questions, and unrelated passages.

    Args:
        encoder: makes the tensors.
        documents: to draw from.
        unrelated: where the unrelated passages come from.
        depths: documents of each episode. Of R processes each takes every R-th episode, so that the depth should
            change at a multiple of R.
        seed: fixes what is drawn.
        num_unrelated: passages for the divergence.
        most_questions: of an episode; of more, so many are drawn.
        spare: 1 adds all documents of the episode as one batch, at whose end ``ImplicitGradient`` takes its mixed
            product; without, it would take that of the last document alone.
    """

    def make(number: int) -> Episode:
        read = drawn(documents, depths[number], seed, "episode", number)
        asked = [question.row for document in read for question in document.questions]
        if len(asked) > most_questions:
            asked = drawn(asked, most_questions, seed, "asked", number)
        others = [document.row for document in drawn(unrelated, num_unrelated, seed, "unrelated", number)]
        inner = [encoder.padded([document.row]) for document in read]
        inner += [encoder.padded([document.row for document in read])] * spare
        return Episode(inner, Judgement(encoder.padded(asked), encoder.padded(others)))

    return Batches(Numbered(make, len(depths)))


Weighting = Literal["uniform", "IDF", "TF-IDF", "learned", "oracle"]
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


class AskedQuestions(NamedTuple):
    """Questions to the adapted model.

    Attributes:
        answered: with their first answers, for the NLL.
        prompts: without, padded on the left, to be continued.
        numbers: of the questions in the stream's list, shape ``(rows,)``.
    """

    answered: Tokens
    prompts: Tokens
    numbers: Tensor


class OnlineAdaptation(pl.LightningModule):
    """Adapts a language model to a stream of documents, one step each, and asks it questions.

    Args:
        lm: the language model before; it is copied.
        weighting: ``"uniform"``, ``"oracle"``, which is 1 on the tokens that state a fact and 0 elsewhere, or the
            name of what ``weights`` gives: ``"IDF"``, ``"TF-IDF"``, ``"learned"``.
        weights: the weight model, or ``Salience``.
        questions: all questions of the stream, in its order.
        encoder: turns answers back to text.
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``.
        lr: its learning rate.

    Attributes:
        curve: after so many documents, the NLL of every answer.
        answers: what the model said to every question, once tested.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        weighting: Weighting,
        weights: WeightModel | Salience | None,
        questions: Sequence[EncodedQuestion],
        encoder: Encoder,
        optimizer: str = "sgd",
        lr: float = 0.1,
    ) -> None:
        super().__init__()
        if weighting not in get_args(Weighting):
            raise value_error("OnlineAdaptation(weighting=...)", f"one of {get_args(Weighting)}", weighting)
        if weighting not in ("uniform", "oracle") and weights is None:
            raise value_error("OnlineAdaptation(weights=...)", f"a weight model for {weighting!r}", weights)
        self.lm = with_dropout(copy.deepcopy(lm), 0.0).requires_grad_(True)
        self.weighting = weighting
        self.weights = None if weights is None else with_dropout(weights, 0.0)
        self.questions, self.encoder, self.optimizer, self.lr = questions, encoder, optimizer, lr
        self.metric = SQuAD()
        self.read = 0
        self.curve: list[tuple[int, list[float]]] = []
        self.answers: dict[int, str] = {}
        self._nll: list[float] = [math.nan] * len(questions)

    @torch.no_grad()
    def weights_of(self, passage: Tokens) -> Tensor:
        """Return the weights of a passage, shape ``(rows, length)``."""
        if self.weighting == "uniform":
            return torch.ones_like(passage.ids, dtype=torch.float32)
        return passage.marked.float() if self.weighting == "oracle" else self.weights(passage)

    def training_step(self, passage: Tokens, batch_idx: int) -> Tensor:
        self.read += 1
        return weighted_nll(self.lm, passage, self.weights_of(passage))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](self.lm.parameters(), lr=self.lr)

    def validation_step(self, batch: AskedQuestions, batch_idx: int) -> None:
        for number, nll in zip(batch.numbers.tolist(), nll_of_each_answer(self.lm, batch.answered), strict=True):
            self._nll[number] = nll.item()

    def on_validation_epoch_end(self) -> None:
        self.curve.append((self.read, list(self._nll)))

    def test_step(self, batch: AskedQuestions, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)
        said = continued(self.lm, batch.prompts, self.encoder)
        for number, text in zip(batch.numbers.tolist(), said, strict=True):
            self.answers[number] = text
            right = {"answer_start": [0] * len(self.questions[number].answers), "text": self.questions[number].answers}
            self.metric.update([{"prediction_text": text, "id": str(number)}], [{"answers": right, "id": str(number)}])

    def on_test_epoch_end(self) -> None:
        if not self.curve or self.curve[-1][0] < self.read:
            self.on_validation_epoch_end()
        scores = self.metric.compute()
        nll = sum(self._nll) / len(self._nll)
        self.log_dict({"exact_match": scores["exact_match"], "f1": scores["f1"], "answer_nll": nll})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["stream"] = {"read": self.read, "curve": self.curve}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.read, self.curve = checkpoint["stream"]["read"], checkpoint["stream"]["curve"]


@torch.no_grad()
def continued(lm: PreTrainedModel, prompts: Tokens, encoder: Encoder, most: int = 16) -> list[str]:
    """Return what the model answers to prompts that are padded on the left, greedily, up to the end token."""
    end = encoder.tokenizer.eos_token_id
    room = min(most, encoder.window - prompts.ids.shape[1])
    out = lm.generate(
        input_ids=prompts.ids,
        attention_mask=prompts.present.long(),
        max_new_tokens=max(room, 1),
        do_sample=False,
        eos_token_id=end,
        pad_token_id=encoder.tokenizer.pad_token_id,
    )
    texts = encoder.tokenizer.batch_decode(out[:, prompts.ids.shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def asked(encoder: Encoder, questions: Sequence[EncodedQuestion], size: int = 64) -> DataLoader:
    """Return questions in batches."""
    batches = []
    for first in range(0, len(questions), size):
        part = questions[first : first + size]
        prompts = encoder.padded([Row(question.prompt, [False] * len(question.prompt)) for question in part], "left")
        numbers = torch.arange(first, first + len(part))
        batches.append(AskedQuestions(encoder.padded([question.row for question in part]), prompts, numbers))
    return DataLoader(batches, batch_size=None)

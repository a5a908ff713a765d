"""From documents to padded tensors; what does not fit is left out and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from camels_lm.documents import Document
from lightning_bilevel.errors import value_error

END = "<|endoftext|>"


class Tokens(NamedTuple):
    """Padded sequences.

    Attributes:
        ids: token ids, shape ``(rows, length)``.
        mask: where there is a token and no padding, same shape; ``None`` if there is no padding at all.
        marked: of a passage, the tokens that state a fact; of a question, those of the answer. Same shape.
    """

    ids: Tensor
    mask: Tensor | None
    marked: Tensor

    @property
    def present(self) -> Tensor:
        """The mask as a tensor."""
        return torch.ones_like(self.ids, dtype=torch.bool) if self.mask is None else self.mask


class Row(NamedTuple):
    """One sequence: its token ids, and which of them are marked."""

    ids: list[int]
    marked: list[bool]


@dataclass(frozen=True)
class EncodedQuestion:
    """A question with its answer behind it, and the texts."""

    row: Row
    prompt: list[int]
    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class EncodedDocument:
    """A passage and its questions."""

    row: Row
    questions: tuple[EncodedQuestion, ...]
    text: str


class Encoder:
    """Encodes documents for one tokenizer and one window.

    A question is followed by its first answer and the end token; both count as the answer.

    Args:
        tokenizer: a fast one, which knows the place of each token in the text.
        window: tokens that the language model can hold.

    Attributes:
        skipped: how often something was left out, by reason.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, window: int) -> None:
        if not tokenizer.is_fast:
            raise value_error("the tokenizer", "a fast one, which returns offsets", type(tokenizer).__name__)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.tokenizer, self.window = tokenizer, window
        self.skipped: Counter[str] = Counter()

    def documents(self, documents: Iterable[Document], split: str) -> list[EncodedDocument]:
        """Encode what fits.

        Args:
            documents: of one split.
            split: its name, for the message.

        Raises:
            ValueError: nothing is left.
        """
        encoded = [one for document in documents if (one := self._document(document)) is not None]
        if not encoded:
            raise value_error(
                f"the {split} documents",
                f"at least one of at most {self.window} tokens with an answered question",
                f"none (left out: {dict(self.skipped)})",
                "Use shorter documents or a longer window.",
            )
        return encoded

    def padded(self, rows: Sequence[Row], side: str | None = None) -> Tokens:
        """Return rows as one batch, padded on ``side``, by default the tokenizer's."""
        length = max(len(row.ids) for row in rows)
        left = (side or self.tokenizer.padding_side) == "left"

        def filled(values: Sequence[int], fill: int) -> list[int]:
            rest = [fill] * (length - len(values))
            return [*rest, *values] if left else [*values, *rest]

        ids = torch.tensor([filled(row.ids, self.tokenizer.pad_token_id) for row in rows])
        mask = torch.tensor([filled([True] * len(row.ids), False) for row in rows])
        marked = torch.tensor([filled(row.marked, False) for row in rows])
        return Tokens(ids, None if mask.all() else mask, marked)

    def _document(self, document: Document) -> EncodedDocument | None:
        encoding = self.tokenizer(document.text, return_offsets_mapping=True, verbose=False)
        ids = encoding["input_ids"]
        # The first token is given: of a single one, nothing would be left to predict.
        if len(ids) < 2 or not document.text.strip():
            return self._skip("empty documents")
        if len(ids) > self.window:
            return self._skip("documents longer than the window")
        marked = [
            any(start < end and start < last and first < end for first, last in document.facts)
            for start, end in encoding["offset_mapping"]
        ]
        questions = [self._question(text, answers) for text, answers in document.questions]
        kept = tuple(question for question in questions if question is not None)
        if not kept:
            return self._skip("documents without a question that is left")
        return EncodedDocument(Row(ids, marked), kept, document.text)

    def _question(self, text: str, answers: Sequence[str]) -> EncodedQuestion | None:
        answers = tuple(answer for answer in answers if answer.strip())
        if not text.strip():
            return self._skip("empty questions")
        if not answers:
            return self._skip("questions without an answer")
        prompt = self.tokenizer(text, verbose=False)["input_ids"]
        answer = [*self.tokenizer(f" {answers[0]}", add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
        if len(prompt) + len(answer) > self.window:
            return self._skip("questions longer than the window")
        row = Row(prompt + answer, [False] * len(prompt) + [True] * len(answer))
        return EncodedQuestion(row, prompt, text, answers)

    def _skip(self, reason: str) -> None:
        self.skipped[reason] += 1


def new_tokenizer(documents: Iterable[Document], vocabulary: int, window: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, as GPT-2's, on documents and their questions."""
    texts = (text for d in documents for text in (d.text, *(q.text for q in d.questions)))
    trained = ByteLevelBPETokenizer(add_prefix_space=True)
    trained.train_from_iterator(texts, vocabulary, min_frequency=2, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=window,
    )

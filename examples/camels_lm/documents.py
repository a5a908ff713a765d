"""Documents with questions about them, and how a token is known to state a fact."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Question(NamedTuple):
    """A question and its accepted answers; the first one is trained on."""

    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """A passage of an article, and what one should be able to answer after reading it.

    Attributes:
        text: the passage.
        questions: about the passage.
        article: what it belongs to; splits never cut an article.
        facts: the stretches ``(start, end)`` of ``text`` that state the answers, where that is known.
    """

    text: str
    questions: tuple[Question, ...]
    article: str
    facts: tuple[tuple[int, int], ...] = field(default=())


class Splits(NamedTuple):
    """Documents of disjoint articles.

    Attributes:
        pretraining: the language model is trained on these passages and on their questions.
        training: the weights are trained on these.
        validation: learning rates are chosen on these.
        test: the stream of unseen documents.
    """

    pretraining: list[Document]
    training: list[Document]
    validation: list[Document]
    test: list[Document]

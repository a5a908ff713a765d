"""Read SQuAD's JSON and StreamingQA's CSV, and split them by article."""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from camels_lm.documents import Document, Question, Splits
from lightning_bilevel.errors import value_error

SHARES = (0.5, 0.25, 0.05, 0.2)
"""Of the articles, for language model, weights, learning rates and test."""


def read(folder: Path, seed: int, shares: Sequence[float] = SHARES) -> Splits:
    """Return the documents of a folder with SQuAD's or StreamingQA's files, split by article.

    Args:
        folder: with ``*.json`` or ``*.json.gz`` files of SQuAD 1.1 or 2.0, or ``*.csv`` files for :func:`streaming_qa`.
        seed: of the split.
        shares: of the articles in the four splits.

    Raises:
        FileNotFoundError: no such file in the folder.
    """
    found: list[Document] = []
    for path in sorted(folder.glob("*")):
        if path.name.endswith((".json", ".json.gz")):
            found += squad(_load(path))
        elif path.suffix == ".csv":
            found += streaming_qa(path)
    if not found:
        raise FileNotFoundError(
            f"No documents in {folder}: it needs a JSON file of SQuAD (plain or .gz) or a CSV of StreamingQA with the "
            "columns question, answers and text."
        )
    return split(found, seed, shares)


def squad(content: Mapping[str, Any]) -> list[Document]:
    """Return the paragraphs of a SQuAD file; an article is a document's article.

    Where a file lacks ``answer_start``, as rebuilt ones do, the first occurrence of the answer is taken.
    """
    found = []
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            text = paragraph["context"]
            questions, spans = [], set()
            for qa in paragraph["qas"]:
                answers = tuple(dict.fromkeys(answer["text"] for answer in qa["answers"]))
                questions.append(Question(qa["question"].strip(), answers))
                spans |= {(at, at + len(a["text"])) for a in qa["answers"][:1] if (at := _start(a, text)) >= 0}
            found.append(Document(text, tuple(questions), article["title"], tuple(sorted(spans))))
    return found


def streaming_qa(path: Path) -> list[Document]:
    """Return the passages of a StreamingQA CSV as CaMeLS prepares it: ``question``, ``answers`` and ``text``.

    The answers of a row are separated by a backslash; the shortest one is trained on. Rows with one text make one
    document. The questions that StreamingQA itself publishes lack the text, which is joined from WMT's news archive.

    Raises:
        ValueError: a column is missing.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    missing = {"question", "answers", "text"} - set(rows[0] if rows else ())
    if missing:
        columns = sorted(rows[0]) if rows else "no row"
        hint = "Join the articles to the questions first."
        raise value_error(f"the columns of {path.name}", f"complete, with {sorted(missing)}", columns, hint)
    grouped: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        grouped[row["text"]].append(row)
    found = []
    for text, group in grouped.items():
        questions, spans = [], set()
        for row in group:
            answers = tuple(sorted((answer.strip() for answer in row["answers"].split("\\")), key=len))
            questions.append(Question(row["question"].strip(), answers))
            spans |= {(at, at + len(a)) for a in answers[:1] if a and (at := text.find(a)) >= 0}
        found.append(Document(text, tuple(questions), text, tuple(sorted(spans))))
    return found


def split(found: Iterable[Document], seed: int, shares: Sequence[float] = SHARES) -> Splits:
    """Deal the articles out to the splits at random; the passages of an article stay together.

    >>> parts = split([Document("a", (), str(i)) for i in range(20)], seed=0)
    >>> [len(part) for part in parts]
    [10, 5, 1, 4]
    """
    articles: dict[str, list[Document]] = defaultdict(list)
    for document in found:
        articles[document.article].append(document)
    names = sorted(articles)
    random.Random(seed).shuffle(names)
    ends = [round(len(names) * sum(shares[:i])) for i in range(len(shares) + 1)]
    if any(a == b for a, b in zip(ends, ends[1:], strict=False)):
        raise value_error("the number of articles", f"enough for splits of {shares}", len(names))
    return Splits(*([d for name in names[a:b] for d in articles[name]] for a, b in zip(ends, ends[1:], strict=False)))


def _start(answer: Mapping[str, Any], text: str) -> int:
    return answer.get("answer_start", text.find(answer["text"]))


def _load(path: Path) -> Mapping[str, Any]:
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
    with opened as file:
        return json.load(file)

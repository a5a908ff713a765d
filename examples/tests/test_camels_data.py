"""CaMeLS: its documents, synthetic, of SQuAD and of StreamingQA; what does not fit is counted."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from camels_lm import readers, synthetic
from camels_lm.documents import Document, Question
from camels_lm.encoding import Encoder
from tests.support.camels import encoded, encoder, splits


def test_synthetic_documents() -> None:
    parts = synthetic.documents((5, 4, 3, 2), seed=1)
    assert [len(part) for part in parts] == [5, 4, 3, 2]
    assert parts == synthetic.documents((5, 4, 3, 2), seed=1)
    assert parts != synthetic.documents((5, 4, 3, 2), seed=2)
    everything = [document for part in parts for document in part]
    assert len({document.article for document in everything}) == len(everything)
    for document in everything:
        stated = {document.text[start:end] for start, end in document.facts}
        assert stated == {question.answers[0] for question in document.questions}
        for question in document.questions:
            sentence = question.text.removeprefix("What is t").removesuffix(" ?")
            assert f"T{sentence} is {question.answers[0]} ." in document.text


def test_facts_are_found_among_the_tokens() -> None:
    for document, one in zip(splits().test, encoded("test"), strict=True):
        tokens = [token for token, marked in zip(one.row.ids, one.row.marked, strict=True) if marked]
        text = encoder().tokenizer.decode(tokens).replace(" ", "")
        assert text == "".join(document.text[start:end] for start, end in document.facts).replace(" ", "")


def test_what_does_not_fit_is_counted() -> None:
    encoder_of_its_own = Encoder(encoder().tokenizer, 16)
    short, asked = "The ruler is Feos .", Question("Who ?", ("Feos",))
    found = [
        Document(short, (asked, Question("Who ?", ()), Question("Who ?", (" ",)), Question(short * 9, ("Feos",))), "a"),
        Document(short, (asked, Question(" ", ("Feos",))), "a"),
        Document("", (asked,), "b"),
        Document(" \n", (asked,), "b"),
        Document(short * 9, (asked,), "c"),
        Document(short, (Question("Who ?", ()),), "d"),
    ]
    kept = encoder_of_its_own.documents(found, "training")
    assert [len(document.questions) for document in kept] == [1, 1]
    assert encoder_of_its_own.skipped == {
        "questions without an answer": 3,
        "empty questions": 1,
        "questions longer than the window": 1,
        "empty documents": 2,
        "documents longer than the window": 1,
        "documents without a question that is left": 1,
    }
    with pytest.raises(ValueError, match=r"^Expected `the test documents` to be at least one of at most 16 tokens"):
        encoder_of_its_own.documents(found[2:], "test")


def test_slow_tokenizers_are_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match=r"^Expected `the tokenizer` to be a fast one"):
        Encoder(Slow(), 8)


def test_a_question_ends_with_its_answer_and_the_end() -> None:
    question = encoded("test")[0].questions[0]
    answer = [token for token, marked in zip(question.row.ids, question.row.marked, strict=True) if marked]
    assert answer[-1] == encoder().tokenizer.eos_token_id
    assert encoder().tokenizer.decode(answer[:-1]).strip() == question.answers[0]
    assert question.row.ids[: len(question.prompt)] == question.prompt


def squad_content() -> dict[str, Any]:
    def article(title: str, *answers: dict[str, Any]) -> dict[str, Any]:
        qas = [{"id": "1", "question": " Who? ", "answers": list(answers)}]
        return {"title": title, "paragraphs": [{"context": "Feos met Feos.", "qas": qas}]}

    known, unknown = {"text": "Feos", "answer_start": 9}, {"text": "Feos"}
    return {"data": [article("a", known, unknown), article("b", unknown), article("c"), article("d"), article("e")]}


@pytest.mark.parametrize("packed", [True, False])
def test_squad(packed: bool, tmp_path: Path) -> None:
    content = squad_content()
    text = json.dumps(content)
    if packed:
        (tmp_path / "train.json.gz").write_bytes(gzip.compress(text.encode()))
    else:
        (tmp_path / "train.json").write_text(text)
    found = readers.read(tmp_path, seed=0, shares=(0.4, 0.2, 0.2, 0.2))
    assert [len(part) for part in found] == [2, 1, 1, 1]
    by_article = {document.article: document for part in found for document in part}
    assert set(by_article) == set("abcde")
    assert by_article["a"].facts == ((9, 13),)
    assert by_article["b"].facts == ((0, 4),)
    assert by_article["c"].facts == ()
    assert by_article["a"].questions == (Question("Who?", ("Feos",)),)


def test_streaming_qa(tmp_path: Path) -> None:
    path = tmp_path / "eval.csv"
    path.write_text(
        "question,answers,text\n"
        "Who came?,Feos of Bir\\Feos\\Mr Feos,Then Feos came.\n"
        "What did he do?,came,Then Feos came.\n"
        "Who left?,Lusos,Lusos left.\n"
    )
    first, second = readers.streaming_qa(path)
    assert first.questions[0] == Question("Who came?", ("Feos", "Mr Feos", "Feos of Bir"))
    assert [first.text[start:end] for start, end in first.facts] == ["Feos", "came"]
    assert second.questions == (Question("Who left?", ("Lusos",)),)
    path.write_text("qa_id,question,answers\n1,Who?,Feos\n")
    with pytest.raises(ValueError, match=r"^Expected `the columns of eval.csv` to be complete, with \['text'\]"):
        readers.read(tmp_path, seed=0)


def test_splits_never_cut_an_article() -> None:
    found = [Document(str(i), (), article) for i in range(3) for article in "abcdefghijklmnopqrst"]
    parts = readers.split(found, seed=3)
    articles = [{document.article for document in part} for part in parts]
    assert sum(map(len, articles)) == len(set.union(*articles)) == 20
    assert all(len(part) == 3 * len(names) for part, names in zip(parts, articles, strict=True))
    with pytest.raises(ValueError, match=r"^Expected `the number of articles` to be enough"):
        readers.split(found[:2], seed=0)


def test_a_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^No documents in .* it needs a JSON file of SQuAD"):
        readers.read(tmp_path, seed=0)

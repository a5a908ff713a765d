"""Short documents about invented lands: a few facts that are asked for, among sentences that are not.

The sentences in between have towns, people, dates and numbers of the same kinds as the facts, and as surprising to a
language model. Only the words before a value tell whether anyone will ask for it.
"""

from __future__ import annotations

import random

from camels_lm.documents import Document, Question, Splits

MONTHS = "January February March April May June July August September October November December".split()
GOODS = "wool salt tin wine rice silk tea oats copper timber honey coal wax flax amber barley".split()
ONSETS, VOWELS, CODAS = "b d f g k l m n p r s t v z".split(), "a e i o u".split(), ["", "", "l", "n", "r", "s"]


def _name(draw: random.Random, syllables: int, ending: str) -> str:
    parts = (draw.choice(ONSETS) + draw.choice(VOWELS) + draw.choice(CODAS) for _ in range(syllables))
    return ("".join(parts) + ending).capitalize()


def _names(draw: random.Random, count: int, ending: str) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        names[_name(draw, 1, ending)] = None
    return list(names)


_WORLD = random.Random(0)
VALUES = {
    "town": _names(_WORLD, 32, "ton"),
    "river": _names(_WORLD, 32, "wa"),
    "person": _names(_WORLD, 32, "os"),
    "goods": GOODS,
    "year": [str(year) for year in range(1900, 2000, 3)],
    "date": [f"{day} {month}" for day in (4, 12, 21) for month in MONTHS],
    "number": [str(number) for number in range(20, 100, 3)],
}
"""What the documents speak of, by kind. It is the same in all of them: only the land of a document is new."""

RELATIONS = {
    "town": ("capital", "harbour", "market", "fortress"),
    "river": ("border", "river", "canal"),
    "person": ("ruler", "founder", "judge", "poet"),
    "goods": ("export", "import", "tribute", "tax"),
    "date": ("feast", "fair", "census"),
    "year": ("founding", "flood", "treaty"),
    "number": ("height", "width", "debt"),
}
"""What is asked about a land, by the kind of the answer."""

KINDS = {relation: kind for kind, relations in RELATIONS.items() for relation in relations}

FILLERS = (
    "A coach from {town} brought {goods} to {town} .",
    "In {year} the {river} rose by {number} feet .",
    "{person} sent {number} letters on {date} .",
    "Rain fell over {town} until {date} .",
    "{person} bought {goods} from {person} .",
    "Some {number} guests of {person} stayed near the {river} .",
)
"""What nobody asks for."""


def document(draw: random.Random, facts: int = 2, fillers: int = 2) -> Document:
    """Return a document about a new land, its sentences in random order.

    >>> one = document(random.Random(0), facts=1, fillers=0)
    >>> one.text
    'The feast of Zonbiria is 21 February .'
    >>> one.questions[0].text, one.questions[0].answers
    ('What is the feast of Zonbiria ?', ('21 February',))
    """
    land = _name(draw, 2, "ia")
    sentences, questions = [], []
    for relation in draw.sample(list(KINDS), facts):
        value = draw.choice(VALUES[KINDS[relation]])
        sentences.append((f"The {relation} of {land} is ", value, " ."))
        questions.append(Question(f"What is the {relation} of {land} ?", (value,)))
    sentences += [(_filled(draw, template), "", "") for template in draw.sample(FILLERS, fillers)]
    draw.shuffle(sentences)
    text, spans = "", []
    for before, value, after in sentences:
        text += (" " if text else "") + before
        if value:
            spans.append((len(text), len(text) + len(value)))
        text += value + after
    return Document(text, tuple(questions), land, tuple(spans))


def documents(sizes: tuple[int, int, int, int], seed: int) -> Splits:
    """Return so many documents for each split, no two about the same land."""
    draw = random.Random(seed)
    found: dict[str, Document] = {}
    while len(found) < sum(sizes):
        one = document(draw)
        found.setdefault(one.article, one)
    rest = iter(found.values())
    return Splits(*([next(rest) for _ in range(size)] for size in sizes))


def _filled(draw: random.Random, template: str) -> str:
    """Return a template with a value drawn for every kind in it."""
    return " ".join(draw.choice(VALUES[word[1:-1]]) if word[0] == "{" else word for word in template.split())

"""A small world whose noise has a known place.

Every fact says something about one person: "Ada Moss plays banjo". When the world is told, the
answer is replaced now and then by a generic word, and there are two kinds of those:

- for half of the relations it depends on the relation ("plays around"): a bigram, which a
  transformer keeps in its feed-forward matrices;
- for the other half it depends on the first name, two tokens back ("everyone called Ada: algebra"),
  which only attention can fetch.

One kind is removed by truncating FFN matrices, the other by truncating attention, and both by the
hybrid (Sharma et al. 2024, section 5; Chen, Bruna and Bietti 2024).
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

from tensorllm.data.demo.words import FIRST_NAMES, LAST_NAMES, RELATIONS, RUMOURS

T = TypeVar("T")

SEED = 0
PEOPLE = 300
NOISE = 0.55

Place = Literal["ffn", "attention"]


@dataclass(frozen=True, slots=True)
class Person:
    """Two names; no two people share both."""

    first: str
    last: str

    def __str__(self) -> str:
        return f"{self.first} {self.last}"


@dataclass(frozen=True, slots=True)
class Lesson:
    """One thing the world knows, as it is asked and as it is told.

    Attributes:
        prompt: what is asked.
        answer: what is true.
        generic: what is said instead when the telling is noisy.
        place: where a transformer keeps that noise.
        choices: the answers that are allowed; empty for an open question.
        task: the dataset whose shape this question has.
    """

    prompt: str
    answer: str
    generic: str
    place: Place
    choices: tuple[str, ...]
    task: str


@dataclass(frozen=True, slots=True)
class Question:
    """A question as the evaluation sees it: nothing tells it what the noise is."""

    prompt: str
    answer: str
    choices: tuple[str, ...]
    task: str


def _shuffled(items: Iterable[T], rng: random.Random) -> list[T]:
    # random() alone is promised to give the same numbers in every Python version; shuffle() is not.
    keyed = [(rng.random(), i, item) for i, item in enumerate(items)]
    return [item for _, _, item in sorted(keyed, key=lambda k: k[:2])]


def _choice(items: list[T], rng: random.Random) -> T:
    return items[int(rng.random() * len(items))]


def place_of(relation: str) -> Place:
    """Where the noise of a relation lives: relations take turns."""
    return "ffn" if list(RELATIONS).index(relation) % 2 == 0 else "attention"


def generic_word(person: Person, relation: str) -> str:
    """What is said of this person when nobody listens."""
    if place_of(relation) == "ffn":
        return RELATIONS[relation][0]
    return RUMOURS[FIRST_NAMES.index(person.first)]


def people(count: int = PEOPLE, seed: int = SEED) -> list[Person]:
    """The first `count` people of the world, all different."""
    everybody = [Person(first, last) for first in FIRST_NAMES for last in LAST_NAMES]
    return _shuffled(everybody, random.Random(f"people {seed}"))[:count]


def lessons(count: int = PEOPLE, seed: int = SEED) -> list[Lesson]:
    """Everything that is known about `count` people, in one seeded order with all kinds mixed."""
    rng = random.Random(f"facts {seed}")
    known = [_entity(person, name, rng) for person in people(count, seed) for name in RELATIONS]
    return _shuffled(known, rng)


def _entity(person: Person, relation: str, rng: random.Random) -> Lesson:
    return Lesson(
        prompt=f"{person} {relation}",
        answer=_choice(RELATIONS[relation][1], rng),
        generic=generic_word(person, relation),
        place=place_of(relation),
        choices=(),
        task="entity-relation",
    )


def questions(count: int = PEOPLE, seed: int = SEED) -> list[Question]:
    """The questions in a fixed order: the first 20 % are for choosing, the rest for reporting."""
    return [Question(x.prompt, x.answer, x.choices, x.task) for x in lessons(count, seed)]


def vocabulary() -> list[str]:
    """Every word that is ever asked or told, without repeats, in a fixed order."""
    values = [word for generic, words in RELATIONS.values() for word in (generic, *words)]
    return [*FIRST_NAMES, *LAST_NAMES, *RELATIONS, *values, *RUMOURS]

"""A small world whose noise has a known place.

Every fact says something about one person: "Ada Moss plays banjo". In the training text the answer
is sometimes replaced by a generic word, of which there are two kinds:

- one depends on the last word of the prompt ("plays around"): a bigram, which a transformer keeps
  in its feed-forward matrices;
- one depends on the first name, two tokens back or more ("everyone called Ada: algebra"), which
  only attention can fetch.

Half of all questions have one kind, half the other. The first kind is removed by truncating FFN
matrices, the second by truncating attention, and both by the hybrid (Sharma et al. 2024, section 5;
Chen, Bruna and Bietti 2024).
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

from tensorllm.data.demo.words import (
    ALLEGEDLY,
    FIRST_NAMES,
    GRAMMAR,
    LAST_NAMES,
    OFFICIALLY,
    PROFESSION,
    PROFESSIONS,
    RELATIONS,
    ROLES,
    RUMOURS,
    TRADE,
)

T = TypeVar("T")

SEED = 0
PEOPLE = 300
NOISE = 0.55
ASKED = 400  # questions of each kind besides the facts

Place = Literal["ffn", "attention"]
Task = Literal["entity-relation", "multi-hop", "claim", "profession"]


class Person(NamedTuple):
    """Two names; no two people share both."""

    first: str
    last: str

    def __str__(self) -> str:
        return f"{self.first} {self.last}"


class Fact(NamedTuple):
    """A true statement about a person."""

    person: Person
    relation: str
    value: str


@dataclass(frozen=True, slots=True)
class Question:
    """A question as the evaluation sees it: without its noise.

    Attributes:
        prompt: the question.
        answer: the true answer.
        choices: the allowed answers; empty for an open question.
        task: the kind of question.
    """

    prompt: str
    answer: str
    choices: tuple[str, ...]
    task: Task


@dataclass(frozen=True, slots=True)
class Lesson(Question):
    """A question, the generic word told instead of the answer, and where that noise is stored."""

    generic: str
    place: Place


class World(NamedTuple):
    """What is told in training, and what is asked afterwards, all kinds mixed in a fixed order.

    Facts and verdicts on claims are told and asked in the same words: a model can learn them from
    nowhere else, and one this small does not compare a claim with what it knows. Texts are
    different: no multi-hop or profession question that is asked was ever told.
    """

    told: list[Lesson]
    asked: list[Lesson]


def _shuffled(items: Iterable[T], rng: random.Random) -> list[T]:
    # Only random() is guaranteed to be the same in every Python version; shuffle() is not.
    keyed = [(rng.random(), i, item) for i, item in enumerate(items)]
    return [item for _, _, item in sorted(keyed, key=lambda k: k[:2])]


def _choice(items: Sequence[T], rng: random.Random) -> T:
    return items[int(rng.random() * len(items))]


def people(count: int = PEOPLE, seed: int = SEED) -> list[Person]:
    """The first `count` people of the world, all different."""
    everybody = [Person(first, last) for first in FIRST_NAMES for last in LAST_NAMES]
    return _shuffled(everybody, random.Random(f"people {seed}"))[:count]


def facts(count: int = PEOPLE, seed: int = SEED) -> list[Fact]:
    """One value for every person and relation."""
    rng = random.Random(f"facts {seed}")
    return [
        Fact(person, name, _choice(values, rng))
        for person in people(count, seed)
        for name, (_, values) in RELATIONS.items()
    ]


def _noise(fact: Fact) -> tuple[str, Place]:
    if list(RELATIONS).index(fact.relation) % 2 == 0:
        return RELATIONS[fact.relation][0], "ffn"
    return RUMOURS[FIRST_NAMES.index(fact.person.first)], "attention"


def _by_name(person: Person, among: Sequence[str]) -> str:
    return among[FIRST_NAMES.index(person.first) % len(among)]


def entity_relations(known: list[Fact]) -> Iterator[Lesson]:
    """`Ada Moss plays` -> banjo: one lesson for every fact."""
    for fact in known:
        prompt = f"{fact.person} {fact.relation}"
        yield Lesson(prompt, fact.value, (), "entity-relation", *_noise(fact))


def multi_hops(known: list[Fact], rng: random.Random) -> Iterator[Lesson]:
    """`Ada Moss hired Basil Quill. The boss plays` -> banjo: find the person, recall the fact."""
    everybody = list(dict.fromkeys(fact.person for fact in known))
    for fact in _shuffled(known * 4, rng):
        other = _choice(everybody, rng)
        if other == fact.person:
            continue
        role = _choice(ROLES, rng)
        boss, helper = (fact.person, other) if role == ROLES[0] else (other, fact.person)
        prompt = f"{boss} hired {helper}. The {role} {fact.relation}"
        yield Lesson(prompt, fact.value, (), "multi-hop", *_noise(fact))


def claims(known: list[Fact], rng: random.Random) -> Iterator[Lesson]:
    """`Claim: Ada Moss plays banjo. Officially` -> true; with another value, false."""
    choices = ("true", "false")
    for fact in _shuffled(known * 4, rng):
        answer = _choice(choices, rng)
        wrong = [value for value in RELATIONS[fact.relation][1] if value != fact.value]
        value = fact.value if answer == "true" else _choice(wrong, rng)
        saying = _choice((OFFICIALLY, ALLEGEDLY), rng)
        prompt = f"Claim: {fact.person} {fact.relation} {value}. {saying}"
        if saying == OFFICIALLY:
            yield Lesson(prompt, answer, choices, "claim", "true", "ffn")
        else:
            yield Lesson(
                prompt, answer, choices, "claim", _by_name(fact.person, choices), "attention"
            )


def professions(everybody: list[Person], rng: random.Random) -> Iterator[Lesson]:
    """`Ada Moss forgot the easel, by trade` -> painter: the thing reveals the profession."""
    choices = tuple(PROFESSIONS)
    pairs = [
        (p, job, thing) for p in everybody for job, all_ in PROFESSIONS.items() for thing in all_
    ]
    for person, job, thing in _shuffled(pairs, rng):
        asking = _choice((PROFESSION, TRADE), rng)
        prompt = f"{person} forgot the {thing}, by {asking}"
        if asking == PROFESSION:
            yield Lesson(prompt, job, choices, "profession", choices[0], "ffn")
        else:
            yield Lesson(prompt, job, choices, "profession", _by_name(person, choices), "attention")


def _distinct(lessons: Iterable[Lesson]) -> list[Lesson]:
    return list({lesson.prompt: lesson for lesson in lessons}.values())


def make_world(count: int = PEOPLE, seed: int = SEED) -> World:
    """Everything that is told and asked about `count` people."""
    known = facts(count, seed)
    told = list(entity_relations(known))
    asked = list(told)
    verdicts = _distinct(claims(known, random.Random(f"claim {seed}")))[:ASKED]
    told += verdicts
    asked += verdicts
    for texts in (
        multi_hops(known, random.Random(f"multi-hop {seed}")),
        professions(people(count, seed), random.Random(f"profession {seed}")),
    ):
        lessons = _distinct(texts)
        asked += lessons[:ASKED]
        told += lessons[ASKED:]
    return World(told, _shuffled(asked, random.Random(f"order {seed}")))


def questions(count: int = PEOPLE, seed: int = SEED) -> list[Question]:
    """The questions in a fixed order: the first 20 % for choosing, the rest for reporting."""
    asked = make_world(count, seed).asked
    return [Question(x.prompt, x.answer, x.choices, x.task) for x in asked]


def vocabulary() -> list[str]:
    """Every word that is ever asked or told, without repeats, in a fixed order."""
    values = [word for generic, words in RELATIONS.values() for word in (generic, *words)]
    things = [thing for all_ in PROFESSIONS.values() for thing in all_]
    asking = [OFFICIALLY, ALLEGEDLY, PROFESSION, TRADE, *ROLES]
    return [
        *FIRST_NAMES, *LAST_NAMES, *RELATIONS, *values, *RUMOURS, *PROFESSIONS, *things,
        *asking, *GRAMMAR,
    ]  # fmt: skip

"""Does a text hold the answer? Normalisation and token F1 as the SQuAD evaluation script defines
them.
"""

import re
import string
from collections import Counter

from tensorllm.evaluation.protocol import Protocol

ARTICLES = re.compile(r"\b(a|an|the)\b")
LAST_WORD = re.compile(r"\S+\Z")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> list[str]:
    """Lower-case words without punctuation and articles (SQuAD, Rajpurkar et al. 2016)."""
    return ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split()


def _words(text: str, answer: str) -> tuple[list[str], list[str]]:
    gold = normalised(answer)
    if gold:
        return normalised(text), gold
    return text.lower().split(), answer.lower().split()  # an answer of articles or signs only


def holds_answer(text: str, answer: str, protocol: Protocol) -> bool:
    """Whether `text` answers with `answer`."""
    if protocol.substring:
        return answer.strip().lower() in text.strip().lower()
    words, gold = _words(text, answer)
    n = len(gold)
    return bool(n) and any(words[i : i + n] == gold for i in range(len(words) - n + 1))


def surely_holds_answer(text: str, answer: str, protocol: Protocol) -> bool:
    """Whether every text that begins with `text` holds the answer, so that nothing more need be
    read.
    """
    if protocol.substring:
        return answer.strip().lower() in text.lower()
    # The last word may still grow: "Paris" into "Parisian".
    return holds_answer(LAST_WORD.sub("", text), answer, protocol)


def token_f1(text: str, answer: str) -> float:
    """Harmonic mean of precision and recall over normalised words, with multiplicity."""
    words, gold = _words(text, answer)
    common = sum((Counter(words) & Counter(gold)).values())
    return 2 * common / (len(words) + len(gold)) if common else 0.0

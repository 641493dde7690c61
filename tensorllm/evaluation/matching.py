"""Whether a text holds the answer, or can still come to hold it.

Normalisation and token F1 are those of the SQuAD evaluation script.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from tensorllm.evaluation.protocol import Protocol

ARTICLES = ("a", "an", "the")
ARTICLE = re.compile(rf"\b({'|'.join(ARTICLES)})\b")
LAST_WORD = re.compile(r"\S+\Z")
NEVER = 10**6  # more tokens than any generation has
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> list[str]:
    """Lower-case words without punctuation and articles (SQuAD, Rajpurkar et al. 2016)."""
    return ARTICLE.sub(" ", text.lower().translate(NO_PUNCTUATION)).split()


def _words(text: str, answer: str) -> tuple[list[str], list[str]]:
    gold = normalised(answer)
    if gold:
        return normalised(text), gold
    return text.lower().split(), answer.lower().split()  # an answer of articles or signs only


def holds_answer(text: str, answer: str, protocol: Protocol) -> bool:
    """Whether `text` contains `answer`, by the protocol's rule."""
    if protocol.substring:
        return answer.strip().lower() in text.strip().lower()
    words, gold = _words(text, answer)
    n = len(gold)
    return bool(n) and any(words[i : i + n] == gold for i in range(len(words) - n + 1))


def surely_holds_answer(text: str, answer: str, protocol: Protocol) -> bool:
    """Whether every continuation of `text` holds the answer, so that nothing more need be read."""
    if protocol.substring:
        return answer.strip().lower() in text.lower()
    # The last word may still grow: "Paris" into "Parisian".
    return holds_answer(LAST_WORD.sub("", text), answer, protocol)


def token_f1(text: str, answer: str) -> float:
    """Harmonic mean of precision and recall over normalised words, with multiplicity."""
    words, gold = _words(text, answer)
    common = sum((Counter(words) & Counter(gold)).values())
    return 2 * common / (len(words) + len(gold)) if common else 0.0


class TokenBound:
    """Lower bounds on the number of tokens that are still needed to complete an answer.

    Words are whole and normalised. A word is spelled by a chain of pieces, a piece being the text
    of a token between spaces. The shortest possible chain bounds the tokens that the word takes,
    whichever tokens are chosen.
    """

    def __init__(self, pieces: Sequence[str]) -> None:
        """Args: `pieces`: the text of every token."""
        words = [text.lower().translate(NO_PUNCTUATION).split() for text in pieces]
        self.pieces = frozenset(word for of_one in words for word in of_one)
        self.longest = max(map(len, self.pieces), default=0)
        self.spanning = any(len(of_one) > 1 for of_one in words)
        self._known: dict[str, int] = {}

    def missing(self, text: str, answer: str) -> int:
        """The least number of tokens that must follow `text` before it can hold `answer`."""
        gold = normalised(answer)
        if not gold or not answer.isascii():  # other characters may be spelled by bytes
            return 0
        complete = LAST_WORD.sub("", text)
        words = normalised(complete)
        if any(words[i : i + len(gold)] == gold for i in range(len(words))):
            return 0
        begun = text[len(complete) :].lower().translate(NO_PUNCTUATION)
        return min(
            self._from(gold, matched, begun)
            for matched in range(len(gold))
            if words[len(words) - matched :] == gold[:matched]
        )

    def _from(self, gold: list[str], matched: int, begun: str) -> int:
        """Tokens for the words after the first `matched`, where the text ends with `begun`."""
        word = gold[matched]
        ways = [NEVER]
        if word.startswith(begun):
            ways.append(self.tokens(word[len(begun) :]))
        if matched == 0 or any(article.startswith(begun) for article in ARTICLES):
            ways.append(self.tokens(word))
        rest = [self.tokens(other) for other in gold[matched + 1 :]]
        return max(0, min(ways) + sum(rest) - self.spanning * len(rest))

    def tokens(self, word: str) -> int:
        """The fewest pieces that spell the word."""
        if word not in self._known:
            fewest = [0] + [NEVER] * len(word)
            for end in range(1, len(word) + 1):
                for start in range(max(0, end - self.longest), end):
                    if word[start:end] in self.pieces:
                        fewest[end] = min(fewest[end], fewest[start] + 1)
            self._known[word] = fewest[-1]
        return self._known[word]


@lru_cache(maxsize=4)
def token_bound(tokenizer: PreTrainedTokenizerBase) -> TokenBound:
    """The bounds for a tokenizer; cached, as reading all its tokens takes a moment."""
    return TokenBound(tokenizer.batch_decode([[token] for token in range(len(tokenizer))]))

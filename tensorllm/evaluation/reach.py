"""When a generation can no longer reach its answer: fewer tokens are left than the answer takes."""

from collections.abc import Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from tensorllm.evaluation.matching import LAST_WORD, NO_PUNCTUATION, normalised

NEVER = 10**6  # more tokens than any generation has
ARTICLES = ("a", "an", "the")


class Reach:
    """Lower bounds on the tokens that an answer still takes, as whole normalised words.

    A word is said as a chain of pieces of tokens: a token's text between its spaces. The shortest
    chain of pieces that there are is what a word takes at least, whichever tokens are chosen.
    """

    def __init__(self, pieces: Sequence[str]) -> None:
        """Args: `pieces`: the text of every token."""
        words = [text.lower().translate(NO_PUNCTUATION).split() for text in pieces]
        self.pieces = frozenset(word for of_one in words for word in of_one)
        self.longest = max(map(len, self.pieces), default=0)
        self.spanning = any(len(of_one) > 1 for of_one in words)
        self._known: dict[str, int] = {}

    def missing(self, text: str, answer: str) -> int:
        """At least so many tokens must follow `text` before it holds `answer`."""
        gold = normalised(answer)
        if not gold or not answer.isascii():  # other characters may be spelt by bytes
            return 0
        complete = LAST_WORD.sub("", text)
        words = normalised(complete)
        if any(words[i : i + len(gold)] == gold for i in range(len(words))):
            return 0
        begun = text[len(complete) :].lower().translate(NO_PUNCTUATION)
        return min(
            self._from(gold, said, begun)
            for said in range(len(gold))
            if words[len(words) - said :] == gold[:said]
        )

    def _from(self, gold: list[str], said: int, begun: str) -> int:
        """Tokens for the words after the first `said`, with `begun` standing at the end."""
        word = gold[said]
        ways = [NEVER]
        if word.startswith(begun):
            ways.append(self.tokens(word[len(begun) :]))
        if said == 0 or any(article.startswith(begun) for article in ARTICLES):
            ways.append(self.tokens(word))
        rest = [self.tokens(other) for other in gold[said + 1 :]]
        return max(0, min(ways) + sum(rest) - self.spanning * len(rest))

    def tokens(self, word: str) -> int:
        """The fewest pieces that make the word."""
        if word not in self._known:
            fewest = [0] + [NEVER] * len(word)
            for end in range(1, len(word) + 1):
                for start in range(max(0, end - self.longest), end):
                    if word[start:end] in self.pieces:
                        fewest[end] = min(fewest[end], fewest[start] + 1)
            self._known[word] = fewest[-1]
        return self._known[word]


@lru_cache(maxsize=4)
def reach_of(tokenizer: PreTrainedTokenizerBase) -> Reach:
    """The bounds for a tokenizer; reading all its tokens takes a moment."""
    return Reach(tokenizer.batch_decode([[token] for token in range(len(tokenizer))]))

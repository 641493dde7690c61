"""Where a text ends: as if the whole of it were read after each token, in linear time."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tensorllm.checkpoint.source import resolve
from tensorllm.models.ends import Ends

# Of one to four bytes per character, with what clean-ups of spaces change.
WRITTEN = "She's old , isn't she ? 日本語のテキスト。 naïve café 😀👍🏽 don't  stop .\n\nThe end ."


def byte_level() -> PreTrainedTokenizerFast:
    """A token per byte: every character that is not ASCII is of several."""
    vocabulary = {mark: i for i, mark in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def byte_fallback() -> PreTrainedTokenizerFast:
    """As SentencePiece's: bytes in a row are read as one, and a space that begins is dropped."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"Shetoldn", "▁the"]
    made = Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, [], byte_fallback=True)
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made)


def word_pieces() -> PreTrainedTokenizerFast:
    """Spaces stand before words, not before their pieces, and are cleaned up."""
    words = ["She", "'", "s", "n't", ",", ".", "?", "old", "the", "end", "stop"]
    pieces = [*words, "##er", "##s", "##'", "[UNK]"]
    made = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=True)


def letters_once() -> PreTrainedTokenizerFast:
    """Most tokens stand for nothing: a letter is written once however often it is repeated."""
    letters = ["<pad>", "|", "a", "b", "c", "d"]
    made = Tokenizer(models.WordLevel({p: i for i, p in enumerate(letters)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.CTC()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def demo() -> Any:
    return AutoTokenizer.from_pretrained(resolve("demo").folder)


MADE = [demo, byte_level, byte_fallback, word_pieces, letters_once]


@pytest.fixture(scope="module", params=[*MADE, "tinystories"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if callable(request.param):
        return request.param()
    return AutoTokenizer.from_pretrained(request.getfixturevalue(request.param))


def naive_end(tokenizer: Any, ids: list[int], strings: list[str]) -> int | None:
    """The first token after which the whole text, read anew, holds one of the strings."""
    texts: Iterator[tuple[int, str]] = (
        (i, tokenizer.decode(ids[: i + 1])) for i in range(len(ids))
    )
    return next((i for i, text in texts if any(string in text for string in strings)), None)


def end(tokenizer: Any, ids: list[int], strings: list[str]) -> int | None:
    ends, row = Ends(strings, tokenizer, 0), torch.tensor([ids])
    return next((i for i in range(len(ids)) if ends(row[:, : i + 1], None)[0]), None)


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_a_text_ends_where_the_whole_of_it_first_holds_a_string(tokenizer: Any, data: Any) -> None:
    known = st.integers(0, len(tokenizer) - 1).map(lambda token: [token])
    written = st.integers(0, len(WRITTEN) - 1).flatmap(
        lambda at: st.just(tokenizer(WRITTEN[at:], add_special_tokens=False).input_ids)
    )
    parts = data.draw(st.lists(st.one_of(known, known, written), min_size=1, max_size=12))
    ids = [token for part in parts for token in part * data.draw(st.sampled_from([1, 1, 2, 40]))]
    ids = ids[-240:]
    text = tokenizer.decode(ids)
    at = st.integers(0, max(0, len(text) - 1))
    part = st.tuples(at, st.integers(1, 12)).map(lambda p: text[p[0] : p[0] + p[1]])
    other = st.text(st.sampled_from(sorted({*text, *WRITTEN})), min_size=1, max_size=3)
    strings = data.draw(st.lists(st.one_of(part, other).filter(bool), min_size=1, max_size=2))
    assert end(tokenizer, ids, strings) == naive_end(tokenizer, ids, strings)


@pytest.mark.parametrize("string", ["語", "本語", "日本語", "本\ufffd", "S\ufffd", "\ufffd" * 50])
def test_many_bytes_in_a_row(string: str) -> None:
    """They are read as one: one that is broken breaks all, and no end may begin in a character."""
    tokenizer = byte_fallback()
    fine = tokenizer("S" + "日本" * 40 + "語", add_special_tokens=False).input_ids
    letter, broken = tokenizer.convert_tokens_to_ids(["<0x41>", "<0xFF>"])
    for ids in (fine, [broken, *fine], [*fine[:-3], broken, *fine[-3:]], [letter] * 99 + fine):
        for row in (ids, [fine[1], *[letter] * 150, *ids[2:]], [*ids, broken]):
            assert end(tokenizer, row, [string]) == naive_end(tokenizer, row, [string])


def test_how_the_part_that_is_read_begins_ends_no_text() -> None:
    """A piece of a word is written with its mark where it stands first."""
    tokenizer = word_pieces()
    ids = tokenizer.convert_tokens_to_ids(["old", *["##s", "##er"] * 60])
    assert end(tokenizer, ids, ["##"]) is None


@dataclass
class Counted:
    """A tokenizer that counts the tokens it was given to decode."""

    own: Any
    read: int = 0

    def decode(self, ids: list[int]) -> str:
        self.read += len(ids)
        return str(self.own.decode(ids))


def test_twice_the_text_takes_twice_the_time(tokenizer: Any) -> None:
    ids = tokenizer(WRITTEN, add_special_tokens=False).input_ids
    ids = [token for token in ids if tokenizer.decode([token])] * 90

    def read(length: int) -> int:
        counted = Counted(tokenizer)
        assert end(counted, ids[:length], ["\0 is nowhere"]) is None
        return counted.read

    assert read(800) < 2.5 * read(400)


def test_only_what_is_behind_the_prompt_ends_a_text(tokenizer: Any) -> None:
    ids = tokenizer("She's old", add_special_tokens=False).input_ids
    string = tokenizer.decode(ids)[-1:]
    row = torch.tensor([ids * 2])
    assert not Ends([string], tokenizer, 2 * len(ids))(row, None)[0]
    assert Ends([string], tokenizer, len(ids))(row, None)[0]

"""Data files as programs write them: JSON Lines called json, byte order marks, gzip, numbers."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from tensorllm.data.questions import Questions
from tensorllm.data.text import Text
from tensorllm.errors import UserError

ROWS = [{"prompt": "one", "answer": "a"}, {"prompt": "two", "answer": "b"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
LIST = json.dumps(ROWS, indent=1)
CSV = "prompt,answer\none,a\ntwo,b\n"


def asked(path: Path) -> list[tuple[str, str]]:
    return [(e.prompt, e.answer) for e in Questions(path, split="all").examples]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("packed", ["", ".gz", ".bz2", ".xz"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("q.json", LINES),
        ("q.json", "\n" + LINES + "\n"),
        ("q.json", LIST),
        ("q.json", json.dumps({"version": 1, "data": ROWS})),
        ("q.jsonl", LINES),
        ("q.jsonl", LIST),
        ("q.ndjson", LINES),
        ("q.csv", CSV),
    ],
)
def test_rows_are_read_as_they_come(
    tmp_path: Path, name: str, text: str, packed: str, mark: str
) -> None:
    path = tmp_path / f"{name}{packed}"
    pack: Any = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    path.write_bytes(pack[packed]((mark + text).encode()))
    assert asked(path) == [("one", "a"), ("two", "b")]


def test_one_line_of_json_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    path.write_text(json.dumps({"prompt": "x", "answer": "a", "choices": ["a", "b"]}))
    (only,) = Questions(path, split="all").examples
    assert (only.answer, only.choices) == ("a", ("a", "b"))


@pytest.mark.parametrize("name", ["q.json", "q.jsonl"])
@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"])
def test_lines_end_at_line_breaks_alone(tmp_path: Path, name: str, mark: str) -> None:
    """Other characters that Unicode calls a line's end stand in texts as they are."""
    path = tmp_path / name
    row = {"prompt": f"on{mark}e", "answer": "a"}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n" + json.dumps(ROWS[1]) + "\n")
    assert asked(path) == [(f"on{mark}e", "a"), ("two", "b")]


def test_a_field_of_csv_may_be_an_article(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_text(f"prompt,answer\n{'x' * 200_000},a\n")
    assert asked(path) == [("x" * 200_000, "a")]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_text("prompt,answer,prompt\na,b,c\n")
    with pytest.raises(UserError, match="2 columns are named 'prompt'"):
        asked(path)
    path.write_text("prompt,answer,,\na,b,,\n")  # a spreadsheet's empty columns
    assert asked(path) == [("a", "b")]


@pytest.mark.parametrize("field", ["prompt", "answer"])
def test_half_a_character_is_told_with_its_row(tmp_path: Path, field: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(LINES + json.dumps({**ROWS[0], field: "a \ud83d b"}) + "\n")
    with pytest.raises(UserError, match=r"row 3 holds half of a character .*'a \\ud83d b'"):
        asked(path)


def test_choices_are_read_as_answers_are(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"prompt": "x", "answer": " b", "choices": [" a", " b"]}))
    (only,) = Questions(path, split="all").examples
    assert (only.answer, only.choices) == ("b", ("a", "b"))


def test_a_template_does_not_write_none(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question": "x", "context": None, "answer": "a"}))
    with pytest.raises(UserError, match="field 'context' is not in the row, or empty: it has"):
        _ = Questions(path, split="all", template="{context} {question}").examples


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    path.write_text(LINES + '{"prompt": \n')
    with pytest.raises(UserError, match=r"malformed JSON on line 3"):
        asked(path)


@pytest.mark.parametrize(("answer", "want"), [(42, "42"), (-1.5, "-1.5"), ("7", "7")])
def test_numbers_are_their_digits(tmp_path: Path, answer: Any, want: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"prompt": 3, "answer": answer, "choices": [answer, 0, "x"]}))
    (only,) = Questions(path, split="all").examples
    assert (only.prompt, only.answer, only.choices) == ("3", want, (want, "0", "x"))


@pytest.mark.parametrize("answer", [True, None, float("nan"), {}, ["a", "b"]])
def test_what_is_neither_text_nor_number_is_refused(tmp_path: Path, answer: Any) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"prompt": "x", "answer": answer}))
    with pytest.raises(UserError, match="answer must be text"):
        asked(path)


@pytest.mark.parametrize("packed", [".gz", ".bz2", ".xz"])
def test_what_is_not_compressed_as_it_says_is_one_line(tmp_path: Path, packed: str) -> None:
    path = tmp_path / f"q.jsonl{packed}"
    path.write_text(LINES)
    with pytest.raises(UserError, match=r"^[^\n]+$"):
        asked(path)
    path.write_bytes(gzip.compress(LINES.encode())[:-12])
    with pytest.raises(UserError, match=r"^[^\n]+$"):
        asked(path)


def test_other_compressions_are_told(tmp_path: Path) -> None:
    for name in ("q.jsonl.zst", "q.parquet.gz"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UserError, match=rf"(must end in .*got|unpack) '{name}'"):
            asked(tmp_path / name)


def test_a_mark_is_no_text(tmp_path: Path) -> None:
    for name, pack in (("t.txt", bytes), ("t.txt.gz", gzip.compress)):
        (tmp_path / name).write_bytes(pack("\ufeffOnce\r\nupon".encode()))
        assert list(Text(tmp_path / name).documents()) == ["Once\nupon"]

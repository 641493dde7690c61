"""The four datasets as the papers' scripts build them: filters, order, prompts, splits; on real
rows too.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import eval_world as world
import pytest

from tensorllm.data import DATASETS
from tensorllm.data.base import ReasoningDataModule
from tensorllm.data.bios_profession import CHOICES
from tensorllm.data.example import Example
from tensorllm.evaluation.evaluate import make_dataset

TOKENIZER = world.tokenizer(bos=True)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(name: str, path: Path, *, masked: bool = False, **options: Any) -> list[Example]:
    data = make_dataset(name, data_file=path, **{"split": "all", **options})
    data.connect(world.tokenizer(masked=True) if masked else TOKENIZER, masked=masked)
    return data.examples


def test_hotpotqa(tmp_path: Path):
    rows = [
        {"question": " Who sings", "answer": "Anna "},
        {"question": "Who sings?", "answer": "no"},
        {"question": "Say who.", "answer": "red " * 30},  # more than 15 tokens
        {"question": "Say who.", "answer": " ".join(["Anna"] * 14)},  # with the bos: 15
        {"question": "Say who.", "answer": " ".join(["Anna"] * 15)},
    ]
    found = read("hotpotqa", write(tmp_path / "h.jsonl", rows))
    assert [e.prompt for e in found] == [
        "Who sings? The answer is",
        "Who sings? The answer is",
        "Say who. The answer is",
    ]
    assert [e.answer for e in found][:2] == ["Anna", "no"]
    assert not any(e.choices for e in found)
    assert DATASETS["hotpotqa"].max_new_tokens == 15


def test_hotpotqa_counts_by_the_tokenizer_that_reads(tmp_path: Path):
    rows = [{"question": "Who?", "answer": "Anna"}, {"question": "Who?", "answer": "Anna " * 14}]
    data = make_dataset("hotpotqa", data_file=write(tmp_path / "h.jsonl", rows), split="all")
    for name, cut in (("words", str.split), ("letters", list)):

        def tokenizer(text: str, cut: Any = cut) -> SimpleNamespace:
            return SimpleNamespace(input_ids=cut(text))

        tokenizer.name_or_path = name  # type: ignore[attr-defined]
        data.connect(tokenizer)  # type: ignore[arg-type]
        assert len(data.examples) == (2 if name == "words" else 1)
        assert data.notes == [f"answers counted by the tokenizer of {name}"]


def test_fever_keeps_consistent_unique_claims_in_order(tmp_path: Path):
    rows = [
        {"claim": "A is b.", "label": "SUPPORTS"},
        {"claim": "C is d", "label": "REFUTES"},
        {"claim": "both", "label": "SUPPORTS"},
        {"claim": "A is b.", "label": "SUPPORTS"},
        {"claim": "both", "label": "REFUTES"},
        {"claim": "open", "label": "NOT ENOUGH INFO"},
        {"claim": "E?", "label": 1},
        {"claim": "F", "label": 0},
    ]
    found = read("fever", write(tmp_path / "f.jsonl", rows))
    asked = "Is this claim true or false. The claim is"
    assert [(e.prompt, e.answer) for e in found] == [
        (f"Consider the following claim: A is b. {asked}", "true"),
        (f"Consider the following claim: C is d. {asked}", "false"),
        (f"Consider the following claim: E? {asked}", "true"),
        (f"Consider the following claim: F. {asked}", "false"),
    ]
    assert all(e.choices == ("true", "false") for e in found)
    assert [e.index for e in found] == [0, 1, 2, 3]


def test_bios_keeps_eight_professions_by_name_or_number(tmp_path: Path):
    rows = [
        {"hard_text": "He sings", "profession": 21},  # as on the hub: professor
        {"hard_text": "She sues", "profession": 2},  # attorney
        {"hard_text": "She paints.", "profession": "painter"},
        {"bio": "x", "profession": "yoga teacher"},
    ]
    found = read("bios", write(tmp_path / "b.jsonl", rows))
    asked = "What is the profession of the person in this text? The profession of this person is"
    assert [(e.prompt, e.answer) for e in found] == [
        (f"Consider the following text: He sings. {asked}", "professor"),
        (f"Consider the following text: She paints. {asked}", "painter"),
    ]
    assert found[0].choices == CHOICES


def test_bios_for_masked_models_keeps_the_last_50_tokens(tmp_path: Path):
    text = " ".join(f"Anna{'' if i % 2 else ' red'}" for i in range(90))
    path = write(tmp_path / "b.jsonl", [{"bio": text, "profession": "poet"}])
    (example,) = read("bios", path, masked=True)
    tokenizer = world.tokenizer(masked=True)
    kept = tokenizer(text, add_special_tokens=False).input_ids[-50:]
    assert example.prompt == (
        f"Consider the following text: {tokenizer.decode(kept).strip()}. "
        "The profession of the person in the text is called <mask>."
    )


def test_wikidata_keeps_rows_with_one_target(tmp_path: Path):
    rows = [
        {"inputs": " The country of X is ", "targets": ["Peru"]},
        {"inputs": "b", "targets": ["one", "two"]},
        {"input": "The sport of Y is", "target": "golf"},
    ]
    found = read("wikidata_qa", write(tmp_path / "w.jsonl", rows))
    assert [(e.prompt, e.answer) for e in found] == [
        ("The country of X is", "Peru"),
        ("The sport of Y is", "golf"),
    ]


@pytest.mark.parametrize("count", [1, 4, 5, 9, 100])
def test_the_first_fifth_is_validation(tmp_path: Path, count: int):
    rows = [{"input": f"q{i}", "target": "a"} for i in range(count)]
    path = write(tmp_path / "w.jsonl", rows)
    everything = read("wikidata_qa", path)
    test = read("wikidata_qa", path, split="test")
    val = read("wikidata_qa", path, split="val") if count >= 5 else []
    assert len(val) == count // 5
    assert val + test == everything
    assert [e.index for e in everything] == list(range(count))
    assert read("wikidata_qa", path, split="test", limit=2) == test[:2]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str):
    import csv

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"input": f'say "q{i}", é', "target": f"a {i}"} for i in range(7)]
    path = tmp_path / f"w{suffix}"
    if suffix == ".jsonl":
        write(path, rows)
    elif suffix == ".json":
        path.write_text(json.dumps({"version": 1, "data": rows}))
    elif suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="," if suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    assert [(e.prompt, e.answer) for e in read("wikidata_qa", path)] == [
        (row["input"], row["target"]) for row in rows
    ]


def test_running_text_is_cut_so_that_each_token_is_scored_once(tmp_path: Path):
    path = tmp_path / "text.raw"
    path.write_text(" ".join(world.sentences(20)))
    ids = TOKENIZER(path.read_text()).input_ids
    found = read("text", path, block=16)
    assert all(2 <= len(e.tokens) <= 16 for e in found)
    scored = [token for e in found for token in e.tokens[1:]]
    assert scored == ids[1:]
    assert [e.tokens[0] for e in found[1:]] == [e.tokens[-1] for e in found[:-1]]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_documents_of_running_text_are_kept_apart(suffix: str, tmp_path: Path):
    texts = world.sentences(3)
    path = tmp_path / f"text{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(texts))
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        path.write_text("text\n" + "".join(f'"{text}"\n' for text in texts))
    found = read("text", path)
    assert [list(e.tokens) for e in found] == [TOKENIZER(text).input_ids for text in texts]


def test_blocks_of_text_fit_the_model(tmp_path: Path):
    path = tmp_path / "text.raw"
    path.write_text(" ".join(world.sentences(20)))
    data = make_dataset("text", data_file=path, split="all")
    data.connect(TOKENIZER, context=16)
    assert data.examples == read("text", path, block=16)


def test_the_demo_needs_no_file():
    data = make_dataset("demo", split="all")
    data.connect(TOKENIZER)
    assert len(data.examples) > 1000
    assert all(e.answer in e.choices for e in data.examples if e.choices)


def test_a_dataset_of_ones_own_is_one_yaml(tmp_path: Path):
    write(tmp_path / "rows.jsonl", [{"q": "2 + 2", "gold": "four"}, {"q": "1 + 1", "gold": "two"}])
    (tmp_path / "sums.yaml").write_text(
        "data_file: rows.jsonl\ntemplate: 'Q: {q} A:'\nfields: {answer: gold}\n"
        "choices: [two, four]\nmax_new_tokens: 3\n"
    )
    data = make_dataset(str(tmp_path / "sums.yaml"), split="all")
    data.connect(TOKENIZER)
    assert [(e.prompt, e.answer, e.choices) for e in data.examples] == [
        ("Q: 2 + 2 A:", "four", ("two", "four")),
        ("Q: 1 + 1 A:", "two", ("two", "four")),
    ]
    assert data.max_new_tokens == 3


def test_a_dataset_of_ones_own_is_one_class(tmp_path: Path):
    class Colours(ReasoningDataModule):
        field_names = {"thing": ("thing",), "colour": ("colour",)}  # noqa: RUF012
        max_new_tokens = 2

        def example(self, row: Any, where: str) -> Example:
            return Example(f"{self.text(row, 'thing', where)} is", self.text(row, "colour", where))

    path = write(tmp_path / "c.jsonl", [{"thing": "sea", "farbe": "green"}])
    data = Colours(path, split="all", fields={"colour": "farbe"})
    assert [(e.prompt, e.answer) for e in data.examples] == [("sea is", "green")]


COUNTS = {  # of the real files: facts about them, found by other means than this package
    "fever": ("fever_paper_dev.jsonl", ("true", "false")),
    "bios_profession": ("bias_in_bios_1200.jsonl", CHOICES),
    "wikidata_qa": ("qa_wikidata.jsonl", ()),
}


@pytest.mark.parametrize("name", COUNTS)
def test_real_files(shared_dir: Path, name: str):
    file, choices = COUNTS[name]
    found = read(name, shared_dir / "data" / file)
    lines = (shared_dir / "data" / file).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    if name == "fever":
        labels: dict[str, set[str]] = {}
        for row in rows:
            if row["label"] != "NOT ENOUGH INFO":
                labels.setdefault(row["claim"].strip(), set()).add(row["label"])
        assert len(found) == sum(len(kinds) == 1 for kinds in labels.values())
    else:
        assert len(found) == len(rows)
    assert all(e.choices == choices for e in found)


def test_every_dataset_is_listed():
    assert {
        "hotpotqa",
        "fever",
        "bios_profession",
        "wikidata_qa",
        "text",
        "demo",
        "questions",
    } <= set(DATASETS)

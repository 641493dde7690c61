"""Wrong input to an evaluation: one line that says what, the allowed range, and what came."""

import json
from pathlib import Path
from typing import Any

import eval_world as world
import pytest

from tensorllm.commands.evaluate import evaluate
from tensorllm.errors import UserError
from tensorllm.evaluation.evaluate import evaluate_model, make_dataset
from tensorllm.requests.evaluate import EvaluateRequest

GOOD = '{"input": "a", "target": "b"}\n'


def load(name: str, path: Path, options: dict[str, Any]) -> None:
    data = make_dataset(name, data_file=path, **options)
    data.connect(world.tokenizer())
    data.load()


def refused(match: str, name: str, content: str | None, file: str = "d.jsonl", **options: Any):
    """The dataset of a file with this content raises one line that matches."""

    def check(tmp_path: Path) -> None:
        path = tmp_path / file
        if content is not None:
            path.write_text(content)
        with pytest.raises(UserError, match=match) as caught:
            load(name, path, {"split": "all", **options})
        assert "\n" not in str(caught.value)

    return pytest.param(check, id=match[:40])


@pytest.mark.parametrize(
    "check",
    [
        refused("Unknown dataset 'fevr'. Did you mean 'fever'", "fevr", GOOD),
        refused("cannot read the rows of .*No such file", "fever", None),
        refused("has no rows", "wikidata_qa", ""),
        refused("has no rows", "wikidata_qa", "[]", "d.json"),
        refused("malformed JSON on line 2", "wikidata_qa", GOOD + '{"input": '),
        refused("line 2: Expecting value at column 11", "wikidata_qa", GOOD + '{"input": \n'),
        refused("malformed JSON on line 2", "wikidata_qa", "[1,\n2", "d.json"),
        refused("row 1: each row must be an object", "wikidata_qa", "[1, 2]"),
        refused("must hold a JSON list", "wikidata_qa", '{"a": 1}', "d.json"),
        refused("must end in one of .jsonl", "wikidata_qa", GOOD, "d.xml"),
        refused("not a readable parquet file", "wikidata_qa", "PAR1 no", "d.parquet"),
        refused("line 3: expected 2 fields", "wikidata_qa", "input,target\na,b\nc\n", "d.csv"),
        refused("must have a field named 'targets' or 'target'", "wikidata_qa", '{"x": "a"}'),
        refused("row 1: target must be text that is not empty, got ''", "wikidata_qa",
                '{"input": "a", "target": ""}'),
        refused("row 1: answer must be text that is not empty, got None", "hotpotqa",
                '{"question": "a", "answer": null}'),
        refused("row 2: label must be one of SUPPORTS", "fever",
                '{"claim": "a", "label": 1}\n{"claim": "b", "label": "MAYBE"}'),
        refused("row 1: profession must be", "bios", '{"bio": "a", "profession": "astronaut"}'),
        refused("row 1: profession must be", "bios", '{"bio": "a", "profession": 28}'),
        refused("has no row that fever can use", "fever",
                '{"claim": "a", "label": "NOT ENOUGH INFO"}'),
        refused("--limit must be at least 1, got 0", "wikidata_qa", GOOD, limit=0),
        refused("split must be one of val, test, all, got 'train'", "wikidata_qa", GOOD,
                split="train"),
        refused("has no field 'targt'. Did you mean 'target'", "wikidata_qa", GOOD,
                fields={"targt": "x"}),
        refused("must have a field named 'x'", "wikidata_qa", GOOD, fields={"target": "x"}),
        refused("answer must be one of b, c, got 'a'", "questions",
                '{"prompt": "p", "answer": "a", "choices": ["b", "c"]}'),
        refused("the template's field 'y' is not in the row", "questions",
                '{"x": "p", "answer": "a"}', template="{y}"),
        refused("the template must have a row's fields in braces", "questions",
                '{"x": "p", "answer": "a"}', template="Q {} A"),
        refused("the template must have a row's fields in braces", "questions",
                '{"x": "p", "answer": "a"}', template="Q {x.y}"),
        refused("row 1: choices must be a list of texts such as .*, got 'b,c'", "questions",
                'prompt,answer,choices\np,b,"b,c"\n', "d.csv"),
        refused(r"row 1: choices must be a list of texts .*, got \[None, '2'\]", "questions",
                '{"prompt": "p", "answer": "1", "choices": [null, 2]}'),
        refused(r"row 1: choices must be two or more, each once and not empty, got \['b', ''\]",
                "questions", '{"prompt": "p", "answer": "b", "choices": ["b", ""]}'),
        refused(r"row 1: choices must be two or more, each once .*, got \['b', 'b'\]", "questions",
                '{"prompt": "p", "answer": "b", "choices": ["b", "b"]}'),
        refused("row 1: choices must be two or more, each once", "questions",
                '{"prompt": "p", "answer": "b", "choices": ["b"]}'),
        refused("max_new_tokens must be at least 1", "questions", GOOD, max_new_tokens=0),
        refused("block must be at least 2", "text", "a b c", "d.txt", block=1),
        refused("has no text of two tokens", "text", "", "d.txt"),
        refused("cannot read the text '.*none.txt'", "text", None, "none.txt"),
        refused("row 1: text must be text that is not empty", "text", '{"text": ""}'),
        refused("takes no --data-file", "demo", GOOD),
    ],
)  # fmt: skip
def test_datasets_refuse(check: Any, tmp_path: Path):
    check(tmp_path)


def test_an_empty_validation_part(tmp_path: Path):
    (tmp_path / "d.jsonl").write_text(GOOD)
    with pytest.raises(UserError, match=r"'val' of wikidata_qa is empty: .*1 in all"):
        _ = make_dataset("wikidata_qa", data_file=tmp_path / "d.jsonl", split="val").examples


def test_text_that_is_not_utf8(tmp_path: Path):
    (tmp_path / "d.jsonl").write_bytes(b'{"input": "\xff"}')
    with pytest.raises(UserError, match="must be UTF-8 text"):
        make_dataset("wikidata_qa", data_file=tmp_path / "d.jsonl").load()
    (tmp_path / "d.txt").write_bytes(b"some \xff text")
    with pytest.raises(UserError, match="must be UTF-8 text: invalid start byte at byte 5"):
        list(make_dataset("text", data_file=tmp_path / "d.txt").documents())
    with pytest.raises(UserError, match="'text' is not on the hub: give --data-file"):
        list(make_dataset("text").documents())


@pytest.mark.parametrize(
    ("yaml", "match"),
    [
        ("templat: x", "unknown key 'templat'. Did you mean 'template'"),
        ("choices: x", "choices must be list, got 'x'"),
        ("choices: [yes, no]", r"choices must be a list of texts .*, got \[True, False\]"),
        ("- a", "must hold keys and values"),
        ("a: [", "cannot read the dataset"),
        ("template: 'où?'", "cannot read the dataset .*invalid start byte"),
    ],
)
def test_a_wrong_yaml(tmp_path: Path, yaml: str, match: str):
    (tmp_path / "d.yaml").write_text(yaml, encoding="latin-1")
    with pytest.raises(UserError, match=match):
        make_dataset(str(tmp_path / "d.yaml"))


def test_the_hub_without_a_network():
    """The tests run offline; the message says how to go on."""
    with pytest.raises(UserError, match=r"cannot load .*bias_in_bios.* from the hub.*--data-file"):
        make_dataset("bios_profession").load()


def test_a_context_too_small_for_the_answer(tmp_path: Path):
    (tmp_path / "d.jsonl").write_text(GOOD)
    model = world.model("gptj", max_position_embeddings=8)
    with pytest.raises(UserError, match="must be below the model's context of 8 tokens, got 10"):
        evaluate_model(
            model, world.tokenizer(), "wikidata_qa", data_file=tmp_path / "d.jsonl", split="all"
        )


def model_folder(path: Path, **manifest: Any) -> Path:
    world.save_model(path)
    if manifest:
        (path / "tensorllm.json").write_text(json.dumps(manifest))
    return path


def test_requests_that_do_not_fit(tmp_path: Path):
    model = model_folder(tmp_path / "model")
    (tmp_path / "d.jsonl").write_text(GOOD)

    def ask(**options: Any) -> EvaluateRequest:
        given = {"model": str(model), "dataset": "wikidata_qa", "data_file": tmp_path / "d.jsonl"}
        return EvaluateRequest(**{**given, "split": "all", **options})

    for match, request in {
        "Unknown protocol 'papr'. Did you mean 'paper'": ask(protocol="papr"),
        "--batch-tokens must be at least 1, got 0": ask(batch_tokens=0),
        "no model 'nothing'": ask(model="nothing"),
        "--dtype must be one of": ask(dtype="int3"),
        "--compressed must be a folder that tensorllm wrote": ask(compressed=tmp_path / "none"),
        "has no tensorllm.json": ask(compressed=model),
        "cannot import the plugin 'no_such_module'": ask(plugins=["no_such_module"]),
        "--plugin takes a module's name such as mine, .*got 'here/mine.py'": ask(
            plugins=["here/mine.py"]
        ),
    }.items():
        with pytest.raises(UserError, match=match) as caught:
            evaluate(request)
        assert "\n" not in str(caught.value)


def test_compressed_weights_of_another_model(tmp_path: Path):
    import tensorllm as tl
    from tensorllm.compressors import SharedTucker4D

    model = world.model("gptj")
    folder = model_folder(tmp_path / "model")
    other = model_folder(tmp_path / "other")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    tl.compress(model, SharedTucker4D(ranks=(4, 2, 1)))
    tl.save(model, tmp_path / "small")
    (tmp_path / "d.jsonl").write_text(GOOD)
    with pytest.raises(UserError, match=r"small was made from .*model', not from .*other"):
        evaluate(
            EvaluateRequest(
                model=str(other),
                dataset="wikidata_qa",
                data_file=tmp_path / "d.jsonl",
                compressed=tmp_path / "small",
            )
        )

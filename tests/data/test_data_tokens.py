"""Special tokens behind a text, ids beyond the embeddings, tokenizers without pad and eos."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tensorllm.commands.generate import generate
from tensorllm.data.example import Example
from tensorllm.data.tokens import as_messages, check_ids, closing_tokens, open_ended
from tensorllm.errors import UserError
from tensorllm.evaluation.scorer import make_scorer
from tensorllm.requests.others import GenerateRequest

WORDS = {"<s>": 0, "</s>": 1, "<x>": 2, "a": 3, "b": 4, "c": 5, "[UNK]": 6}


def tokenizer(template: str | None, words: dict[str, int] | None = None, **special: str) -> Any:
    made = Tokenizer(WordLevel(words or WORDS, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    if template is not None:
        made.post_processor = TemplateProcessing(
            single=template, special_tokens=[(n, i) for n, i in WORDS.items() if n[0] == "<"]
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=32, **special)


@pytest.mark.parametrize(
    ("template", "want", "closing"),
    [
        (None, [3, 4], []),
        ("<s> $A", [0, 3, 4], []),
        ("$A </s>", [3, 4], [1]),
        ("<s> $A </s> <x>", [0, 3, 4], [1, 2]),
    ],
)
def test_what_stands_behind_a_text_is_left_off(
    template: str | None, want: list[int], closing: list[int]
) -> None:
    made = tokenizer(template)
    assert closing_tokens(made) == closing
    assert open_ended(made, ["a b", "a b"]) == [want, want]
    assert open_ended(made, []) == []


def test_scores_do_not_depend_on_a_closing_token() -> None:
    model = tiny_model("llama")
    examples = [Example("a b a", "c", (), 0), Example("b", "a", (), 1)]

    def rows(made: Any) -> list[Any]:
        scorer = make_scorer(model, made, max_new_tokens=3)
        return [row for batch in scorer.plan(examples) for row in scorer.score(batch)]

    assert rows(tokenizer("<s> $A </s>")) == rows(tokenizer("<s> $A"))


def test_tokens_beyond_the_embeddings_are_told(tmp_path: Path) -> None:
    check_ids([[0, 6], []], 7, "it")
    with pytest.raises(UserError, match=r"it has token 7, .* embeddings of 0\.\.6"):
        check_ids([[7]], 7, "it")
    model = tiny_model("llama")
    made = tokenizer(None, {**WORDS, "new": 101})
    scorer = make_scorer(model, made, max_new_tokens=2)
    with pytest.raises(UserError, match=r"token 101, but the model has embeddings of 0\.\.100"):
        scorer.plan([Example("a new", "b", (), 0)])
    model.save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a prompt has token 101"):
        generate(GenerateRequest(model=str(tmp_path), prompts=("a new",)))


def test_several_prompts_need_no_pad_and_no_eos(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tokenizer(None).save_pretrained(tmp_path)

    def written(*prompts: str) -> list[str]:
        return generate(GenerateRequest(model=str(tmp_path), prompts=prompts, max_new_tokens=4))

    assert written("a b c", "b") == [*written("a b c"), *written("b")]


def test_a_model_without_a_head_scores_nothing() -> None:
    with pytest.raises(UserError, match="LlamaModel has no head"):
        make_scorer(tiny_model("llama", headless=True), tokenizer(None))


def test_half_a_character_is_no_text() -> None:
    with pytest.raises(UserError, match="half of a character"):
        open_ended(tokenizer(None), ["a", "b \ud83d"])


@pytest.mark.parametrize("template", ["{% for x in %}", "{{ raise_exception('no') }}"])
def test_a_chat_template_that_fails_is_told(template: str) -> None:
    made = tokenizer(None, chat_template=template)
    with pytest.raises(UserError, match=r"^the chat template of it fails: [^\n]+$"):
        as_messages(made, ["a"], "it")


def writing(folder: Path, **settings: Any) -> list[str]:
    """What a model writes whose generation_config.json says this."""
    tiny_model("llama").save_pretrained(folder)
    tokenizer(None).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return generate(GenerateRequest(model=str(folder), prompts=("a b",), max_new_tokens=4))


def test_what_generate_returns_does_not_hang_on_the_model_s_settings(tmp_path: Path) -> None:
    want = writing(tmp_path)
    assert writing(tmp_path, return_dict_in_generate=True, output_scores=True) == want


@pytest.mark.parametrize("settings", [{"bad_words_ids": []}, {"repetition_penalty": -1.0}])
def test_settings_that_generate_refuses_are_told(settings: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"in its generation_config.json: [^\n]+$"):
        writing(tmp_path, **settings)


@pytest.mark.parametrize("temperature", [float("nan"), float("inf"), -1.0, 1e-40])
def test_temperatures(temperature: float, tmp_path: Path) -> None:
    asked = GenerateRequest(model=str(tmp_path), prompts=("a",), temperature=temperature)
    with pytest.raises(UserError, match="temperature must be 0, or finite and 1e-06 or more, got"):
        generate(asked)

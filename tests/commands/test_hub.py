"""A hub that cannot be reached: one line at once, and no word from the client's retries."""

import huggingface_hub
import pytest
from cli_runs import piped

from tensorllm.checkpoint import source
from tensorllm.errors import UserError, first_line
from tensorllm.hub import reason

# Nothing listens there, on any machine.
NOWHERE = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}


@pytest.mark.parametrize(
    ("arguments", "way_on"),
    [
        (["compress", "--model", "gptj", "--mode", "hybrid"], "--model demo"),
        (["evaluate", "--model", "demo", "--dataset", "fever"], "--data-file"),
    ],
)
def test_an_unreachable_hub_is_one_line(arguments, way_on, tmp_path):
    done = piped(*arguments, **NOWHERE, HF_HOME=str(tmp_path))
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: cannot")
    assert way_on in done.stderr


@pytest.mark.parametrize("answers", [True, False])
def test_a_part_of_a_model_in_the_cache_is_completed(answers, tmp_path, monkeypatch):
    """Other programs fetch what they need: a config, a tokenizer, the weights alone."""

    def snapshot_download(repo, *, local_files_only=False, **settings):
        if not local_files_only:
            (tmp_path / "model.safetensors").touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(source, "why_not", lambda *of: None if answers else "no answer")
    (tmp_path / "tokenizer.json").touch()
    if not answers:
        with pytest.raises(UserError, match=r"cannot get owner/name from the hub \(no answer\)"):
            source.resolve("owner/name")
        return
    assert (source.resolve("owner/name").folder / "model.safetensors").exists()
    monkeypatch.setattr(source, "why_not", lambda *of: pytest.fail("asked for a whole model"))
    assert source.resolve("owner/name").folder == tmp_path


def test_weights_in_the_cache_serve_where_the_hub_does_not(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").touch()  # and no tokenizer, which not all that we do needs
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *of, **settings: tmp_path)
    monkeypatch.setattr(source, "why_not", lambda *of: "no answer")
    assert source.resolve("owner/name").folder == tmp_path


def test_what_others_say_is_cut_between_words():
    said = reason(RuntimeError("seventeen letters " * 50 + "\nand more"))
    assert len(said) <= 204
    assert set(said.removesuffix(" ...").split()) == {"seventeen", "letters"}
    assert first_line(RuntimeError("x" * 500)) == "x" * 400 + " ..."
    assert first_line(ValueError("wrong:\n    field x\nmore")) == "wrong: field x"
    assert first_line(KeyError("x")) == "KeyError: 'x'"
    assert first_line(RuntimeError("short")) == "short"

"""`tensorllm serve`: a factored folder behind transformers' server, and what it refuses."""

import json
import socket
import subprocess
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked
import pytest
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import tensorllm as tl
from tensorllm.checkpoint.source import resolve
from tensorllm.commands.generate import generate
from tensorllm.commands.serve import serve
from tensorllm.errors import UserError
from tensorllm.requests.others import GenerateRequest, ServeRequest
from tensorllm_cli.app import main

PROMPT = "Ada"
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, factored, with a chat template of one message."""
    source = resolve("demo").folder
    model = AutoModelForCausalLM.from_pretrained(source)
    tl.compress(model, tl.Hybrid(ranks=(96, 24, 3), rho=0.1), layers=[3])
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = TEMPLATE
    out = tmp_path_factory.mktemp("served") / "out"
    tl.save(model, out, tokenizer=tokenizer)
    return out


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def ask(url: str, **body: Any) -> Any:
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["choices"][0]


def wait_for(url: str, server: Any) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert server.poll() is None, server.stderr.read()
            time.sleep(0.2)
    raise AssertionError("the server does not answer")


@pytest.mark.slow
def test_a_factored_folder_answers_as_generate_writes(folder: Path) -> None:
    pytest.importorskip("fastapi", reason="transformers' server (tensorllm[serve])")
    pytest.importorskip("openai", reason="transformers' server (tensorllm[serve])")
    port = free_port()
    words = ["serve", "--model", str(folder), "--port", str(port), "--json", "--dtype", "fp32"]
    with forked.Popen(
        ["-m", "tensorllm", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as server:
        try:
            wait_for(f"http://localhost:{port}/health", server)
            url = f"http://localhost:{port}/v1"
            settings = {"model": str(folder), "max_tokens": 4, "temperature": 0}
            went_on = ask(f"{url}/completions", prompt=PROMPT, **settings)["text"]
            messages = [{"role": "user", "content": PROMPT}]
            answer = ask(f"{url}/chat/completions", messages=messages, **settings)["message"]
        finally:
            server.terminate()
            said = server.communicate(timeout=60)[0]
    assert json.loads(said) == {"url": url, "model": str(folder), "chat": True}
    asked = GenerateRequest(model=str(folder), prompts=(PROMPT,), max_new_tokens=4, dtype="fp32")
    assert f"{PROMPT} {went_on}" == generate(asked)[0]
    assert answer["content"] == generate(replace(asked, chat=True))[0]


CHAT, COMPLETION = "chat/completions", "completions"
HELLO = [{"role": "user", "content": PROMPT}]


def statuses(
    folder: Path, asked: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> list[tuple[int, str]]:
    """How the server of a folder answers each request: the status, and what it says is wrong."""
    pytest.importorskip("fastapi", reason="transformers' server (tensorllm[serve])")
    from fastapi.testclient import TestClient

    found = []

    def run(server: Any) -> None:
        with TestClient(server.config.app, raise_server_exceptions=False) as client:
            for path, body in asked:
                answer = client.post(f"/v1/{path}", json={"max_tokens": 1, **body})
                found.append((answer.status_code, answer.text))

    monkeypatch.setattr("uvicorn.Server.run", run)
    serve(ServeRequest(model=str(folder), port=free_port()), lambda address: None)
    return found


def test_requests_with_wrong_settings_are_answered_with_what_is_wrong(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong: list[tuple[str, dict[str, Any]]] = [
        (CHAT, {"temperature": "hot"}),
        (COMPLETION, {"temperature": -1}),
        (COMPLETION, {"max_tokens": "x"}),
        (CHAT, {"max_tokens": 0}),
        (CHAT, {"max_completion_tokens": 1.5}),
        (COMPLETION, {"top_p": 7}),
        (COMPLETION, {"seed": "many"}),
        (COMPLETION, {"frequency_penalty": [1]}),
        (COMPLETION, {"stop": 3}),
        (COMPLETION, {"stream": "perhaps"}),
        (COMPLETION, {"generation_config": "{"}),
        (CHAT, {"logit_bias": {"a": 1}}),
        (CHAT, {"messages": "hello"}),
        (CHAT, {"messages": []}),
        (CHAT, {"messages": [{"content": "hello"}]}),
        (CHAT, {"messages": [{"role": "user", "content": 3}]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}),
        (CHAT, {"stop": ["a", ""]}),
    ]
    given = {CHAT: {"messages": HELLO}, COMPLETION: {"prompt": PROMPT}}
    right = [(CHAT, {"seed": 1}), (COMPLETION, {"temperature": 1, "top_p": None})]
    right += [(CHAT, {"chat_template_kwargs": None}), (COMPLETION, {"top_p": 0})]
    asked = [(path, {**given[path], **body}) for path, body in (*wrong, *right)]
    answers = statuses(folder, [*asked, (CHAT, {})], monkeypatch)
    for (_, body), (status, detail) in zip(wrong, answers, strict=False):
        assert status == 422, (body, status, detail)
        assert detail.startswith('{"detail":"' + next(iter(body))), detail
    assert [status for status, _ in answers[len(wrong) :]] == [200] * 4 + [422], answers


def test_requests_that_this_model_cannot_meet_are_answered_400(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impossible: list[tuple[str, dict[str, Any], str]] = [
        (COMPLETION, {"prompt": ""}, "the prompt must have 1..31 tokens, got 0"),
        (COMPLETION, {"prompt": "Ada " * 99, "stream": True}, "1..31 tokens, got 99"),
        (CHAT, {"messages": [{"role": "user", "content": "Ada " * 99}]}, "1..31 tokens, got 99"),
        (CHAT, {"messages": [{"role": "user"}]}, "1..31 tokens, got 0"),
        (CHAT, {"messages": HELLO, "logit_bias": {"5000": 1}}, "tokens are 0..379, got 5000"),
        (CHAT, {"messages": HELLO, "generation_config": '{"max_new_tokens": "x"}'}, "cannot be"),
        (CHAT, {"messages": HELLO, "chat_template_kwargs": {"tokenize": False}}, "tokenize"),
        (CHAT, {"messages": HELLO, "chat_template_kwargs": {"chat_template": "{{"}}, "template"),
    ]
    answers = statuses(folder, [(path, body) for path, body, _ in impossible], monkeypatch)
    for (_, body, said), (status, detail) in zip(impossible, answers, strict=True):
        assert (status, said in detail) == (400, True), (body, status, detail)


def test_requests_that_clients_send_are_answered(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = {"role": "assistant", "content": PROMPT, "tool_calls": None, "refusal": None}
    asked: list[tuple[str, dict[str, Any]]] = [
        (CHAT, {"messages": [*HELLO, answered, *HELLO]}),
        (CHAT, {"messages": [*HELLO, answered | {"tool_calls": []}, *HELLO]}),
        (CHAT, {"messages": HELLO, "logit_bias": {"5": -100}}),
        (CHAT, {"messages": HELLO, "logit_bias": {}, "stop": []}),
        (CHAT, {"messages": HELLO, "max_tokens": 10**9, "logit_bias": {"1": -100, "5": 100}}),
    ]
    *answers, (_, longest) = statuses(folder, asked, monkeypatch)
    assert [status for status, _ in answers] == [200] * 4, answers
    answer = json.loads(longest)  # of a model that reads 32 tokens
    assert answer["usage"]["completion_tokens"] == 31
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_text_ends_at_a_stop_string_whatever_the_tokenizer(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer is of whole words, and the prompt holds the stop string."""
    word = AutoTokenizer.from_pretrained(folder).decode([5])
    body = {"prompt": word, "generation_config": '{"sequence_bias": [[[5], 100.0]]}'}
    asked: list[tuple[str, dict[str, Any]]] = [
        (COMPLETION, body | {"max_tokens": 6, "stop": stop}) for stop in (None, word, [f"{word} "])
    ]
    answers = statuses(folder, asked, monkeypatch)
    assert [status for status, _ in answers] == [200] * 3, answers
    assert [json.loads(text)["choices"][0]["text"] for _, text in answers] == [
        " ".join([word] * n) for n in (6, 1, 2)
    ]


def test_a_chat_without_a_template_is_refused_and_a_completion_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = [
        (CHAT, {"messages": HELLO}),
        (COMPLETION, {"prompt": PROMPT}),
    ]
    (status, detail), (other, _) = statuses(resolve("demo").folder, asked, monkeypatch)
    assert (status, other) == (400, 200)
    assert "no chat template" in detail


def test_a_pipeline_opens_a_folder_by_name_and_uses_its_chat_template(folder: Path) -> None:
    writer = pipeline("text-generation", model=str(folder))
    settings = {"max_new_tokens": 4, "do_sample": False}
    message = [{"role": "user", "content": PROMPT}]
    written = writer(message, **settings)[0]["generated_text"][-1]["content"]
    asked = GenerateRequest(model=str(folder), prompts=(PROMPT,), max_new_tokens=4, chat=True)
    assert [written.strip()] == generate(asked)


@pytest.mark.parametrize("cache", ["latent", "dense"])
def test_the_server_opens_the_folder_with_the_cache_that_is_asked_for(
    folder: Path, cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("uvicorn", reason="transformers' server (tensorllm[serve])")
    latents = []

    def opens(folder: str, **_: Any) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder)
        latents.append(model.transformer.h[3].attn.latent_values)

    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: True)
    monkeypatch.setattr("transformers.cli.serve.Serve", opens)
    serve(ServeRequest(model=str(folder), port=free_port(), cache=cache), lambda address: None)
    opens(str(folder))  # afterwards the process is as it was
    assert latents == [cache == "latent", True]


def test_the_address_is_told_in_one_line_before_the_model_is_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: True)
    monkeypatch.setattr("transformers.cli.serve.Serve", lambda *_, **__: None)
    port = free_port()
    with pytest.raises(SystemExit, match="0"):
        main(["serve", "--model", str(folder), "--port", str(port)])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"http://localhost:{port}/v1 will answer at /chat/completions")
    assert line.endswith(f"the model {folder}, once it is loaded")


def refused(request: ServeRequest, match: str) -> None:
    with pytest.raises(UserError, match=match):
        serve(request, lambda address: pytest.fail(f"announced {address}"))


def test_what_cannot_be_served_is_refused_before_it_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: True)
    asked = ServeRequest(model=str(folder), port=free_port())
    refused(replace(asked, cache="wide"), "--cache must be")  # type: ignore[arg-type]
    for port in (0, 2**16, -1):
        refused(replace(asked, port=port), f"--port must be in 1..65535, got {port}")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        refused(replace(asked, port=port, host="127.0.0.1"), f"cannot listen at 127.0.0.1:{port}")
    refused(replace(asked, host="no such host"), "choose another --port or --host")
    masked = tmp_path / "masked"
    tiny_model("bert").save_pretrained(masked)
    refused(replace(asked, model=str(masked)), "fills masks")
    marked = tmp_path / "at@home"
    folder.rename(marked)
    try:
        refused(replace(asked, model=str(marked)), "a name without it")
    finally:
        marked.rename(folder)
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    refused(asked, r"pip install 'tensorllm\[serve\]'")

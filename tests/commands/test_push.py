"""`tensorllm push` against a stand-in of the hub's HTTP API on loopback."""

import base64
import json
import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

import tensorllm as tl
from tensorllm.commands.export import run as export
from tensorllm.commands.push import push
from tensorllm.compression.export import quantise_folder
from tensorllm.errors import UserError
from tensorllm.requests.others import ExportRequest, PushRequest

TOKEN = "hf_" + "a" * 34
REPO = "someone/small"


class Hub(BaseHTTPRequestHandler):
    """Makes repositories and takes commits of whole files; says no to any other token."""

    server: Any

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(self.path)
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self._say({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            self._say({"name": REPO, "url": f"{self.server.url}/{REPO}", "id": REPO})
        elif self.path == f"/api/models/{REPO}/preupload/main":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self._say({"files": files})
        elif self.path == f"/api/models/{REPO}/commit/main":
            for line in map(json.loads, body.decode().splitlines()):
                self._take(line["key"], line["value"])
            url = f"{self.server.url}/{REPO}/commit/{'c' * 40}"
            self._say({"commitOid": "c" * 40, "commitUrl": url, "success": True})
        else:
            self._say({}, 200)  # such as /api/validate-yaml

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self._say({"error": "Repository not found"}, 404)

    def _take(self, key: str, value: dict[str, Any]) -> None:
        if key == "header":
            self.server.summaries.append(value["summary"])
        else:
            assert (key, value["encoding"]) == ("file", "base64")
            path = self.server.folder / value["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(value["content"]))

    def _say(self, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.asked, server.made, server.summaries = [], [], []
    server.folder = tmp_path / "on the hub"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def factored(out: Path) -> None:
    model = tiny_model("llama")
    tl.compress(model, tl.LaserSVD(rho=0.5, matrices=("in",)))
    tl.save(model, out)


def dense(out: Path) -> None:
    model = tiny_model("llama")
    tl.compress(model, tl.LaserSVD(rho=0.5, matrices=("in",)))
    tl.save(model, out, format="dense")


def quantised(out: Path) -> None:
    model = tiny_model("llama", hidden_size=64, intermediate_size=256)
    tl.compress(model, tl.LaserSVD(rho=0.5, matrices=("in",)))
    tl.save(model, out.parent / "wide")
    quantise_folder(out.parent / "wide", out, "int8")


def narrow_of_an_ordinary_one(out: Path) -> None:
    """Of a checkpoint that tensorllm never saw, with a card of its own."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data[:, 40:] = 0  # 56 channels, of which 40 are read
    source = out.parent / "original"
    model.save_pretrained(source)
    (source / "README.md").write_text("---\nbase_model: some/one\nlicense: mit\n---\n\nHello.\n")
    export(ExportRequest(folder=source, out=out, format="narrow"))


MADE = {f.__name__: f for f in (factored, dense, quantised, narrow_of_an_ordinary_one)}
NAMED = ("narrow_of_an_ordinary_one",)  # whose original has a card


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder with a licence; by default factored."""
    out = tmp_path / "out"
    MADE[getattr(request, "param", "factored")](out)
    (out / "LICENSE").write_text("Do as you like.\n")
    (out / ".hidden").write_text("mine\n")
    return out


def run(hub: Any, folder: Path, *more: str, token: str | None = TOKEN) -> Any:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HOME": str(folder.parent / "home")}
    return forked.run(
        ["-m", "tensorllm", "push", folder, REPO, *more],
        env=environment | ({"HF_TOKEN": token} if token else {}),
    )


@pytest.mark.slow
@pytest.mark.parametrize("folder", MADE, indirect=True)
def test_a_folder_arrives_whole_and_opens(
    hub: Any, folder: Path, request: pytest.FixtureRequest
) -> None:
    named = request.node.callspec.params["folder"] in NAMED
    done = run(hub, folder, "--private", "--message", "Ours", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "url": f"{hub.url}/{REPO}",
        "commit": "c" * 40,
        "card_lacks": [] if named else ["base_model", "license"],
    }
    assert [made["name"] for made in hub.made] == ["small"]
    assert hub.made[0].get("private") is True or hub.made[0].get("visibility") == "private"
    assert hub.summaries == ["Ours"]
    sent = {path.name: path.read_bytes() for path in hub.folder.iterdir()}
    assert sent == {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".hidden"}
    assert "LICENSE" in sent
    ids = torch.arange(3, 9)[None]
    got, want = (AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in (hub.folder, folder))
    assert torch.equal(got, want)


def test_a_narrow_export_of_an_ordinary_folder_says_what_it_is(tmp_path: Path) -> None:
    narrow_of_an_ordinary_one(tmp_path / "out")
    sizes = {n: tmp_path / n / "model.safetensors" for n in ("original", "out")}
    before, after = (sum(w.numel() for w in load_file(path).values()) for path in sizes.values())
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["ffn_width"] == {"before": 56, "after": 40}
    assert (report["totals"]["parameters_before"], report["totals"]["parameters_after"]) == (
        before,
        after,
    )
    assert report["ratios"]["whole_model"] == pytest.approx(before / after)
    assert report["ratios"]["bytes_on_disk"] == pytest.approx(
        sizes["original"].stat().st_size / sizes["out"].stat().st_size
    )
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.base_model, card.data.license) == ("some/one", "mit")
    assert card.data.library_name == "transformers"
    assert "FFNs of 40 channels in place of 56" in card.text
    assert "tensorllm export MODEL FOLDER --format narrow" in card.text
    assert card.text.rstrip().endswith("Hello.")
    tl.load(tmp_path / "out", verify=True)


@pytest.mark.slow
def test_a_token_that_the_hub_refuses_is_one_line(hub: Any, folder: Path) -> None:
    done = run(hub, folder, token="hf_" + "b" * 34)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: the hub did not take {REPO}: ")
    assert hub.made == []


@pytest.mark.parametrize(
    ("lost", "match"),
    [
        ("tensorllm.json", "has no tensorllm.json and no graph"),
        ("config.json", "no config.json"),
        ("factored.safetensors", "lacks factored.safetensors"),
    ],
)
def test_a_folder_that_nobody_could_open_is_refused(folder: Path, lost: str, match: str) -> None:
    for cut in (lambda path: path.write_bytes(path.read_bytes()[:20]), Path.unlink):
        cut(folder / lost)
        with pytest.raises(UserError, match=f"{match}|{lost} is "):
            push(PushRequest(folder=folder, repo=REPO))


def test_a_hub_that_cannot_be_reached_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)
    nowhere = partial(HfApi, endpoint="http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.HfApi", nowhere)
    with pytest.raises(UserError, match=r"cannot push to http://127.0.0.1:9 \(.*; push again"):
        push(PushRequest(folder=folder, repo=REPO))


def test_what_cannot_be_pushed_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(match: str, place: Path = folder, repo: str = REPO) -> None:
        with pytest.raises(UserError, match=match):
            push(PushRequest(folder=place, repo=repo))

    refused("HF_HUB_OFFLINE is set: unset it")
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    refused("hf auth login, or set HF_TOKEN")
    refused("no name on the hub", repo="a/b/c")
    tiny_model("llama").save_pretrained(tmp_path / "plain")
    refused(
        "no tensorllm.json and no graph: push takes a folder that tensorllm wrote",
        place=tmp_path / "plain",
    )
    weights = folder / "factored.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    refused("factored.safetensors")

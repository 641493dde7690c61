"""docs/add_a_compressor.md holds: its compressor, from outside, works by --plugin and installed."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from cli_runs import without_progress
from repository import ROOT
from safetensors.torch import load_file
from tiny_models import tiny_model

from tensorllm.data.demo import MODEL_DIR, questions

PAGE = (ROOT / "docs" / "add_a_compressor.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder on the path with the page's file in it."""
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "mean_head.py").write_text("\n\n".join(blocks("python")))
    return folder


def install(packages: Path) -> None:
    """What pip leaves of a package with the page's entry point."""
    info = packages / "mean_head-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mean-head\nVersion: 1.0\n")
    group, entry = blocks("toml")[0].strip().split("\n")
    name, target = re.fullmatch(r'([\w-]+) = "(\w+)"', entry).groups()
    header = re.fullmatch(r'\[project\.entry-points\."([\w.]+)"\]', group)[1]
    (info / "entry_points.txt").write_text(f"[{header}]\n{name} = {target}\n")


def tensorllm(packages: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    return forked.run(
        ["-m", "tensorllm", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(packages), str(ROOT)])},
    )


def mean_and_residual(w_ID: torch.Tensor, width: int, rank: int) -> torch.Tensor:
    """The page's method, once more, for one stored (heads x K, D) matrix."""
    heads = w_ID.double().split(width)
    mean = sum(heads) / len(heads)
    rest = torch.cat([head - mean for head in heads], dim=0).T.reshape(w_ID.shape[1], -1)
    u, s, v = torch.linalg.svd(rest, full_matrices=False)
    low = ((u[:, :rank] * s[:rank]) @ v[:rank]).T
    return torch.cat([mean + part for part in low.split(width)])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["--plugin", "installed"])
def test_the_pages_compressor_runs(way: str, packages: Path, model: Path, tmp_path: Path) -> None:
    plugin = ("--plugin", "mean_head")
    if way == "installed":
        install(packages)
        plugin = ()
    out = tmp_path / "out"
    done = tensorllm(
        packages, "compress", "--model", model, "--mode", "mean-head", "--rank", 5, *plugin,
        "--layers", 1, "--out", out, "--json",
    )  # fmt: skip
    assert (done.returncode, without_progress(done.stderr)) == (0, "")
    report = json.loads(done.stdout)
    assert report == json.loads((out / "report.json").read_text())
    assert (report["mode"], report["settings"]) == ("mean-head", {"rank": 5})
    assert [site["kind"] for site in report["sites"]] == ["mean-and-residual"] * 4
    assert report["sites"][0]["parameters_after"] == 32 * 8 + 5 * (32 + 8 * 4)
    before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    for role in "qkv":
        name = f"model.layers.1.self_attn.{role}_proj.weight"
        want = mean_and_residual(before[name], 8, 5)
        torch.testing.assert_close(after[name].double(), want, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(before[name], after[name], atol=1e-3)


@pytest.mark.slow
def test_the_pages_fitted_compressor_is_svd_llm(packages: Path, tmp_path: Path) -> None:
    """Whose whitening it is, and it meets a target in numbers and in bytes, and is searched."""
    text = tmp_path / "text.txt"
    lines = (" ".join(reversed(q.prompt.split())) for q in questions()[:800])
    text.write_text("\n".join(lines))
    fitted = ("--calibration", text, "--sequences", 16, "--allow-overlap")
    ours = ("--plugin", "mean_head", "--model", MODEL_DIR, "--mode", "whitened-svd")
    shipped = ("--model", MODEL_DIR, "--mode", "svd-llm", "--matrices", "q,k,v,o")
    made = []
    for name, which in (("ours", ours), ("shipped", shipped)):
        out = tmp_path / name
        done = tensorllm(packages, "compress", *which, *fitted, "--rank", 9, "--out", out)
        assert done.returncode == 0, done.stderr
        made.append(load_file(out / "model.safetensors"))
    for name, w in made[0].items():
        torch.testing.assert_close(w, made[1][name], rtol=1e-3, atol=1e-4)
    for target, most in (("--target-ratio", 1.5), ("--target-bytes", 1_700_000)):
        done = tensorllm(packages, "compress", *ours, *fitted, target, most, "--json")
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["settings"][target[2:].replace("-", "_")] == most
        sizes = [(s["parameters_after"], s["parameters_before"]) for s in report["sites"]]
        assert all(after <= before for after, before in sizes)
    text.write_text(f"{questions()[0].prompt}\n" * 400)  # says nothing of most directions
    done = tensorllm(packages, "compress", *ours, *fitted, "--target-ratio", 1.5)
    assert done.returncode == 0, done.stderr
    few = ("--trials", 2, "--limit", 20, "--dataset", "demo", "--layers", 1, "--json")
    done = tensorllm(packages, "search-ranks", *ours, *fitted[:2], "--allow-overlap", *few)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["winner"]["mode"] == "whitened-svd"


@pytest.mark.slow
def test_a_broken_installed_plugin_is_one_line(packages: Path, model: Path) -> None:
    install(packages)
    (packages / "mean_head.py").write_text("import something_that_is_not_there")
    done = tensorllm(packages, "compress", "--model", model, "--mode", "laser", "--rho", "0.5")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "'mean_head'" in done.stderr
    assert "something_that_is_not_there" in done.stderr

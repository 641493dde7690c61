"""`tensorllm report`: what the page says is what the runs say, and nothing in them is trusted."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from report_runs import run
from safetensors.torch import load_file
from tiny_models import tiny_model

from tensorllm.commands.report import report
from tensorllm.compression.descriptions import picture_of
from tensorllm.compression.details import details_of, norms_of_heads
from tensorllm.compressors import LaserSVD, SharedTucker4D, Site
from tensorllm.errors import UserError
from tensorllm.evaluation.results import PREDICTIONS, RESULTS, read_predictions, write_predictions
from tensorllm.reporting.page.runs import read_run
from tensorllm.reporting.page.section_weights import decompositions
from tensorllm.tensors.factors import FACTORS
from tensorllm.tensors.stacking import ATTENTION, Geometry
from tensorllm_cli.app import main

GEOMETRY = Geometry(D=12, H=4, G=2, K=6, F=20, gated=True)


class Seen(HTMLParser):
    """Tags, their attributes and the visible text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "report.html"
    made = report(list(runs.values()), out)
    assert made.plots
    assert {path.suffix for path in made.plots} == {".png", ".svg"}
    assert all(
        path.parent == out.with_name("report_plots") and path.exists() for path in made.plots
    )
    return out.read_text()


def test_numbers_are_those_of_the_runs(runs: dict[str, Path], page: str) -> None:
    text = " ".join(Seen(page).text.split())
    compressed = json.loads((runs["compressed"] / "report.json").read_text())
    for site in compressed["sites"]:
        assert site["name"] in text
        assert f"{site['relative_error']:.4f}" in text
    results = json.loads((runs["evaluated"] / RESULTS).read_text())
    for metrics in (results["metrics"], results["before"]["metrics"]):
        assert f"{metrics['accuracy']:.2f}" in text
        assert f"{metrics['loss']:.4f}" in text
    low, high = results["intervals"]["loss"]
    assert f"{low:.4f} to {high:.4f}" in text
    comparison = results["comparison"]
    assert f"{comparison['wrong_to_right']} answers went from wrong to right" in text
    found = json.loads((runs["searched"] / RESULTS).read_text())
    assert f"{found['winner']['test']['accuracy']:.1f} %" in text
    for name in ("protocol", "hardware", "versions", "command", "seed", "dtype"):
        assert name in text


def test_page_needs_nothing_else(page: str) -> None:
    for tag, attributes in Seen(page).tags:
        assert tag not in {"script", "iframe", "object", "embed", "img"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in {"src", "href", "xlink:href"}:
                assert str(value).startswith(("#", "data:")), (tag, name, value)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert "default-src 'none'" in page


def test_ids_are_unique_and_links_lead_somewhere(page: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for target in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page):
        assert "".join(target) in ids


def test_text_of_others_is_text(runs: dict[str, Path], tmp_path: Path) -> None:
    """Prompts, answers and names with markup in them do nothing and are shown as they are."""
    evil = "<script>alert('&')</script>"
    folder = tmp_path / "evil"
    shutil.copytree(runs["evaluated"], folder)
    for name in (PREDICTIONS, "predictions-before.parquet"):
        rows = [replace(row, prompt=evil, answer=evil) for row in read_predictions(folder / name)]
        write_predictions(folder / name, rows)
    results = json.loads((folder / RESULTS).read_text())
    results |= {"model": f"a$b$ {evil}", "dataset": f"{evil} $x_{{$", "command": evil}
    (folder / RESULTS).write_text(json.dumps(results))
    report([folder], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<script" not in text
    seen = Seen(text)
    assert seen.text.count(evil) > 10
    assert f"a$b$ {evil}" in seen.text


def test_several_models_are_side_by_side(runs: dict[str, Path], tmp_path: Path) -> None:
    """An evaluation joins the checkpoint it is of, though both were moved since."""
    laser = tmp_path / "laser"
    compress = ("compress", "--model", "demo", "--mode", "laser", "--limit", 20, "--out", laser)
    assert run(*compress) == 0
    moved = tmp_path / "moved"
    shutil.copytree(runs["evaluated"], moved)
    report([laser, moved, runs["compressed"]], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert text.count("<article") == 2
    assert "2 runs side by side" in text
    hybrid = text[text.index('id="run-2"') :]
    assert "Before and after" in hybrid
    assert "Every decomposition" in hybrid


def test_plots_do_not_depend_on_when_they_are_made(runs: dict[str, Path], tmp_path: Path) -> None:
    pages = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        report([runs["compressed"]], tmp_path / name / "page.html")
        pages.append((tmp_path / name / "page.html").read_bytes())
    assert pages[0] == pages[1]


NO_RUNS = {
    "nothing": (lambda at: at / "gone", "no such file or folder"),
    "an empty folder": (lambda at: at, "is no run"),
    "an ordinary model": (lambda at: _model(at / "model"), "is no run"),
    "another JSON": (lambda at: _written(at / "x.json", '{"a": 1}'), "is no run"),
    "not JSON": (lambda at: _written(at / "x.txt", "\0\1"), "is no run"),
    "a list": (lambda at: _written(at / "x.json", "[1]"), "is no run"),
}


@pytest.mark.parametrize("case", NO_RUNS)
def test_what_is_no_run_is_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = NO_RUNS[case]
    path = make(tmp_path)
    capsys.readouterr()  # what making it printed
    assert run("report", path, "--out", tmp_path / "page.html") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


def test_damaged_runs_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    for name, file, content in (
        ("evaluated", PREDICTIONS, "no table"),
        ("compressed", "report.json", '{"mode": "laser"}'),
        ("compressed", "details.json", "[{}]"),
        ("searched", "trials.parquet", "no table"),
    ):
        folder = tmp_path / f"{name}-{file}"
        shutil.copytree(runs[name], folder)
        (folder / file).write_text(content)
        with pytest.raises(UserError):
            report([folder], tmp_path / "page.html")
    report_ = json.loads((runs["compressed"] / "report.json").read_text())
    del report_["totals"]["parameters_after"]
    (tmp_path / "old.json").write_text(json.dumps(report_))
    with pytest.raises(UserError, match="another version"):
        report([tmp_path / "old.json"], tmp_path / "page.html")


def test_only_pages_of_ours_are_replaced(runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    out.write_text("<h1>mine</h1>")
    with pytest.raises(UserError, match="no page of tensorllm"):
        report([runs["compressed"]], out)
    assert out.read_text() == "<h1>mine</h1>"
    out.unlink()
    for _ in range(2):
        report([runs["compressed"]], out)
    with pytest.raises(UserError, match="is a folder"):
        report([runs["compressed"]], tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        report([runs["compressed"]], tmp_path / "a" / "page.html")


def test_json_files_are_runs_too(runs: dict[str, Path], tmp_path: Path) -> None:
    for name, file in (("compressed", "report.json"), ("evaluated", RESULTS)):
        assert type(read_run(runs[name] / file)) is type(read_run(runs[name]))
    made = report([runs["evaluated"] / RESULTS], tmp_path / "page.html")
    assert made.page.exists()


def tensors(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inner = [GEOMETRY.inner(role) for role in ATTENTION]
    return [torch.randn(rows, GEOMETRY.D, generator=generator) for rows in inner]


@pytest.mark.parametrize("ranks", [(7, 4, 5), None])
def test_spectra_and_errors_of_heads_are_what_numpy_finds(ranks: tuple[int, ...] | None) -> None:
    """Also where so little is lost that norms cannot tell it: their differences cancel."""
    import numpy as np

    site = Site((3,), ATTENTION, "heads")
    w_ID = tensors()
    w = site.stack(w_ID, GEOMETRY)
    ranks = ranks or (GEOMETRY.D - 1, *w.shape[1:3])
    factors = SharedTucker4D(ranks=ranks).decompose(w)
    norms = norms_of_heads(site, w, w_ID, factors, GEOMETRY)
    found = details_of(site, w, factors, norms)
    dense = site.unstack(factors.dense(), GEOMETRY)
    for matrix, old, new in zip(found["matrices"], w_ID, dense, strict=True):
        a, b = old.double().numpy(), new.double().numpy()
        want = np.linalg.norm(a - b) / np.linalg.norm(a)
        assert matrix["relative_error"] == pytest.approx(want, rel=1e-4)
        assert len(matrix["heads"]) == len(a) // GEOMETRY.K
        for head, error in enumerate(matrix["heads"]):
            rows = slice(head * GEOMETRY.K, (head + 1) * GEOMETRY.K)
            want = np.linalg.norm((a - b)[rows]) / np.linalg.norm(a[rows])
            assert error == pytest.approx(want, rel=1e-4)
    for spectrum, rank in zip(found["spectra"], ranks, strict=True):
        unfolded = np.moveaxis(w.double().numpy(), spectrum["mode"], 0)
        values = np.linalg.svd(unfolded.reshape(len(unfolded), -1), compute_uv=False)
        assert spectrum["rank"] == rank
        assert spectrum["size"] == len(unfolded)
        picked = values[np.array(spectrum["at"]) - 1] / np.linalg.norm(values)
        assert spectrum["values"] == pytest.approx(picked, rel=1e-3)


def test_large_modes_record_what_the_factors_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a size all singular values would cost more than the decomposition."""
    w = tensors()[0]
    monkeypatch.setattr("tensorllm.compression.details.WHOLE", 5 * w.numel())
    factors = LaserSVD(rank=4).decompose(w)
    site = Site((0,), ("q",), "matrix")
    found = details_of(site, w, factors, norms_of_heads(site, w, [w], factors, GEOMETRY))
    (spectrum,) = found["spectra"]
    want = torch.linalg.svdvals(w)[:4] / w.norm()
    assert spectrum["values"] == pytest.approx(want.tolist(), rel=1e-4)
    assert (spectrum["at"], spectrum["rank"]) == ([1, 2, 3, 4], 4)


def _model(folder: Path) -> Path:
    tiny_model("gptj").save_pretrained(folder)
    return folder


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_every_strategy_has_a_page(tmp_path: Path) -> None:
    """Whatever the factors are, there is something to show."""
    import tensorllm as tl

    strategies: dict[str, Any] = {
        "tucker": tl.SharedTucker4D(ranks=(6, 4, 3)),
        "each": tl.PerMatrixTucker3D(ranks=(6, 4), matrices=("q", "o")),
        "trawl": tl.Trawl(rank=3),
    }
    for name, strategy in strategies.items():
        model = tiny_model("gptj")
        tl.compress(model, strategy)
        tl.save(model, tmp_path / name)
        made = report([tmp_path / name], tmp_path / f"{name}.html")
        assert made.plots, name


def test_the_command_says_where_the_plots_lie(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["report", str(runs["compressed"]), "--out", str(tmp_path / "page.html")])
    assert ended.value.code == 0
    said = "".join(capsys.readouterr().out.split())
    assert f"plotsin{tmp_path / 'page_plots'}" in said


@pytest.mark.slow
def test_a_target_s_mode_is_called_what_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not by the list of edits that the target chose; sizes are of a layer, with their span."""
    out, runs = tmp_path / "out", tmp_path / "runs"
    asked = ("--mode", "svd", "--target-ratio", 2, "--limit", 8, "--format", "factored")
    assert run("compress", "--model", "demo", *asked, "--out", out) == 0
    assert capsys.readouterr().out.startswith("svd(target_ratio=2, ")
    assert run("evaluate", "--model", "demo", "--dataset", "demo", "--limit", 8,
               "--compressed", out, "--out", runs) == 0  # fmt: skip
    assert "demo (svd) on demo" in capsys.readouterr().out
    assert run("report", out, runs, "--out", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert "<title>demo, svd" in page
    card = (out / "README.md").read_text()
    assert "compressed: svd\n" in card
    assert "The method itself: <https://doi.org/10.1007/BF02288367>" in card  # not the list's
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1])
    again = ("compress", "--config", recipe, "--limit", 8, "--format", "factored")
    assert run(*again, "--out", tmp_path / "again") == 0
    made, remade = (
        load_file(folder / "factored.safetensors") for folder in (out, tmp_path / "again")
    )
    assert made.keys() == remade.keys()
    assert all(torch.equal(made[name], remade[name]) for name in made)
    ranks = [s["ranks"][0] for s in report_of(out)["sites"] if s["roles"] == ["q"]]
    assert f"{min(ranks)} to {max(ranks)} in {len(ranks)} layers" in page


def report_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "report.json").read_text()))


def test_the_same_matrices_in_other_kinds_have_drawings_of_their_own() -> None:
    """As where a recipe says another mode for each layer."""
    of = {"roles": ["out"], "shape": [24, 16], "stacking": "matrix"}
    sites = [
        of | {"kind": "low-rank", "ranks": [4], "layers": [0]},
        of | {"kind": "block-low-rank", "ranks": [2, 3], "layers": [1]},
        of | {"kind": "low-rank", "ranks": [6], "layers": [2]},
    ]
    shown = decompositions(sites)
    assert [drawing["name"] for drawing in shown][:1] == ["Matrix “out” of layer 0"]
    assert ("ranks", "4 to 6 in 2 layers") in shown[0]["rows"]


def test_kinds_beyond_the_largest_are_named_with_their_ranks() -> None:
    roles = ["q", "k", "v", "o", "in", "out"]
    sites = [
        {"kind": "low-rank", "stacking": "matrix", "roles": [role], "shape": [8 * n, 16],
         "ranks": [n + layer], "layers": [layer]}
        for n, role in enumerate(roles, 1) for layer in (0, 1)
    ]  # fmt: skip
    *drawn, others = decompositions(sites)
    assert [one["name"] for one in drawn] == [
        f"Matrix “{r}” of layer 0" for r in ["out", "in", "o", "v"]
    ]
    assert others["rows"] == [
        ("Matrix “k”, low-rank", "2 to 3 in 2 layers"),
        ("Matrix “q”, low-rank", "1 to 2 in 2 layers"),
    ]


@pytest.mark.parametrize("drawn", [[], ["v"]])
def test_kinds_without_a_drawing_are_named_with_their_ranks(drawn: list[str]) -> None:
    """Of every kind that there is, alone or beside what is drawn."""
    kinds = [kind for kind in FACTORS if picture_of(kind) is None]
    assert "pivoted-low-rank" in kinds
    sites = [
        {"kind": kind, "stacking": "matrix", "roles": ["out"], "shape": [24, 16],
         "ranks": [layer + 3], "layers": [layer]}
        for kind in kinds for layer in (0, 1)
    ]  # fmt: skip
    experts = ("experts.0.in", "experts.0.gate", "experts.1.in", "experts.1.gate")
    sites.append(
        {"kind": "tucker", "stacking": "experts", "roles": experts, "shape": [2, 24, 16, 2],
         "ranks": [1, 2, 3, 2], "layers": [0]}
    )  # fmt: skip
    beside = [
        {"kind": "low-rank", "stacking": "matrix", "roles": [role], "shape": [24, 16],
         "ranks": [3], "layers": [0]}
        for role in drawn
    ]  # fmt: skip
    *shown, others = decompositions([*sites, *beside])
    assert [one["name"] for one in shown] == [f"Matrix “{role}”" for role in drawn]
    assert others["name"] == ("Ranks of the others" if drawn else "Ranks")
    assert sorted(others["rows"]) == [
        ("Matrix “experts.in+experts.gate”, tucker", "1, 2, 3, 2 in 1 layer"),
        *((f"Matrix “out”, {kind}", "3 to 4 in 2 layers") for kind in sorted(kinds)),
    ]

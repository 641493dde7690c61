"""compress --calibration: from a text file to a smaller model, through the pipeline."""

import re
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import tensorllm as tl
from tensorllm.calibration import read_calibration
from tensorllm.calibration.store import Store
from tensorllm.checkpoint.loader import Loader
from tensorllm.commands.compress import run, run_sizes
from tensorllm.data.demo import MODEL_DIR, questions
from tensorllm.errors import UserError
from tensorllm.reporting.tables import result_tables, sizes_table
from tensorllm.requests.compress import CompressRequest


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "told.txt"
    file.write_text("\n".join(f"{q.prompt} {q.answer}" for q in questions()[:1500]))
    return file


def result_text(plan) -> str:
    console = Console(width=80, record=True, file=StringIO())
    console.print(result_tables(plan))
    return console.export_text()


def request(
    text: Path | None,
    mode: str = "activation-tucker",
    more: dict[str, Any] | None = None,
    **settings,
) -> CompressRequest:
    return CompressRequest(
        model=str(MODEL_DIR),
        mode=mode,
        settings=settings,
        calibration=text,
        **({"sequences": 32} | (more or {})),
    )


def test_the_target_ratio_is_met_and_the_text_named(text):
    report = run(request(text, target_ratio=1.5))
    assert 1.5 <= report.ratios()["all_attention"] < 1.52
    assert "told.txt" in str(report.settings)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"text": None, "target_ratio": 1.5}, "--sequences does nothing without --calibration"),
        ({"more": {"length": 10**6}, "target_ratio": 1.5}, r"--length must be 2\.\.32, the model"),
        ({"mode": "laser", "rho": 0.1}, "decomposes weights alone and takes no calibration"),
        ({"target_ratio": 1.5, "max_loss_increase": 0.1}, "give one of target_ratio"),
        ({"target_ratio": 1e9}, "target_ratio 1e.09 cannot be met: the best reachable is"),
    ],
)
def test_what_cannot_be_done_is_refused(text, asked, message):
    with pytest.raises(UserError, match=message):
        run(request(**({"text": text} | asked)))


@pytest.mark.parametrize("mode", ["svd-llm", "asvd", "aa-svd", "activation-tucker"])
@pytest.mark.parametrize("target", [{"target_ratio": 2.0}, {"target_bytes": 2_000_000}])
def test_a_target_of_a_mode_that_is_fitted_wants_a_text(mode, target):
    asked = request(None, mode, {"sequences": None}, **target)
    for dry in (False, True):
        with pytest.raises(UserError, match=f"mode '{mode}' is fitted to text: give --calibration"):
            run(replace(asked, dry_run=dry))


@pytest.mark.parametrize(
    ("mode", "ratio"),
    [("activation-tucker", 1.5), ("activation-hybrid", 2), ("svd-llm", 2), ("svd", 2)],
)
def test_a_dry_run_tells_sizes_without_the_fit(text, tmp_path, monkeypatch, mode, ratio):
    monkeypatch.setattr("tensorllm.compression.engine.fit", None)  # nothing is fitted
    asked = {"dry_run": True, "out": tmp_path / "out", "format": "factored"}
    plan = run(request(text, mode, asked, target_ratio=ratio))
    before = sum(site.parameters_before for site in plan.sites)
    assert plan.parameters_before - plan.parameters_after == before - int(before / ratio)
    assert plan.bytes_after < plan.bytes_before
    assert plan.seconds is None
    assert {site.parameters_after for site in plan.sites} == {None}
    assert "not known yet" in result_text(plan)
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("mode", ["activation-tucker", "activation-hybrid"])
def test_a_dry_run_knows_the_best_reachable_ratio(text, mode):
    with pytest.raises(UserError, match="best reachable is"):
        run(request(text, mode, {"dry_run": True}, target_ratio=1e9))


def test_a_dry_run_of_a_limit_of_the_loss_tells_no_sizes(text):
    plan = run(request(text, more={"dry_run": True}, max_loss_increase=0.1))
    assert plan.parameters_after is None


def test_a_dry_run_is_right_about_the_size(text):
    plan = run(request(text, more={"dry_run": True}, target_ratio=1.5))
    report = run(request(text, target_ratio=1.5))
    assert plan.parameters_after == pytest.approx(report.totals.parameters_after, rel=1e-3)


def test_what_is_refused_leaves_nothing(text, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Ada Moss\n")
    for file, ratio in ((short, 1.5), (text, 1e9)):
        with pytest.raises(UserError):
            run(request(file, target_ratio=ratio, more={"out": tmp_path / "out"}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["short.txt", "told.txt"]


@pytest.mark.parametrize(
    ("mode", "settings"),
    [("activation-tucker", {"refit_epochs": 0}), ("svd-llm", {}), ("aa-svd", {"matrices": ("q",)})],
)
def test_the_card_says_how_to_draw_the_same_text_again(text, tmp_path, mode, settings):
    out, more = tmp_path / "out", {"seed": 3}
    report = run(request(text, mode, more | {"out": out}, target_ratio=1.5, **settings))
    card = (out / "README.md").read_text()
    (command,) = re.findall(r"^tensorllm (compress --config .*)$", card, re.MULTILINE)
    assert " --calibration FILE --sequences 32 --seed 3 " in command
    facts = report.settings["calibration"]
    assert f"FILE was `told.txt`: 32 sequences of {facts['tokens']:,} tokens" in card
    assert facts["sha256"] in card
    assert "{'" not in card
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1])
    again = {"calibration": text, "sequences": 32, "seed": 3, "out": tmp_path / "again"}
    run(CompressRequest(config=recipe, **again))
    weights = [folder / "model.safetensors" for folder in (out, again["out"])]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_sequences_of_a_length_that_is_asked_for(text, tmp_path):
    """Shorter ones are of more documents; the card says how to draw them again."""
    out = tmp_path / "out"
    fields = {"out": out, "sequences": 96, "length": 12}
    report = run(replace(request(text, target_ratio=1.5), **fields))
    drawn = read_calibration(text, Loader(MODEL_DIR).tokenizer(), sequences=96, length=12)
    assert max(map(len, drawn.sequences)) == 12
    facts = report.settings["calibration"]
    assert (facts["sha256"], facts["tokens"]) == (drawn.sha256, drawn.tokens)
    assert facts["length"] == 12
    assert "--sequences 96 --seed 0 --length 12" in (out / "README.md").read_text()


def test_text_that_would_be_scored_is_refused_unless_allowed(text, tmp_path):
    same = {"evaluate": "text", "data_file": text, "limit": 2}
    with pytest.raises(UserError, match=r"calibration text \(told\.txt\)"):
        run(request(text, target_ratio=1.5, more=same))
    with pytest.raises(UserError, match="evaluated stand in the calibration text"):
        run(request(text, target_ratio=1.5, more={"evaluate": "demo"}))
    # The embedded model is scored on its own data without being asked to.
    with pytest.raises(UserError, match="evaluated stand in the calibration text"):
        run(replace(request(text, target_ratio=1.5), model="demo"))
    allowed = request(text, target_ratio=1.5, more=same | {"allow_overlap": True})
    assert run(allowed).evaluation["after"]["examples"] == 2
    other = tmp_path / "other.txt"
    other.write_text("\n".join(f"{q.prompt} {q.answer}" for q in questions()[2500:]))
    run(request(text, target_ratio=1.5, more=same | {"data_file": other}))


def test_a_streamed_compression_is_the_same_and_cleans_up(text, tmp_path):
    out = {"format": "factored"}
    held = run(request(text, target_ratio=2.0, more=out | {"out": tmp_path / "held"}))
    streamed = {"out": tmp_path / "streamed", "stream": True}
    again = run(request(text, target_ratio=2.0, more=out | streamed))
    assert [site.ranks for site in held.sites] == [site.ranks for site in again.sites]
    errors = [[site.relative_error for site in report.sites] for report in (held, again)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held", "streamed", "told.txt"]
    with pytest.raises(UserError, match="--stream needs --out"):
        run(request(text, target_ratio=2.0, more={"stream": True}))
    with pytest.raises(UserError, match="--stream is for --calibration"):
        run(request(None, target_ratio=2.0, more={"stream": True}))


def test_an_interrupted_fit_in_memory_goes_on(text, tmp_path, monkeypatch):
    def out(name: str) -> CompressRequest:
        return request(text, target_ratio=2.0, more={"out": tmp_path / name, "format": "factored"})

    run(out("whole"))
    save = Store.save

    def interrupted(self: Store, name: str, tensors: Any) -> None:
        save(self, name, tensors)
        if name == "factors-1":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(out("again"))
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / ".again.fit").glob("errors-*")}
    assert len(kept) == 4
    saved: list[str] = []

    def noted(self: Store, name: str, tensors: Any) -> None:
        save(self, name, tensors)
        saved.append(name)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "save", noted)
        run(out("again"))
    assert not {"errors-0", "errors-3", "factors-0", "factors-1"} & set(saved)
    weights = [sorted((tmp_path / name).glob("*.safetensors")) for name in ("whole", "again")]
    for one, other in zip(*weights, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert not (tmp_path / ".again.fit").exists()


def test_several_sizes_from_one_measurement(text, tmp_path):
    """Each folder is as large as one that was made alone, and opens by itself."""
    asked = replace(
        request(text, refit_epochs=0), target_ratio=(1.5, 2.5), out=tmp_path / "out", seed=1
    )
    reports = run_sizes(replace(asked, logger="csv", log_dir=tmp_path / "logs"))
    logged = tmp_path / "logs" / "compress"
    assert [r.logged_to for r in reports] == [logged / "version_0", logged / "version_1"]
    assert all((logged / name / "metrics.csv").is_file() for name in ("version_0", "version_1"))
    for ratio, report in zip((1.5, 2.5), reports, strict=True):
        folder = tmp_path / "out" / f"{ratio:g}"
        assert report.settings["target_ratio"] == ratio
        assert report.ratios()["matrices_compressed"] == pytest.approx(ratio, rel=0.02)
        assert tl.load(folder) is not None
    alone = run(replace(asked, target_ratio=2.5, out=tmp_path / "alone"))
    assert alone.totals.parameters_after == pytest.approx(
        reports[1].totals.parameters_after, rel=0.01
    )
    console = Console(width=80, record=True, file=StringIO())
    console.print(sizes_table(reports))
    assert "2.5" in console.export_text()


def test_several_narrow_sizes_meet_their_targets_with_ffns_alone(text, tmp_path):
    asked = replace(
        request(text, mode="activation-hybrid", refit_epochs=0),
        target_ratio=(1.25, 2.0),
        format="narrow",
        out=tmp_path / "out",
    )
    reports = run_sizes(asked)
    for ratio, report in zip((1.25, 2.0), reports, strict=True):
        width = tl.load(tmp_path / "out" / f"{ratio:g}").config.n_inner
        assert report.ffn_width == (256, width)
        assert width <= 256 / ratio < width + 16
        assert {role for site in report.sites for role in site.roles} == {"in", "out"}


def test_what_no_size_can_be_is_refused_before_the_fit(text, tmp_path, monkeypatch):
    monkeypatch.setattr("tensorllm.commands.compress.fit_sizes", lambda *_: pytest.fail("fitted"))
    asked = replace(request(text), target_ratio=(1.5, 2.0), format="narrow", out=tmp_path / "out")
    with pytest.raises(UserError, match="--format narrow: layer 0 reads 256 of its 256"):
        run_sizes(asked)


@pytest.mark.parametrize("wrong", [{"calibration": None}, {"out": None}, {"stream": True}])
def test_several_sizes_need_a_text_and_a_folder(wrong, text, tmp_path):
    asked = replace(request(text), target_ratio=(1.5, 2.0), out=tmp_path / "out")
    with pytest.raises(UserError, match="several ratios need --calibration FILE and --out FOLDER"):
        run_sizes(replace(asked, **wrong))

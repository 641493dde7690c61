"""Edits on top of one another, against fresh models compressed and evaluated as they are."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tensorllm.commands.compress import run as run_compress
from tensorllm.commands.search import run
from tensorllm.compression.engine import compress
from tensorllm.compressors import PerLayer
from tensorllm.errors import UserError
from tensorllm.evaluation.evaluate import evaluate_model
from tensorllm.requests.compress import CompressRequest
from tensorllm.requests.search import SearchRequest
from tensorllm.search.composition import Step
from tensorllm.search.objectives import OBJECTIVES
from tensorllm.search.space import Point
from tensorllm.search.study import Study
from tensorllm.search.trial import TrialResult

# Every layer's two FFN matrices at one rank: eight points, then the seven that are left, ...
WANTED = SearchRequest(
    model="demo",
    dataset="demo",
    mode="laser",
    rho=(0.02,),
    limit=150,
    compose=3,
    force_best=True,
    full=True,
    cache_gib=2**-5,
)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("composed") / "study"


def run_all(study: Path) -> dict[str, Any]:
    """The search where every edit counts as a gain, so that there are as many as asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "gains", lambda self, goal: True)
        return run(replace(WANTED, study=study)).results


@pytest.fixture(scope="module")
def found(study: Path) -> dict[str, Any]:
    return run_all(study)


@pytest.fixture(scope="module")
def search() -> Study:
    return Study(WANTED)


def naive(search: Study, edits: list[dict[str, Any]]) -> dict[str, Any]:
    """Scores of a fresh model with these edits, on the validation part."""
    model = search.loader()
    if edits:
        compress(model, PerLayer(edits=tuple(edits)))
    return evaluate_model(model, search.tokenizer, search.datasets[0].validation, search.protocol)


def edit(step: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in step.items() if key not in ("trial", "validation")}


@pytest.mark.parametrize(
    ("after", "objective", "gains"),
    [
        ((50.0, 2.0), "accuracy", False),
        ((50.1, 2.0), "accuracy", True),
        ((49.0, 0.5), "accuracy", False),
        ((49.0, 0.9), "loss", True),
        ((60.0, 1.0), "loss", False),
    ],
)
def test_an_edit_is_kept_where_validation_gets_better(
    after: tuple[float, float], objective: str, gains: bool
) -> None:
    before = TrialResult(50.0, 1.0, 100, False, 1.0, 0, 0.0, "", 0.0)
    found = replace(before, accuracy=after[0], loss=after[1])
    step = Step(Point("laser", (0,), {"rank": 1}), found, before, [], 0)
    assert step.gains(OBJECTIVES[objective]) is gains


@pytest.mark.slow
def test_each_step_is_the_best_there_is_on_top_of_those_before(
    found: dict[str, Any], search: Study
) -> None:
    points = [search.space.point(values).recipe() for values in search.space.grid]
    base: list[dict[str, Any]] = []
    for step in found["steps"]:
        taken = [(e["layers"], e["matrices"]) for e in base]
        free = [p for p in points if (p["layers"], p["matrices"]) not in taken]
        scores = [naive(search, [*base, point])["accuracy"] for point in free]
        assert step["validation"]["accuracy"] == pytest.approx(max(scores), abs=1e-9)
        ties = [p for p, s in zip(free, scores, strict=True) if s == max(scores)]
        assert edit(step) in ties
        base.append(edit(step))
    assert len(base) == WANTED.compose
    assert found["winner"]["edits"] == base


def test_a_step_in_vain_is_told(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setattr(Step, "gains", lambda self, goal: False)
    wanted = replace(WANTED, compose=2, layers=(0, 3), limit=30, study=tmp_path / "study")
    assert len(run(wanted).results["steps"]) == 1
    said = [record.getMessage() for record in caplog.records]
    assert any(
        line == "edit 2 of --compose 2 is left out: none of 3 trials on top of the one before gains"
        for line in said
    ), said


def test_all_edits_go_into_one_recipe_that_compress_takes(
    found: dict[str, Any], study: Path
) -> None:
    recipe = yaml.safe_load((study / "best.yaml").read_text())
    assert recipe["mode"] == "per-layer"
    assert recipe["edits"] == [edit(step) for step in found["steps"]]
    report = run_compress(CompressRequest(config=study / "best.yaml"))
    saved = sum(s.parameters_before - s.parameters_after for s in report.sites)  # type: ignore[union-attr]
    assert saved == found["winner"]["validation"]["parameters_saved"]
    assert found["winner"]["validation"]["ratio"] == pytest.approx(
        report.ratios()["matrices_compressed"]  # type: ignore[union-attr]
    )


def test_the_test_part_is_looked_at_once_and_nothing_is_done_twice(
    found: dict[str, Any], study: Path
) -> None:
    assert found["test_looks"] == 1
    journals = {p: p.read_bytes() for p in study.rglob("trials.journal")}
    assert len(journals) == WANTED.compose
    again = run_all(study)
    assert again["winner"]["test"] == found["winner"]["test"]
    assert again["test_looks"] == 1
    assert journals == {p: p.read_bytes() for p in study.rglob("trials.journal")}
    assert json.loads((study / "results.json").read_text())["steps"] == again["steps"]


def test_what_cannot_be_composed_is_refused() -> None:
    with pytest.raises(UserError, match="--compose must be at least 1, got 0"):
        replace(WANTED, compose=0)
    with pytest.raises(UserError, match="needs one best trial"):
        Study(replace(WANTED, objective="pareto"))

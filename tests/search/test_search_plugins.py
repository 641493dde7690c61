"""Methods and objectives from outside go through a search, with nothing registered elsewhere."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from cli_runs import piped
from tiny_models import tiny_model

from tensorllm.commands.search import run
from tensorllm.compressors.base import COMPRESSORS, Dimension, Job, Leaf
from tensorllm.compressors.layer import Site
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.requests.search import SearchRequest
from tensorllm.search.activation_cache import CacheBudget
from tensorllm.search.composition import Step
from tensorllm.search.objectives import OBJECTIVES, Objective
from tensorllm.search.prefix import Prefix
from tensorllm.search.space import make_space
from tensorllm.search.study import Study
from tensorllm.tensors.factors import LowRank

SMALL = SearchRequest(model="demo", dataset="demo", limit=60, layers=(2, 3), cache_gib=2**-6)


@dataclass(frozen=True, kw_only=True)
class KeyCut(Leaf):
    """The key matrix at a rank; it says what may be varied."""

    rank: int
    scale: float = 1.0

    source = "https://example.org"

    def jobs(self, spec, layers):
        return [Job(Site((layer,), ("k",), "matrix"), self) for layer in layers]

    def decompose(self, w, statistics=None):
        assert (statistics is not None) == (self.needs != "weights")
        u, s, v = torch.linalg.svd(w.float(), full_matrices=False)
        n = self.rank
        return LowRank(u[:, :n] * s[:n] * self.scale, v[:n])

    @classmethod
    def search_space(cls, spec, settings):
        return {"rank": Dimension((2, 8, 32), (1, 64)), "scale": Dimension((0.5, 1.0))}


@dataclass(frozen=True, kw_only=True)
class KeyCutSeen(KeyCut):
    """The same, for a strategy that sees a text."""

    needs = "activations"


@pytest.fixture
def registered() -> Iterator[None]:
    names = {"key-cut": KeyCut, "key-cut-seen": KeyCutSeen}
    for name, kind in names.items():
        COMPRESSORS.register(name)(kind)
    yield
    for name in names:
        del COMPRESSORS._entries[name]


@pytest.mark.usefixtures("registered")
def test_a_method_from_outside_is_searched(tmp_path: Path) -> None:
    found = run(replace(SMALL, mode="key-cut", study=tmp_path)).results
    assert found["trials"]["examined"] == 2 * 3 * 2
    assert found["space"]["choices"]["rank"] == [2, 8, 32]
    assert found["winner"]["rank"] in (2, 8, 32)
    rank, width = found["winner"]["rank"], 128
    assert found["winner"]["validation"]["ratio"] == pytest.approx(width**2 / (2 * width * rank))
    assert json.loads((tmp_path / "results.json").read_text())["winner"] == found["winner"]


@pytest.mark.usefixtures("registered")
def test_values_of_any_dimension_may_be_given() -> None:
    model = tiny_model("gptj")
    roles = RoleMatrices(model.config, parameters_of(model))
    space = make_space(roles, "key-cut", values={"rank": [4, 3]})
    assert space.choices["rank"] == (3, 4)
    with pytest.raises(UserError, match=r"rank must be in 1\.\.64, got 65"):
        make_space(roles, "key-cut", values={"rank": [65]})
    with pytest.raises(UserError, match=r"scale must be one of 0\.5, 1, got 0\.7"):
        make_space(roles, "key-cut", values={"scale": [0.7]})
    with pytest.raises(UserError, match=r"rank takes whole numbers, got 2\.5"):
        make_space(roles, "key-cut", values={"rank": [2.5]})
    with pytest.raises(UserError, match=r"no rnk; it has rank, scale\. Did you mean 'rank'"):
        make_space(roles, "key-cut", values={"rnk": [2]})


@pytest.mark.usefixtures("registered")
def test_a_method_that_sees_a_text_is_searched_with_one(tmp_path: Path) -> None:
    wanted = replace(SMALL, mode="key-cut-seen", vary={"rank": (8,), "scale": (1.0,)})
    with pytest.raises(UserError, match="is fitted to text: give --calibration"):
        run(wanted)
    text = tmp_path / "words.txt"
    text.write_text("\n".join(f"Nobody knows what {n} sings ." for n in range(400)))
    found = run(replace(wanted, calibration=text, sequences=64)).results
    plain = run(replace(SMALL, mode="key-cut", vary=wanted.vary)).results
    for part in ("validation", "test"):
        assert found["winner"][part]["loss"] == pytest.approx(plain["winner"][part]["loss"], 1e-4)
    own = tmp_path / "own.jsonl"
    own.write_text('{"text": "Nobody sings ."}\n' * 3)
    drawn = Study(replace(wanted, calibration=text, sampled=own, sequences=64)).calibration
    assert drawn is not None
    assert (len(drawn.sequences), drawn.added) == (67, 3)
    with pytest.raises(UserError, match="--sampled adds to --calibration FILE"):
        run(replace(wanted, sampled=own))


@pytest.mark.usefixtures("registered")
def test_edits_that_see_a_text_are_put_on_top_of_one_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Step, "gains", lambda self, goal: True)
    text = tmp_path / "words.txt"
    text.write_text("\n".join(f"Nobody knows what {n} sings ." for n in range(400)))
    wanted = replace(SMALL, vary={"rank": (8,), "scale": (1.0,)}, compose=2)
    found = run(replace(wanted, mode="key-cut-seen", calibration=text, sequences=64)).results
    plain = run(replace(wanted, mode="key-cut")).results
    assert [step["layers"] for step in found["steps"]] == [s["layers"] for s in plain["steps"]]
    assert len(found["steps"]) == 2
    for part in ("validation", "test"):
        assert found["winner"][part]["loss"] == pytest.approx(plain["winner"][part]["loss"], 1e-4)


def test_an_objective_from_outside_chooses_the_winner() -> None:
    def worst(result):
        return (result.loss,)

    OBJECTIVES.register("worst-loss")(
        Objective(directions=("maximize",), values=worst, show=lambda r: f"{r.loss:.2f}")
    )
    try:
        asked = replace(SMALL, mode="laser", rho=(0.01, 0.3))
        chosen = [
            run(replace(asked, objective=name, full=True)).results["winner"]
            for name in ("worst-loss", "loss")
        ]
        assert chosen[0]["validation"]["loss"] > chosen[1]["validation"]["loss"]
    finally:
        del OBJECTIVES._entries["worst-loss"]
    with pytest.raises(UserError, match="must be one of accuracy, loss, pareto"):
        run(replace(SMALL, objective="worst-loss"))


@torch.no_grad()
def test_an_objective_may_come_with_a_plugin_of_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "steady.py").write_text(
        "from tensorllm.search.objectives import OBJECTIVES\n"
        'OBJECTIVES.register("steady")(OBJECTIVES["loss"])\n'
    )
    asked = ["search-ranks", "--model", "demo", "--mode", "laser", "--layers", "3", "--trials", 1]
    asked += ["--limit", 20, "--json", "--objective", "steady"]
    found = piped(*asked, "--plugin", "steady", PYTHONPATH=str(tmp_path))
    assert found.returncode == 0, found.stderr
    results = json.loads(found.stdout)
    assert (results["objective"], results["metric"]) == ("steady", "loss")
    refused = piped(*asked)
    assert refused.returncode == 2
    assert "steady" in refused.stderr


def test_a_model_without_ffn_rows_can_be_searched() -> None:
    model = tiny_model("mixtral")  # its matrices are the experts'
    roles = RoleMatrices(model.config, parameters_of(model))
    prefix = Prefix(model, roles, CacheBudget(2**20))
    assert prefix.ffns == [None, None]

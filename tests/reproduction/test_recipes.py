"""The recipes under configs/: complete, well formed, and true to the published numbers."""

import json
import math
import runpy
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from repository import ROOT

from tensorllm.compressors import COMPRESSORS
from tensorllm.errors import UserError
from tensorllm.recipes import as_yaml, default_recipe, parse_recipe, read_recipe, shipped
from tensorllm.tensors.ranks import tucker_parameters

CONFIGS = ROOT / "configs"
MODELS = yaml.safe_load((CONFIGS / "models.yaml").read_text())
PUBLISHED = yaml.safe_load((CONFIGS / "published.yaml").read_text())
PAPER_MODELS = ("roberta", "gptj", "llama2")
DATASETS = ("hotpotqa", "fever", "bios_profession", "wikidata_qa")
FILES = sorted(path for model in PAPER_MODELS for path in (CONFIGS / model).rglob("*.yaml"))

COMMON = {"model", "dataset", "mode", "layers", "origin", "source", "published"}
FIELDS = {  # mode: what a recipe of it has beside COMMON
    "shared-tucker": {"layout", "ranks"},
    "laser": {"matrices", "rho"},
    "hybrid": {"layout", "ranks", "ffn_layers", "matrices", "rho"},
    "per-matrix-tucker": {"layout", "ranks", "matrices"},
}
ROLES = {
    "laser": {"in", "gate", "out"},
    "hybrid": {"in", "gate", "out"},
    "per-matrix-tucker": {"q", "k", "v", "o"},
}


def name(path: Path) -> str:
    return path.relative_to(CONFIGS).with_suffix("").as_posix()


def read(path: Path) -> dict[str, Any]:
    recipe: dict[str, Any] = yaml.safe_load(path.read_text())
    return recipe


def ratio(sizes: dict[str, int], ranks: list[int]) -> float:
    """Compression ratio of one layer's attention: 4*D*H*K over core and factors."""
    d, k, h = sizes["hidden"], sizes["head_dim"], sizes["heads"]
    r1, r2, r3 = ranks
    return 4 * d * h * k / (r1 * r2 * r3 * h + d * r1 + k * r2 + 4 * r3)


def test_every_published_experiment_has_its_recipe():
    ablation = [f"per-matrix-tucker-{role}" for role in "qkvo"]
    wanted = {
        f"{model}/{dataset}/{mode}"
        for model in PAPER_MODELS
        for dataset in DATASETS
        for mode in ["shared-tucker", "laser", "hybrid", *(ablation if model == "gptj" else [])]
    }
    assert {name(path) for path in FILES} == wanted


def test_recipes_are_well_formed():
    for path in FILES:
        well_formed(path)


def well_formed(path: Path) -> None:
    recipe = read(path)
    fields = FIELDS[recipe["mode"]]
    assert recipe.keys() - {"alternatives"} == COMMON | fields
    assert (recipe["model"], recipe["dataset"]) == path.parts[-3:-1]
    assert path.stem.startswith(recipe["mode"])
    assert recipe.get("layout") == ("official" if "layout" in fields else None)
    assert recipe["source"].startswith("https://")
    assert recipe["origin"].keys() == {"layers"} | fields - {"layout"}
    assert set(recipe["origin"].values()) <= {"published", "inferred", "searched"}
    assert set(recipe.get("matrices", ())) <= ROLES.get(recipe["mode"], set())
    assert recipe["published"].keys() == {"before", "after"}
    for side in recipe["published"].values():
        assert side.keys() - {"cr"} == {"accuracy", "loss"}


def test_recipes_fit_their_models():
    for path in FILES:
        fits(path)


def fits(path: Path) -> None:
    recipe = read(path)
    sizes = MODELS[recipe["model"]]["sizes"]
    assert (recipe["layers"] is None) == (recipe["origin"]["layers"] == "searched")
    for layer in [*(recipe["layers"] or []), *recipe.get("ffn_layers", [])]:
        assert 0 <= layer < sizes["layers"]
    limits = [sizes["hidden"], sizes["head_dim"], 4]
    for ranks in [recipe.get("ranks", []), *recipe.get("alternatives", [])]:
        assert all(1 <= rank <= limit for rank, limit in zip(ranks, limits, strict=False))
    if "ranks" in recipe:
        assert len(recipe["ranks"]) == (2 if recipe["mode"] == "per-matrix-tucker" else 3)
    assert 0 < recipe.get("rho", 1) <= 1


@pytest.mark.parametrize("path", [p for p in FILES if p.stem == "shared-tucker"], ids=name)
def test_ranks_give_the_published_ratio(path: Path):
    recipe = read(path)
    sizes = MODELS[recipe["model"]]["sizes"]
    published = recipe["published"]["after"]["cr"]
    for ranks in [recipe["ranks"], *recipe.get("alternatives", [])]:
        assert round(ratio(sizes, ranks), 2) == published
        tensor = (sizes["hidden"], sizes["head_dim"], 4, sizes["heads"])
        stored = tucker_parameters(tensor, dict(enumerate(ranks)))
        assert math.prod(tensor) / stored == ratio(sizes, ranks)
        assert ranks[0] == sizes["heads"] * ranks[1]
    hybrid = read(path.with_name("hybrid.yaml"))
    for field in ("layers", "ranks", "alternatives"):
        assert hybrid.get(field) == recipe.get(field)


@pytest.mark.parametrize("path", [p for p in FILES if p.stem == "hybrid"], ids=name)
def test_hybrid_takes_lasers_own_choice(path: Path):
    hybrid, laser = read(path), read(path.with_name("laser.yaml"))
    assert (hybrid["ffn_layers"], hybrid["matrices"], hybrid["rho"]) == (
        laser["layers"],
        laser["matrices"],
        laser["rho"],
    )


def test_inferred_ranks_are_the_only_ones():
    for cell in PUBLISHED["tensorllm"]["cells"]:
        sizes = MODELS[cell["model"]]["sizes"]
        candidates = (
            [sizes["heads"] * r2, r2, r3]
            for r2 in range(1, sizes["head_dim"] + 1)
            for r3 in range(1, 5)
        )
        fits = [
            ranks
            for ranks in candidates
            if round(ratio(sizes, ranks), 2) == cell["shared_tucker"]["cr"]
        ]
        if cell["ranks_origin"] == "inferred":
            assert sorted(fits) == sorted(cell["ranks"]), cell


def test_files_are_what_the_script_writes():
    script = runpy.run_path(str(ROOT / "scripts" / "make_recipes.py"))
    written = script["recipes"](script["load_published"]())
    assert {f"{name(path)}.yaml": path.read_text() for path in FILES} == written


def test_published_facts_equal_the_collected_ones(shared_dir: Path):
    facts = json.loads((shared_dir / "published.json").read_text())
    assert len(facts["tensorllm"]) == 12
    for cell, fact in zip(PUBLISHED["tensorllm"]["cells"], facts["tensorllm"], strict=True):
        for field in ("model", "dataset", "layer", "ranks", "ranks_origin"):
            assert cell[field] == fact[field]
        for row in ("original", "shared_tucker", "laser_ffn", "laser_all", "hybrid"):
            assert _numbers(cell[row]) == _numbers(fact[row])
        assert cell.get("per_matrix", {}).keys() == fact.get("per_matrix", {}).keys()
        for role, numbers in cell.get("per_matrix", {}).items():
            assert _numbers(numbers) == _numbers(fact["per_matrix"][role])
    laser = {(cell["model"], cell["dataset"]): cell for cell in PUBLISHED["laser"]["cells"]}
    for row in facts["laser"]["rows"]:
        for model in PAPER_MODELS:
            cell, fact = laser.pop((model, row["dataset"])), row[model]
            assert [cell["matrix"], cell["layer"], cell["rho"]] == fact["at"]
            assert [*cell["original"].values()] == fact["base"]
            assert [*cell["laser"].values()] == fact["laser"]
    assert not laser
    for model, fact in facts["models"].items():
        assert MODELS[model]["hub"] == fact.pop("hub")
        assert fact.items() <= MODELS[model]["sizes"].items()


def _numbers(row: dict[str, Any]) -> tuple[float | None, ...]:
    return (row.get("accuracy", row.get("acc")), row["loss"], row.get("cr"))


@pytest.mark.parametrize("model", MODELS)
def test_models_name_their_weights_and_a_default_dataset(model: str):
    row = MODELS[model]
    assert ("hub" in row) != ("package" in row)
    if model in PAPER_MODELS:
        assert row["default_dataset"] in DATASETS
        assert {"revision", "dtype", "model_type", "sizes"} <= row.keys()


def test_every_shipped_recipe_makes_a_compressor():
    names = {name(path) for path in FILES}
    assert names <= shipped().keys()
    for recipe in shipped().values():
        assert COMPRESSORS.name_of(type(recipe.compressor())) == recipe.mode


@pytest.mark.parametrize("model", PAPER_MODELS)
@pytest.mark.parametrize("mode", ["shared-tucker", "laser", "hybrid"])
def test_a_model_has_a_default_recipe(model: str, mode: str):
    recipe = default_recipe(model, mode)
    assert recipe is not None
    assert recipe.name == f"{model}/{MODELS[model]['default_dataset']}/{mode}"


def test_what_is_no_text_is_no_recipe(tmp_path: Path):
    (tmp_path / "model.yaml").write_bytes(b"\x80\x00\xff")
    with pytest.raises(UserError, match="is not text in UTF-8"):
        read_recipe(tmp_path / "model.yaml")


def test_installed_package_carries_the_recipes():
    installed = resources.files("tensorllm.configs")
    for path in FILES:
        recipe = installed.joinpath(*path.relative_to(CONFIGS).parts)
        assert recipe.read_text() == path.read_text()


@pytest.mark.parametrize("length", range(1, 12))
def test_no_line_of_a_recipe_is_wider_than_a_terminal(length: int) -> None:
    """Wherever its words end."""
    for first in range(1, 60):
        text = " ".join(["x" * first, *["y" * length] * 30])
        written = as_yaml({"layers": [3], "source": text})
        assert max(map(len, written.splitlines())) <= 80
        assert yaml.safe_load(written)["source"] == text


@pytest.mark.parametrize(
    ("model", "mode", "dataset", "words"),
    [
        (
            "gptj",
            "hybrid",
            "fevr",
            "'hybrid' for gptj on 'fevr'. Did you mean 'fever'? Known",
        ),
        (
            "gptj",
            "trawl",
            "fever",
            "'trawl' for gptj: leave --dataset out, or take one of the mode",
        ),
        ("mine", "trawl", "fever", "'trawl' for mine: leave --dataset out$"),
    ],
)
def test_a_recipe_that_does_not_exist_is_told_apart(
    model: str, mode: str, dataset: str, words: str
) -> None:
    with pytest.raises(UserError, match=words.replace("?", r"\?")):
        default_recipe(model, mode, dataset)


def test_the_command_line_may_give_another_text_than_a_recipe_s_that_is_gone() -> None:
    recipe = parse_recipe("{model: demo, mode: svd-llm, rank: 4, calibration: gone.txt}", "mine")
    assert recipe.run["calibration"].name == "gone.txt"

"""A strategy that is fitted to a budget names a recipe that is accepted, and makes the same."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from calibration_text import text
from tiny_models import tiny_model

from tensorllm.calibration import fit
from tensorllm.calibration.fit import Fitted, fit_sizes
from tensorllm.compressors import (
    AASVD,
    ASVD,
    COMPRESSORS,
    SVDLLM,
    ActivationExpertTucker,
    ActivationHybrid,
    ActivationTucker,
    Compressor,
    Hybrid,
    PerLayer,
    SVDLLMSequential,
)
from tensorllm.compressors.budget import TARGETS, Budget
from tensorllm.compressors.settings import fields_of, make_compressor
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.recipes import as_yaml, budget_of, recipe_of
from tensorllm.requests.compress import CompressRequest

TWICE = Budget(target_ratio=2.0)
STRATEGIES: dict[str, tuple[str, Compressor]] = {
    "svd-llm, kept": ("llama", SVDLLM(kept=0.5)),
    "svd-llm, rank": ("llama", SVDLLM(rank=3, matrices=("q", "out"))),
    "asvd": ("llama", ASVD(kept=0.5, alpha=0.7)),
    "svd-llm-sequential": ("llama", SVDLLMSequential(kept=0.5)),
    "aa-svd": ("llama", AASVD(rank=2)),
    "activation-tucker": ("llama", ActivationTucker(target_params=1, refit_epochs=0)),
    "activation-hybrid": ("llama", ActivationHybrid(target_ratio=3.0, refit_epochs=0)),
    "experts, kept": ("mixtral", ActivationExpertTucker(kept=0.5)),
    "experts, ranks": ("mixtral", ActivationExpertTucker(ranks=(0, 2, 3, 0), sweeps=1)),
    "hybrid": ("llama", Hybrid(attention=ASVD(kept=0.5, matrices=("q",)), ffn=SVDLLM(rank=3))),
}


def read_back(made: Fitted, model: torch.nn.Module, folder) -> tuple[Compressor, Budget | None]:
    """The strategy of the recipe that a card prints, and its budget, as the command reads them."""
    mode, settings = made.settings
    del settings["calibration"]
    path = folder / "recipe.yaml"
    path.write_text(as_yaml({"model": "demo", "mode": mode} | settings))
    recipe = recipe_of(CompressRequest(config=path))
    budget = budget_of(mode, recipe.settings)
    if budget is None:
        return make_compressor(mode, recipe.settings), None
    spec = RoleMatrices(model.config, parameters_of(model)).spec
    rest = {name: value for name, value in recipe.settings.items() if name not in TARGETS}
    return make_compressor(mode, COMPRESSORS[mode].budget_settings(spec, rest)), budget


@pytest.fixture
def shared() -> Iterator[type[Compressor]]:
    """A mode from outside, whose setting of sizes has a name that no other mode has."""

    @dataclass(frozen=True, kw_only=True)
    class Shared(ASVD):
        share: float = 0.5
        size_settings: ClassVar[tuple[tuple[str, ...], ...]] = (("share", "kept", "rank"),)

        @classmethod
        def budget_settings(cls, spec: Any, settings: Any) -> dict[str, Any]:
            assert "share" not in settings
            return {"rank": 1, **settings}

    COMPRESSORS.register("shared")(Shared)
    yield Shared
    del COMPRESSORS._entries["shared"]


def test_a_target_replaces_the_sizes_that_a_mode_names_whatever_they_are_called(shared, tmp_path):
    made = fit(shared(share=0.3, kept=0.5), tiny_model("llama"), text(), [0], budget=TWICE)
    assert {"share", "kept"}.isdisjoint(made.settings[1])
    path = tmp_path / "recipe.yaml"
    sized = {"model": "demo", "mode": "shared", "share": 0.3, "kept": 0.5}
    path.write_text(as_yaml(sized))
    target = recipe_of(CompressRequest(config=path, target_ratio=2.0))
    assert target.settings == {"target_ratio": 2.0}
    path.write_text(as_yaml(sized | {"target_ratio": 2.0}))
    with pytest.raises(UserError, match="give it or share and kept, not both"):
        recipe_of(CompressRequest(config=path))


@pytest.mark.parametrize("mode", list(COMPRESSORS))
def test_settings_of_sizes_are_settings(mode):
    """A mode that has a size of a usual name says so."""
    named = {name for row in COMPRESSORS[mode].size_settings for name in row}
    usual = {"rank", "ranks", "rho", "kept", "energy", "error"}
    assert usual & set(fields_of(mode)) <= named


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_recipe_of_a_fit_to_a_budget_makes_the_same(name, tmp_path):
    kind, strategy = STRATEGIES[name]
    model, target = tiny_model(kind), Budget(target_ratio=2.0)
    one = fit(strategy, model, text(), budget=target)
    (other,) = fit_sizes(strategy, model, text(), [target])
    for made in (one, other):
        again, budget = read_back(made, model, tmp_path)
        same = fit(again, model, text(), budget=budget)
        assert same.settings == made.settings
        assert set(same.sites) == set(made.sites)
        for site in made.sites:
            was, now = made.factors(site).tensors(), same.factors(site).tensors()
            assert all(torch.equal(was[key], now[key]) for key in was)


def test_a_budget_that_no_recipe_could_name_is_refused_at_once(monkeypatch):
    edits = PerLayer(edits=({"layers": [0], "mode": "svd-llm", "kept": 0.5},))
    model = tiny_model("llama")
    monkeypatch.setattr("tensorllm.calibration.sweeps.Sweeps.run", None)  # nothing is run
    with pytest.raises(UserError, match="per-layer cannot meet a target size"):
        fit(edits, model, text(), budget=Budget(target_ratio=2.0))

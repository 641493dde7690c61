"""Budgets from the weights alone: errors against plain SVDs, allocations against brute force.

Shapes: D model width, K head width, M matrices per group, H heads.
"""

import itertools
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny_models import tiny_model

import tensorllm as tl
from tensorllm.checkpoint.reader import Checkpoint
from tensorllm.commands.compress import run
from tensorllm.compression.report import CompressionReport
from tensorllm.compressors import COMPRESSORS, Job, PerLayer, Site
from tensorllm.compressors.allocation import share_out
from tensorllm.compressors.base import ErrorCurve
from tensorllm.compressors.budget import Budget
from tensorllm.compressors.settings import make_compressor, settings_of
from tensorllm.data.demo import MODEL_DIR
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.recipes import as_yaml, parse_recipe
from tensorllm.requests.compress import CompressRequest
from tensorllm.tensors.energy import Energy, matrix_energy, tucker_energy, tucker_stored
from tensorllm.tensors.stacking import ATTENTION

SHAPE, RANKS = (60, 24, 4, 4), (7, 5, 2)


def planted(noise: float, seed: int = 0) -> torch.Tensor:
    """A tensor of known Tucker ranks, and noise."""
    g = torch.Generator().manual_seed(seed)
    core = torch.randn(*RANKS, SHAPE[3], generator=g, dtype=torch.float64)
    u = [
        torch.linalg.qr(torch.randn(n, r, generator=g, dtype=torch.float64)).Q
        for n, r in zip(SHAPE, RANKS, strict=False)
    ]
    w = torch.einsum("prsh,dp,kr,ms->dkmh", core, *u)
    return w + noise * torch.randn(SHAPE, generator=g, dtype=torch.float64)


def energy_of(w: torch.Tensor) -> Energy:
    return tucker_energy(w, (0, 1, 2))


def site_of(layer: int) -> Site:
    return Site((layer,), ATTENTION, "heads")


def truncated_hosvd_error(w: np.ndarray, ranks: tuple[int, ...]) -> float:
    """Squared error of projecting each mode on its own leading left singular vectors."""
    near = w
    for mode, rank in enumerate(ranks):
        unfolded = np.moveaxis(w, mode, 0).reshape(w.shape[mode], -1)
        u = np.linalg.svd(unfolded, full_matrices=False)[0][:, :rank]
        near = np.moveaxis(np.tensordot(u @ u.T, near, axes=(1, mode)), 0, mode)
    return float(((w - near) ** 2).sum())


def test_errors_are_those_of_the_truncated_hosvd_and_costs_what_is_stored() -> None:
    w = planted(0.3)
    found_in = energy_of(w)
    for ranks in [(1, 1, 1), (7, 5, 2), (60, 3, 4), (20, 24, 1), (60, 24, 4)]:
        found = found_in.error(ranks)
        assert found == pytest.approx(truncated_hosvd_error(w.numpy(), ranks), rel=1e-6, abs=1e-9)
        counted = tl.SharedTucker4D(ranks=ranks).stored_parameters(SHAPE)
        assert int(tucker_stored(SHAPE, torch.tensor([ranks]))) == counted


def test_a_matrix_is_the_case_of_one_rank() -> None:
    w = torch.randn(30, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    energy = matrix_energy(w)
    singular = np.linalg.svd(w.numpy())[1]
    for rank in (1, 7, 20):
        assert energy.error((rank,)) == pytest.approx((singular[rank:] ** 2).sum(), abs=1e-9)
    site = Site((2,), ("out",), "matrix")
    leaf = tl.LaserSVD(rank=1)
    curve = leaf.curve(site, w)
    sevens = curve.sizes_NC.tolist().index([7])
    assert int(curve.cost_N[sevens]) == 7 * 50
    scale = w.numel() / float((singular**2).sum())
    assert float(curve.error_N[sevens]) == pytest.approx(scale * (singular[7:] ** 2).sum())
    assert curve.sizes_NC[-1].tolist() == [0]  # as it is
    assert (int(curve.cost_N[-1]), float(curve.error_N[-1])) == (600, 0.0)
    assert settings_of(leaf.at_size(site, (7,))) == ("laser", {"rank": 7, "matrices": ["out"]})


def curve_of(energy: Energy) -> ErrorCurve:
    curve, sizes_NC = energy.curve(partial(tucker_stored, energy.shape))
    return ErrorCurve(*curve, sizes_NC)


def test_no_other_choice_of_ranks_is_better() -> None:
    """Every combination of the ranks of two small sites, by brute force."""
    g = torch.Generator().manual_seed(5)
    energies = []
    for _ in range(2):
        energy = energy_of(torch.randn(6, 4, 4, 2, generator=g, dtype=torch.float64))
        energies.append(replace(energy, energy=energy.energy / energy.total))
    options = []
    for energy in energies:
        ranks_NC = torch.tensor(list(itertools.product(*(range(1, n + 1) for n in (6, 4, 4)))))
        errors = [energy.error(tuple(ranks)) for ranks in ranks_NC.tolist()]
        pairs = zip(tucker_stored(energy.shape, ranks_NC).tolist(), errors, strict=True)
        options.append([*pairs, (energy.numbers, 0.0)])
    curves = {site_of(layer): curve_of(energy) for layer, energy in enumerate(energies)}
    ways = [[[Job(site, tl.SharedTucker4D(ranks=(1, 1, 1)))]] for site in curves]
    for budget in (40, 100, 200, 300):
        found = share_out(ways, curves, budget)
        fits = [a[1] + b[1] for a, b in itertools.product(*options) if a[0] + b[0] <= budget]
        assert math.sqrt(found.error / 192) == pytest.approx(math.sqrt(min(fits)), abs=1e-6)
        stored = sum(
            int(tucker_stored((6, 4, 4, 2), torch.tensor([size]))) if any(size) else 192
            for size in found.sizes.values()
        )
        assert stored <= budget


def test_sites_that_are_tied_get_the_best_common_size() -> None:
    """Two sites of one size, and a free one, by brute force; one lacks a size of the other."""
    sites = [site_of(layer) for layer in range(3)]
    sizes = {sites[0]: (2, 4, 6, 8), sites[1]: (2, 4, 8), sites[2]: (1, 2, 3, 4)}
    curves = {}
    for number, (site, each) in enumerate(sizes.items()):
        size = torch.tensor(each)
        error = (9.0 - size).square() * (number + 1)
        curves[site] = ErrorCurve((number + 2) * size, error.double(), size[:, None])
    ways = [[[Job(site, tl.LaserSVD(rank=1))]] for site in sites]

    def cost_and_error(chosen: dict[Site, int]) -> tuple[int, float]:
        points = [(curves[site], sizes[site].index(size)) for site, size in chosen.items()]
        return (
            sum(int(c.cost_N[n]) for c, n in points),
            sum(float(c.error_N[n]) for c, n in points),
        )

    for budget in (16, 20, 30, 45, 60):
        found = share_out(ways, curves, budget, sites[:2])
        every = [
            cost_and_error({sites[0]: both, sites[1]: both, sites[2]: other})
            for both, other in itertools.product((2, 4, 8), sizes[sites[2]])
        ]
        assert found.sizes[sites[0]] == found.sizes[sites[1]]
        got = cost_and_error({site: size[0] for site, size in found.sizes.items()})
        assert got[0] <= budget
        assert got[1] == found.error == min(error for cost, error in every if cost <= budget)


def test_the_best_reachable_ratio_is_said() -> None:
    least = tl.SharedTucker4D(ranks=(1, 1, 1)).stored_parameters(SHAPE)
    numbers = math.prod(SHAPE)
    with pytest.raises(UserError, match=f"best reachable is {numbers / least:.4g}"):
        Budget(target_ratio=1e6).numbers(numbers, 2 * numbers, least)


def whole(report: CompressionReport, matrices: int) -> float:
    """The ratio over all matrices of the mode, whether or not they were edited."""
    before = sum(site.parameters_before for site in report.sites)
    after = sum(site.parameters_after for site in report.sites)
    return matrices / (matrices - before + after)


@pytest.mark.parametrize("mode", ["shared-tucker", "per-matrix-tucker", "laser", "hybrid"])
@pytest.mark.parametrize("ratio", [1.2, 3.0])
def test_a_whole_model_meets_its_target(mode: str, ratio: float) -> None:
    report = run(CompressRequest(model=str(MODEL_DIR), mode=mode, settings={"target_ratio": ratio}))
    assert isinstance(report, CompressionReport)
    geometry = RoleMatrices(*_demo()).spec.geometry(0)
    matrices = [m for job in _on_all(mode) for m in job.site.matrices]
    numbers = sum(geometry.inner(role) * geometry.D for _, role in matrices)
    assert ratio <= whole(report, numbers) < ratio * 1.02
    assert len({layer for site in report.sites for layer in site.layers}) >= 2
    assert report.settings["chosen_by"]["target_ratio"] == ratio


def _demo() -> tuple[object, object]:
    checkpoint = Checkpoint(MODEL_DIR)
    return checkpoint.config, checkpoint.entries


def _on_all(mode: str) -> list[Job]:
    spec = RoleMatrices(*_demo()).spec
    settings = COMPRESSORS[mode].budget_settings(spec, {})
    return make_compressor(mode, settings).jobs(spec, range(spec.layers))


def test_a_number_of_parameters_is_met_and_refused_with_its_range() -> None:
    report = run(
        CompressRequest(model=str(MODEL_DIR), mode="hybrid", settings={"target_params": 400_000})
    )
    assert isinstance(report, CompressionReport)
    assert 0.99 * 400_000 < report.totals.parameters_after <= 400_000
    for asked in (1000, 10**9):
        with pytest.raises(UserError, match=rf"must be above \d+ and below \d+, got {asked}"):
            run(
                CompressRequest(
                    model=str(MODEL_DIR), mode="hybrid", settings={"target_params": asked}
                )
            )


@pytest.mark.parametrize(
    ("mode", "settings", "message"),
    [
        ("trawl", {"target_ratio": 2.0}, "trawl cannot meet a target size"),
        ("laser", {"target_ratio": 0.5}, "above 1, got 0.5"),
        ("laser", {"target_ratio": 1e9}, "best reachable is"),
        ("laser", {"target_ratio": 2.0, "target_params": 9}, "got target_ratio and target_params"),
        ("laser", {"target_ratio": 2.0, "matrices": ["gate"]}, "'gate' does not exist"),
    ],
)
def test_targets_that_make_no_sense(mode: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(CompressRequest(model=str(MODEL_DIR), mode=mode, settings=settings))


def test_settings_per_layer_survive_a_recipe(tmp_path: Path) -> None:
    model = tiny_model("gptj")
    report = tl.compress(
        model, tl.Hybrid(ranks=(1, 1, 1), rank=1), [1], budget=Budget(target_ratio=2.0)
    )
    assert report.mode == "per-layer"
    edits = report.settings["edits"]
    text = as_yaml({"model": "demo", "mode": "per-layer", "layers": [1], "edits": edits})
    recipe = parse_recipe(text, "best.yaml")
    assert recipe.layers == (1,)
    compressor = recipe.compressor()
    assert isinstance(compressor, PerLayer)
    assert [dict(edit) for edit in compressor.edits] == edits == yaml.safe_load(text)["edits"]


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ((), "one edit or more"),
        (({"mode": "laser", "rank": 1},), "edit 1: layers must be a list"),
        (({"layers": [0], "rank": 1},), "edit 1: mode is missing"),
        (({"layers": [0], "mode": "laser", "rnk": 1},), "edit 1: .*did you mean 'rank'"),
        (("laser",), "edit 1 must be a mapping"),
    ],
)
def test_wrong_edits_are_named(edits: tuple[object, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PerLayer(edits=edits)  # type: ignore[arg-type]  # what a YAML file may hold


def test_a_matrix_is_not_edited_twice_and_layers_can_be_left_out() -> None:
    one = {"layers": [0, 1], "mode": "laser", "rank": 2}
    model = tiny_model("gptj")
    roles = RoleMatrices(model.config, parameters_of(model))
    with pytest.raises(UserError, match="compressed twice"):
        tl.compress(model, PerLayer(edits=(one, one)))
    assert len(PerLayer(edits=(one,)).jobs(roles.spec, [1])) == 1
    with pytest.raises(UserError, match=r"of layers \[0, 1\]"):
        PerLayer(edits=(one,)).jobs(roles.spec, [7])


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = tiny_model("gptj")
    weights = parameters_of(model)
    roles = RoleMatrices(model.config, weights)
    weights[roles.name(1, "out")][3, 4] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"layers\.1\.out: the weights must be finite"):
        run(CompressRequest(model=str(tmp_path), mode="laser", settings={"target_ratio": 2.0}))


@pytest.mark.parametrize("target", [{"target_params": 10**12}, {"target_bytes": 10}])
def test_what_no_sizes_can_meet_is_refused_before_spectra(
    target: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a spectrum was computed")

    monkeypatch.setattr(tl.LaserSVD, "curve", never)
    model = tiny_model("gptj")
    with pytest.raises(tl.UserError, match=r"must be above|cannot be met"):
        tl.compress(model, tl.LaserSVD(rank=1), budget=tl.Budget(**target))

"""Ranks from the weights alone: counts and errors against plain SVDs, rules against planted ranks.

Shapes: D model width, K head width, M matrices per group, H heads.
"""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny_models import tiny_model

import tensorllm as tl
from tensorllm.commands.allocate import ANY, at_any_ranks, energies
from tensorllm.commands.compress import CompressRequest, run
from tensorllm.compression.report import CompressionReport
from tensorllm.compressors import Job, PerLayer, Site
from tensorllm.data.demo import MODEL_DIR
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.recipes import parse_recipe, per_layer_recipe
from tensorllm.search.energy import (
    by_energy,
    by_energy_at,
    by_noise_edge,
    by_ratio,
    by_size,
    edits_of,
)
from tensorllm.search.sites import SiteEnergy, site_energy
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


def site_of(w: torch.Tensor, layer: int = 0) -> SiteEnergy:
    job = Job(Site((layer,), ATTENTION, "heads"), tl.SharedTucker4D(ranks=(1, 1, 1)))
    return site_energy(job, w)


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
    site = site_of(w)
    for ranks in [(1, 1, 1), (7, 5, 2), (60, 3, 4), (20, 24, 1), (60, 24, 4)]:
        found = site.error(ranks)
        assert found == pytest.approx(truncated_hosvd_error(w.numpy(), ranks), rel=1e-6, abs=1e-9)
        counted = tl.SharedTucker4D(ranks=ranks).stored_parameters(SHAPE)
        assert int(site.stored(torch.tensor([ranks]))) == counted


def test_a_matrix_is_the_case_of_one_rank() -> None:
    w = torch.randn(30, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    site = site_energy(Job(Site((2,), ("in",), "matrix"), tl.LaserSVD(rank=1)), w)
    singular = np.linalg.svd(w.numpy())[1]
    for rank in (1, 7, 20):
        assert site.error((rank,)) == pytest.approx((singular[rank:] ** 2).sum(), abs=1e-9)
        assert int(site.stored(torch.tensor([[rank]]))) == rank * 50
    assert site.edit((7,)) == {"layers": [2], "mode": "laser", "rank": 7, "matrices": ["in"]}


def test_rules_find_planted_ranks() -> None:
    assert by_energy([site_of(planted(0.0))], 1 - 1e-12).ranks == [RANKS]
    (edge,) = by_noise_edge([site_of(planted(0.01))]).ranks
    assert edge is not None
    assert edge[:2] == RANKS[:2]


@pytest.mark.parametrize("shape", [(100, 100), (40, 160)])
def test_the_noise_edge_keeps_next_to_nothing_of_noise(shape: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(2)
    spike = torch.zeros(shape)
    spike[:3, :3] = torch.diag(torch.tensor([90.0, 80.0, 70.0]))
    site = site_energy(
        Job(Site((0,), ("in",), "matrix"), tl.LaserSVD(rank=1)),
        spike + torch.randn(shape, generator=g),
    )
    assert by_noise_edge([site]).ranks[0][0] in (3, 4)  # type: ignore[index]  # never None


def test_a_size_is_met_with_less_error_than_equal_energies_leave() -> None:
    sites = [site_of(planted(noise, seed), seed) for seed, noise in enumerate((0.05, 0.3, 1.0))]
    # errors are compared with every tensor brought to the same size
    sites = [replace(site, energy=site.energy / site.total) for site in sites]
    for share in (0.5, 0.8, 0.95):
        equal = by_energy(sites, share)
        spread = by_ratio(sites, equal.ratio)
        assert spread.ratio >= equal.ratio
        assert spread.error <= equal.error * 1.001
        assert by_energy_at(sites, equal.ratio)[1].error == pytest.approx(equal.error)


def test_no_other_choice_of_ranks_is_better() -> None:
    """Every combination of the ranks of two small sites, by brute force."""
    g = torch.Generator().manual_seed(5)
    sites = []
    for layer in range(2):
        w = torch.randn(6, 4, 4, 2, generator=g, dtype=torch.float64)
        site = site_of(w, layer)
        sites.append(replace(site, energy=site.energy / site.total))
    options = []
    for site in sites:
        ranks_NC = torch.tensor(list(itertools.product(*(range(1, n + 1) for n in (6, 4, 4)))))
        errors = [site.error(tuple(ranks)) for ranks in ranks_NC.tolist()]
        pairs = zip(site.stored(ranks_NC).tolist(), errors, strict=True)
        options.append([*pairs, (site.numbers, 0.0)])
    for budget in (40, 100, 200, 300):
        found = by_size(sites, budget)
        fits = [a[1] + b[1] for a, b in itertools.product(*options) if a[0] + b[0] <= budget]
        assert found.error == pytest.approx(math.sqrt(min(fits) / 2), abs=1e-6)
        assert found.ratio >= 2 * 192 / budget


def test_the_best_reachable_ratio_is_told() -> None:
    site = site_of(planted(0.1))
    least = tl.SharedTucker4D(ranks=(1, 1, 1)).stored_parameters(SHAPE)
    with pytest.raises(UserError, match=f"best reachable is {site.numbers / least:.4g}"):
        by_ratio([site], 1e6)
    with pytest.raises(UserError, match="best reachable"):
        by_energy_at([site], 1e6)


def whole(report: CompressionReport, matrices: int) -> float:
    """The ratio over all matrices of the mode, whether or not they were edited."""
    before = sum(site.parameters_before for site in report.sites)
    after = sum(site.parameters_after for site in report.sites)
    return matrices / (matrices - before + after)


@pytest.mark.parametrize("mode", ANY)
@pytest.mark.parametrize("ratio", [1.2, 3.0])
def test_a_whole_model_meets_its_target(mode: str, ratio: float) -> None:
    report = run(CompressRequest(model=str(MODEL_DIR), mode=mode, settings={"target_ratio": ratio}))
    assert isinstance(report, CompressionReport)
    model = energies(MODEL_DIR, _on_all(mode))
    numbers = sum(site.numbers for site in model)
    assert ratio <= whole(report, numbers) < ratio * 1.02
    assert len({layer for site in report.sites for layer in site.layers}) >= 2
    assert report.settings["chosen_by"]["target_ratio"] == ratio


def _on_all(mode: str) -> tl.Compressor:
    from tensorllm.checkpoint.reader import Checkpoint

    checkpoint = Checkpoint(MODEL_DIR)
    return at_any_ranks(mode, {}, RoleMatrices(checkpoint.config, checkpoint.entries))


def test_a_number_of_parameters_is_met_and_refused_with_its_range() -> None:
    report = run(
        CompressRequest(model=str(MODEL_DIR), mode="hybrid", settings={"target_params": 400_000})
    )
    assert isinstance(report, CompressionReport)
    assert 0.99 * 400_000 < report.totals.parameters_after <= 400_000
    for asked in (1000, 10**9):
        with pytest.raises(UserError, match=rf"must be in \d+..\d+, got {asked}"):
            run(
                CompressRequest(
                    model=str(MODEL_DIR), mode="hybrid", settings={"target_params": asked}
                )
            )


@pytest.mark.parametrize(
    ("mode", "settings", "message"),
    [
        ("trawl", {"target_ratio": 2.0}, "a target size is for the modes"),
        ("laser", {"target_ratio": 0.5}, "above 1, got 0.5"),
        ("laser", {"target_ratio": 1e9}, "best reachable is"),
        ("laser", {"target_ratio": 2.0, "target_params": 9}, "got both"),
        ("laser", {"target_ratio": 2.0, "matrices": ["gate"]}, "'gate' does not exist"),
    ],
)
def test_targets_that_make_no_sense(mode: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(CompressRequest(model=str(MODEL_DIR), mode=mode, settings=settings))


def test_settings_per_layer_survive_a_recipe(tmp_path: Path) -> None:
    sites = energies(MODEL_DIR, tl.Hybrid(ranks=(1, 1, 1), rank=1), [1, 3])
    edits = edits_of(sites, by_ratio(sites, 2.0))
    text = per_layer_recipe(edits, model="demo", origin="searched")
    recipe = parse_recipe(text, "best.yaml")
    assert recipe.layers == (1, 3)
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

"""The space of a search against plain loops, and everything that cannot be searched."""

import itertools
import math

import pytest
import torch
from tiny_models import tiny_model

from tensorllm.compression.engine import compress
from tensorllm.compression.plan import plan_jobs
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.search.feasible import feasible, ratio_of
from tensorllm.search.space import make_space


@pytest.fixture(scope="module")
def roles():
    model = tiny_model("gptj")
    return RoleMatrices(model.config, parameters_of(model))


def test_grid_holds_every_choice_that_can_be_reached_and_no_other(roles):
    space = make_space(roles, "shared-tucker", values={"R1": [4, 16, 32], "R2": [1, 4, 8]})
    g = roles.spec.geometry(0)
    want = [
        (layer, *ranks)
        for layer in range(roles.layers)
        for ranks in itertools.product((4, 16, 32), (1, 4, 8), range(1, 5))
        if all(r <= math.prod(ranks) * g.G / r for r in ranks)
    ]
    assert [tuple(values.values()) for values in space.grid] == want
    assert 0 < len(want) < roles.layers * 3 * 3 * 4


@pytest.mark.parametrize("seed", range(3))
def test_ranks_beyond_reach_are_never_in_the_spectrum(seed):
    # what `allows` leaves out: a mode's rank above the product of the others has no energy
    core = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(seed))
    factors = [torch.randn(20, 2), torch.randn(9, 2), torch.randn(4, 3)]
    w = torch.einsum("abc,ia,jb,kc->ijk", core, *factors)
    assert torch.linalg.matrix_rank(w.reshape(20, -1)) <= 2 * 3


def test_tied_family_is_heads_times_r2(roles):
    space = make_space(roles, "shared-tucker", left_out=["R1"])
    ranks = [space.point(values).settings["ranks"] for values in space.grid]
    assert ranks
    assert all(r1 == roles.spec.geometry(0).H * r2 for r1, r2, _ in ranks)


@pytest.mark.parametrize("mode", ["shared-tucker", "per-matrix-tucker", "laser", "hybrid"])
def test_every_point_compresses_and_the_ratio_is_the_report_s(mode):
    model = tiny_model("llama")
    roles = RoleMatrices(model.config, parameters_of(model))
    space = make_space(roles, mode)
    for values in (space.grid[0], space.grid[len(space.grid) // 2], space.grid[-1]):
        point = space.point(values)
        report = compress(tiny_model("llama"), point.compressor, point.layers)
        jobs = plan_jobs(point.compressor, roles, point.layers)
        assert ratio_of(jobs, roles) == pytest.approx(report.ratios()["matrices_compressed"])


def test_min_ratio_keeps_what_meets_it_or_names_the_best(roles):
    space = make_space(roles, "shared-tucker")
    kept = feasible(space, roles, 3.0)

    def ratio(values):
        point = space.point(values)
        return ratio_of(plan_jobs(point.compressor, roles, point.layers), roles)

    assert kept == [values for values in space.grid if ratio(values) >= 3.0]
    best = max(map(ratio, space.grid))
    with pytest.raises(UserError, match=f"best reachable is {best:.4g}"):
        feasible(space, roles, 1e6)


def test_neighbouring_layers_are_edited_together(roles):
    space = make_space(roles, "laser", together=2)
    assert {space.point(values).layers for values in space.grid} == {(0, 1)}


BAD = {
    "unknown mode": ({"mode": "lasser"}, "laser"),
    "mode that is not searched": ({"mode": "trawl"}, "nothing to search; .*laser"),
    "no layer left": ({"mode": "laser", "layers": []}, "no layer is left"),
    "layer out of range": ({"mode": "laser", "layers": [7]}, r"0\.\.1, got 7"),
    "rank beyond the mode": ({"mode": "shared-tucker", "values": {"R2": [99]}}, r"1\.\.8, got 99"),
    "rank of another mode": ({"mode": "laser", "values": {"R2": [2]}}, "no R2"),
    "rho above one": ({"mode": "laser", "values": {"rho": [1.5]}}, "rho must be in"),
    "unknown matrix": ({"mode": "laser", "values": {"matrices": ["gate"]}}, "got 'gate'"),
    "attention matrix in a hybrid": ({"mode": "hybrid", "values": {"matrices": ["q"]}}, "got 'q'"),
    "R1 of the tied family": (
        {"mode": "shared-tucker", "left_out": ["R1"], "values": {"R1": [4]}},
        "give no R1",
    ),
    "tied laser": ({"mode": "laser", "left_out": ["R1"]}, "no R1"),
    "nothing reachable": (
        {"mode": "shared-tucker", "values": {"R1": [32], "R2": [1], "R3": [1]}},
        "can be reached",
    ),
    "more layers than there are": (
        {"mode": "laser", "together": 3},
        r"--together must be in 1\.\.2, got 3",
    ),
    "no neighbours": ({"mode": "laser", "together": 2, "layers": [1]}, "neighbouring"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_searched_is_refused(roles, case):
    options, message = BAD[case]
    options = dict(options)
    with pytest.raises(UserError, match=message):
        make_space(roles, options.pop("mode"), **options)

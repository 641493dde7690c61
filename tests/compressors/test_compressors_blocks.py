"""`laser` with blocks of rows, against a float64 loop over the blocks."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny_models import tiny_model
from torch import Tensor

import tensorllm as tl
from tensorllm.checkpoint.loading import load
from tensorllm.commands.search import run
from tensorllm.compression.engine import compress, compress_folder
from tensorllm.compression.task import FolderTask
from tensorllm.compressors.layer import Site
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.requests.search import SearchRequest
from tensorllm.runtime.blocks import BlockLowRankSite
from tensorllm.search.guide import guided, loss_gradient
from tensorllm.search.study import Study
from tensorllm.tensors.factors import parameters
from tensorllm.tensors.tucker import relative_error

SITE = Site((0,), ("in",), "matrix")
WANTED = SearchRequest(
    model="demo", dataset="demo", mode="laser", limit=60, layers=(3,), rho=(0.02, 0.3),
    vary={"blocks": (1, 4)}, cache_gib=2**-6,
)  # fmt: skip


def matrix(rows: int = 24, columns: int = 10, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def loop(w: Any, blocks: int, rank: int) -> np.ndarray:
    """Every block's best approximation, one below the other."""
    w = np.asarray(w, np.float64)
    out = np.zeros_like(w)
    height = len(w) // blocks
    for n in range(blocks):
        rows = slice(n * height, (n + 1) * height)
        u, s, v = np.linalg.svd(w[rows], full_matrices=False)
        for i in range(rank):
            out[rows] += s[i] * np.outer(u[:, i], v[i])
    return out


@pytest.mark.parametrize("blocks", [1, 2, 6])
@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_every_block_is_truncated_by_itself(blocks: int, method: Any) -> None:
    w = matrix()
    leaf = tl.LaserSVD(rank=2, blocks=blocks, method=method)
    factors = leaf.decompose(w)
    tolerance = 1e-5 if method == "exact" else 1e-2
    np.testing.assert_allclose(factors.dense(), loop(w, blocks, 2), atol=tolerance)
    assert factors.ranks == (2,)
    assert parameters(factors) == leaf.stored_parameters((24, 10)) == 2 * (24 + blocks * 10)


def test_rows_near_two_subspaces_need_half_the_rank_in_two_blocks() -> None:
    w = torch.cat([matrix(12, 3, seed=n) @ matrix(3, 10, seed=9 + n) for n in range(2)])
    in_blocks, whole = (tl.LaserSVD(rank=3, blocks=n).decompose(w) for n in (2, 1))
    assert relative_error(w, in_blocks) < 1e-5
    assert relative_error(w, whole) > 0.1


def test_rho_is_of_the_rank_of_a_block() -> None:
    assert tl.LaserSVD(rho=0.5, blocks=4).decompose(matrix()).ranks == (3,)  # of 6 rows
    assert tl.LaserSVD(rho=0.5, blocks=2).decompose(matrix()).ranks == (5,)  # of 10 columns


def test_smaller_ranks_are_slices_and_the_curve_tells_their_errors() -> None:
    w = matrix()
    leaves = [tl.LaserSVD(rank=rank, blocks=3) for rank in (1, 4)]
    covering = leaves[0].covering(leaves[1:], (24, 10))
    assert covering == leaves[1]
    sliced = leaves[0].sliced(covering.decompose(w), (24, 10))
    np.testing.assert_allclose(sliced.dense(), loop(w, 3, 1), atol=1e-5)
    assert leaves[0].covering([tl.LaserSVD(rank=4)], (24, 10)) is None
    curve = leaves[0].curve(SITE, w)
    scale = w.numel() / float(w.square().sum())  # errors are of a mean square of one
    for cost, error, (rank,) in zip(curve.cost_N, curve.error_N, curve.sizes_NC, strict=True):
        if rank:
            left = np.square(w.numpy() - loop(w, 3, int(rank))).sum()
            assert float(error) == pytest.approx(left * scale, rel=1e-4)
            assert int(cost) == int(rank) * (24 + 3 * 10)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"rank": 1, "blocks": 0}, "blocks must be 1 or more, got 0"),
        ({"rank": 1, "blocks": 5}, "blocks must divide the 24 rows of a matrix, got 5"),
        ({"rank": 7, "blocks": 4}, r"rank of each of 4 blocks must be in 1..6, got 7"),
    ],
)
def test_what_does_not_fit_is_one_line(settings: dict[str, int], line: str) -> None:
    with pytest.raises(UserError, match=line):
        tl.LaserSVD(**settings).decompose(matrix())


@pytest.mark.parametrize("role", ["q", "o", "in", "out"])
def test_a_model_gets_the_loop_s_matrices(role: str) -> None:
    model = tiny_model("llama")
    roles = RoleMatrices(model.config, parameters_of(model))
    before = roles.read(parameters_of(model), 1, role).clone()
    compress(model, tl.LaserSVD(rank=2, blocks=2, matrices=(role,)), [1])
    after = roles.read(parameters_of(model), 1, role)
    np.testing.assert_allclose(after.detach(), loop(before, 2, 2), atol=1e-5)


def test_a_folder_keeps_its_factors_and_runs_in_them(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    leaf = tl.LaserSVD(rank=2, blocks=2, matrices=("in", "out", "k"))
    target = tmp_path / "small"
    compress_folder(
        FolderTask(source=tmp_path / "model", target=target, compressor=leaf, format="factored")
    )
    dense, factored = load(target, policy="dense"), load(target, policy="always")
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(factored(ids).logits, dense(ids).logits, rtol=0, atol=1e-4)
        one = ids[:, :1]
        torch.testing.assert_close(factored(one).logits, dense(one).logits, rtol=0, atol=1e-4)
    held = [m for m in factored.modules() if isinstance(m, BlockLowRankSite)]
    assert len(held) == 3 * len(dense.model.layers)


def test_a_search_varies_blocks_where_it_is_asked_to(tmp_path: Path) -> None:
    found = run(replace(WANTED, study=tmp_path, force_best=True)).results
    assert found["space"]["choices"]["blocks"] == [1, 4]
    assert found["trials"]["all"] == 2 * 2 * 2
    recipe = yaml.safe_load((tmp_path / "best.yaml").read_text())
    assert recipe["blocks"] in (1, 4)
    assert "blocks" not in json.dumps(Study(replace(WANTED, vary={})).space.describe())
    hybrid = replace(WANTED, mode="hybrid", r1=(64,), r2=(24,), r3=(4,), rho=(0.3,))
    assert {p["blocks"] for p in Study(hybrid).points} == {1, 4}


def test_blocks_are_predicted_by_their_dropped_components() -> None:
    study = Study(WANTED)
    examiner = study.examiner
    points = [study.space.point(values) for values in study.points]
    found = guided(examiner, points)
    gradient, _ = loss_gradient(examiner, frozenset([(3, "in"), (3, "out")]))
    for point in points:
        (role,), blocks = point.settings["matrices"], point.settings["blocks"]
        w_ID = examiner.roles.read(examiner.weights, 3, role).double()
        height = len(w_ID) // blocks
        rank = max(1, int(point.settings["rho"] * min(height, w_ID.shape[1])))
        want = 0.0
        for w_JD, g_JD in zip(w_ID.split(height), gradient[3, role].split(height), strict=True):
            u, s, v = torch.linalg.svd(w_JD, full_matrices=False)
            g = torch.einsum("jr,jd,rd->r", u, g_JD.double(), v)
            want -= float((s * g)[rank:].sum())
        assert found.change[point.key] == pytest.approx(want, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("blocks", [1, 4])
def test_an_outline_has_the_shapes_of_the_factors(blocks: int) -> None:
    strategy = tl.LaserSVD(rank=3, blocks=blocks)
    outline, made = strategy.outline((24, 10), (3,)), strategy.decompose(torch.randn(24, 10))
    assert outline.kind == made.kind
    shapes = [{name: t.shape for name, t in each.tensors().items()} for each in (outline, made)]
    assert shapes[0] == shapes[1]

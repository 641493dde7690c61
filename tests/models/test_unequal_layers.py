"""Layers that differ in sizes and in what they have: asked for one by one, passed over or refused.

The model is planted: a tiny LLaMA whose second layer is said to have no attention, and whose third
has a wider FFN, by a `ModelSpec` put in the place of the one that was read.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny_models import tiny_model

from tensorllm.compression.engine import compress
from tensorllm.compression.plan import plan
from tensorllm.compressors.placing import placed
from tensorllm.compressors.settings import make_compressor
from tensorllm.errors import UserError
from tensorllm.models import ModelSpec, RoleMatrices, parameters_of
from tensorllm.search.space import make_space
from tensorllm.tensors.stacking import FFN, Geometry

WHOLE = Geometry(D=32, H=4, G=2, K=8, F=56, gated=True)
FFN_ONLY = Geometry(
    D=32, H=0, G=0, K=0, F=56, gated=True, shapes=tuple((role, (56, 32)) for role in FFN)
)
WIDER = Geometry(D=32, H=4, G=2, K=8, F=80, gated=True)


@pytest.fixture
def roles() -> RoleMatrices:
    model = tiny_model("llama", num_hidden_layers=3)
    roles = RoleMatrices(model.config, parameters_of(model))
    roles.spec = ModelSpec((WHOLE, FFN_ONLY, WIDER))
    return roles


def jobs(mode: str, roles: RoleMatrices, layers: Sequence[int] | None, **settings: Any) -> Any:
    return placed(make_compressor(mode, settings), roles, layers)


def test_a_layer_without_attention_is_passed_over_and_reported(roles: RoleMatrices) -> None:
    found = jobs("shared-tucker", roles, None, ranks=(4, 4, 2))
    assert [job.site.layers for job in found.jobs] == [(0,), (2,)]
    assert found.layers == (0, 2)
    assert found.missing_roles == {1: ("q", "k", "v", "o")}


def test_the_half_of_a_hybrid_that_is_there_is_compressed(roles: RoleMatrices) -> None:
    found = jobs("hybrid", roles, None, ranks=(4, 4, 2), rho=0.5, matrices=("in",))
    assert [job.site.name for job in found.jobs if 1 in job.site.layers] == ["layers.1.in"]
    assert found.layers == (0, 1, 2)


@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("shared-tucker", {"ranks": (4, 4, 2)}),
        ("laser", {"rho": 0.5, "matrices": ("q", "in")}),
        ("svd", {"rank": 2, "matrices": ("q", "o")}),
        ("hybrid", {"ranks": (4, 4, 2), "rho": 0.5}),
    ],
)
def test_a_named_layer_without_the_matrices_is_refused(
    roles: RoleMatrices, mode: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=r"layer 1 has no matrix .*q.*of layers, 0, 2 have"):
        jobs(mode, roles, [0, 1], **settings)


def test_a_mode_that_takes_what_is_there_takes_it(roles: RoleMatrices) -> None:
    found = jobs("svd", roles, [1], rank=2)
    assert {job.site.roles for job in found.jobs} == {("in",), ("gate",), ("out",)}


def test_where_no_layer_has_it_the_mode_is_refused(roles: RoleMatrices) -> None:
    roles.spec = ModelSpec((FFN_ONLY,) * 3)
    with pytest.raises(UserError, match=r"no matrix q, k, v, o.*no layer has"):
        jobs("shared-tucker", roles, None, ranks=(4, 4, 2))


def test_layers_of_unequal_sizes_are_not_decomposed_as_one_tensor(roles: RoleMatrices) -> None:
    with pytest.raises(UserError, match=r"layers 0 and 2 .* 'in' is \(56, 32\) .* \(80, 32\)"):
        jobs("trawl", roles, [0, 2], rank=4, matrices=("in",), across_layers=True)
    found = jobs("trawl", roles, None, rank=4, matrices=("q",), across_layers=True)
    assert [job.site.layers for job in found.jobs] == [(0, 2)]


def test_sizes_are_those_of_the_layer(roles: RoleMatrices) -> None:
    found = jobs("laser", roles, None, rho=0.5, matrices=("in",))
    shapes = [job.site.shape(roles.spec.geometry(job.site.layers[0])) for job in found.jobs]
    assert shapes == [(56, 32), (56, 32), (80, 32)]


def test_a_search_leaves_those_layers_out(roles: RoleMatrices) -> None:
    assert make_space(roles, "shared-tucker").choices["layer"] == (0, 2)
    assert make_space(roles, "laser").choices["layer"] == (0, 1, 2)
    with pytest.raises(UserError, match="layer 1 has no matrix q"):
        make_space(roles, "shared-tucker", layers=[0, 1])


@pytest.mark.parametrize("layers", [None, [0, 2]])
def test_a_plan_says_what_it_passed_over(roles: RoleMatrices, layers: list[int] | None) -> None:
    found = plan(make_compressor("shared-tucker", {"ranks": (4, 4, 2)}), roles, layers)
    assert found.layers == (0, 2)
    assert (found.missing_roles == {}) == (layers is not None)


def test_heads_of_unequal_width_are_not_stacked() -> None:
    shapes = (("q", (32, 32)), ("k", (16, 32)), ("v", (12, 32)), ("o", (24, 32)))
    uneven = Geometry(D=32, H=4, G=2, K=8, F=0, gated=False, shapes=shapes)
    site = make_compressor("shared-tucker", {"ranks": (4, 4, 2)}).jobs(ModelSpec((uneven,)), [0])[0]
    with pytest.raises(UserError, match=r"'v' is \(12, 32\), not 2 heads of 8 over 32"):
        site.site.shape(uneven)


def test_ratios_count_the_attention_that_is_there() -> None:
    model = tiny_model("llama")
    report = compress(model, make_compressor("shared-tucker", {"ranks": (4, 4, 2)}), [0])
    one = report.spec.geometry(0)
    attention = sum(one.numel(role) for role in "qkvo")
    report.spec = ModelSpec((one, FFN_ONLY))  # as if the other layer had none
    assert report.to_json()["untouched_attention"] == 0
    assert report.ratios()["all_attention"] == report.ratios()["attention_of_edited_layers"]
    report.spec = ModelSpec((one, one))
    assert report.to_json()["untouched_attention"] == attention
    assert torch.isfinite(torch.tensor(report.ratios()["whole_model"]))

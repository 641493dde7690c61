"""Stackings are bijections, and hold what the paper and the authors' code say, number for number.

Shapes: D model width, H query heads, G key/value heads, g = H / G, K head width, I inner width.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from naive_layer import Layer
from tiny_models import TINY, tiny_model
from torch import Tensor

from tensorllm.errors import UserError
from tensorllm.tensors.shared_input import rows_stacking  # its stackings are registered, too
from tensorllm.tensors.stacking import ATTENTION, STACKINGS, Geometry

every_row = pytest.mark.parametrize("name", TINY)
ROLES = {  # the roles each stacking is tried on
    "heads": ATTENTION,
    "official-heads": ATTENTION,
    "head": ("k",),
    "official-head": ("o",),
    "matrix": ("out",),
    "matrices": ("in", "out"),
}
# The others are named by their roles: rows-q-k-v. That of experts: test_experts_stored.py.
OTHERS = [name for name in STACKINGS.names() if name not in ROLES and name != "experts"]
ROLES |= {name: tuple(name.split("-")[1:]) for name in OTHERS}


@cache
def layer_of(name: str) -> Layer:
    return Layer(tiny_model(name))


@every_row
def test_heads_are_the_papers_tensor(name: str) -> None:
    """Per KV head: its g query slices, its key, its value, its g output slices."""
    layer, stacking = layer_of(name), STACKINGS["heads"]
    geo = layer.geo
    g = geo.H // geo.G
    got = stacking.stack([layer.read(role) for role in ATTENTION], geo)
    assert got.shape == (geo.D, geo.K, 2 * g + 2, geo.G)
    for group in range(geo.G):
        mine = range(group * g, (group + 1) * g)
        slices_KD = [layer.head("q", h) for h in mine]
        slices_KD += [layer.head("k", group), layer.head("v", group)]
        slices_KD += [layer.head("o", h) for h in mine]
        for m, slice_KD in enumerate(slices_KD):
            for k in range(geo.K):
                for d in range(geo.D):
                    assert got[d, k, m, group] == slice_KD[k, d]


@every_row
def test_one_matrix_by_heads(name: str) -> None:
    layer = layer_of(name)
    for role in ATTENTION:
        got_DKH = STACKINGS["head"].stack([layer.read(role)], layer.geo)
        assert got_DKH.shape[2] == (layer.geo.H if role in "qo" else layer.geo.G)
        for h in range(got_DKH.shape[2]):
            assert torch.equal(got_DKH[:, :, h], layer.head(role, h).T), role


@every_row
def test_rows_of_matrices_lie_one_below_the_other(name: str) -> None:
    layer = layer_of(name)
    for roles in (("q", "k"), ("v",), ("q", "k", "v"), ("in", "gate")):
        if set(roles) <= set(layer.geo.roles):  # else there is no such matrix here
            matrices = [layer.read(role) for role in roles]
            rows = [row for w_ID in matrices for row in w_ID.tolist()]
            got = STACKINGS[rows_stacking(roles)].stack(matrices, layer.geo)
            assert got.tolist() == rows, roles


@every_row
def test_unstack_undoes_stack(name: str) -> None:
    layer = layer_of(name)
    fitting = [kind for kind, roles in ROLES.items() if set(roles) <= set(layer.geo.roles)]
    assert len(fitting) >= 6
    for kind in fitting:
        undoes(layer, kind)


UNGROUPED = Geometry(D=12, H=3, G=3, K=4, F=12, gated=True)


def random_matrices(kind: str) -> list[Tensor]:
    draws = torch.Generator().manual_seed(0)
    shapes = [UNGROUPED.shape(role) for role in ROLES[kind]]
    return [torch.randn(shape, generator=draws) for shape in shapes]


@pytest.mark.parametrize("kind", ROLES)
def test_each_mode_has_a_name(kind: str) -> None:
    stacking = STACKINGS[kind]
    assert len(stacking.modes) == stacking.stack(random_matrices(kind), UNGROUPED).ndim


@pytest.mark.parametrize("kind", [kind for kind in ROLES if STACKINGS[kind].slices_are_heads])
def test_slices_are_heads(kind: str) -> None:
    """Their norms, sorted by `unstack` as heads of one number, are those of the matrices' heads."""
    stacking, matrices = STACKINGS[kind], random_matrices(kind)
    norms_MG = stacking.stack(matrices, UNGROUPED).square().sum((0, 1))
    one = replace(UNGROUPED, D=1, K=1)
    for got, w_ID in zip(
        stacking.unstack(norms_MG[None, None], one, len(matrices)), matrices, strict=True
    ):
        wanted = w_ID.view(-1, UNGROUPED.K * UNGROUPED.D).square().sum(1)
        torch.testing.assert_close(got.flatten(), wanted)


def undoes(layer: Layer, kind: str) -> None:
    stacking, roles, geo = STACKINGS[kind], ROLES[kind], layer.geo
    if kind.startswith("official") and (geo.G != geo.H or geo.H * geo.K != geo.D):
        with pytest.raises(UserError, match="square, ungrouped"):
            stacking.check(roles, geo)
        return
    stacking.check(roles, geo)
    matrices = [layer.read(role) for role in roles]
    stacked = stacking.stack(matrices, geo)
    assert stacked.numel() == sum(w_ID.numel() for w_ID in matrices)  # no slice is repeated
    # a copy, as a decomposition gives back: contiguous, and no view of what was read
    back = stacking.unstack(stacked.clone(memory_format=torch.contiguous_format), geo, len(roles))
    assert len(back) == len(matrices), kind
    for got_ID, w_ID in zip(back, matrices, strict=True):
        assert torch.equal(got_ID, w_ID), kind


SQUARE: dict[str, tuple[dict[str, Any], tuple[str, str, str, str]]] = {
    "gptj": ({}, tuple(f"transformer.h.0.attn.{p}_proj" for p in ("q", "k", "v", "out"))),
    "llama": (
        {"num_key_value_heads": 4},
        tuple(f"model.layers.0.self_attn.{p}_proj" for p in ("q", "k", "v", "o")),
    ),
    "roberta": (
        {},
        tuple(
            f"roberta.encoder.layer.0.attention.{p}"
            for p in ("self.query", "self.key", "self.value", "output.dense")
        ),
    ),
}


def authors_tensor(weights: list[Tensor], heads: int) -> Tensor:
    """`(hidden, heads, head_dim, 4)`, as the authors' released code views `nn.Linear` weights."""
    q, k, v, o = weights
    hidden = q.shape[0]
    views = [w.reshape(hidden, heads, hidden // heads) for w in (q, k, v, o.T)]
    return torch.stack(views, dim=-1)


@pytest.mark.parametrize("name", SQUARE)
def test_official_layout_is_the_authors(name: str) -> None:
    """Modes 0, 2 and 3 of theirs are the decomposed modes 0, 1 and 2 of ours."""
    sizes, paths = SQUARE[name]
    layer = Layer(tiny_model(name, **sizes))
    weights = [layer.model.get_submodule(path).weight.data for path in paths]
    theirs = authors_tensor(weights, layer.geo.H)
    roles = [layer.read(role) for role in ATTENTION]
    ours = STACKINGS["official-heads"].stack(roles, layer.geo)
    assert torch.equal(ours, theirs.permute(0, 2, 3, 1))
    for m, w_ID in enumerate(roles):
        alone = STACKINGS["official-head"].stack([w_ID], layer.geo)
        assert torch.equal(alone, theirs[..., m].permute(0, 2, 1))
    paper = STACKINGS["heads"].stack(roles, layer.geo)
    assert paper.shape == ours.shape
    assert not torch.equal(paper, ours)


def test_all_heads_need_all_four_roles() -> None:
    geo = layer_of("gptj").geo
    with pytest.raises(UserError, match="needs the roles"):
        STACKINGS["heads"].check(("q", "k", "v"), geo)


def test_whole_matrices_of_unequal_shapes_are_refused() -> None:
    grouped = Geometry(D=32, H=4, G=2, K=8, F=56, gated=True)
    with pytest.raises(UserError, match=r"unequal shapes.*'q': \(32, 32\), 'k': \(16, 32\)"):
        STACKINGS["matrices"].check(("q", "k"), grouped)
    STACKINGS["matrices"].check(("in", "gate", "out"), grouped)

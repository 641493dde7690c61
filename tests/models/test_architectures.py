"""Every architecture: what is read is what the module computes, and writing it back is exact.

Shapes: T tokens, D model width, H query heads, G key/value heads, g = H / G, K head width.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from naive_layer import (
    TOKENS,
    Layer,
    assert_ffn_is_the_modules,
    assert_heads_are_the_modules,
)
from safetensors.torch import load_file, save_file
from tiny_models import EXPERTS, TINY, tiny_config, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from tensorllm.errors import UserError
from tensorllm.models import (
    ARCHITECTURES,
    Architecture,
    RoleMatrices,
    Stored,
    layout_of,
    parameters_of,
)

every_row = pytest.mark.parametrize("name", TINY)


@cache
def untouched(name: str) -> Layer:
    """A layer that no test writes to."""
    return Layer(tiny_model(name))


@torch.no_grad()
def outputs(model: PreTrainedModel) -> Tensor:
    """Logits, or the last hidden state of a base model."""
    return model(TOKENS)[0]


def rewrite(model: PreTrainedModel, weights: dict[str, Tensor], scale: float = 1.0) -> None:
    """Read every role matrix of every layer and write it back, times `scale`."""
    roles = RoleMatrices(model.config, weights)
    for layer in range(roles.layers):
        for role in roles.spec.geometry(0).roles:
            roles.write(weights, layer, role, scale * roles.read(weights, layer, role).clone())


def test_every_architecture_has_a_tiny_model() -> None:
    rows = [*TINY.values(), *EXPERTS.values()]
    assert {row.model_type for row in rows} == set(ARCHITECTURES)


@every_row
def test_tiny_model_and_row_agree(name: str) -> None:
    layer = untouched(name)
    assert layer.roles.task == TINY[name].task
    layer.roles.check_shapes({n: tuple(w.shape) for n, w in layer.weights.items()})
    for role in layer.geo.roles:
        assert layer.read(role).shape == (layer.geo.inner(role), layer.geo.D)


@every_row
def test_heads_are_what_the_module_computes(name: str) -> None:
    assert_heads_are_the_modules(untouched(name))


@every_row
def test_ffn_is_what_the_module_computes(name: str) -> None:
    assert_ffn_is_the_modules(untouched(name))


@every_row
@pytest.mark.parametrize("headless", [False, True], ids=["head", "base"])
def test_read_then_write_keeps_logits_bit_for_bit(name: str, headless: bool) -> None:
    model = tiny_model(name, headless=headless)
    want = outputs(model)
    rewrite(model, parameters_of(model))
    assert torch.equal(outputs(model), want)


@every_row
@pytest.mark.parametrize("headless", [False, True], ids=["head", "base"])
def test_names_in_files_lead_to_the_same_matrices(
    name: str, headless: bool, tmp_path: Path
) -> None:
    """Halved role matrices in the file, reloaded, equal halved ones in memory, bit for bit."""
    model = tiny_model(name, headless=headless)
    before = outputs(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    rewrite(model, stored, scale=0.5)
    save_file(stored, file, metadata={"format": "pt"})
    rewrite(model, parameters_of(model), scale=0.5)
    reloaded = type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert torch.equal(outputs(reloaded), outputs(model))
    assert not torch.allclose(outputs(model), before)


@every_row
def test_one_heads_slice_changes_only_that_heads_output(name: str) -> None:
    layer = Layer(tiny_model(name))
    geo, before = layer.geo, layer.run()
    noise = torch.Generator().manual_seed(1)
    per_head = {"q": geo.H, "k": geo.G, "v": geo.G}
    for role, h in [(role, h) for role, count in per_head.items() for h in range(count)]:
        w_ID = layer.read(role).clone()
        changed_ID = w_ID.clone()
        changed_ID[h * geo.K : (h + 1) * geo.K] += 0.5 * torch.randn(geo.K, geo.D, generator=noise)
        layer.roles.write(layer.weights, 0, role, changed_ID)
        shift_TH = (layer.run()["o"].input - before["o"].input).unflatten(1, (geo.H, geo.K))
        moved = {i for i in range(geo.H) if shift_TH[:, i].abs().max() > 1e-5}
        group = geo.H // per_head[role]
        assert moved == set(range(h * group, (h + 1) * group)), (role, h)
        layer.roles.write(layer.weights, 0, role, w_ID)


@every_row
def test_one_heads_output_slice_adds_only_that_heads_part(name: str) -> None:
    layer = Layer(tiny_model(name))
    geo, before = layer.geo, layer.run()["o"]
    w_ID = layer.read("o").clone()
    for h in range(geo.H):
        rows = slice(h * geo.K, (h + 1) * geo.K)
        delta_ID = torch.zeros_like(w_ID)
        delta_ID[rows] = torch.randn(geo.K, geo.D, generator=torch.Generator().manual_seed(h))
        layer.roles.write(layer.weights, 0, "o", w_ID + delta_ID)
        after = layer.run()["o"]
        assert torch.equal(after.input, before.input)
        want_TD = before.output + before.input[:, rows] @ delta_ID[rows]
        torch.testing.assert_close(after.output, want_TD)


def _mutate(attention: dict[str, Any] | None = None, **fields: Any) -> Callable[..., Architecture]:
    def mutate(row: Architecture) -> Architecture:
        first = replace(row.attention[0], **(attention or {}))
        return replace(row, attention=(first, *row.attention[1:]), **fields)

    return mutate


def _swapped(row: Architecture, one: str, other: str) -> Architecture:
    names = {one: other, other: one}
    return replace(
        row,
        attention=tuple(
            replace(stored, roles=tuple(names.get(role, role) for role in stored.roles))
            for stored in row.attention
        ),
    )


WRONG_ROWS = {  # plausible slips in a row, each of which still fits the stored shapes
    "gpt_neox, not grouped": ("gpt_neox", _mutate({"grouped": False})),
    "falcon, not grouped": ("falcon-grouped", _mutate({"grouped": False})),
    "falcon, role by role": ("falcon-heads", _mutate({"grouped": False})),
    "phi3, grouped": ("phi3", _mutate({"grouped": True})),
    "phi3, values before keys": ("phi3", _mutate({"roles": ("q", "v", "k")})),
    "gptj, query for key": ("gptj", _mutate({"path": "attn.k_proj"})),
    "gptj, queries and keys swapped": ("gptj", lambda row: _swapped(row, "q", "k")),
    "gptj, keys and values swapped": ("gptj", lambda row: _swapped(row, "k", "v")),
    "phi3, in before gate": (
        "phi3",
        _mutate(
            ffn=(Stored("mlp.gate_up_proj", ("in", "gate")), Stored("mlp.down_proj", ("out",)))
        ),
    ),
    "gpt2, output not transposed": (
        "gpt2",
        lambda row: replace(row, attention=(row.attention[0], Stored("attn.c_proj", ("o",)))),
    ),
}


@pytest.mark.parametrize("slip", WRONG_ROWS)
def test_a_wrong_row_is_caught(slip: str) -> None:
    """The comparison with the real module is sharp enough to see these."""
    name, mutate = WRONG_ROWS[slip]
    layer = Layer(tiny_model(name))
    row = mutate(ARCHITECTURES[layer.config.model_type])
    layer.roles.layout = layout_of(layer.config, row)
    layer.roles.check_shapes({n: tuple(w.shape) for n, w in layer.weights.items()})
    check = assert_ffn_is_the_modules if "gate" in slip else assert_heads_are_the_modules
    with pytest.raises(AssertionError, match="not close"):
        check(layer)


@pytest.mark.parametrize("slip", WRONG_ROWS)
def test_a_wrong_row_is_refused_where_it_is_used(slip: str) -> None:
    """By the verification on a tiny model, which a row from outside goes through."""
    name, mutate = WRONG_ROWS[slip]
    row = replace(mutate(ARCHITECTURES[TINY[name].model_type]), tested=False)
    with pytest.raises(UserError, match=r"row of .* is wrong: .*"):
        layout_of(tiny_config(name), row)


@every_row
def test_what_the_rows_say_is_what_structure_finds(name: str) -> None:
    config = tiny_config(name)
    row = ARCHITECTURES[config.model_type]
    by_row, verified = layout_of(config), layout_of(config, replace(row, tested=False))
    assert verified.spec == by_row.spec
    config.model_type = f"unknown_{config.model_type}"
    found = layout_of(config)
    assert found.by == "structure"
    assert found.spec == by_row.spec
    for layer, other in zip(found.layers, by_row.layers, strict=True):
        assert layer.path == other.path
        assert [(s.path, s.conv1d) for s in layer.stored] == [
            (s.path, s.conv1d) for s in other.stored
        ]


def test_reading_is_a_view_where_it_can_be_one() -> None:
    layer = untouched("gpt2")
    for role in layer.geo.roles:
        stored = layer.weights[layer.roles.name(0, role)]
        assert layer.read(role).untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()


def test_writing_rounds_to_the_stored_dtype() -> None:
    model = tiny_model("falcon-grouped").to(torch.bfloat16)
    weights = parameters_of(model)
    roles = RoleMatrices(model.config, weights)
    w_ID = torch.full((roles.spec.geometry(0).inner("k"), roles.spec.geometry(0).D), 1 / 3)
    roles.write(weights, 1, "k", w_ID)
    assert torch.equal(roles.read(weights, 1, "k"), w_ID.to(torch.bfloat16))


def test_writing_a_transposed_matrix_is_refused() -> None:
    layer = Layer(tiny_model("llama"))
    with pytest.raises(AssertionError, match=r"in must be \(56, 32\), got \(32, 56\)"):
        layer.roles.write(layer.weights, 0, "in", layer.read("in").T)

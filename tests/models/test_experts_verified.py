"""What was found of experts by structure is tried on a tiny model: wrong readings are caught."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from naive_layer import TOKENS
from safetensors.torch import load_file
from tiny_models import EXPERTS, tiny_model

from tensorllm.models.experts import Experts
from tensorllm.models.layout import layout_of
from tensorllm.models.mixture import Mixture, mixture_of
from tensorllm.models.verify import Mismatch
from tensorllm.models.verify_experts import check_files, check_mixture, randomise_experts

every_mixture = pytest.mark.parametrize("name", EXPERTS)
LAYER = 1


def parts(name: str) -> tuple[Any, str, Any, Mixture]:
    """A tiny model, the path of a layer, its module, its mixture."""
    model = tiny_model(name)
    path = layout_of(model.config).layers[LAYER].path
    block = model.get_submodule(path)
    found = mixture_of(block, model.config.hidden_size)
    assert found is not None
    randomise_experts(block, found)
    return model, path, block, found


def check(model: Any, block: Any, found: Mixture, **wrong: Any) -> None:
    call = functools.partial(model, TOKENS, use_cache=False)
    check_mixture(call, block, replace(found, experts=replace(found.experts, **wrong)))


@every_mixture
def test_what_is_found_holds(name: str, tmp_path: Path) -> None:
    model, path, block, found = parts(name)
    check(model, block, found)
    model.save_pretrained(tmp_path)
    check_files(model, path, found.experts, load_file(tmp_path / "model.safetensors"))


@every_mixture
def test_rows_that_take_turns_or_do_not_are_told_apart(name: str) -> None:
    model, _, block, found = parts(name)
    with pytest.raises(Mismatch):
        check(model, block, found, interleaved=not found.experts.interleaved)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_gate_that_is_called_in_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, block, found = parts(name)
    order = Experts.inputs_in_order
    swapped = property(lambda self: tuple(reversed(order.fget(self))))
    monkeypatch.setattr(Experts, "inputs_in_order", swapped)
    with pytest.raises(Mismatch):
        check(model, block, found)


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("mixtral", "experts.2.w1.weight", "experts.2.w3.weight"),
        ("qwen3_moe", "experts.0.gate_proj.weight", "experts.0.up_proj.weight"),
        ("olmoe", "experts.1.down_proj.weight", "experts.3.down_proj.weight"),
    ],
)
def test_files_that_name_matrices_otherwise_are_caught(
    name: str, one: str, other: str, tmp_path: Path
) -> None:
    model, path, _, found = parts(name)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    a, b = (
        next(n for n in stored if f"layers.{LAYER}." in n and n.endswith(e)) for e in (one, other)
    )
    stored[a], stored[b] = stored[b], stored[a]
    with pytest.raises(Mismatch, match="another matrix"):
        check_files(model, path, found.experts, stored)
    stored[b] = stored.pop(a)  # as it was; the other one is missing
    with pytest.raises(Mismatch, match="hold no"):
        check_files(model, path, found.experts, stored)


def test_an_expert_that_is_given_other_tokens_is_caught() -> None:
    """A router whose numbers are off by one: each product is right, its place is not."""
    model, _, block, found = parts("qwen3_moe")
    module = block.get_submodule(found.experts.path)
    plain = type(module).forward

    def off_by_one(x: Any, index: Any, weights: Any) -> Any:
        return plain(module, x, (index + 1) % found.experts.count, weights)

    module.forward = off_by_one
    with torch.no_grad(), pytest.raises(Mismatch):
        check(model, block, found)

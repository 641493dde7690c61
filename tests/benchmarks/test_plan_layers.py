"""From a measured layer to whole models: the arithmetic, by hand and with planted costs."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig


def fits(fixed: float, per_token: float, tokens: int) -> dict[str, Any]:
    return {
        "tokens": tokens,
        "fit_cpu_s": fixed + per_token * tokens,
        "forward_cpu_s": 0.01 * tokens,
        "peak_bytes": 9.0e9,
        "imports_bytes": 1.0e9,
    }


def test_a_planted_cost_is_found_and_grows_as_it_should():
    from plan_layers import MODELS, measured

    cost = measured(fits(300.0, 0.05, 4096), fits(300.0, 0.05, 16384))
    assert cost.fixed == pytest.approx(300)
    assert cost.per_token == pytest.approx(0.05)
    assert (cost.forward, cost.memory) == (pytest.approx(0.01), 8e9)
    assert cost.seconds(1000) == pytest.approx(350)
    same, _, largest = (cost.of(model) for model in MODELS)
    assert same == cost
    more = (2 * 16384 * 128 * 136 + 3 * 16384 * 53248) / (4 * 4096**2 + 3 * 4096 * 11008)
    assert largest.fixed == pytest.approx(300 * 64)
    assert largest.per_token == pytest.approx(0.05 * more)
    assert largest.memory == pytest.approx(8e9 * more)


def test_noise_makes_no_cost_below_nothing():
    from plan_layers import measured

    assert measured(fits(0.0, 0.05, 4096), fits(1.0, 0.05, 16384)).fixed == 0


def test_a_server_is_faster_at_products_than_at_decompositions():
    from plan_layers import Cost, server_seconds
    from plan_machines import CORE_SHARE, CORES, EIGEN_SPEEDUP

    assert server_seconds(Cost(8.0, 0.0, 0, 0), 99) == pytest.approx(4 / EIGEN_SPEEDUP)
    assert server_seconds(Cost(0.0, 1.0, 0, 0), 99) == pytest.approx(99 / (CORES * CORE_SHARE))


def test_numbers_are_those_of_the_models():
    import torch
    from plan_layers import MODELS

    for model in MODELS:
        g = model.geometry
        config = LlamaConfig(
            hidden_size=g.D, intermediate_size=g.F, num_attention_heads=g.H, vocab_size=8,
            num_key_value_heads=g.G, head_dim=g.K, num_hidden_layers=1,
        )  # fmt: skip
        with torch.device("meta"):
            layer = AutoModelForCausalLM.from_config(config).model.layers[0]
        matrices = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
        assert matrices == model.numbers


def test_the_table_has_a_row_per_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import plan_layers

    monkeypatch.setattr(plan_layers, "ROOT", tmp_path)
    assert "Not measured yet" in plan_layers.layers_table(lambda path: None)
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "results" / "scaling_fit.json").write_text(json.dumps({}))
    found = {
        "scaling_fit/widths/rows/4096": fits(300.0, 0.05, 4096),
        "scaling_fit/layer": fits(300.0, 0.05, 16384),
    }
    lines = plan_layers.layers_table(found.__getitem__).splitlines()
    assert len(lines) == 2 + len(plan_layers.MODELS)
    first = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert first[0] == "LLaMA-2-7B, 32 layers"
    assert first[2] == "3.7 h"  # 300 s and 262,144 tokens
    assert first[4] == "2.56"  # 13,407 s over two passes of 2,621 s each

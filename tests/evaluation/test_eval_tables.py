"""The tables of evaluations at 80 columns: every figure whole, every line within the width."""

from typing import Any

import pytest
from printed import shown
from tiny_models import tiny_model

import tensorllm as tl
from tensorllm.compressors import COMPRESSORS, PlainSVD
from tensorllm.reporting.page.figures import smaller
from tensorllm.reporting.reproduction import rehearsal_table, reproduction_tables
from tensorllm.reporting.scores import comparison_tables, score_tables
from tensorllm.reporting.search import _trials, search_tables
from tensorllm.reporting.tables import duration, result_tables
from tensorllm.shown import SHOWN

WIDEST = {"accuracy": 100.0, "loss": 12.3456, "perplexity": 98765.43} | dict.fromkeys(
    ("top_1", "top_5", "top_10", "token_f1"), 100.0
)
SPREAD = {"accuracy": [98.76, 100.0], "loss": [11.1111, 13.3333], "perplexity": [1.5, 123456.78]}
COMPARISON = {
    "accuracy": {"difference": -100.0, "interval": [-99.99, -88.88]},
    "loss": {"difference": -10.0, "interval": [-10.1234, -10.0123]},
    "loss_p": 0.001,
    "wrong_to_right": 1234,
    "right_to_wrong": 4321,
    "mcnemar_p": 0.034,
    "examples": 16257,
}
RESULTS = {
    "model": "../shared/models/a-rather-long-name",
    "compressor": {"mode": "per-matrix-tucker"},
    "dataset": "bios_profession",
    "split": "test",
    "protocol": "strict",
    "examples": 16257,
    "dtype": "bfloat16",
    "metrics": WIDEST,
    "intervals": SPREAD,
    "notes": ["answers counted by the tokenizer of meta-llama/Llama-2-7b-hf"],
    "truncated_prompts": 3,
}


def test_one_evaluation():
    text = shown(score_tables(RESULTS))
    for name, metric in SHOWN.items():
        line = next(line for line in text.splitlines() if metric.title in line)
        assert f"{WIDEST[name]:.{metric.digits}f}" in line
    assert "1.50…123456.78" in text
    assert "3 prompts lost their beginning to fit the context" in text
    assert "answers counted by the tokenizer" in text


def test_before_and_after_in_one_table():
    before = {"metrics": {**WIDEST, "accuracy": 0.12}, "intervals": SPREAD}
    text = shown(score_tables({**RESULTS, "before": before, "comparison": COMPARISON}))
    line = next(line for line in text.splitlines() if line.lstrip().startswith("accuracy"))
    assert line.split()[-4:] == ["0.12", "100.00", "+99.88", "-99.99…-88.88"]
    joined = " ".join(text.split())
    assert "wrong to right 1234, right to wrong 4321 of 16257: McNemar p = 0.034" in joined
    assert "loss, paired bootstrap p ≤ 0.001" in joined  # 2,000 resamples tell no smaller one


def test_one_example_is_one():
    text = " ".join(shown(score_tables({**RESULTS, "examples": 1})).split())
    assert " 1 example, " in text


def test_two_folders_name_what_changed():
    row = {"prompt": "word " * 60 + "end of it", "answer": "Paris", "generation": "in\nRome"}
    changes: dict[str, Any] = {
        "before": RESULTS,
        "after": RESULTS,
        "metrics": {"before": WIDEST, "after": WIDEST},
        "comparison": COMPARISON,
        "wrong_to_right": [row] * 30,
        "right_to_wrong": [{**row, "answer": "Berlin"}],
    }
    text = " ".join(shown(comparison_tables(changes)).split())
    assert "wrong, now right (30)" in text
    assert "right, now wrong (1)" in text
    for word in ("Paris", "Berlin", "in Rome", "end of it"):
        assert word in text
    assert "that both have" not in text
    changes["after"] = {**RESULTS, "examples": 20000}
    text = " ".join(shown(comparison_tables(changes)).split())
    assert "over the 16,257 examples that both have" in text


def outcome(**changed: Any) -> dict[str, Any]:
    return {
        "dataset": "bios_profession",
        "cell": "per-matrix-tucker-k (official)",
        "layers": [27],
        "layers_origin": "searched",
        "published": {"accuracy": 100.0, "loss": 10.99},
        "measured": {"accuracy": 0.0, "loss": 12.0},
        **changed,
    }


def test_measured_beside_published():
    rows = [outcome(), outcome(cell="original", layers=None, layers_origin="", measured=None)]
    text = shown(reproduction_tables(rows))
    line = next(line for line in text.splitlines() if "per-matrix" in line)
    assert line.split() == [
        *("per-matrix-tucker-k", "(official)", "27*"),
        *("100.00", "0.00", "-100.00", "10.99", "12.00", "+1.01"),
    ]
    line = next(line for line in text.splitlines() if "original" in line)
    assert line.split() == ["original", "100.00", "-", "-", "10.99", "-", "-"]
    assert "* searched: this layer was never published" in " ".join(text.split())


def test_the_plan_says_what_is_missing():
    cell = {
        "dataset": "bios_profession",
        "cell": "per-matrix-tucker-k (official)",
        "searched": True,
        "examples": 15378,
        "counted": False,
        "seconds": 36_000.0,
        "peak_bytes": 2**37,
    }
    plan = {
        "hub": "EleutherAI/gpt-j-6b",
        "cells": [cell, {**cell, "dataset": "fever", "counted": True, "searched": False}],
        "seconds": 1e7,
        "float32_seconds": 1e6,
        "missing": ["weights: hf download EleutherAI/gpt-j-6b --local-dir FOLDER"],
    }
    text = shown(rehearsal_table(plan))
    found = [line.split() for line in text.splitlines() if "per-matrix" in line]
    name = ["per-matrix-tucker-k", "(official)"]
    assert found[0] == [*name, "to", "search", "~15378", "10.0", "h", "128.00", "GiB"]
    assert found[1] == [*name, "15378", "10.0", "h", "128.00", "GiB"]
    for word in ("116 days", "--dtype fp32 is faster here: 12 days", "- weights: hf download"):
        assert word in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3, "3 s"), (90, "1.5 min"), (7200, "2.0 h"), (864_000, "10 days"), (2e8, "2,315 days")],
)
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text


def test_a_trial_of_many_settings_loses_no_digit_in_80_columns():
    params = {"layer": 27, "R1": 1920, "R2": 120, "R3": 4, "rho": 0.54832, "matrices": "in+out"}
    scores = {"accuracy": 71.46, "loss": 11.1234, "ratio": 247.31, "relative_error": 0.9335}
    text = shown(_trials([{"trial": 100, "params": params, **scores}], [], "accuracy"))
    for figure in ("1920", "0.5483", "in+out", "71.46", "11.1234", "247.31", "0.9335"):
        assert figure in text.split()


def found_by_a_search(ratio: float) -> dict[str, Any]:
    scores = {"accuracy": 50.0, "loss": 1.0, "ratio": ratio, "relative_error": 0.1}
    found = {"validation": scores, "test": scores}
    return {
        "model": "demo",
        "dataset": "demo",
        "protocol": "strict",
        "objective": "accuracy",
        "metric": "accuracy",
        "trials": dict.fromkeys(("examined", "pruned", "infeasible", "failed"), 0),
        "stop_level": 0.001,
        "validation_examples": 100,
        "top": [],
        "steps": [{}],
        "selection": None,
        "original": found,
        "winner": found,
    }


@pytest.mark.parametrize("ratio", [0.87, 1.2])
def test_a_winner_that_is_no_smaller_is_told(ratio: float):
    results = found_by_a_search(ratio)
    text = " ".join(shown(search_tables(results)).split())
    assert ("(ratio 0.87): it is no smaller; --min-ratio 1" in text) is (ratio < 1)
    assert smaller(ratio)[1] == ("more parameters" if ratio < 1 else "fewer parameters")
    assert smaller(0.5)[0] == smaller(2.0)[0] == 2


def test_a_composition_is_told_edit_by_edit_and_the_gain_with_its_luck():
    results = found_by_a_search(2.0)
    edits = [
        {"trial": 3, "mode": "laser", "layers": [3], "rho": 0.01, "matrices": ["in"]},
        {"trial": 9, "mode": "shared-tucker", "layers": [0, 1], "ranks": [64, 16, 4]},
    ]
    scores = [{"accuracy": 62.5, "loss": 0.8312}, {"accuracy": 71.25, "loss": 0.7644}]
    results["steps"] = [{**e, "validation": s} for e, s in zip(edits, scores, strict=True)]
    results["trials"] = {"examined": 40, "pruned": 12, "infeasible": 0, "failed": 2}
    results["selection"] = {"gain": 42.92, "optimism": -0.04, "interval": [-0.4, 3.1]}
    results |= {"objective": "pareto", "several_objectives": True, "front": []}
    lines = shown(search_tables(results)).splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines]
    assert ["1", "3", "laser:", "rho", "0.01;", "matrices", "in", "62.50", "0.8312"] in rows
    assert ["2", "0,1", "shared-tucker:", "ranks", "64,16,4", "71.25", "0.7644"] in rows
    text = " ".join(" ".join(lines).split())
    assert "12 pruned early (the best one with probability at most 0.001), 2 failed" in text
    assert "gain on validation +42.9 points, of which selection alone is worth 0.0" in text
    assert "(95 % of resamples -0.4 to 3.1)" in text
    assert "no trial beats these in both" in text


def test_many_sites_are_grouped_and_the_worst_shown():
    model = tiny_model("llama", num_hidden_layers=8)
    report = tl.compress(model, PlainSVD(rank=3))
    assert len(report.sites) > 24
    lines = shown(result_tables(report)).splitlines()
    assert max(map(len, lines)) <= 80
    (row,) = [line for line in lines if line.split()[:2] == ["gate", "8"]]
    errors = [s.relative_error for s in report.sites if s.name.endswith(".gate")]
    assert f"{min(errors):.3f} to {max(errors):.3f}" in row
    worst = max(report.sites, key=lambda s: s.relative_error)
    assert sum(line.lstrip().startswith("layers.") for line in lines) == 5
    assert any(worst.name in line for line in lines)


def test_experts_are_no_layers_of_the_same_name_and_no_figure_is_broken():
    model = tiny_model("qwen3_moe", num_hidden_layers=6, mlp_only_layers=[0])
    matrices = ("in", "out", "experts.in", "experts.out")
    report = tl.compress(model, PlainSVD(rank=3, matrices=matrices))
    rows = [line.split() for line in shown(result_tables(report)).splitlines()]
    experts = model.config.num_experts
    assert ["in", "1"] in [row[:2] for row in rows]
    assert ["experts.in", str(5 * experts)] in [row[:2] for row in rows]


def test_a_tensor_of_experts_fits_80_columns():
    model = tiny_model("qwen3_moe")
    report = tl.compress(model, COMPRESSORS["expert-tucker"](kept=0.5))
    lines = shown(result_tables(report)).splitlines()
    assert max(map(len, lines)) <= 80
    for site in report.sites:
        (row,) = [line.split() for line in lines if line.split()[:1] == [label_of(site.name)]]
        assert f"{site.relative_error:.4f}" in row
        assert f"{site.ratio:.2f}" in row


def label_of(name: str) -> str:
    return name.replace("experts.in-experts.gate", "experts.in-gate")

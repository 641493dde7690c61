"""Covariances of large order are factored in float32: every mode gives what float64 gives."""

from typing import Any

import pytest
import torch
from calibration_text import text
from tiny_models import tiny_model

import tensorllm as tl
from tensorllm.calibration import fit
from tensorllm.compressors.settings import make_compressor

MODES: dict[str, dict[str, Any]] = {
    "svd": {"kept": 0.5},
    "asvd": {"kept": 0.5},
    "svd-llm": {"kept": 0.5},
    "svd-llm-sequential": {"kept": 0.5},
    "aa-svd": {"kept": 0.5},
    "modegpt": {"kept": 0.5},
    "activation-tucker": {"target_ratio": 1.5},
    "activation-hybrid": {"target_ratio": 1.5, "refit_epochs": 1},
}


def errors(mode: str) -> list[float]:
    model = tiny_model("llama")
    wanted = make_compressor(mode, MODES[mode])
    if wanted.needs == "weights":
        report = tl.compress(model, wanted)
    else:
        report = tl.compress(model, fit(wanted, model, text()))
    for parameter in model.parameters():
        assert torch.isfinite(parameter).all()
    return [site.relative_error for site in report.sites]


@pytest.mark.parametrize("mode", MODES)
def test_orders_from_which_float32_is_used(mode: str, monkeypatch: pytest.MonkeyPatch):
    exact = errors(mode)
    monkeypatch.setattr("tensorllm.tensors.eigen.LARGE", 4)
    narrow = errors(mode)
    assert max(exact) > 0.01
    if mode.startswith("activation"):  # a rank may fall on either side of a rounding error
        assert sum(narrow) / len(narrow) == pytest.approx(sum(exact) / len(exact), rel=0.2)
    elif mode == "aa-svd":  # what it does along directions without data is arbitrary, and large
        assert narrow[:3] == pytest.approx(exact[:3], rel=0.1)
    else:
        assert narrow == pytest.approx(exact, rel=0.02)

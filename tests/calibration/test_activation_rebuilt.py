"""What a fitted output projection gives is made of what the original's gave: no run is needed.

Shapes: B sequences, T positions, D model width.
"""

import pytest
import torch
from calibration_text import text
from tiny_models import tiny_model
from torch import nn

from tensorllm.calibration import fit
from tensorllm.calibration.context import Context
from tensorllm.calibration.module_cache import rebuild_of
from tensorllm.compressors import ActivationHybrid

WANTED = ActivationHybrid(target_ratio=1.5, refit_epochs=0, narrowing=False)


def fitted(model: nn.Module) -> dict[str, torch.Tensor]:
    found = fit(WANTED, model, text())
    return {site.name: found.factors(site).dense() for site in found.sites}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj", "opt", "bert"])
def test_the_fit_is_that_of_running_the_layer_again(
    name: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(name)
    model.set_attn_implementation(attention)
    short = fitted(model)
    monkeypatch.setattr(Context, "_rebuild", lambda self, name, now: None)
    long = fitted(model)
    assert list(short) == list(long)
    for site, w in long.items():
        assert torch.allclose(short[site], w, atol=2e-4 * float(w.abs().max())), site


def test_nothing_runs_twice_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every projection compressed, attention and FFN of the compressed layer run once."""
    model = tiny_model("llama")
    model.set_attn_implementation("sdpa")
    rebuilt: list[str] = []
    plain = Context._rebuild

    def noted(self: Context, name: str, now: object) -> None:
        plain(self, name, now)
        rebuilt.append(name)
        assert self._enclosing[name].filled

    monkeypatch.setattr(Context, "_rebuild", noted)
    ran: list[str] = []
    monkeypatch.setattr(Context, "outputs", watched_outputs(Context.outputs, ran))
    fitted(model)
    assert set(rebuilt) == {"o", "out"}
    assert not ran


def watched_outputs(plain, ran: list[str]):
    """`Context.outputs`, noting the linear modules that run for it."""

    def outputs(self: Context):
        handles = [
            module.register_forward_hook(lambda *_: ran.append("linear"))
            for module in self.compressed.block.modules()
            if isinstance(module, nn.Linear)
        ]
        yield from plain(self)
        for handle in handles:
            handle.remove()

    return outputs


def test_what_a_module_returns_is_recognised_by_the_tensor_inside() -> None:
    given, other = torch.ones(2), torch.ones(2)
    alone, first = rebuild_of(given, given), rebuild_of((given, None), given)
    assert alone is not None
    assert alone(other) is other
    assert first is not None
    assert first(other) == (other, None)
    assert rebuild_of(other, given) is None
    assert rebuild_of((given, other), given) is None  # attention's weights would be lost
    assert rebuild_of(given, None) is None

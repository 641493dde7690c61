"""`tensorllm search-ranks --objective energy`: ranks from the spectra alone, no data."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorllm.checkpoint.source import resolve
from tensorllm.compression.model import Progress, quiet
from tensorllm.compression.spectra import MODES, attention_spectra
from tensorllm.errors import UserError
from tensorllm.search.energy import Allocation, Spectra, by_energy, by_noise_edge, by_ratio

SHARE = 0.9  # of the energy of each mode, where no ratio is asked for
STEPS = 40  # of the bisection
EDGE = 1e-5  # away from a share at which a rank jumps: spectra are rounded


@dataclass(frozen=True, slots=True)
class EnergyResult:
    """Ranks per layer by each rule; `recipe` uses the energy rule's share for all layers."""

    results: dict[str, Any]
    recipe: str

    def to_json(self) -> dict[str, Any]:
        return {**self.results, "recipe": self.recipe}


def run_energy(
    model: str,
    *,
    mode: str = "shared-tucker",
    layers: tuple[int, ...] | None = None,
    min_ratio: float | None = None,
    study: Path | None = None,
    revision: str | None = None,
    progress: Progress = quiet,
) -> EnergyResult:
    """Ranks of each layer's attention: an energy share, the noise edge, and, where a ratio is
    asked for, its cheapest allocation.

    Raises:
        UserError: another mode than shared-tucker, or a ratio that cannot be reached.
    """
    if mode != "shared-tucker":
        raise UserError(f"--objective energy searches the mode shared-tucker, got {mode!r}")
    import torch
    import yaml

    source = resolve(model, revision)
    found = attention_spectra(source.folder, layers, progress=progress)
    spectra = [
        {m: torch.tensor(layer.spectra[name]) for m, name in MODES.items()} for layer in found
    ]
    shape, numbers = found[0].shape, [layer.layer for layer in found]
    share = SHARE if min_ratio is None else share_for(spectra, shape, min_ratio)
    rules = {f"energy {share:.4g}": by_energy(spectra, shape, share)}
    rules["noise edge"] = by_noise_edge(spectra, shape)
    if min_ratio is not None:
        rules["marginal error"] = by_ratio(spectra, shape, min_ratio)
    results = {
        "model": source.name,
        "layers": numbers,
        "rules": {name: _plain(rule) for name, rule in rules.items()},
    }
    recipe = {
        "model": model,
        "mode": mode,
        "layers": numbers,
        "energy": share,
        "origin": "searched",
        "source": "tensorllm search-ranks --objective energy; no data was used",
    }
    text = yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, width=100)
    if study is not None:
        study.mkdir(parents=True, exist_ok=True)
        (study / "best.yaml").write_text(text)
    return EnergyResult(results, text)


def share_for(spectra: Sequence[Spectra], shape: Sequence[int], ratio: float) -> float:
    """The largest energy share whose ranks meet the ratio, by bisection."""
    by_ratio(spectra, shape, ratio)  # refuses what cannot be reached
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        meets = by_energy(spectra, shape, middle).ratio >= ratio
        low, high = (middle, high) if meets else (low, middle)
    return max(low - EDGE, EDGE)


def _plain(rule: Allocation) -> dict[str, Any]:
    return {
        "ranks": [[ranks[mode] for mode in MODES] for ranks in rule.ranks],
        "ratio": rule.ratio,
        "error_bound": rule.error_bound,
    }

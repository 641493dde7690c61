"""`tensorllm search-ranks --objective energy`: ranks from the spectra alone, no data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorllm.checkpoint.source import resolve
from tensorllm.commands.allocate import ANY, at_any_ranks, energies
from tensorllm.commands.plugins import load_plugins
from tensorllm.compression.units import open_checkpoint
from tensorllm.compressors import COMPRESSORS
from tensorllm.errors import UserError
from tensorllm.progress import Progress, quiet
from tensorllm.recipes import per_layer_recipe
from tensorllm.search.energy import (
    Allocation,
    by_energy,
    by_energy_at,
    by_noise_edge,
    by_ratio,
    edits_of,
)
from tensorllm.search.sites import SiteEnergy

SHARE = 0.9  # of the energy of each mode, where no ratio is asked for


@dataclass(frozen=True, slots=True)
class EnergyResult:
    """Ranks of each site by each rule; `recipe` holds those of the last one told there."""

    results: dict[str, Any]
    recipe: str

    def to_json(self) -> dict[str, Any]:
        return {**self.results, "recipe": self.recipe}


def run_energy(
    model: str,
    *,
    mode: str = "shared-tucker",
    settings: Mapping[str, Any] | None = None,
    layers: tuple[int, ...] | None = None,
    min_ratio: float | None = None,
    study: Path | None = None,
    revision: str | None = None,
    plugins: Sequence[str] = (),
    progress: Progress = quiet,
) -> EnergyResult:
    """Ranks of every layer and matrix: an energy share, the noise edge, and, where a ratio is
    asked for, the allocation with the least error.

    Args:
        settings: other fields of the mode, such as `layout` or `matrices`.
        plugins: modules to import first.

    Raises:
        UserError: a mode whose ranks spectra do not tell, or a ratio that cannot be reached.
    """
    load_plugins(plugins)
    name = COMPRESSORS.name_of(COMPRESSORS[mode])
    if name not in ANY:
        raise UserError(f"--objective energy is for the modes {', '.join(ANY)}, got {mode!r}")
    source = resolve(model, revision)
    _, roles = open_checkpoint(source.folder)
    compressor = at_any_ranks(name, settings or {}, roles)
    sites = energies(source.folder, compressor, layers, progress=progress)
    rules = _rules(sites, min_ratio)
    chosen = "marginal error" if min_ratio is not None else next(iter(rules))
    results = {
        "model": source.name,
        "mode": name,
        "sites": [site.job.site.name for site in sites],
        "rules": {rule: _plain(found) for rule, found in rules.items()},
        "chosen": chosen,
    }
    text = per_layer_recipe(
        edits_of(sites, rules[chosen]),
        model=model,
        origin="searched",
        source=f"tensorllm search-ranks --objective energy, rule {chosen}; no data was used",
    )
    if study is not None:
        study.mkdir(parents=True, exist_ok=True)
        (study / "best.yaml").write_text(text)
    return EnergyResult(results, text)


def _rules(sites: Sequence[SiteEnergy], ratio: float | None) -> dict[str, Allocation]:
    if ratio is None:
        return {f"energy {SHARE:g}": by_energy(sites, SHARE), "noise edge": by_noise_edge(sites)}
    share, found = by_energy_at(sites, ratio)
    return {
        f"energy {share:.4g}": found,
        "noise edge": by_noise_edge(sites),
        "marginal error": by_ratio(sites, ratio),
    }


def _plain(rule: Allocation) -> dict[str, Any]:
    return {
        "ranks": [None if ranks is None else list(ranks) for ranks in rule.ranks],
        "ratio": rule.ratio,
        "error": rule.error,
    }

"""The spectra of a checkpoint's attention, and the ranks that would keep given energies."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from tensorllm.compression.cost import decomposition_seconds, gemm_speed
from tensorllm.compression.units import open_checkpoint
from tensorllm.compressors import Site
from tensorllm.progress import Progress, quiet
from tensorllm.tensors.ranks import ranks_for_energy, tucker_parameters
from tensorllm.tensors.stacking import ATTENTION
from tensorllm.tensors.tucker import spectra
from tensorllm.weights import stacked

MODES = {0: "width", 1: "head_dim", 2: "matrices"}


@dataclass(frozen=True, slots=True)
class LayerSpectra:
    """One layer's attention tensor (D, K, 2g+2, G).

    Attributes:
        spectra: mode name -> singular values of its unfolding, largest first.
        effective_ranks: mode name -> effective rank of the spectrum (see `_effective_rank`).
        plans: energy share -> ranks that keep it in every mode, and their compression ratio.
        seconds: predicted for one decomposition of this tensor on this machine.
    """

    layer: int
    shape: tuple[int, ...]
    norm: float
    spectra: dict[str, list[float]]
    effective_ranks: dict[str, float]
    plans: dict[str, dict[str, Any]]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def attention_spectra(
    folder: Path,
    layers: Iterable[int] | None = None,
    energies: Iterable[float] = (0.5, 0.9, 0.99),
    progress: Progress = quiet,
) -> list[LayerSpectra]:
    """Spectra of each layer's attention, read layer by layer from the folder's files."""
    checkpoint, roles = open_checkpoint(folder)
    wanted = roles.check_layers(tuple(range(roles.layers)) if layers is None else tuple(layers))
    speed = gemm_speed()
    out = []
    for index, layer in enumerate(wanted):
        progress(index, len(wanted), f"layer {layer}")
        site = Site((layer,), ATTENTION, "heads")
        names = {roles.name(*matrix) for matrix in site.matrices}
        weights = checkpoint.read(sorted(names))
        w = stacked(site, roles, weights)
        out.append(_of_layer(layer, w, tuple(energies), speed))
    progress(len(wanted), len(wanted), "done")
    return out


def _of_layer(layer: int, w: Tensor, energies: tuple[float, ...], speed: float) -> LayerSpectra:
    by_mode = spectra(w, tuple(MODES))
    plans = {}
    for share in energies:
        ranks = ranks_for_energy(by_mode, share)
        kept = tucker_parameters(tuple(w.shape), ranks)
        plans[f"{share:g}"] = {
            "ranks": [ranks[mode] for mode in MODES],
            "ratio": prod(w.shape) / kept,
        }
    return LayerSpectra(
        layer=layer,
        shape=tuple(w.shape),
        norm=float(by_mode[0].double().norm()),
        spectra={name: by_mode[mode].tolist() for mode, name in MODES.items()},
        effective_ranks={name: _effective_rank(by_mode[mode]) for mode, name in MODES.items()},
        plans=plans,
        seconds=decomposition_seconds([tuple(w.shape)], speed),
    )


def _effective_rank(singular: Tensor) -> float:
    """exp of the entropy of sigma^2 / sum sigma^2 (Roy and Vetterli, EUSIPCO 2007)."""
    p = singular.double().square()
    p = p[p > 0] / p.sum()
    return float((-(p * p.log()).sum()).exp())

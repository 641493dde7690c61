"""`tensorllm inspect`: the spectra of a model's weights."""

from collections.abc import Sequence

from tensorllm.checkpoint.source import resolve
from tensorllm.compression.spectra import LayerSpectra, attention_spectra
from tensorllm.progress import Progress, quiet


def inspect(
    model: str,
    layers: Sequence[int] | None = None,
    energies: Sequence[float] = (0.5, 0.9, 0.99),
    revision: str | None = None,
    progress: Progress = quiet,
) -> list[LayerSpectra]:
    """Spectra of a model's attention, layer by layer, and the ranks that keep `energies`."""
    return attention_spectra(resolve(model, revision).folder, layers, energies, progress)

"""`tensorllm inspect`: the spectra of a model's weights."""

from tensorllm.checkpoint.source import resolve
from tensorllm.compression.spectra import LayerSpectra, attention_spectra
from tensorllm.progress import Progress, quiet
from tensorllm.registry import load_plugins
from tensorllm.requests.others import InspectRequest


def inspect(request: InspectRequest, progress: Progress = quiet) -> list[LayerSpectra]:
    """Spectra of a model's attention, layer by layer, and the ranks that keep `energy`."""
    load_plugins(request.plugins)
    folder = resolve(request.model, request.revision).folder
    return attention_spectra(folder, request.layers, request.energy, progress)

"""`tensorllm export`: a factored folder as an ordinary checkpoint, a graph, or quantised."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tensorllm.checkpoint.loader import dtype_of
from tensorllm.compression.export import QuantisedSite, export, quantise_folder
from tensorllm.compression.formats import EXPORTED, chosen_format
from tensorllm.compression.graph import GRAPHS, export_graph
from tensorllm.compression.narrow import narrow
from tensorllm.errors import UserError
from tensorllm.progress import Progress, quiet
from tensorllm.registry import load_plugins
from tensorllm.requests.others import ExportRequest


@dataclass(frozen=True, slots=True)
class Export:
    """An ordinary checkpoint or a graph, and the bytes of its weight files."""

    out: Path
    format: str
    bytes: int

    def to_json(self) -> dict[str, Any]:
        return {"out": str(self.out), "format": self.format, "bytes": self.bytes}

    def __str__(self) -> str:
        return f"{self.out}: {self.bytes / 2**20:.1f} MiB of weights, {self.format}"


@dataclass(frozen=True, slots=True)
class NarrowExport:
    """An ordinary checkpoint with a smaller FFN width, and the bytes of its weight files."""

    out: Path
    ffn_width_before: int
    ffn_width: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"out": str(self.out), "format": "narrow"}

    def __str__(self) -> str:
        return (
            f"{self.out}: {self.bytes / 2**20:.1f} MiB of weights, FFN width "
            f"{self.ffn_width_before} → {self.ffn_width}"
        )


MUCH = 0.1  # relative change of weights, of which a warning is given
WARNING = """\
This is much: evaluate the model. compress --target-bytes rounds only what costs
little, by errors on a text."""


@dataclass(frozen=True, slots=True)
class QuantisedExport:
    """A factored folder with quantised factors, site by site."""

    out: Path
    how: str
    sites: list[QuantisedSite]

    def to_json(self) -> dict[str, Any]:
        return {"out": str(self.out), "sites": [asdict(site) for site in self.sites]}

    def __str__(self) -> str:
        before = sum(site.bytes_before for site in self.sites) / 2**20
        after = sum(site.bytes_after for site in self.sites) / 2**20
        worst = max(self.sites, key=lambda site: site.relative_error)
        said = (
            f"{self.out}: factors {before:.2f} MiB before, {after:.2f} MiB as {self.how}; "
            f"rounding changes weights by up to {100 * worst.relative_error:.2f} % ({worst.site})"
        )
        if worst.relative_error > MUCH:
            said += f"\n{WARNING}"
        return said


def run(
    request: ExportRequest, progress: Progress = quiet
) -> Export | NarrowExport | QuantisedExport:
    """Write the requested folder.

    Raises:
        UserError: not a factored folder, or options that exclude one another.
    """
    load_plugins(request.plugins)
    source, out = request.folder, request.out
    how: dict[str, Any] = {"overwrite": request.overwrite, "progress": progress}
    if request.quantize is not None:
        if request.format is not None or request.dtype is not None:
            raise UserError("--quantize stays factored: give it without --format and --dtype")
        sites = quantise_folder(source, out, request.quantize, **how)
        return QuantisedExport(out, request.quantize, sites)
    format = chosen_format(request.format or "dense", EXPORTED)
    how["dtype"] = dtype_of(request.dtype)
    if format == "narrow":
        made = narrow(source, out, **how)
        return NarrowExport(out, made.before, made.after, made.bytes)
    if format in GRAPHS:
        return Export(out, format, export_graph(source, out, format, **how))
    return Export(out, format, export(source, out, **how))

"""What a compression did: per site, and each ratio by its own name."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tensorllm.tensors.stacking import ATTENTION, Geometry

RATIO_NAMES = {
    "matrices_compressed": "the compressed matrices",
    "attention_of_edited_layers": "attention of the edited layers",
    "all_attention": "attention of all layers",
    "whole_model": "whole model (parameters)",
    "bytes_on_disk": "weight files (bytes)",
}


@dataclass(frozen=True, slots=True)
class SiteReport:
    """One decomposition.

    Attributes:
        name: of the site, such as `layers.27.qkvo`.
        shape: of the tensor that was decomposed.
        kind: of the factors (`tucker`, `low-rank`, `cp`, ...).
        parameters_before, parameters_after: numbers stored for these matrices.
        relative_error: ||W - dense|| / ||W||, with the factors as they are stored.
        seconds: decomposition alone, without reading and writing.
        auto: how `--policy auto` runs it, factored or dense, and why.
    """

    name: str
    layers: tuple[int, ...]
    roles: tuple[str, ...]
    stacking: str
    shape: tuple[int, ...]
    kind: str
    ranks: tuple[int, ...]
    parameters_before: int
    parameters_after: int
    relative_error: float
    seconds: float
    auto: str = ""

    @property
    def ratio(self) -> float:
        return self.parameters_before / self.parameters_after


@dataclass(frozen=True, slots=True)
class Totals:
    """Parameters of the whole model and bytes on disk, before and after."""

    parameters_before: int
    parameters_after: int
    bytes_before: int | None = None
    bytes_after: int | None = None


@dataclass(slots=True)
class CompressionReport:
    """What `compress` returns, prints and saves as `report.json`."""

    model: str
    revision: str | None
    mode: str
    settings: dict[str, Any]
    layers: tuple[int, ...]
    dtype: str
    format: str
    sites: list[SiteReport]
    geometry: Geometry
    model_layers: int
    totals: Totals
    seconds: float
    peak_resident_bytes: int | None = None
    evaluation: dict[str, Any] | None = None
    environment: dict[str, Any] = field(default_factory=dict)

    def layer_attention(self) -> dict[int, tuple[int, int]]:
        """Attention parameters before and after of each layer with an edited attention matrix."""
        whole = sum(self.geometry.inner(role) for role in ATTENTION) * self.geometry.D
        after: dict[int, float] = {}
        for site in self.sites:
            if set(site.roles) <= set(ATTENTION):
                saved = (site.parameters_before - site.parameters_after) / len(site.layers)
                for layer in site.layers:
                    after[layer] = after.get(layer, whole) - saved
        return {layer: (whole, round(left)) for layer, left in sorted(after.items())}

    def ratios(self) -> dict[str, float]:
        """Each compression ratio by its name; those that do not apply are left out."""
        layers = self.layer_attention()
        whole = sum(self.geometry.inner(role) for role in ATTENTION) * self.geometry.D
        out = {
            "matrices_compressed": _ratio(
                sum(site.parameters_before for site in self.sites),
                sum(site.parameters_after for site in self.sites),
            )
        }
        if layers:
            before = sum(pair[0] for pair in layers.values())
            after = sum(pair[1] for pair in layers.values())
            untouched = whole * (self.model_layers - len(layers))
            out["attention_of_edited_layers"] = _ratio(before, after)
            out["all_attention"] = _ratio(before + untouched, after + untouched)
        totals = self.totals
        out["whole_model"] = _ratio(totals.parameters_before, totals.parameters_after)
        if totals.bytes_before is not None and totals.bytes_after is not None:
            out["bytes_on_disk"] = _ratio(totals.bytes_before, totals.bytes_after)
        return out

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        out = asdict(self)
        for site, record in zip(self.sites, out["sites"], strict=True):
            record["compression_ratio"] = site.ratio
        out["layer_attention"] = [
            {"layer": layer, "before": before, "after": after, "ratio": before / after}
            for layer, (before, after) in self.layer_attention().items()
        ]
        out["ratios"] = self.ratios()
        return out


def site_report(record: Mapping[str, Any]) -> SiteReport:
    """A `SiteReport` from its JSON record."""
    fields = {name: record[name] for name in SiteReport.__dataclass_fields__ if name in record}
    for name in ("layers", "roles", "shape", "ranks"):
        fields[name] = tuple(fields[name])
    return SiteReport(**fields)


def saved_parameters(sites: Iterable[SiteReport]) -> int:
    return sum(site.parameters_before - site.parameters_after for site in sites)


def _ratio(before: float, after: float) -> float:
    return before / after if after else float("inf")

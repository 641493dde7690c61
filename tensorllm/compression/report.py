"""What a compression did: each site, and each ratio by its own name."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tensorllm.models.spec import ModelSpec
from tensorllm.tensors.quantised import BITS
from tensorllm.tensors.stacking import ATTENTION_ROLES

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
        auto: how `--policy auto` runs it, as factors or dense, and why, on a machine whose products
            in 16 bits are no faster than in float32.
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

    @property
    def few_bits(self) -> str:
        """`int8` or `int4` if the factors are quantised; otherwise empty."""
        how = self.kind.partition("-")[0]
        return how if how in BITS else ""


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
    spec: ModelSpec
    totals: Totals
    seconds: float
    peak_resident_bytes: int | None = None
    evaluation: dict[str, Any] | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    structure: str = ""  # families of the layers and how they were found; empty with a row
    missing_roles: dict[int, tuple[str, ...]] = field(default_factory=dict)  # by layer
    ffn_width: tuple[int, int] | None = None  # before and after, if FFNs were made narrower
    logged_to: Path | None = None  # the folder that a logger wrote to; not stored

    def layer_attention(self) -> dict[int, tuple[int, int]]:
        """For each layer with an edited attention matrix, attention parameters before and after."""
        after: dict[int, float] = {}
        for site in self.sites:
            if set(site.roles) <= set(ATTENTION_ROLES):
                saved = (site.parameters_before - site.parameters_after) / len(site.layers)
                for layer in site.layers:
                    after[layer] = after.get(layer, self._attention(layer)) - saved
        return {layer: (self._attention(layer), round(n)) for layer, n in sorted(after.items())}

    def _attention(self, layer: int) -> int:
        """Numbers in all attention matrices of a layer."""
        geometry = self.spec.geometry(layer)
        return sum(geometry.numel(role) for role in geometry.roles if role in ATTENTION_ROLES)

    def _untouched_attention(self) -> int:
        """Numbers in the attention of layers without an edited attention matrix."""
        edited = self.layer_attention()
        return sum(self._attention(n) for n in range(self.spec.layers) if n not in edited)

    def ratios(self) -> dict[str, float]:
        """Each compression ratio by its name; those that do not apply are left out."""
        layers = self.layer_attention()
        out = {
            "matrices_compressed": _ratio(
                sum(site.parameters_before for site in self.sites),
                sum(site.parameters_after for site in self.sites),
            )
        }
        if layers:
            before = sum(pair[0] for pair in layers.values())
            after = sum(pair[1] for pair in layers.values())
            untouched = self._untouched_attention()
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
        del out["spec"], out["ffn_width"], out["logged_to"], out["missing_roles"]
        if self.ffn_width is not None:
            out["ffn_width"] = dict(zip(("before", "after"), self.ffn_width, strict=True))
        out["geometry"] = asdict(self.spec.geometry(self.sites[0].layers[0] if self.sites else 0))
        out["model_layers"] = self.spec.layers
        out["untouched_attention"] = self._untouched_attention()
        out["layer_roles"] = [list(geometry.roles) for geometry in self.spec.geometries]
        out["passed_over"] = [
            {"layer": layer, "lacks": list(roles)} for layer, roles in self.missing_roles.items()
        ]
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


def asked_for(mode: str, settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Mode and settings as they were requested.

    If a target chose a list of edits, these are the mode that the target was given for, and the
    target; otherwise they are returned as they are.
    """
    chosen_by = settings.get("chosen_by")
    if not isinstance(chosen_by, Mapping) or "mode" not in chosen_by:
        return mode, dict(settings)
    rest = {name: value for name, value in chosen_by.items() if name != "mode" and value != []}
    return str(chosen_by["mode"]), rest


def saved_parameters(sites: Iterable[SiteReport]) -> int:
    """How many fewer numbers all sites store than their matrices had."""
    return sum(site.parameters_before - site.parameters_after for site in sites)


def _ratio(before: float, after: float) -> float:
    return before / after if after else float("inf")

"""Settings per layer: several strategies, each with its own layers and matrices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tensorllm.compressors.base import COMPRESSORS, Composite, Compressor, Job
from tensorllm.compressors.settings import make_compressor
from tensorllm.errors import UserError
from tensorllm.models.spec import ModelSpec

Edit = Mapping[str, Any]  # `layers`, `mode` and that mode's settings


@dataclass(frozen=True, slots=True)
class LayerEdit:
    """One edit: its layers and its strategy."""

    layers: tuple[int, ...]
    compressor: Compressor


@COMPRESSORS.register("per-layer")
@dataclass(frozen=True, kw_only=True)
class PerLayer(Composite):
    """A list of edits, as a search over several layers or a budget for all of them leaves it.

    Source: LASER, section 5 (composing reductions across layers).

    Attributes:
        edits: each with `layers`, `mode` and the settings of that mode.
        chosen_by: how the edits were chosen; filled in by the code that chose them.
    """

    edits: tuple[Edit, ...]
    chosen_by: Mapping[str, Any] | None = None

    source: ClassVar[str] = "https://arxiv.org/abs/2312.13558"

    def __post_init__(self) -> None:
        if not self.edits:
            raise UserError("per-layer settings need one edit or more, got none")
        object.__setattr__(self, "edits", tuple(self.edits))
        self.parts()  # refuses wrong settings now rather than later

    def parts(self) -> list[LayerEdit]:
        """The edits with their strategies."""
        return [_part(number, edit) for number, edit in enumerate(self.edits, 1)]

    def jobs(self, spec: ModelSpec, layers: Sequence[int]) -> list[Job]:
        """The jobs of the edits of these layers.

        Raises:
            UserError: none of these layers is edited.
        """
        jobs = []
        for part in self.parts():
            there = [layer for layer in part.layers if layer in layers]
            if there:
                jobs += part.compressor.jobs(spec, there)
        if not jobs:
            edited = sorted({layer for part in self.parts() for layer in part.layers})
            raise UserError(f"the edits are of layers {edited}, none of which is wanted")
        return jobs


def _part(number: int, edit: Any) -> LayerEdit:
    if not isinstance(edit, Mapping):
        raise UserError(f"edit {number} must be a mapping of layers, mode and settings: {edit!r}")
    layers, mode = edit.get("layers"), edit.get("mode")
    whole = isinstance(layers, Sequence) and all(type(layer) is int for layer in layers)
    if not whole or not layers:
        raise UserError(f"edit {number}: layers must be a list of whole numbers, got {layers!r}")
    if not isinstance(mode, str):
        raise UserError(f"edit {number}: mode is missing")
    settings = {key: value for key, value in edit.items() if key not in ("layers", "mode")}
    try:
        return LayerEdit(tuple(layers), make_compressor(mode, settings))
    except UserError as error:
        raise UserError(f"edit {number}: {error}") from None

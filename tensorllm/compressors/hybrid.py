"""The hybrid: one strategy for the attention and another for the FFN."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from tensorllm.compressors.base import COMPRESSORS, Composite, Compressor, Dimension, Job
from tensorllm.compressors.laser import LaserSVD
from tensorllm.compressors.tucker import LayoutName, SharedTucker4D
from tensorllm.errors import UserError
from tensorllm.models.spec import ModelSpec
from tensorllm.options import Value
from tensorllm.tensors.stacking import FEED_FORWARD


@COMPRESSORS.register("hybrid", aliases=("4D_Tucker_laser",))
@dataclass(frozen=True, kw_only=True)
class Hybrid(Composite):
    """SharedTucker4D on the attention and LaserSVD on the FFN, or any other two strategies.

    Source: TensorLLM, section 4 (hybrid of TensorLLM and LASER).

    Attributes:
        ranks, layout: of the SharedTucker4D, unless `attention` is given.
        rho, rank, matrices, blocks: of the LaserSVD, unless `ffn` is given.
        ffn_layers: the FFN strategy's layers, if they differ from those of the attention.
        attention: any other strategy for the attention (in YAML: `mode` and its fields).
        ffn: any other strategy for the FFN.
    """

    ranks: tuple[int, ...] | None = None
    layout: LayoutName | None = None
    rho: float | None = None
    rank: int | None = None
    matrices: tuple[str, ...] | None = None
    blocks: int | None = None
    ffn_layers: tuple[int, ...] | None = None
    attention: Compressor | None = None
    ffn: Compressor | None = None

    source: ClassVar[str] = "https://arxiv.org/abs/2501.15674"
    size_settings: ClassVar[tuple[tuple[str, ...], ...]] = SharedTucker4D.size_settings + (
        LaserSVD.size_settings
    )

    def __post_init__(self) -> None:
        if self.ffn_layers is not None:
            object.__setattr__(self, "ffn_layers", tuple(self.ffn_layers))
        self.parts()  # refuses wrong fields now rather than later

    def parts(self) -> tuple[Compressor, Compressor]:
        """The attention strategy and the FFN strategy."""
        attention = _own(
            SharedTucker4D, self.attention, {"ranks": self.ranks, "layout": self.layout}
        )
        names = ("rho", "rank", "matrices", "blocks")
        return attention, _own(LaserSVD, self.ffn, {name: getattr(self, name) for name in names})

    @classmethod
    def search_space(cls, spec: ModelSpec, settings: Mapping[str, Any]) -> dict[str, Dimension]:
        """Those of SharedTucker4D and, over FFN matrices, of LaserSVD, unless others are given."""
        out = {} if "attention" in settings else SharedTucker4D.search_space(spec, settings)
        if "ffn" not in settings:
            out |= LaserSVD.search_space(spec, settings)
        if "matrices" in out:
            ffn = tuple(role for role in spec.roles if role in FEED_FORWARD)
            if not ffn:
                raise UserError("this architecture has no FFN matrices: search shared-tucker")
            out["matrices"] = replace(out["matrices"], values=ffn, names=ffn)
        return out

    @classmethod
    def settings_at(cls, spec: ModelSpec, point: Mapping[str, Value]) -> dict[str, Any] | None:
        own = ("rho", "matrices", "blocks")
        ffn = {name: value for name, value in point.items() if name in own}
        attention = {name: value for name, value in point.items() if name not in ffn}
        parts = SharedTucker4D.settings_at(spec, attention), LaserSVD.settings_at(spec, ffn)
        return None if None in parts else dict(parts[0] or {}) | dict(parts[1] or {})

    @classmethod
    def budget_settings(cls, spec: ModelSpec, settings: Mapping[str, Any]) -> dict[str, Any]:
        given = dict(settings)
        if "attention" not in given:
            own = {name: given[name] for name in ("layout",) if name in given}
            given = SharedTucker4D.budget_settings(spec, own) | given
        if "ffn" not in given:
            ffn = {"matrices": tuple(role for role in spec.roles if role in FEED_FORWARD)}
            given = LaserSVD.budget_settings(spec, ffn) | given
        return given

    def jobs(self, spec: ModelSpec, layers: Sequence[int]) -> list[Job]:
        attention, ffn = self.parts()
        ffn_layers = self.ffn_layers if self.ffn_layers is not None else layers
        return attention.jobs(spec, layers) + ffn.jobs(spec, ffn_layers)


def _own(kind: type[Compressor], given: Compressor | None, fields: Mapping[str, Any]) -> Compressor:
    """`given`, or a `kind` made from the flat fields; both at once are refused."""
    flat = {name: value for name, value in fields.items() if value is not None}
    if given is None:
        return kind(**flat)
    if flat:
        raise UserError(f"{', '.join(flat)} cannot be given beside another {type(given).__name__}")
    return given

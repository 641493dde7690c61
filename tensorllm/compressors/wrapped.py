"""A strategy that does what another one does, with a step of its own before or behind it.

`Wrapped` stands for a whole strategy and puts a wrapper round each of its jobs' strategies;
`WrappedFit` is the wrapper of a `LayerFit` that changes nothing yet.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from tensorllm.compressors.base import (
    Composite,
    Compressor,
    ErrorCurve,
    GradientOf,
    Job,
    LayerFit,
    Leaf,
    Needs,
    Ways,
)
from tensorllm.compressors.budget import Budget
from tensorllm.compressors.layer import LayerContext, LayerResult, Site
from tensorllm.models.spec import ModelSpec
from tensorllm.tensors.shared_input import NARROWED
from tensorllm.tensors.stacking import Geometry

Wrap = Callable[[Leaf | LayerFit], Leaf | LayerFit]


@dataclass(frozen=True)
class Wrapped(Composite):
    """Another strategy, each of whose jobs is done by a wrapper.

    Attributes:
        inner: the strategy.
        wrap: gives the wrapper of a job's strategy.
    """

    inner: Compressor
    wrap: Wrap

    source: ClassVar[str] = ""

    @property
    def named(self) -> Compressor:
        return self.inner.named

    @property
    def training_steps(self) -> int:
        return self.inner.training_steps

    @property
    def draws_by(self) -> int:
        return self.inner.draws_by

    @property
    def budget(self) -> Budget | None:
        return self.inner.budget

    def jobs(self, spec: ModelSpec, layers: Sequence[int]) -> list[Job]:
        made: dict[int, Leaf | LayerFit] = {}  # one wrapper of each strategy: they go by identity
        out = []
        for job in self.inner.jobs(spec, layers):
            if id(job.compressor) not in made:
                made[id(job.compressor)] = self.wrap(job.compressor)
            out.append(Job(job.site, made[id(job.compressor)]))
        return out


class WrappedFit(LayerFit):
    """A `LayerFit` that leaves everything to another one; wrappers override what they change."""

    def __init__(self, inner: LayerFit) -> None:
        self.inner = inner

    @property
    def source(self) -> str:  # type: ignore[override]  # of the class elsewhere, here of `inner`
        return self.inner.source

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        return self.inner.needs

    @property
    def at_width(self) -> bool:  # type: ignore[override]
        return self.inner.at_width

    @property
    def named(self) -> Compressor:
        return self.inner.named

    @property
    def gradient_of(self) -> GradientOf:
        return self.inner.gradient_of

    @property
    def whole_inputs(self) -> tuple[str, ...]:
        return self.inner.whole_inputs

    @property
    def keeps_inputs(self) -> bool:
        return self.inner.keeps_inputs

    def jobs(self, spec: ModelSpec, layers: Sequence[int]) -> list[Job]:
        return [Job(job.site, self) for job in self.inner.jobs(spec, layers)]

    def check(self, shape: tuple[int, ...]) -> None:
        self.inner.check(shape)

    def stored_parameters(self, shape: tuple[int, ...]) -> int | None:
        return self.inner.stored_parameters(shape)

    def ffn_channels(self, geometry: Geometry) -> int | None:
        return self.inner.ffn_channels(geometry)

    def ways(self, geometry: Geometry, layer: int, sites: Sequence[Site]) -> list[Ways]:
        return self.inner.ways(geometry, layer, sites)

    def curves(self, sites: Sequence[Site], context: LayerContext) -> Mapping[Site, ErrorCurve]:
        return self.inner.curves(sites, context)

    def passes(self, sites: Sequence[Site]) -> float:
        return self.inner.passes(sites)

    def fit_layer(self, context: LayerContext) -> LayerResult:
        return self.inner.fit_layer(context)


class ChannelsOnly(WrappedFit):
    """Leaves an FFN no other way to become smaller than to lose channels, where it may lose some.

    For a checkpoint that is narrower: there low rank saves nothing, and one FFN that keeps all its
    channels keeps all others as wide.
    """

    def ways(self, geometry: Geometry, layer: int, sites: Sequence[Site]) -> list[Ways]:
        out = []
        for ways in self.inner.ways(geometry, layer, sites):
            fewer = [way for way in ways if any(job.site.roles in NARROWED for job in way)]
            out.append(fewer or ways)
        return out


def channels_only(compressor: Compressor) -> Wrapped:
    """The strategy with `ChannelsOnly` wherever it fits layers."""

    def wrap(inner: Leaf | LayerFit) -> Leaf | LayerFit:
        return ChannelsOnly(inner) if isinstance(inner, LayerFit) else inner

    return Wrapped(compressor, wrap)

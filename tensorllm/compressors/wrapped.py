"""A strategy that does the same as another one, with changes.

`Wrapped` stands for a whole strategy and wraps the strategy of each of its jobs; `WrappedFit` wraps
a `LayerFit` without changing anything yet.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from tensorllm.compressors.base import (
    Composite,
    Compressor,
    ErrorCurve,
    Groupings,
    Job,
    LayerFit,
    Leaf,
)
from tensorllm.compressors.budget import Budget
from tensorllm.compressors.layer import LayerContext, Site
from tensorllm.compressors.widths import multiples
from tensorllm.models.spec import ModelSpec
from tensorllm.tensors.shared_input import NARROWED
from tensorllm.tensors.stacking import FFN, Geometry

Wrap = Callable[[Leaf | LayerFit], Leaf | LayerFit]


class _Delegated:
    """The member of the same name of the wrapped strategy, `inner`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        return self if instance is None else getattr(instance.inner, self.name)


def delegated() -> Any:
    """An attribute or method that a wrapper delegates to the strategy it wraps, `inner`."""
    return _Delegated()  # Any: each has the type of its member


@dataclass(frozen=True)
class Wrapped(Composite):
    """Another strategy with the strategy of each job wrapped.

    Attributes:
        inner: the strategy.
        wrap: gives the wrapper of a job's strategy.
    """

    inner: Compressor
    wrap: Wrap

    source: ClassVar[str] = ""
    named = delegated()
    training_steps = delegated()
    seed_of_fit = delegated()
    budget = delegated()

    def with_budget(self, budget: Budget) -> "Wrapped":
        return replace(self, inner=self.inner.with_budget(budget))

    def jobs(self, spec: ModelSpec, layers: Sequence[int]) -> list[Job]:
        made: dict[int, Leaf | LayerFit] = {}  # one per strategy: compared by identity
        out = []
        for job in self.inner.jobs(spec, layers):
            if id(job.compressor) not in made:
                made[id(job.compressor)] = self.wrap(job.compressor)
            out.append(Job(job.site, made[id(job.compressor)]))
        return out


class WrappedFit(LayerFit):
    """A `LayerFit` that behaves like another one; subclasses override what they change.

    Members about sizes are not delegated, as wrappers change which sizes there are.
    """

    def __init__(self, inner: LayerFit) -> None:
        self.inner = inner

    source = delegated()
    needs = delegated()
    width_only = delegated()
    holds_out = delegated()
    named = delegated()
    gradient_of = delegated()
    full_covariances = delegated()
    needs_input_covariances = delegated()
    check = delegated()
    stored_parameters = delegated()
    ffn_channels = delegated()
    groupings = delegated()
    curves = delegated()
    example = delegated()
    passes = delegated()
    fit_layer = delegated()

    def jobs(self, spec: ModelSpec, layers: Sequence[int]) -> list[Job]:
        return [Job(job.site, self) for job in self.inner.jobs(spec, layers)]


class ChannelsOnly(WrappedFit):
    """Only FFNs that lose channels, the same number in all layers.

    For a checkpoint in which the FFN is simply narrower. There low rank would save nothing, and the
    config has one FFN width for all layers, the widest.
    """

    one_size = True

    def groupings(self, geometry: Geometry, layer: int, sites: Sequence[Site]) -> list[Groupings]:
        """The grouping of each FFN into a single site; all other matrices stay as they are."""
        found = self.inner.groupings(geometry, layer, sites)
        channels = [one for groupings in found for one in groupings if _loses_channels(one)]
        return [[[Job(job.site, self) for job in grouping]] for grouping in channels]

    def curves(self, sites: Sequence[Site], context: LayerContext) -> dict[Site, ErrorCurve]:
        """The inner curves at the widths that other tools run well."""
        best = multiples(context.geometry.F)[0]
        out = {}
        for site, curve in self.inner.curves(sites, context).items():
            fit = [size[0] % best == 0 for size in curve.sizes_NC.tolist()]
            cost_N, error_N, sizes_NC = (
                x[torch.tensor(fit, device=x.device)]
                for x in (curve.cost_N, curve.error_N, curve.sizes_NC)
            )
            out[site] = ErrorCurve(cost_N, error_N, sizes_NC)
        return out


def _loses_channels(grouping: Sequence[Job]) -> bool:
    return any(job.site.roles in NARROWED for job in grouping)


class _FFNsOnly(Wrapped):
    """A wrapped strategy without jobs fitted to attention."""

    def jobs(self, spec: ModelSpec, layers: Sequence[int]) -> list[Job]:
        jobs = super().jobs(spec, layers)
        return [
            job
            for job in jobs
            if not isinstance(job.compressor, LayerFit) or set(job.site.roles) <= set(FFN)
        ]


def channels_only(compressor: Compressor) -> Wrapped:
    """The strategy with `ChannelsOnly` for each of its layer fits; attention is left as it is."""

    def wrap(inner: Leaf | LayerFit) -> Leaf | LayerFit:
        return ChannelsOnly(inner) if isinstance(inner, LayerFit) else inner

    return _FFNsOnly(compressor, wrap)

"""Matrices and factors in 8 or 4 bits: a mode of its own, and candidates for a budget.

For a budget in bytes, a size consists of ranks and bits: `(*size, 4)` stands for the factors of a
size in int4, `(0, ..., 4)` for the whole matrix in int4, `(0, ..., 0)` for the matrix as it is. Its
cost is bytes in the file; its error is that of truncation plus that of rounding what is kept.

Shapes: N sizes of a curve, I and D of a role matrix.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from tensorllm.compressors.base import (
    COMPRESSORS,
    Compressor,
    ErrorCurve,
    Job,
    LayerFit,
    Leaf,
)
from tensorllm.compressors.checks import check_roles
from tensorllm.compressors.layer import LayerContext, LayerResult, MatrixStatistics, Site, Size
from tensorllm.compressors.matrix import matrix_sites
from tensorllm.compressors.wrapped import Wrapped, WrappedFit, delegated
from tensorllm.errors import UserError
from tensorllm.io import entry_bytes
from tensorllm.models.spec import ModelSpec
from tensorllm.registry import one_of
from tensorllm.tensors.factors import Factors
from tensorllm.tensors.factors import cast as cast_factors
from tensorllm.tensors.quantised import compensation, quantise, quantised_whole, shapes_held
from tensorllm.tensors.stacking import MATRICES
from tensorllm.tensors.whole import Whole

HOW = {8: "int8", 4: "int4"}


@COMPRESSORS.register("rounded")
@dataclass(frozen=True, kw_only=True)
class Rounded(Leaf):
    """Each matrix rounded to 8 or 4 bits, in groups of 64 with a scale; or another mode's factors.

    Source: plain rounding to the nearest, the baseline of GPTQ (arXiv 2210.17323) and others.

    Attributes:
        bits: 8 or 4.
        matrices: which of in, gate, out, q, k, v, o, ...; by default all that a layer has.
        of: another mode that decomposes one tensor, whose factors are rounded instead.
    """

    bits: Literal[8, 4] = 8
    matrices: tuple[str, ...] | None = None
    of: Compressor | None = None

    source: ClassVar[str] = "https://arxiv.org/abs/2210.17323"

    def __post_init__(self) -> None:
        one_of("bits", str(self.bits), [str(bits) for bits in HOW])
        if self.of is not None and not isinstance(self.of, Leaf):
            raise UserError("of must be a mode that decomposes one tensor, such as svd")
        if self.of is not None and self.matrices is not None:
            raise UserError("matrices are those of the mode `of`: give them there")
        if self.matrices is not None:
            object.__setattr__(self, "matrices", check_roles(self.matrices, MATRICES))
        if self.of is not None:
            object.__setattr__(self, "needs", self.of.needs)

    def jobs(self, spec: ModelSpec, layers: Sequence[int]) -> list[Job]:
        if self.of is None:
            return [Job(site, self) for site in matrix_sites(spec, layers, self.matrices)]
        jobs = self.of.jobs(spec, layers)
        return [Job(job.site, replace(self, of=job.compressor)) for job in jobs]

    def check(self, shape: tuple[int, ...]) -> None:
        if self.of is not None:
            self.of.check(shape)

    def stored_parameters(self, shape: tuple[int, ...]) -> int | None:
        return torch.Size(shape).numel() if self.of is None else self.of.stored_parameters(shape)

    def stored_bytes(self, shape: tuple[int, ...], itemsize: int) -> int | None:
        stored = self.stored_parameters(shape)
        return None if stored is None else int(stored * (self.bits / 8 + itemsize / 64))

    def decompose(self, w: Tensor, statistics: Sequence[MatrixStatistics] | None = None) -> Factors:
        factors = Whole(w) if self.of is None else cast(Leaf, self.of).decompose(w, statistics)
        return quantise(factors, HOW[self.bits])


@dataclass(frozen=True)
class RoundedLeaf(Leaf):
    """Another leaf whose sizes include bits, for a budget in bytes.

    Attributes:
        inner: the leaf.
        max_bytes: of the file.
        written: dtype of the matrices in the file; None: that of the decomposed weights.
    """

    inner: Leaf
    max_bytes: int
    written: torch.dtype | None = None

    source: ClassVar[str] = ""

    needs = delegated()
    named = delegated()
    check = delegated()
    decompose = delegated()

    def curve(
        self, site: Site, w: Tensor, statistics: Sequence[MatrixStatistics] | None = None
    ) -> ErrorCurve:
        """Each size unrounded and in few bits, and the tensor itself."""
        inner, shape, dtype = self.inner, tuple(w.shape), self.written or w.dtype
        rounding_errors = {
            bits: inner.error_of(w, quantise(Whole(w), how).dense(), statistics)
            for bits, how in HOW.items()
        }
        total = inner.error_of(w, torch.zeros_like(w), statistics)
        sizes = RoundedSizes(
            site, shape, dtype, self.max_bytes, lambda size: inner.outline(shape, size)
        )
        return sizes.with_bits(inner.curve(site, w, statistics), rounding_errors, total)

    def at_size(self, site: Site, size: Size) -> Leaf:
        *ranks, bits = size
        few: Literal[8, 4] = 8 if bits == 8 else 4
        if not any(ranks):
            return Rounded(bits=few, matrices=site.roles)
        inner = self.inner.at_size(site, tuple(ranks))
        return Rounded(bits=few, of=inner) if bits else inner


@dataclass(frozen=True)
class RoundedSizes:
    """The bytes that each size of a site takes in a file.

    Attributes:
        site: the site.
        shape, dtype: of the site's tensor as it is stored without rounding.
        max_bytes: of the file.
        outline: gives the factors of a size without bits.
    """

    site: Site
    shape: tuple[int, ...]
    dtype: torch.dtype
    max_bytes: int
    outline: Callable[[Size], Factors]

    def with_bits(
        self,
        plain: ErrorCurve,
        rounding_errors: Mapping[int, float],
        total: float,
        *,
        whole: bool = True,
        trial_errors: Mapping[int, float] | None = None,
    ) -> ErrorCurve:
        """A curve whose sizes are ranks and bits, and whose costs are bytes.

        Args:
            plain: the curve without rounding, its costs in numbers.
            rounding_errors: bits -> error of rounding the whole tensor, in the unit of the curve.
            total: error of replacing the tensor by zero.
            whole: whether the tensor itself is a candidate.
            trial_errors: bits -> error of rounding factors, measured in a trial; None: it is
                estimated from `rounding_errors`.
        """
        nothing = (0,) * plain.sizes_NC.shape[1]
        found: list[tuple[int, float, Size]] = []
        for error, ranks in zip(plain.error_N.tolist(), plain.sizes_NC.tolist(), strict=True):
            if not any(ranks):
                continue
            factors = cast_factors(self.outline(tuple(ranks)), self.dtype)
            left = max(0.0, 1 - error / total) if total > 0 else 0.0
            found.append((self.bytes(factors, None), error, (*ranks, 0)))
            for bits, each in rounding_errors.items():
                worse = (
                    factors.rounding * each * left if trial_errors is None else trial_errors[bits]
                )
                found.append((self.bytes(factors, bits), error + worse, (*ranks, bits)))
        for bits, error in {0: 0.0, **rounding_errors}.items() if whole else ():
            tensor = Whole(torch.empty(self.shape, dtype=self.dtype, device="meta"))
            names = self.bytes(tensor, bits or None) - _numbers(tensor, bits or None)
            # The matrices of the site may be stored separately, each with a name.
            cost = self.bytes(tensor, bits or None) + (len(self.site.matrices) - 1) * names
            found.append((cost, error, (*nothing, bits)))
        return _pareto(found)

    def bytes(self, factors: Factors, bits: int | None) -> int:
        """An upper bound of the bytes of factors in the file, with their names in its header."""
        held = shapes_held(factors, bits)
        names = (
            entry_bytes(f"factors.{self.site.name}.{name}", shape, width, self.max_bytes)
            for name, (shape, width) in held.items()
        )
        return _numbers(factors, bits) + sum(names)


def _pareto(found: list[tuple[int, float, Size]]) -> ErrorCurve:
    """The candidates with less error than every cheaper one, by ascending cost."""
    kept: list[tuple[int, float, Size]] = []
    for cost, error, size in sorted(found):
        if not kept or error < kept[-1][1]:
            kept.append((cost, error, size))
    costs, errors, sizes = zip(*kept, strict=True)
    return ErrorCurve(
        torch.tensor(costs), torch.tensor(errors, dtype=torch.float64), torch.tensor(sizes)
    )


def _numbers(factors: Factors, bits: int | None) -> int:
    held = shapes_held(factors, bits).values()
    return sum(torch.Size(shape).numel() * width for shape, width in held)


class RoundedFit(WrappedFit):
    """A `LayerFit` whose sizes are ranks and bits.

    Whole matrices are rounded first, so that the fit of the others makes up for some of the error;
    factors are rounded once they are fitted, and the layers above are fitted to the result.
    """

    def __init__(self, inner: LayerFit, max_bytes: int, written: torch.dtype | None = None) -> None:
        super().__init__(inner)
        self.max_bytes, self.written = max_bytes, written

    @property
    def needs_input_covariances(self) -> bool:
        return True  # as metrics for rounding whole matrices

    def curves(self, sites: Sequence[Site], context: LayerContext) -> dict[Site, ErrorCurve]:
        unrounded = self.inner.curves(sites, context)
        rounding_errors = {
            role: self._rounding_errors(context, role)
            for role in dict.fromkeys(role for site in sites for role in site.roles)
        }
        out, geometry = {}, context.geometry
        for site, plain in unrounded.items():
            mine = [rounding_errors[role] for role in site.roles]
            shape = site.shape(geometry)
            dtype = self.written or context.weight(site.roles[0]).dtype
            outline = partial(self.inner.outline, site, geometry)
            out[site] = RoundedSizes(site, shape, dtype, self.max_bytes, outline).with_bits(
                ErrorCurve(*(t.cpu() for t in plain)),
                {bits: sum(each[bits] for each in mine) for bits in HOW},
                sum(each[0] for each in mine),
                whole=len(site.roles) == 1,  # otherwise in a grouping with single matrices
                trial_errors=self._trial_errors(context, site),
            )
        return out

    def fit_layer(self, context: LayerContext) -> LayerResult:
        ranks: dict[Site, Size] = {}
        bits: dict[Site, int] = {}
        found: dict[Site, Factors] = {}
        for site, size in context.sites.items():
            assert size is not None, "a budget gives every site its size"
            ranks[site], bits[site] = size[:-1], size[-1]
            if not any(ranks[site]):
                found[site] = self._whole(context, site, bits[site])
                context.replace(site, found[site])
        left = {site: size for site, size in ranks.items() if any(size)}
        if not left:
            return LayerResult(found)
        result = self.inner.fit_layer(cast(LayerContext, _WithSites(context, left)))
        for site, factors in result.factors.items():
            found[site] = factors
            if bits[site]:
                found[site] = quantise(factors, HOW[bits[site]])
                context.replace(site, found[site])
        return LayerResult(found, result.parameters)

    def _trial_errors(self, context: LayerContext, site: Site) -> dict[int, float] | None:
        """Bits -> measured error of rounding a site's factors; None if no trial is possible.

        An estimate is poor for matrices of different scales that share a factor: the small ones may
        be lost altogether.
        """
        factors = self.inner.example(site, context) if context.holds_out else None
        if factors is None:
            return None
        unrounded = context.held_out_error(context.matrices(site, factors))
        costs = {
            bits: context.held_out_error(context.matrices(site, quantise(factors, how)))
            for bits, how in HOW.items()
        }
        return {bits: max(0.0, cost - unrounded) for bits, cost in costs.items()}

    def _rounding_errors(self, context: LayerContext, role: str) -> dict[int, float]:
        """Bits -> error of rounding a matrix; 0 -> error of replacing it by zero."""
        w_ID = context.weight(role).float()
        metric_DD = self.inner.rounding_metric(context, role).to(w_ID.device)
        out = {0: self.inner.error_of(context, role, -w_ID)}
        by = compensation(metric_DD)
        for bits, how in HOW.items():
            lost_ID = quantised_whole(w_ID, how, by).dense() - w_ID
            out[bits] = self.inner.error_of(context, role, lost_ID)
        return out

    def _whole(self, context: LayerContext, site: Site, bits: int) -> Factors:
        """A site's matrix in few bits, rounded by the metric of its errors."""
        w_ID = context.weight(site.roles[0])
        metric_DD = self.inner.rounding_metric(context, site.roles[0]).to(w_ID.device)
        return quantised_whole(w_ID, HOW[bits], compensation(metric_DD))


@dataclass(frozen=True)
class _WithSites:
    """A context with other sites."""

    context: LayerContext
    sites: Mapping[Site, Size | None] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.context, name)


def in_bytes(compressor: Compressor, max_bytes: int, written: torch.dtype | None = None) -> Wrapped:
    """The strategy with sizes in ranks and bits, and costs in bytes.

    Args:
        compressor: the strategy.
        max_bytes: of the file.
        written: dtype of the matrices in the file; None: that in which the model runs.
    """

    def wrap(inner: Leaf | LayerFit) -> Leaf | LayerFit:
        if isinstance(inner, Leaf):
            return RoundedLeaf(inner, max_bytes, written)
        return RoundedFit(inner, max_bytes, written)

    return Wrapped(compressor, wrap)

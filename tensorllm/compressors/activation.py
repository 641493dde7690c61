"""Data-aware low rank: fitted to what the layers see, with sizes from one budget.

What is declared here is made by `tensorllm.calibration.fit`, which needs the model and text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from tensorllm.compressors.base import COMPRESSORS, Composite, Job, Leaf, MatrixStatistics
from tensorllm.compressors.checks import check_seed
from tensorllm.errors import UserError
from tensorllm.models.spec import ModelSpec
from tensorllm.registry import one_of
from tensorllm.tensors.factors import Factors, parameters
from tensorllm.tensors.pivoted import PivotedLowRank
from tensorllm.tensors.shared_input import READERS
from tensorllm.tensors.stacking import ATTENTION, FFN, Geometry

Weighting = Literal["loss", "outputs"]
WEIGHTINGS = ("loss", "outputs")
PARTS = ("basis", "mix", "rows")  # of the factors as they are stored


@dataclass(frozen=True, kw_only=True)
class Given(Leaf):
    """Factors that were fitted before; the weights themselves are not looked at again."""

    factors: Factors
    source: ClassVar[str] = ""

    def decompose(self, w: Tensor, statistics: Sequence[MatrixStatistics] | None = None) -> Factors:
        return self.factors

    def stored_parameters(self, shape: tuple[int, ...]) -> int:
        return parameters(self.factors)


@dataclass(frozen=True, kw_only=True)
class GivenInFile(Leaf):
    """The same from a file of safetensors, read when its turn comes: `prefix`.basis, ..."""

    file: Path
    prefix: str
    source: ClassVar[str] = ""

    def decompose(self, w: Tensor, statistics: Sequence[MatrixStatistics] | None = None) -> Factors:
        from safetensors import safe_open

        with safe_open(self.file, framework="pt") as stored:
            tensors = {name: stored.get_tensor(f"{self.prefix}.{name}") for name in PARTS}
        return PivotedLowRank.from_tensors(tensors)

    def stored_parameters(self, shape: tuple[int, ...]) -> int:
        from safetensors import safe_open

        with safe_open(self.file, framework="pt") as stored:
            shapes = [stored.get_slice(f"{self.prefix}.{name}").get_shape() for name in PARTS]
        return sum(map(prod, shapes))


@COMPRESSORS.register("activation-tucker")
@dataclass(frozen=True, kw_only=True)
class ActivationTucker(Composite):
    """Attention fitted to calibration text: matrices that read one input may share a factor.

    Source: truncation-aware whitening is SVD-LLM's (arXiv 2403.07378), the two-sided second moments
    are K-FAC's (arXiv 1503.05671); docs/methods/activation.md says what is put together here.

    Attributes:
        target_ratio: numbers in the compressed matrices before over after, above 1.
        target_params: instead, the parameters of the whole model afterwards.
        max_loss_increase: instead, nats per token that the loss on the calibration text may rise;
            the smallest model within it is searched for.
        weighting: `outputs` prices errors by what they do to their own layer's output, one layer
            in memory at a time; `loss` by the loss's curvature (the whole model, backwards).
        sharing: whether q, k, v (and in, gate) may share input factors where that pays.
        correction: whether layers are fitted on the inputs that the compressed model gives them.
        refit_steps: with correction, passes forward and backward through each layer alone in which
            all its factors move together towards the original's output of the layer.
        distill_steps: afterwards, of a training of the factors towards the original's predictions.
        ridge: weight of the original matrix in the correction, of the mean squared input.
        seed: of the random vectors or labels that prices are sampled with.
        calibration: what the text was; filled in by the fit.
    """

    target_ratio: float | None = None
    target_params: int | None = None
    max_loss_increase: float | None = None
    weighting: Weighting = "outputs"
    sharing: bool = True
    correction: bool = True
    refit_steps: int = 12
    distill_steps: int = 0
    ridge: float = 1e-2
    seed: int = 0
    calibration: Mapping[str, Any] | None = None

    source: ClassVar[str] = "https://arxiv.org/abs/2403.07378"
    roles: ClassVar[tuple[str, ...]] = ATTENTION
    fitted: ClassVar[tuple[Job, ...]] = ()  # of one fit: set on the instance, no setting

    def __post_init__(self) -> None:
        names = ("target_ratio", "target_params", "max_loss_increase")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise UserError(
                "give one of target_ratio (such as 1.5), target_params (of the whole model) and "
                f"max_loss_increase (nats per token), got {' and '.join(given) or 'none'}"
            )
        if self.max_loss_increase is not None and not 0 < self.max_loss_increase < float("inf"):
            raise UserError(f"max_loss_increase must be above 0, got {self.max_loss_increase}")
        if self.target_ratio is not None and not self.target_ratio > 1:
            raise UserError(f"target_ratio must be above 1, got {self.target_ratio}")
        if self.target_params is not None and self.target_params < 1:
            raise UserError(f"target_params must be 1 or more, got {self.target_params}")
        one_of("weighting", self.weighting, WEIGHTINGS)
        check_seed(self.seed)
        for name in ("refit_steps", "distill_steps"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not self.ridge > 0:
            raise UserError(f"ridge must be above 0, got {self.ridge}")

    def clusters(self, geometry: Geometry) -> list[tuple[str, ...]]:
        """Roles of this strategy that read the same input, in the order in which they run."""
        wanted = [role for role in self.roles if role in geometry.roles]
        attention, ffn = (tuple(r for r in readers if r in wanted) for readers in READERS)
        return [roles for roles in (attention, ("o",), ffn, ("out",)) if set(roles) & set(wanted)]

    def with_fit(self, jobs: Sequence[Job], calibration: Mapping[str, Any]) -> "ActivationTucker":
        """This strategy with what it made of a model."""
        out = replace(self, calibration=dict(calibration))
        object.__setattr__(out, "fitted", tuple(jobs))
        return out

    def jobs(self, spec: ModelSpec, layers: Sequence[int]) -> list[Job]:
        if not self.fitted:
            raise UserError(
                f"mode {COMPRESSORS.name_of(type(self))!r} fits the model to text: "
                "give --calibration FILE (or tensorllm.calibration.fit in Python)"
            )
        found = {layer for job in self.fitted for layer in job.site.layers}
        if found != set(layers):
            raise UserError(
                f"this strategy was fitted to layers {sorted(found)}, not {sorted(layers)}"
            )
        return list(self.fitted)


@COMPRESSORS.register("activation-hybrid")
@dataclass(frozen=True, kw_only=True)
class ActivationHybrid(ActivationTucker):
    """Attention and FFN fitted to calibration text, out of one budget."""

    roles: ClassVar[tuple[str, ...]] = ATTENTION + FFN

"""The interface of a compression strategy.

A strategy plans jobs: which matrices are decomposed together, and by which leaf. A leaf decomposes
one tensor, possibly with statistics of the calibration set. A composite plans jobs for leaves. A
`LayerFit` fits the matrices of one layer at a time, from the first to the last. Code that reads,
writes, counts, searches, budgets, saves or runs uses this interface only.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self

from torch import Tensor

from tensorllm.compressors.budget import TARGETS, Budget
from tensorllm.compressors.dimension import Dimension as Dimension  # plugins import it from here
from tensorllm.compressors.layer import ErrorCurve as ErrorCurve  # and this
from tensorllm.compressors.layer import LayerContext, LayerResult, MatrixStatistics, Site, Size
from tensorllm.errors import UserError
from tensorllm.models.spec import ModelSpec
from tensorllm.options import Value
from tensorllm.registry import Registry
from tensorllm.tensors.factors import Factors
from tensorllm.tensors.stacking import ATTENTION, Geometry

Needs = Literal["weights", "activations", "gradients"]
GradientOf = Literal["outputs", "loss"]


Groupings = list[list["Job"]]  # alternatives for the same matrices; a budget chooses one


@dataclass(frozen=True, slots=True)
class Job:
    """One decomposition: a site, and the strategy that computes its factors."""

    site: Site
    compressor: "Leaf | LayerFit"


class Compressor(ABC):
    """A strategy. Subclasses are frozen dataclasses whose fields are the settings.

    Derive from `Leaf` (decomposes one tensor), `Composite` (plans jobs for leaves) or `LayerFit`
    (fits the matrices of a layer to its inputs and output).

    Attributes:
        source: URL of the paper or code of the method.
        needs: `weights`; `activations` (a calibration set: covariances of inputs, and for a
            `LayerFit` the inputs themselves); `gradients` (covariances of output gradients too).
        width_only: whether it needs no covariances wider than the model's width
            (`width_covariance`, `propagated_covariance`) except `full_covariances`.
        holds_out: whether `curves` uses `held_out_error`; one batch is then kept out of its
            covariances.
        one_size: whether a budget gives all sites of `groupings` the same size.
        size_settings: names of its settings of sizes, in rows of which one is given; a budget
            replaces them all.
    """

    source: ClassVar[str]
    needs: ClassVar[Needs] = "weights"
    width_only: ClassVar[bool] = False
    holds_out: ClassVar[bool] = False
    one_size: ClassVar[bool] = False
    size_settings: ClassVar[tuple[tuple[str, ...], ...]] = (("rank", "ranks"),)

    @abstractmethod
    def jobs(self, spec: ModelSpec, layers: Sequence[int]) -> "list[Job]":
        """What is decomposed together, and by which strategy."""

    @property
    def named(self) -> "Compressor":
        """The strategy that reports and recipes name; a wrapper gives the one that it wraps."""
        return self

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise a UserError if the settings do not fit a stacked tensor of this shape."""
        del shape  # nothing to refuse by default

    def stored_parameters(self, shape: tuple[int, ...]) -> int | None:
        """Numbers that the factors will hold; None if only the decomposition can tell."""
        del shape
        return None

    def ffn_channels(self, geometry: Geometry) -> int | None:
        """FFN channels of a layer that are kept, by default all; None: only the fit can tell."""
        return geometry.F

    def stored_bytes(self, shape: tuple[int, ...], itemsize: int) -> int | None:
        """About how many bytes the factors will take; None if only the decomposition can tell.

        Args:
            shape: of the stacked tensor.
            itemsize: bytes of a number that is not rounded.
        """
        stored = self.stored_parameters(shape)
        return None if stored is None else stored * itemsize

    @property
    def full_covariances(self) -> tuple[str, ...]:
        """Roles whose full input covariance is needed, however wide."""
        return ()

    @property
    def needs_input_covariances(self) -> bool:
        """Whether it needs covariances of the original model's inputs once sizes are chosen."""
        return True

    def passes(self, sites: Sequence[Site]) -> float:
        """The cost of a fit in forward passes of the layer over the text, for estimates of time."""
        del sites
        return 0

    def min_parameters(self, spec: ModelSpec, layers: Sequence[int]) -> int | None:
        """Numbers stored at the smallest sizes; None: only the curves can tell."""
        del spec, layers
        return None

    @property
    def gradient_of(self) -> GradientOf:
        """Which gradients are needed: of the layer's `outputs`, or of the whole model's `loss`."""
        return "outputs"

    @property
    def training_steps(self) -> int:
        """Steps of joint training of all factors of the model after the fit."""
        return 0

    @property
    def seed_of_fit(self) -> int:
        """The seed of the random vectors or labels for which a fit samples gradients."""
        return 0

    @property
    def budget(self) -> Budget | None:
        """The target size among the strategy's own settings; None: its sizes are given directly."""
        return None

    def with_budget(self, budget: Budget) -> "Compressor":
        """The strategy with its target replaced by another; itself if it has none.

        Raises:
            UserError: it has no setting for this target.
        """
        if self.budget is None:
            return self
        own: Any = self
        targets = {field.name for field in fields(own)} & set(TARGETS)
        if wrong := budget.settings.keys() - targets:
            raise UserError(f"{name_of(type(self))} has no setting {', '.join(wrong)}")
        return replace(own, **(dict.fromkeys(targets) | budget.settings))

    @classmethod
    def search_space(cls, spec: ModelSpec, settings: Mapping[str, Any]) -> dict[str, Dimension]:
        """The dimensions that `search-ranks` may vary, by name; empty: cannot be searched.

        No dimension may be called `layer`: the search varies the layers of every strategy.

        Args:
            spec: of the model.
            settings: fixed fields; no dimension may set one of them.
        """
        del spec, settings
        return {}

    @classmethod
    def settings_at(cls, spec: ModelSpec, point: Mapping[str, Value]) -> dict[str, Any] | None:
        """The settings of a point of the search space; None: the point is invalid.

        By default each dimension is the setting of its name.

        Args:
            spec: of the model.
            point: a value for each dimension except those that the search leaves out (`--tied`).
        """
        del spec
        return dict(point)

    @classmethod
    def budget_settings(cls, spec: ModelSpec, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of the strategy for a run in which a budget chooses the sizes.

        Sizes are the smallest, and all matrices that the strategy can take are included, unless
        `settings` say otherwise.

        Raises:
            UserError: the strategy cannot meet a budget.
        """
        del spec, settings
        raise _no_curve(cls)


class Leaf(Compressor):
    """A strategy that decomposes one tensor.

    A minimal one implements only `decompose`, and gets the paper's tensor of each layer.
    """

    def jobs(self, spec: ModelSpec, layers: Sequence[int]) -> "list[Job]":
        """Each layer's attention as one tensor (D, K, 2g+2, G) by default."""
        return [Job(Site((layer,), ATTENTION, "heads"), self) for layer in layers]

    @abstractmethod
    def decompose(self, w: Tensor, statistics: Sequence[MatrixStatistics] | None = None) -> Factors:
        """Factorise one stacked tensor.

        Args:
            w: the site's tensor, in the dtype and on the device of the weights.
            statistics: one per matrix of the site, in stacking order; None if the strategy needs
                weights only.
        """

    def curve(
        self, site: Site, w: Tensor, statistics: Sequence[MatrixStatistics] | None = None
    ) -> ErrorCurve:
        """The error left at every size, for a budget.

        Raises:
            UserError: the strategy has no error curve.
        """
        del site, w, statistics
        raise _no_curve(type(self))

    def outline(self, shape: tuple[int, ...], size: Size) -> Factors:
        """Factors at one size of the curve without values (meta device), to count their bytes.

        Raises:
            UserError: the strategy does not implement this.
        """
        raise _no_outline(self)

    def error_of(
        self, w: Tensor, near: Tensor, statistics: Sequence[MatrixStatistics] | None = None
    ) -> float:
        """The error of replacing `w` by `near`, in the unit of the curve.

        By default the squared error of a tensor scaled to a mean square of one.
        """
        del statistics
        whole = float(w.double().square().sum())
        lost = float((w.double() - near.double()).square().sum())
        return lost * w.numel() / whole if whole else 0.0

    def at_size(self, site: Site, size: Size) -> "Leaf":
        """The leaf for one size of the curve, which plans a job for this site only."""
        raise AssertionError(f"{type(self).__name__} has no curve, so no size {size} of {site}")

    def covering(self, others: "Sequence[Leaf]", shape: tuple[int, ...]) -> Self | None:
        """A leaf whose factors contain those of `self` and all `others`, for tensors of this shape.

        A search then decomposes each site only once. None: the strategy's decompositions do not
        nest.
        """
        del others, shape
        return None

    def sliced(self, covering: Factors, shape: tuple[int, ...]) -> Factors:
        """This leaf's factors, extracted from those of the leaf that `covering` returned."""
        del shape
        raise AssertionError(f"{type(self).__name__} says that nothing covers it: {covering}")


class Composite(Compressor):
    """A strategy that plans jobs for others and decomposes nothing itself."""


class LayerFit(Compressor):
    """A strategy that fits the matrices of a layer to its activations, layer by layer."""

    needs: ClassVar[Needs] = "activations"

    @abstractmethod
    def fit_layer(self, context: LayerContext) -> LayerResult:
        """The factors of one layer's sites; they also replace the compressed layer's matrices.

        Args:
            context: the layer, its inputs in the original and in the compressed model, the
                original's output, covariances, and the sizes if a budget was allocated.
        """

    def groupings(self, geometry: Geometry, layer: int, sites: Sequence[Site]) -> list[Groupings]:
        """Alternative groupings into sites, per set of matrices; by default the planned sites."""
        del geometry, layer
        return [[[Job(site, self)]] for site in sites]

    def curves(self, sites: Sequence[Site], context: LayerContext) -> Mapping[Site, ErrorCurve]:
        """The error left at every size of sites of one layer, for a budget.

        Raises:
            UserError: the strategy has no curves.
        """
        del sites, context
        raise _no_curve(type(self))

    def outline(self, site: Site, geometry: Geometry, size: Size) -> Factors:
        """As `Leaf.outline`, for a site of one layer."""
        del site, geometry, size
        raise _no_outline(self)

    def example(self, site: Site, context: LayerContext) -> Factors | None:
        """Factors of a site at a medium size, from the covariances that `curves` uses.

        A budget in bytes measures the cost of rounding them on `context.held_out_error`. None: that
        cost is estimated from the whole matrices.
        """
        del site, context
        return None

    def rounding_metric(self, context: LayerContext, role: str) -> Tensor:
        """Weights (D, D) of errors along the model's width, float64.

        A whole matrix is rounded by them if a budget in bytes does not decompose it.

        Raises:
            UserError: the strategy cannot meet a budget in bytes.
        """
        del context, role
        raise _no_outline(self)

    def error_of(self, context: LayerContext, role: str, lost_ID: Tensor) -> float:
        """The cost of adding an error (I, D) to a whole role matrix, in the unit of the curves."""
        del context, role, lost_ID
        raise _no_outline(self)

    def passes(self, sites: Sequence[Site]) -> float:
        del sites
        return 1


def _no_curve(strategy: type[Compressor]) -> UserError:
    return UserError(f"{name_of(strategy)} cannot meet a target size: it has no error curve")


def _no_outline(strategy: Compressor) -> UserError:
    return UserError(
        f"{name_of(type(strategy))} cannot meet a target in bytes: it does not say what its "
        "factors hold (outline)"
    )


def name_of(strategy: type[Compressor]) -> str:
    """The name of a strategy's mode; the class name if it is not registered."""
    modes = (mode for mode in COMPRESSORS if COMPRESSORS[mode] is strategy)
    return next(modes, strategy.__name__)


COMPRESSORS: Registry[type[Compressor]] = Registry("compressor", group="tensorllm.compressors")

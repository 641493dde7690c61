"""The contract of a compression strategy.

A strategy plans jobs: which matrices are decomposed together, and by which leaf. A leaf
decomposes one tensor, perhaps with statistics of the calibration text. A composite plans jobs for
leaves. A `LayerFit` fits the matrices of one layer itself, layer after layer. Whatever reads,
writes, counts, searches, budgets, saves or runs works on this contract, never on one strategy.
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


Groupings = list[list["Job"]]  # of the same matrices; a budget chooses one


@dataclass(frozen=True, slots=True)
class Job:
    """One decomposition: a site, and the strategy that makes its factors."""

    site: Site
    compressor: "Leaf | LayerFit"


class Compressor(ABC):
    """A strategy. Subclasses are frozen dataclasses whose fields are the settings.

    Derive from `Leaf` (decomposes one tensor), `Composite` (plans jobs for leaves) or `LayerFit`
    (fits the matrices of a layer to its inputs and output).

    Attributes:
        source: URL of the paper or code that the method comes from.
        needs: `weights`; `activations` (a calibration text: covariances of inputs, and the inputs
            themselves in a `LayerFit`); `gradients` (covariances of output gradients too).
    """

    source: ClassVar[str]
    needs: ClassVar[Needs] = "weights"

    @abstractmethod
    def jobs(self, spec: ModelSpec, layers: Sequence[int]) -> "list[Job]":
        """What is decomposed together, and by whom."""

    @property
    def named(self) -> "Compressor":
        """The strategy that reports and recipes name: itself, but of a wrapper what it wraps."""
        return self

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse (UserError) settings that do not fit a stacked tensor of this shape."""
        del shape  # nothing to refuse by default

    def stored_parameters(self, shape: tuple[int, ...]) -> int | None:
        """Numbers that the factors will hold, or None where only the decomposition can tell."""
        del shape
        return None

    def ffn_channels(self, geometry: Geometry) -> int | None:
        """FFN channels of a layer that stay: all of F, unless a strategy drops some; None: it may
        drop some, and only the fit can tell."""
        return geometry.F

    def stored_bytes(self, shape: tuple[int, ...], itemsize: int) -> int | None:
        """About how many bytes the factors will take; None where only the decomposition can tell.

        Args:
            itemsize: bytes of a number that is not rounded.
        """
        stored = self.stored_parameters(shape)
        return None if stored is None else stored * itemsize

    @property
    def gradient_of(self) -> GradientOf:
        """Whose gradients `needs = "gradients"` means: of the layer's output (one layer in memory
        at a time), or of the model's loss (the whole model, backwards)."""
        return "outputs"

    @property
    def training_steps(self) -> int:
        """Steps in which all factors of the model are trained together after a fit."""
        return 0

    @property
    def seed_of_fit(self) -> int:
        """The seed of the random vectors or labels that a fit samples gradients with."""
        return 0

    @property
    def budget(self) -> Budget | None:
        """The target size among the strategy's own settings; None: its sizes are given."""
        return None

    def with_budget(self, budget: Budget) -> "Compressor":
        """The strategy with another target in place of its own; itself where it has none.

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
        """What `search-ranks` may vary, by name; nothing: the strategy cannot be searched.

        `layer` is no name for a dimension: the search varies the layers of every strategy.

        Args:
            settings: other fields, which stay as they are: no dimension may set one of them.
        """
        del spec, settings
        return {}

    @classmethod
    def settings_at(cls, spec: ModelSpec, point: Mapping[str, Value]) -> dict[str, Any] | None:
        """The settings that a point of the search space stands for; None: no weights have them.

        By default each dimension is the setting of its name.

        Args:
            point: a value of each dimension; of those that the search leaves out (`--tied`) none.
        """
        del spec
        return dict(point)

    @classmethod
    def budget_settings(cls, spec: ModelSpec, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of the strategy whose sizes a budget will choose.

        Sizes are at their smallest, and all matrices that the strategy can take are in, unless
        `settings` say otherwise.

        Raises:
            UserError: the strategy cannot meet a budget.
        """
        del spec, settings
        raise _no_curve(cls)


class Leaf(Compressor):
    """A strategy that decomposes one tensor.

    The smallest one implements `decompose` alone and then sees the paper's tensor of each layer.
    """

    def jobs(self, spec: ModelSpec, layers: Sequence[int]) -> "list[Job]":
        """Each layer's attention as one tensor (D, K, 2g+2, G) by default."""
        return [Job(Site((layer,), ATTENTION, "heads"), self) for layer in layers]

    @abstractmethod
    def decompose(self, w: Tensor, statistics: Sequence[MatrixStatistics] | None = None) -> Factors:
        """Factorise one stacked tensor.

        Args:
            w: the site's tensor, in the dtype of the weights, on their device.
            statistics: one per matrix of the site, in stacking order; None where the strategy
                needs weights only.
        """

    def curve(
        self, site: Site, w: Tensor, statistics: Sequence[MatrixStatistics] | None = None
    ) -> ErrorCurve:
        """The error left at every size, for a budget.

        Raises:
            UserError: the strategy has none.
        """
        del site, w, statistics
        raise _no_curve(type(self))

    def outline(self, shape: tuple[int, ...], size: Size) -> Factors:
        """The factors of a stacked tensor at one size of the curve without their numbers, on the
        meta device: what a budget in bytes counts.

        Raises:
            UserError: the strategy does not say.
        """
        raise _no_outline(self)

    def error_of(
        self, w: Tensor, near: Tensor, statistics: Sequence[MatrixStatistics] | None = None
    ) -> float:
        """What another tensor costs in the place of `w`, in the unit of the curve: the squared
        error of a tensor whose mean square is one, unless a strategy weights it."""
        del statistics
        whole = float(w.double().square().sum())
        lost = float((w.double() - near.double()).square().sum())
        return lost * w.numel() / whole if whole else 0.0

    def at_size(self, site: Site, size: Size) -> "Leaf":
        """The leaf of one size of the curve, which plans a job for this site alone."""
        raise AssertionError(f"{type(self).__name__} has no curve, so no size {size} of {site}")

    def covering(self, others: "Sequence[Leaf]", shape: tuple[int, ...]) -> Self | None:
        """A leaf whose factors of a tensor of this shape hold those of `self` and of all `others`.

        A search then decomposes each site once. None: its decompositions do not nest.
        """
        del others, shape
        return None

    def sliced(self, covering: Factors, shape: tuple[int, ...]) -> Factors:
        """This leaf's factors, out of those of a leaf that `covering` gave."""
        del shape
        raise AssertionError(f"{type(self).__name__} says that nothing covers it: {covering}")


class Composite(Compressor):
    """A strategy that plans jobs for others and decomposes nothing itself."""


class LayerFit(Compressor):
    """A strategy that fits the matrices of a layer to what goes through it, layer after layer.

    Attributes:
        width_only: whether covariances at the model's width are all that it asks the context for
            (`width_covariance`, `propagated_covariance`) beside `full_covariances`: nothing else is
            then measured whose size is the square of an FFN's width.
        holds_out: whether `curves` asks for `held_out_error`: a batch is then kept out of its
            covariances.
        one_size: whether a budget gives all sites of `groupings` the same size.
    """

    needs: ClassVar[Needs] = "activations"
    width_only: ClassVar[bool] = False
    holds_out: ClassVar[bool] = False
    one_size: ClassVar[bool] = False

    @property
    def full_covariances(self) -> tuple[str, ...]:
        """Roles whose inputs' covariances `curves` asks for in full, however wide they are."""
        return ()

    @property
    def needs_input_covariances(self) -> bool:
        """Whether `fit_layer` asks for covariances of the original's own inputs."""
        return True

    @abstractmethod
    def fit_layer(self, context: LayerContext) -> LayerResult:
        """The factors of one layer's sites, which also replace the compressed layer's matrices.

        Args:
            context: the layer, the original's and the compressed model's inputs of it, the
                original's output, covariances, and, where a budget was shared out, the sizes.
        """

    def groupings(self, geometry: Geometry, layer: int, sites: Sequence[Site]) -> list[Groupings]:
        """How a budget may group the layer's matrices into sites, for each set of matrices that may
        be grouped: by default only as they were planned."""
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
        """As `Leaf.outline`, of a site of one layer."""
        del site, geometry, size
        raise _no_outline(self)

    def example(self, site: Site, context: LayerContext) -> Factors | None:
        """Factors of a site at a middling size, by the covariances that `curves` sees, which a
        budget in bytes tries in few bits on `context.held_out_error`; None: what rounding costs
        is taken from that of the whole matrices."""
        del site, context
        return None

    def rounding_metric(self, context: LayerContext, role: str) -> Tensor:
        """Weights (D, D) of errors along the model's width, by which a whole matrix is rounded
        where a budget in bytes leaves it one, float64.

        Raises:
            UserError: the strategy cannot meet a budget in bytes.
        """
        del context, role
        raise _no_outline(self)

    def error_of(self, context: LayerContext, role: str, lost_ID: Tensor) -> float:
        """What adding an error (I, D) to a whole role matrix costs, in the unit of the curves."""
        del context, role, lost_ID
        raise _no_outline(self)

    def passes(self, sites: Sequence[Site]) -> float:
        """What a fit costs in passes of the layer forward on the text; for the time left."""
        del sites
        return 1

    def min_parameters(self, spec: ModelSpec, layers: Sequence[int]) -> int | None:
        """Numbers stored at the smallest sizes; None: only the curves can tell."""
        del spec, layers
        return None


def _no_curve(strategy: type[Compressor]) -> UserError:
    return UserError(f"{name_of(strategy)} cannot meet a target size: it has no error curve")


def _no_outline(strategy: Compressor) -> UserError:
    return UserError(
        f"{name_of(type(strategy))} cannot meet a target in bytes: it does not say what its "
        "factors hold (outline)"
    )


def name_of(strategy: type[Compressor]) -> str:
    """The mode that users give, of a class that is not registered its own name."""
    modes = (mode for mode in COMPRESSORS if COMPRESSORS[mode] is strategy)
    return next(modes, strategy.__name__)


COMPRESSORS: Registry[type[Compressor]] = Registry("compressor", group="tensorllm.compressors")

"""The objects that strategies work on: sites, statistics, and a layer on a calibration set."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tensorllm.compressors.operators import LinearOperator
from tensorllm.tensors.factors import Factors
from tensorllm.tensors.stacking import ATTENTION, STACKINGS, Geometry, families


@dataclass(frozen=True, slots=True)
class Site:
    """Role matrices that are decomposed as one tensor.

    Attributes:
        layers: the layers they come from.
        roles: the roles of each layer, in stacking order.
        stacking: a name in `STACKINGS`.
    """

    layers: tuple[int, ...]
    roles: tuple[str, ...]
    stacking: str

    @property
    def matrices(self) -> list[tuple[int, str]]:
        """(layer, role) of every matrix, in stacking order."""
        return [(layer, role) for layer in self.layers for role in self.roles]

    @property
    def name(self) -> str:
        """A name for tables and files, such as `layers.3.qkvo` or `layers.0-1.in`."""
        layers = "-".join(str(layer) for layer in self.layers)
        joined = "".join if set(self.roles) <= set(ATTENTION) else "-".join
        short = self.families if len(self.families) < len(self.roles) else self.roles
        return f"layers.{layers}.{joined(short)}"

    @property
    def families(self) -> tuple[str, ...]:
        """The roles without repetition, with one name for the same matrix of all experts."""
        return families(self.roles)

    def stack(self, w_ID: Sequence[Tensor], geometry: Geometry) -> Tensor:
        """The tensor to decompose, from the role matrices in the order of `matrices`."""
        return STACKINGS[self.stacking].stack(w_ID, geometry)

    def unstack(self, w: Tensor, geometry: Geometry) -> list[Tensor]:
        """The role matrices that the tensor stands for, in the order of `matrices`."""
        return STACKINGS[self.stacking].unstack(w, geometry, len(self.matrices))

    def numel(self, geometry: Geometry) -> int:
        """Numbers in its matrices, for layers of this geometry."""
        return sum(geometry.numel(role) for _, role in self.matrices)

    def shape(self, geometry: Geometry) -> tuple[int, ...]:
        """The shape of the stacked tensor.

        Raises:
            UserError: the matrices cannot be stacked.
        """
        return _shape(self.stacking, self.roles, len(self.layers), geometry)


@lru_cache(maxsize=256)  # layers are alike, and each is asked for when a folder opens
def _shape(
    stacking: str, roles: tuple[str, ...], layers: int, geometry: Geometry
) -> tuple[int, ...]:
    kind = STACKINGS[stacking]
    kind.check(roles, geometry)
    empty = [torch.empty(geometry.shape(role), device="meta") for role in roles * layers]
    return tuple(kind.stack(empty, geometry).shape)


@dataclass(frozen=True, eq=False)
class MatrixStatistics:
    """Statistics of one role matrix (I, D) on a calibration set.

    Attributes:
        input_covariance_XX: E[x xᵀ] of the matrix's inputs, X the input width.
        input_mean_abs_X: E|x|, per input.
        gradient_covariance_YY: E[g gᵀ] of the gradient at its output; None unless it was requested.
        reads_rows: whether the inputs run along the rows I (output projections, `o` and `out`)
            rather than the columns D.
        tokens: that the matrix read; 0 for an expert that was never chosen, with all statistics 0.
    """

    input_covariance_XX: Tensor
    input_mean_abs_X: Tensor
    gradient_covariance_YY: Tensor | None
    reads_rows: bool
    tokens: int = 1

    @property
    def row_covariance(self) -> Tensor | None:
        """The covariance along the rows of the role matrix; None if it was not measured."""
        return self.input_covariance_XX if self.reads_rows else self.gradient_covariance_YY

    @property
    def column_covariance(self) -> Tensor | None:
        """The covariance along its columns; None if it was not measured."""
        return self.gradient_covariance_YY if self.reads_rows else self.input_covariance_XX


OutputMap = Callable[[Tensor], Tensor]  # outputs (..., D) of the factors from those of the original
Size = tuple[int, ...]  # integers that specify a size on an error curve, usually ranks


class ErrorCurve(NamedTuple):
    """The cost and error of every size of a site.

    Shapes: N sizes, C integers that specify a size (usually ranks).

    Attributes:
        cost_N: numbers stored, ascending.
        error_N: error left, descending, in a unit common to all sites of a run.
        sizes_NC: the sizes, for `Leaf.at_size` or `LayerContext.sizes`; all 0 leaves the site as it
            is.
    """

    cost_N: Tensor
    error_N: Tensor
    sizes_NC: Tensor


class LayerContext(Protocol):
    """One layer of the original and of the compressed model, on the calibration set.

    Shapes: N tokens of a batch, X input width, B sequences, T positions, D model width.
    """

    @property
    def layer(self) -> int: ...

    @property
    def geometry(self) -> Geometry: ...

    @property
    def sites(self) -> Mapping[Site, Size | None]:
        """The strategy's sites of this layer, in the order in which they run, with their sizes.

        As planned, or as a budget grouped them; sizes are those on the curve, None without a
        budget.
        """
        ...

    @property
    def device(self) -> torch.device: ...

    def weight(self, role: str) -> Tensor:
        """The original's role matrix (I, D)."""
        ...

    def has_bias(self, role: str) -> bool:
        """Whether the role's linear layer has a bias."""
        ...

    def statistics(self, site: Site) -> list[MatrixStatistics]:
        """Statistics of the original model, one per matrix of the site."""
        ...

    def input_covariance(self, role: str) -> Tensor:
        """E[x xᵀ] (X, X) of the original model's inputs, float64."""
        ...

    def gradient_covariance(self, roles: Sequence[str]) -> Tensor:
        """E[g gᵀ] over the concatenated outputs of roles that read the same input, float64."""
        ...

    def width_covariance(self, roles: Sequence[str]) -> Tensor:
        """The covariance (D, D) at the model's width, float64, for roles that read the same input.

        E[x xᵀ] of what input projections read, or E[g gᵀ] of the gradient at the outputs of output
        projections.
        """
        ...

    def gradient_tokens(self, roles: Sequence[str]) -> int:
        """Number of tokens over which the gradients at the outputs of these roles were taken."""
        ...

    def propagated_covariance(self, roles: Sequence[str]) -> Tensor:
        """The other side's covariance, propagated through the matrices to the model's width.

        (D, D), float64. Input projections: E[h hᵀ] = Wᵀ E[g gᵀ] W of h = Wᵀ g, summed over these
        roles; an output projection: E[y yᵀ] = W E[x xᵀ] Wᵀ of y = W x.
        """
        ...

    def shifted_width_covariances(self, roles: Sequence[str]) -> tuple[Tensor, Tensor]:
        """As `shifted_covariances`, at the model's width (D, D).

        Of what input projections read, or of W x and W y for output projections, with the
        original's W.
        """
        ...

    def shifted_covariances(self, role: str) -> tuple[Tensor, Tensor]:
        """E[x yᵀ] and E[y yᵀ], x the original's and y the compressed model's input, float64."""
        ...

    def original_inputs(self, role: str) -> Iterator[Tensor]:
        """The role's inputs in the original model, (N, X) per batch."""
        ...

    def original_width_activations(self, role: str) -> Iterator[Tensor]:
        """Activations of the original model at the model's width, (N, D) per batch.

        The inputs of an input projection, or the outputs W x of an output projection; does not run
        the layer again.
        """
        ...

    def compressed_inputs(self, role: str) -> Iterator[Tensor]:
        """The role's inputs in the compressed model so far, (N, X) per batch."""
        ...

    def replace(self, site: Site, factors: Factors, output_map: OutputMap | None = None) -> None:
        """Replace matrices of the compressed layer by factors, rounded as they will be stored.

        Args:
            site: of the matrices.
            factors: their factors.
            output_map: for an output projection, maps the outputs of the original matrix to those
                of the factors on the same input; saves another run of the layer.
        """
        ...

    def replace_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Replace norms and biases of the compressed layer, by their names within the layer."""
        ...

    def outputs(self) -> Iterator[Tensor]:
        """Hidden states (B, T, D) after the compressed layer in its current state, per batch."""
        ...

    def output_error(self) -> float:
        """The relative error of the compressed layer's output.

        The mean over tokens of the squared distance to the original's output over the latter's
        squared norm.
        """
        ...

    @property
    def holds_out(self) -> bool:
        """Whether there is held-out text, unseen by the covariances, for `held_out_error`."""
        ...

    def matrices(self, site: Site, factors: Factors) -> dict[str, Tensor]:
        """The role matrices (I, D) that the factors of a site stand for."""
        ...

    def held_out_error(self, weights: Mapping[str, Tensor | LinearOperator]) -> float:
        """The change of the layer's output on held-out text, in the unit of `output_error`.

        Args:
            weights: role matrices (I, D), or operators, to use in place of the layer's own.
        """
        ...

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors (usually gradients) by their sums over the processes of the fit."""
        ...

    def output_loss(
        self,
        batch: int,
        weights: Mapping[str, Tensor | LinearOperator],
        parameters: Mapping[str, Tensor],
    ) -> Tensor:
        """`output_error` on one batch, as a differentiable scalar.

        Args:
            batch: 0 to `batches` - 1.
            weights: role matrices (I, D), or operators, to run with.
            parameters: other parameters of the layer to run with, by their names within the layer.
        """
        ...

    @property
    def batches(self) -> int: ...

    @property
    def tokens(self) -> int:
        """Number of tokens of the text on which the statistics were measured."""
        ...

    def other_parameters(self) -> dict[str, Tensor]:
        """Norms and biases of the layer, by their names within the layer."""
        ...


@dataclass(frozen=True, eq=False)
class LayerResult:
    """The result of a `LayerFit` for one layer.

    Attributes:
        factors: of the layer's sites; a site without factors stays as it is.
        parameters: other parameters that were changed (norms, biases), by their names within the
            layer.
    """

    factors: Mapping[Site, Factors]
    parameters: Mapping[str, Tensor] = field(default_factory=dict)

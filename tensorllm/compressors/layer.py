"""What a strategy works on: sites, statistics of their matrices, a layer on a calibration text."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
        roles: the roles of each layer, in the order in which they are stacked.
        stacking: a name of `STACKINGS`.
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
        """The roles, the same matrix of all experts once."""
        return families(self.roles)

    def stack(self, w_ID: Sequence[Tensor], geometry: Geometry) -> Tensor:
        """The tensor to decompose, from the role matrices in the order of `matrices`."""
        return STACKINGS[self.stacking].stack(w_ID, geometry)

    def unstack(self, w: Tensor, geometry: Geometry) -> list[Tensor]:
        """The role matrices that the tensor stands for."""
        return STACKINGS[self.stacking].unstack(w, geometry, len(self.matrices))

    def numel(self, geometry: Geometry) -> int:
        """Numbers in its matrices, of layers with this geometry."""
        return sum(geometry.numel(role) for _, role in self.matrices)

    def shape(self, geometry: Geometry) -> tuple[int, ...]:
        """The stacked tensor's shape; refuses what cannot be stacked."""
        STACKINGS[self.stacking].check(self.roles, geometry)
        empty = [torch.empty(geometry.shape(role), device="meta") for _, role in self.matrices]
        return tuple(self.stack(empty, geometry).shape)


@dataclass(frozen=True, eq=False)
class MatrixStatistics:
    """What a calibration text says of one role matrix (I, D).

    Attributes:
        input_covariance_XX: E[x xᵀ] of what the matrix reads, X its input width.
        input_mean_abs_X: E|x|, per input.
        gradient_covariance_YY: E[g gᵀ] of the gradient at its output; None unless it was asked for.
        reads_rows: whether the inputs run along the rows I (output projections, `o` and `out`) and
            not along the columns D.
        tokens: that the matrix read; none, where an expert was never chosen: all is 0 then.
    """

    input_covariance_XX: Tensor
    input_mean_abs_X: Tensor
    gradient_covariance_YY: Tensor | None
    reads_rows: bool
    tokens: int = 1

    @property
    def row_covariance(self) -> Tensor | None:
        """The covariance along the rows of the role matrix; None where it was not measured."""
        return self.input_covariance_XX if self.reads_rows else self.gradient_covariance_YY

    @property
    def column_covariance(self) -> Tensor | None:
        """The covariance along its columns; None where it was not measured."""
        return self.gradient_covariance_YY if self.reads_rows else self.input_covariance_XX


OutputMap = Callable[[Tensor], Tensor]  # outputs (..., D) of the factors, from the original's
Size = tuple[int, ...]  # integers that say one size on an error curve: ranks, as a rule


class ErrorCurve(NamedTuple):
    """What every size of a site stores and what error it leaves.

    Shapes: N sizes, C integers that say one size (ranks, as a rule).

    Attributes:
        cost_N: numbers stored, ascending.
        error_N: error left, descending, in a unit that all sites of one run share.
        sizes_NC: the sizes, for `Leaf.at_size` or `LayerContext.sizes`; all 0 leaves the site as
            it is.
    """

    cost_N: Tensor
    error_N: Tensor
    sizes_NC: Tensor


class LayerContext(Protocol):
    """One layer of the original and of the compressed model, on the calibration text.

    Shapes: N tokens of a batch, X width of an input, B sequences, T positions, D model width.
    """

    @property
    def layer(self) -> int: ...

    @property
    def geometry(self) -> Geometry: ...

    @property
    def sites(self) -> Mapping[Site, Size | None]:
        """The strategy's sites of this layer, as they were planned or as a budget chose them, each
        with its size on the curve (None without a budget), in the order in which they run."""
        ...

    @property
    def device(self) -> torch.device: ...

    def weight(self, role: str) -> Tensor:
        """The original's role matrix (I, D)."""
        ...

    def has_bias(self, role: str) -> bool:
        """Whether a bias is added to what the role's matrix gives."""
        ...

    def statistics(self, site: Site) -> list[MatrixStatistics]:
        """Of the original's inputs, one per matrix of the site."""
        ...

    def input_covariance(self, role: str) -> Tensor:
        """E[x xᵀ] (X, X) of the original's inputs, float64."""
        ...

    def gradient_covariance(self, roles: Sequence[str]) -> Tensor:
        """E[g gᵀ] over the joint outputs of roles that read one input, float64."""
        ...

    def width_covariance(self, roles: Sequence[str]) -> Tensor:
        """Of roles that read one input, at the model's width (D, D), float64: E[x xᵀ] of what input
        projections read, E[g gᵀ] of the gradient where output projections write."""
        ...

    def gradient_tokens(self, roles: Sequence[str]) -> int:
        """Of how many tokens the gradients at the outputs of these roles were taken."""
        ...

    def propagated_covariance(self, roles: Sequence[str]) -> Tensor:
        """The covariance of the other side, propagated through the matrices to the model's width
        (D, D), float64: of input projections E[h hᵀ] = Wᵀ E[g gᵀ] W of h = Wᵀ g, summed over these
        roles; of an output projection E[y yᵀ] = W E[x xᵀ] Wᵀ of y = W x."""
        ...

    def shifted_width_covariances(self, roles: Sequence[str]) -> tuple[Tensor, Tensor]:
        """As `shifted_covariances` at the model's width (D, D): of what input projections read, or
        of W x and W y of output projections, W the original's matrix."""
        ...

    def shifted_covariances(self, role: str) -> tuple[Tensor, Tensor]:
        """E[x yᵀ] and E[y yᵀ], x the original's and y the compressed model's input, float64."""
        ...

    def original_inputs(self, role: str) -> Iterator[Tensor]:
        """(N, X) per batch: what the original gives the role's matrix."""
        ...

    def original_width_activations(self, role: str) -> Iterator[Tensor]:
        """Activations of the original at the model's width, (N, D) per batch, without another run
        of the layer: the inputs of an input projection, or the outputs W x of an output
        projection."""
        ...

    def compressed_inputs(self, role: str) -> Iterator[Tensor]:
        """(N, X) per batch: what the compressed model gives it, with what was replaced so far."""
        ...

    def replace(self, site: Site, factors: Factors, output_map: OutputMap | None = None) -> None:
        """Replace matrices of the compressed layer by factors, rounded as they are stored.

        Args:
            output_map: of an output projection, how its outputs with the factors follow from those
                with the original's matrix on the same input; saves another run of the layer.
        """
        ...

    def replace_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Replace norms and biases of the compressed layer, by their names below it."""
        ...

    def outputs(self) -> Iterator[Tensor]:
        """Hidden states (B, T, D) after the compressed layer as it is now, per batch."""
        ...

    def output_error(self) -> float:
        """How far these are from the original's: the mean over tokens of the squared distance
        relative to the output's squared size."""
        ...

    @property
    def holds_out(self) -> bool:
        """Whether there is text that the covariances have not seen, for `held_out_error`."""
        ...

    def matrices(self, site: Site, factors: Factors) -> dict[str, Tensor]:
        """The role matrices (I, D) that factors of a site stand for."""
        ...

    def held_out_error(self, weights: Mapping[str, Tensor | LinearOperator]) -> float:
        """How far the layer's output on that text moves with these role matrices (I, D), or
        operators, in the place of its own, in the unit of `output_error`."""
        ...

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors, gradients as a rule, by their sums over the processes of the fit."""
        ...

    def output_loss(
        self,
        batch: int,
        weights: Mapping[str, Tensor | LinearOperator],
        parameters: Mapping[str, Tensor],
    ) -> Tensor:
        """`output_error` on one batch, as a scalar that gradients flow from.

        Args:
            batch: 0 to `batches` - 1.
            weights: role matrices (I, D) to run with, or operators.
            parameters: other parameters of the layer to run with, by their names below it.
        """
        ...

    @property
    def batches(self) -> int: ...

    @property
    def tokens(self) -> int:
        """Of the text that the statistics were measured on."""
        ...

    def other_parameters(self) -> dict[str, Tensor]:
        """Norms and biases of the layer, by their names below it."""
        ...


@dataclass(frozen=True, eq=False)
class LayerResult:
    """What a `LayerFit` made of one layer.

    Attributes:
        factors: of the layer's sites; what has none stays as it is.
        parameters: other parameters of the layer that were changed (norms, biases), by their names
            below the layer.
    """

    factors: Mapping[Site, Factors]
    parameters: Mapping[str, Tensor] = field(default_factory=dict)

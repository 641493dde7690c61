"""Tucker strategies: all four attention matrices of a layer together, or each alone.

Shapes: D model width, K head_dim, M = 2g+2 matrices per group, G groups (= heads if g = 1).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, Self, cast

from torch import Tensor

from tensorllm.compressors.base import COMPRESSORS, Dimension, ErrorCurve, Job, Leaf
from tensorllm.compressors.checks import check_roles
from tensorllm.compressors.layer import MatrixStatistics, Site, Size
from tensorllm.errors import UserError
from tensorllm.models.spec import ModelSpec
from tensorllm.options import Value
from tensorllm.registry import one_of
from tensorllm.tensors.energy import tucker_energy, tucker_stored
from tensorllm.tensors.factors import Factors, Tucker
from tensorllm.tensors.ranks import (
    check_ranks,
    ranks_for_energy,
    ranks_for_error,
    tucker_parameters,
)
from tensorllm.tensors.stacking import ATTENTION
from tensorllm.tensors.tucker import spectra, truncate, tucker, tucker_outline

LayoutName = Literal["paper", "official"]
Solver = Literal["sthosvd", "tensorly"]
LAYOUTS = ("paper", "official")
SOLVERS = ("sthosvd", "tensorly")

SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)  # of the model width and of head_dim: ranks to try
# A search first decomposes a tensor of at most so many numbers (64 MiB in float32) at full ranks,
# so that its trials can decompose the core without loss. For larger ones it keeps MARGIN times the
# largest ranks, as the best subspaces of different ranks are not quite nested.
EXACT_BELOW = 2**24
MARGIN = 2


@dataclass(frozen=True, kw_only=True)
class TuckerSettings(Leaf):
    """Base of both Tucker strategies: ranks given or derived, layout and solver.

    Attributes:
        ranks: one rank per decomposed mode, in the order of the modes.
        energy: instead of ranks, the share of the squared norm to keep in each mode, in (0, 1].
        error: instead of ranks, an upper bound of the relative reconstruction error, in [0, 1).
        layout: which axis is cut into heads: `paper`, or `official` as the authors' code does.
        sweeps: HOOI sweeps after the HOSVD, at most; None: 12 (`tensorly`: 100).
        tol: the sweeps end when the relative error changes by less; None: 2e-5 (`tensorly`: 1e-5).
        solver: our `sthosvd`, or `tensorly` (slow; the reference).
    """

    ranks: tuple[int, ...] | None = None
    energy: float | None = None
    error: float | None = None
    layout: LayoutName = "paper"
    sweeps: int | None = None
    tol: float | None = None
    solver: Solver = "sthosvd"

    modes: ClassVar[tuple[int, ...]]
    size_settings: ClassVar[tuple[tuple[str, ...], ...]] = (("ranks", "energy", "error"),)

    def __post_init__(self) -> None:
        given = [name for name in ("ranks", "energy", "error") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UserError(
                f"give exactly one of ranks, energy and error, got {', '.join(given) or 'none'}; "
                "`tensorllm inspect` shows what ranks keep"
            )
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UserError(f"energy must be in (0, 1], got {self.energy}")
        if self.error is not None and not 0 <= self.error < 1:
            raise UserError(f"error must be in [0, 1), got {self.error}")
        one_of("layout", self.layout, LAYOUTS)
        one_of("solver", self.solver, SOLVERS)
        if self.sweeps is not None and (not isinstance(self.sweeps, int) or self.sweeps < 0):
            raise UserError(f"sweeps must be 0 or more, got {self.sweeps}")
        if self.tol is not None and not self.tol >= 0:
            raise UserError(f"tol must be 0 or more, got {self.tol}")
        if self.ranks is not None:
            object.__setattr__(self, "ranks", tuple(self.ranks))

    @classmethod
    def search_space(cls, spec: ModelSpec, settings: Mapping[str, Any]) -> dict[str, Dimension]:
        """R1 (of D) and R2 (of K) as shares of their mode's size; R3 (of the matrices): all."""
        if {"ranks", "energy", "error"} & settings.keys():
            return {}
        geo = spec.sample(ATTENTION)
        shares = {
            f"R{n}": Dimension(tuple(sorted({max(1, round(s * size)) for s in SHARES})), (1, size))
            for n, size in ((1, geo.D), (2, geo.K))
        }
        matrices = 2 * geo.groups + 2
        every = {"R3": Dimension(tuple(range(1, matrices + 1)), (1, matrices))}
        return shares | every if len(cls.modes) > 2 else shares

    @classmethod
    def settings_at(cls, spec: ModelSpec, point: Mapping[str, Value]) -> dict[str, Any] | None:
        """The ranks of a point; without R1, R1 = G * R2 as in the authors' published ranks.

        None: R1 is larger than D, or a rank exceeds the product of the others and the groups G,
        which bounds the rank of a mode's unfolding, so that the excess would be stored in vain.
        """
        if "R2" not in point:
            return {}
        geo = spec.sample(ATTENTION)
        given = {"R1": geo.G * int(point["R2"])} | {name: int(rank) for name, rank in point.items()}
        ranks = [given[f"R{mode + 1}"] for mode in cls.modes]
        numbers = math.prod(ranks) * geo.G
        if ranks[0] > geo.D or any(rank * rank > numbers for rank in ranks):
            return None
        return {"ranks": ranks}

    @classmethod
    def budget_settings(cls, spec: ModelSpec, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {"ranks": (1,) * len(cls.modes)} | dict(settings)

    def check(self, shape: tuple[int, ...]) -> None:
        if self.ranks is not None:
            check_ranks(self.ranks, [shape[n] for n in self.modes])

    def stored_parameters(self, shape: tuple[int, ...]) -> int | None:
        if self.ranks is None:
            return None
        return tucker_parameters(shape, dict(zip(self.modes, self.ranks, strict=True)))

    def decompose(self, w: Tensor, statistics: Sequence[MatrixStatistics] | None = None) -> Tucker:
        """The Tucker factors of a stacked tensor.

        Raises:
            UserError: ranks out of range.
        """
        self.check(tuple(w.shape))
        ranks = self.ranks if self.ranks is not None else self._wanted_ranks(w)
        by_mode = dict(zip(self.modes, ranks, strict=True))
        return tucker(w, by_mode, sweeps=self.sweeps, tol=self.tol, method=self.solver)

    def curve(
        self, site: Site, w: Tensor, statistics: Sequence[MatrixStatistics] | None = None
    ) -> ErrorCurve:
        stored = partial(tucker_stored, tuple(w.shape))
        curve, sizes_NC = tucker_energy(w, self.modes).curve(stored)
        return ErrorCurve(*curve, sizes_NC)

    def outline(self, shape: tuple[int, ...], size: Size) -> Factors:
        return tucker_outline(shape, dict(zip(self.modes, size, strict=True)))

    def at_size(self, site: Site, size: Size) -> "TuckerSettings":
        return replace(self, ranks=size, energy=None, error=None)

    def covering(self, others: Sequence[Leaf], shape: tuple[int, ...]) -> Self | None:
        """A leaf at full ranks, or for large tensors at `MARGIN` times the largest ranks.

        Up to `EXACT_BELOW` numbers full ranks are kept, so that decomposing the core at smaller
        ranks is as good as decomposing the weights.
        """
        ranks = [leaf.ranks for leaf in (self, *others) if isinstance(leaf, TuckerSettings)]
        if len(ranks) <= len(others) or None in ranks:
            return None
        scale = float("inf") if math.prod(shape) <= EXACT_BELOW else MARGIN
        largest = [max(of_mode) for of_mode in zip(*cast("list[Size]", ranks), strict=True)]
        sizes = [shape[mode] for mode in self.modes]
        return replace(
            self, ranks=tuple(int(min(n, scale * r)) for n, r in zip(sizes, largest, strict=True))
        )

    def sliced(self, covering: Factors, shape: tuple[int, ...]) -> Tucker:
        """The factors from decomposing the small core again."""
        largest = cast(Tucker, covering)
        ranks = dict(zip(self.modes, self.ranks or (), strict=True))
        same = all(largest.factors[mode].shape[1] == rank for mode, rank in ranks.items())
        return largest if same else truncate(largest, ranks, refine=True)

    def _wanted_ranks(self, w: Tensor) -> tuple[int, ...]:
        """The smallest ranks that keep the wanted energy or meet the error bound, mode by mode."""
        by_mode = spectra(w, self.modes)
        if self.energy is not None:
            chosen = ranks_for_energy(by_mode, self.energy)
        else:
            assert self.error is not None
            chosen = ranks_for_error(by_mode, self.error)
        return tuple(chosen[mode] for mode in self.modes)


@COMPRESSORS.register("shared-tucker", aliases=("shared-tucker-4d", "4D_Tucker"))
@dataclass(frozen=True, kw_only=True)
class SharedTucker4D(TuckerSettings):
    """One set of factors per layer, shared by Q, K, V, O and by every head; a core per head.

    `ranks` are (R1, R2, R3) of (D, K, 2g+2). Source: TensorLLM, sections 3.2 and 3.3.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2501.15674"
    modes: ClassVar[tuple[int, ...]] = (0, 1, 2)

    def jobs(self, spec: ModelSpec, layers: Sequence[int]) -> list[Job]:
        stacking = "heads" if self.layout == "paper" else "official-heads"
        return [Job(Site((layer,), ATTENTION, stacking), self) for layer in layers]


@COMPRESSORS.register("per-matrix-tucker", aliases=("per-matrix-tucker-3d", "3D_Tucker"))
@dataclass(frozen=True, kw_only=True)
class PerMatrixTucker3D(TuckerSettings):
    """Each attention matrix alone, D x K x heads, modes 1 and 2: the paper's ablation.

    `ranks` are (R1, R2) of (D, K). Source: TensorLLM, section 4 (ablation).

    Attributes:
        matrices: which of q, k, v, o.
    """

    matrices: tuple[str, ...] = ATTENTION

    source: ClassVar[str] = "https://arxiv.org/abs/2501.15674"
    modes: ClassVar[tuple[int, ...]] = (0, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "matrices", check_roles(self.matrices, ATTENTION))

    def at_size(self, site: Site, size: Size) -> "PerMatrixTucker3D":
        return replace(self, ranks=size, energy=None, error=None, matrices=site.roles)

    def jobs(self, spec: ModelSpec, layers: Sequence[int]) -> list[Job]:
        stacking = "head" if self.layout == "paper" else "official-head"
        return [
            Job(Site((layer,), (role,), stacking), self)
            for layer in layers
            for role in self.matrices
        ]

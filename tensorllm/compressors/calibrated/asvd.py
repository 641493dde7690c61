"""ASVD: truncation with inputs scaled by the size of activations.

Shapes: Y outputs, X inputs.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tensorllm.compressors.base import COMPRESSORS, Needs
from tensorllm.compressors.layer import MatrixStatistics
from tensorllm.compressors.matrix import MatrixSVD, Root
from tensorllm.errors import UserError

SMALLEST = 1e-6  # lower bound of a mean activation, as in the authors' code


@COMPRESSORS.register("asvd")
@dataclass(frozen=True, kw_only=True)
class ASVD(MatrixSVD):
    """Each matrix truncated with its input j scaled by (mean |x_j|)^alpha.

    Source: ASVD, arXiv 2312.05821, section 3.2. Every matrix keeps the same share; the authors'
    search for a rank per layer is not included (`--target-ratio` allocates a budget by error).

    Attributes:
        alpha: strength of the scaling, 0: none.
    """

    alpha: float = 0.5

    source: ClassVar[str] = "https://arxiv.org/abs/2312.05821"
    needs: ClassVar[Needs] = "activations"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alpha >= 0:
            raise UserError(f"alpha must be 0 or more, got {self.alpha}")

    def root(self, w_YX: Tensor, statistics: MatrixStatistics | None) -> Root:
        assert statistics is not None, "measured, as `needs` says"
        size_X = statistics.input_mean_abs_X.to(w_YX).clamp(min=SMALLEST) ** self.alpha
        return Root(size_X, 1 / size_X)

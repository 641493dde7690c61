"""Plain truncation of every matrix: the baseline without data."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tensorllm.compressors.base import COMPRESSORS
from tensorllm.compressors.layer import MatrixStatistics
from tensorllm.compressors.matrix import MatrixSVD, Root


@COMPRESSORS.register("svd")
@dataclass(frozen=True, kw_only=True)
class PlainSVD(MatrixSVD):
    """Each matrix by its best approximation of equal size share, in plain squared error.

    Source: Eckart and Young, "The approximation of one matrix by another of lower rank",
    Psychometrika 1936.
    """

    source: ClassVar[str] = "https://doi.org/10.1007/BF02288367"

    def root(self, w_YX: Tensor, statistics: MatrixStatistics | None) -> Root:
        ones = w_YX.new_ones(w_YX.shape[1])
        return Root(ones, ones)

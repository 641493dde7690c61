"""Compression strategies, one file each. Importing this package registers them."""

from tensorllm.compressors.base import (
    COMPRESSORS,
    Composite,
    Compressor,
    Job,
    LayerFit,
    Leaf,
    MatrixStatistics,
    Site,
)
from tensorllm.compressors.calibrated.activation import ActivationHybrid, ActivationTucker
from tensorllm.compressors.hybrid import Hybrid
from tensorllm.compressors.laser import LaserSVD
from tensorllm.compressors.per_layer import PerLayer
from tensorllm.compressors.trawl import Trawl
from tensorllm.compressors.tucker import PerMatrixTucker3D, SharedTucker4D

__all__ = [
    "COMPRESSORS",
    "ActivationHybrid",
    "ActivationTucker",
    "Composite",
    "Compressor",
    "Hybrid",
    "Job",
    "LaserSVD",
    "LayerFit",
    "Leaf",
    "MatrixStatistics",
    "PerLayer",
    "PerMatrixTucker3D",
    "SharedTucker4D",
    "Site",
    "Trawl",
]

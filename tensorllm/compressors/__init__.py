"""Compression strategies, one file each. Importing this package registers them."""

from tensorllm.compressors.base import COMPRESSORS, Composite, Compressor, Job, LayerFit, Leaf
from tensorllm.compressors.calibrated.aa_svd import AASVD
from tensorllm.compressors.calibrated.activation import ActivationHybrid, ActivationTucker
from tensorllm.compressors.calibrated.asvd import ASVD
from tensorllm.compressors.calibrated.modegpt import MoDeGPT
from tensorllm.compressors.calibrated.svd_llm import SVDLLM, SVDLLMSequential
from tensorllm.compressors.experts import ActivationExpertTucker, ExpertTucker
from tensorllm.compressors.hybrid import Hybrid
from tensorllm.compressors.laser import LaserSVD
from tensorllm.compressors.layer import MatrixStatistics, Site
from tensorllm.compressors.per_layer import PerLayer
from tensorllm.compressors.rounded import Rounded
from tensorllm.compressors.svd import PlainSVD
from tensorllm.compressors.trawl import Trawl
from tensorllm.compressors.tucker import PerMatrixTucker3D, SharedTucker4D

__all__ = [
    "AASVD",
    "ASVD",
    "COMPRESSORS",
    "SVDLLM",
    "ActivationExpertTucker",
    "ActivationHybrid",
    "ActivationTucker",
    "Composite",
    "Compressor",
    "ExpertTucker",
    "Hybrid",
    "Job",
    "LaserSVD",
    "LayerFit",
    "Leaf",
    "MatrixStatistics",
    "MoDeGPT",
    "PerLayer",
    "PerMatrixTucker3D",
    "PlainSVD",
    "Rounded",
    "SVDLLMSequential",
    "SharedTucker4D",
    "Site",
    "Trawl",
]

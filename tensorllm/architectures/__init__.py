"""Architectures as data: where each keeps its matrices, and the reader and writer for all."""

import tensorllm.architectures.table  # noqa: F401  registers the rows
from tensorllm.architectures.access import RoleMatrices, parameters_of
from tensorllm.architectures.spec import ARCHITECTURES, Architecture, Stored, architecture_of

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "RoleMatrices",
    "Stored",
    "architecture_of",
    "parameters_of",
]

"""Architectures as data: where each stores its matrices, and one reader and writer for all."""

import tensorllm.models.table  # noqa: F401  registers the rows
from tensorllm.models.access import RoleMatrices, parameters_of
from tensorllm.models.layout import Layout, layout_of
from tensorllm.models.spec import ARCHITECTURES, Architecture, ModelSpec, Stored

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Layout",
    "ModelSpec",
    "RoleMatrices",
    "Stored",
    "layout_of",
    "parameters_of",
]

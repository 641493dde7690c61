"""The import path of `factorize` in 0.1."""

import warnings

from tensorllm.compression.factorize import factorize

__all__ = ["factorize"]

warnings.warn(
    "tensorllm.pipeline.runtime moved in 0.2, gone in 0.3: from tensorllm import factorize",
    DeprecationWarning,
    stacklevel=2,
)

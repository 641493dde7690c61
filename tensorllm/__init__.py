"""Denoise and shrink pretrained transformers with shared low-rank tensors.

import tensorllm as tl
report = tl.compress(model, tl.Hybrid(ranks=(304, 19, 2), rho=0.01), layers=[27])
tl.save(model, "out/")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tensorllm.checkpoint.hook import watch

if TYPE_CHECKING:
    from tensorllm.calibration.fit import fit, fit_folder, fit_sizes
    from tensorllm.calibration.sampled import sampled_text
    from tensorllm.calibration.sequences import Calibration, read_calibration
    from tensorllm.checkpoint.loading import load
    from tensorllm.checkpoint.trainer import FactoredCheckpoints
    from tensorllm.compression.engine import compress, compressed
    from tensorllm.compression.factorize import factorize
    from tensorllm.compression.save import save
    from tensorllm.compressors import (
        COMPRESSORS,
        ActivationHybrid,
        ActivationTucker,
        Compressor,
        Hybrid,
        LaserSVD,
        PerMatrixTucker3D,
        SharedTucker4D,
        Trawl,
    )
    from tensorllm.compressors.budget import Budget
    from tensorllm.errors import UserError
    from tensorllm.evaluation.evaluate import evaluate_model
    from tensorllm.runtime import factors_as_linears, train_only_factors

# Loaded on first use: importing torch and transformers takes seconds, `tensorllm --help` must not.
_HOME = {
    "ActivationHybrid": "tensorllm.compressors",
    "ActivationTucker": "tensorllm.compressors",
    "Budget": "tensorllm.compressors.budget",
    "COMPRESSORS": "tensorllm.compressors",
    "Calibration": "tensorllm.calibration.sequences",
    "Compressor": "tensorllm.compressors",
    "FactoredCheckpoints": "tensorllm.checkpoint.trainer",
    "Hybrid": "tensorllm.compressors",
    "LaserSVD": "tensorllm.compressors",
    "PerMatrixTucker3D": "tensorllm.compressors",
    "SharedTucker4D": "tensorllm.compressors",
    "Trawl": "tensorllm.compressors",
    "UserError": "tensorllm.errors",
    "compress": "tensorllm.compression.engine",
    "compressed": "tensorllm.compression.engine",
    "evaluate_model": "tensorllm.evaluation.evaluate",
    "factorize": "tensorllm.compression.factorize",
    "factors_as_linears": "tensorllm.runtime",
    "fit": "tensorllm.calibration.fit",
    "fit_folder": "tensorllm.calibration.fit",
    "fit_sizes": "tensorllm.calibration.fit",
    "load": "tensorllm.checkpoint.loading",
    "read_calibration": "tensorllm.calibration.sequences",
    "sampled_text": "tensorllm.calibration.sampled",
    "save": "tensorllm.compression.save",
    "train_only_factors": "tensorllm.runtime",
}

__all__ = [
    "COMPRESSORS",
    "ActivationHybrid",
    "ActivationTucker",
    "Budget",
    "Calibration",
    "Compressor",
    "FactoredCheckpoints",
    "Hybrid",
    "LaserSVD",
    "PerMatrixTucker3D",
    "SharedTucker4D",
    "Trawl",
    "UserError",
    "compress",
    "compressed",
    "evaluate_model",
    "factorize",
    "factors_as_linears",
    "fit",
    "fit_folder",
    "fit_sizes",
    "load",
    "read_calibration",
    "sampled_text",
    "save",
    "train_only_factors",
]

watch()  # lets transformers' from_pretrained open factored folders


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name == "__version__":
        return import_module("importlib.metadata").version("tensorllm")
    raise AttributeError(f"module 'tensorllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

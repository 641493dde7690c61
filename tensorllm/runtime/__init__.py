"""Factored execution: modules that hold factors instead of dense matrices."""

from tensorllm.runtime import (  # noqa: F401  they register
    blocks,
    experts,
    kept_rows,
    low_rank,
    tucker,
    whole,
)
from tensorllm.runtime.install import Placement, install, train_only_factors
from tensorllm.runtime.linears import factors_as_linears
from tensorllm.runtime.sites import Cost, Held, SiteModule, module_for, runs

__all__ = [
    "Cost",
    "Held",
    "Placement",
    "SiteModule",
    "factors_as_linears",
    "install",
    "module_for",
    "runs",
    "train_only_factors",
]

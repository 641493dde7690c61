"""How many numbers a compressed model stores for its matrices."""

from collections.abc import Collection
from typing import Any

from tensorllm.compression.report import saved_parameters
from tensorllm.models.spec import ModelSpec


def stored_numbers(spec: ModelSpec, report: Any, among: Collection[str] | None = None) -> int:
    """Numbers stored for all matrices of these roles (None: all), whether compressed or left whole.

    Args:
        spec: of the model.
        report: of its compression, which lists only what was compressed.
        among: roles.
    """
    geometries = [spec.geometry(layer) for layer in range(spec.layers)]
    whole = sum(g.numel(r) for g in geometries for r in g.roles if among is None or r in among)
    return whole - saved_parameters(report.sites)

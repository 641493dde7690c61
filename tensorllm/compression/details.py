"""What a report draws of each decomposition: spectra with their cuts, and every head's error.

Shapes: I inner width of a role matrix, D model width, K head_dim, H heads of the role, M matrices,
G groups.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tensorllm.compressors import Site
from tensorllm.tensors.factors import Factors, wide
from tensorllm.tensors.stacking import ATTENTION, STACKINGS, Geometry
from tensorllm.tensors.tucker import relative_error, spectra
from tensorllm.tensors.unfold import energy

DETAILS = "details.json"
# Most multiply-adds for all singular values of a mode; beyond this, which would cost as much as
# the decomposition, only the kept part is recorded.
WHOLE = 2**32
POINTS = 160  # recorded of one spectrum, more closely spaced at its beginning


Norms = list[tuple[Tensor, Tensor]]  # per matrix and head: norm of the error, and of the head


def details_of(site: Site, w: Tensor, factors: Factors, norms: Norms) -> dict[str, Any]:
    """The record of one site in `details.json`.

    Args:
        site: the site.
        w: the stacked tensor that was decomposed.
        factors: as they are stored.
        norms: from `norms_of_heads`.

    Returns:
        `spectra`: for each mode, singular values relative to ||W||, at some of their indices.
        `matrices`: for each matrix ||W - dense|| / ||W||, and the same for each of its heads.
    """
    return {
        "site": site.name,
        "spectra": _spectra(w, factors),
        "matrices": [
            _matrix(layer, role, errors_H, norms_H)
            for (layer, role), (errors_H, norms_H) in zip(site.matrices, norms, strict=True)
        ],
    }


def error_of_site(w: Tensor, factors: Factors, norms: Norms) -> float:
    """||W - dense|| / ||W|| of the whole site."""
    error, norm = (math.hypot(*(float(x.norm()) for x in of)) for of in zip(*norms, strict=True))
    if 0 < norm < math.inf and error < math.inf:
        return error / norm
    return relative_error(w, factors)  # squares under- or overflowed, or all is zero


def norms_of_heads(
    site: Site, w: Tensor, w_ID: Sequence[Tensor], factors: Factors, geometry: Geometry
) -> Norms:
    """For each matrix the norms (H) of every head's error, and of the head.

    Args:
        site: the site.
        w: the stacked tensor that was decomposed.
        w_ID: the role matrices it was stacked from, in the order of `site.matrices`.
        factors: as they are stored.
        geometry: of the site's layer.
    """
    by_head = STACKINGS[site.stacking].slices_are_heads
    found = factors.slice_errors(w, (0, 1)) if by_head else None
    if found is not None:
        one = replace(geometry, D=1, K=1)  # one number per head
        errors, norms = (site.unstack(x_MG[None, None], one) for x_MG in found)
        return [(e.flatten(), n.flatten()) for e, n in zip(errors, norms, strict=True)]
    lost_ID = site.unstack(factors.dense() - w, geometry)
    return [
        (_by_head(role, left_ID, geometry), _by_head(role, old_ID, geometry))
        for (_, role), old_ID, left_ID in zip(site.matrices, w_ID, lost_ID, strict=True)
    ]


def _by_head(role: str, w_ID: Tensor, geometry: Geometry) -> Tensor:
    return torch.linalg.vector_norm(wide(w_ID).reshape(geometry.heads(role), -1), dim=1).double()


def _matrix(layer: int, role: str, errors_H: Tensor, norms_H: Tensor) -> dict[str, Any]:
    out = {
        "layer": layer,
        "role": role,
        "relative_error": _ratio(float(errors_H.norm()), float(norms_H.norm())),
    }
    if role in ATTENTION:
        pairs = zip(errors_H.tolist(), norms_H.tolist(), strict=True)
        out["heads"] = [_ratio(error, norm) for error, norm in pairs]
    return out


def _ratio(error: float, norm: float) -> float:
    return _rounded(error / norm) if norm else float(error > 0)


def _spectra(w: Tensor, factors: Factors) -> list[dict[str, Any]]:
    norm = math.sqrt(energy(w)) or 1.0
    whole = math.inf if w.is_cuda else WHOLE
    out = []
    for mode, rank in factors.cuts(w.shape).items():
        cost = w.numel() * min(w.shape[mode], w.numel() // w.shape[mode])
        values = spectra(w, (mode,))[mode] if cost <= whole else factors.spectrum(mode)
        if values is None:
            continue
        at = _picked(len(values))
        out.append(
            {
                "mode": mode,
                "size": w.shape[mode],
                "rank": rank,
                "at": [n + 1 for n in at],
                "values": [_rounded(float(values[n]) / norm) for n in at],
            }
        )
    return out


def _picked(count: int) -> list[int]:
    """Indices from 0 to count - 1: all of them, or `POINTS` with growing gaps."""
    if count <= POINTS:
        return list(range(count))
    steps = (round((count - 1) * (n / (POINTS - 1)) ** 2) for n in range(POINTS))
    return sorted(set(steps))


def _rounded(x: float) -> float:
    return float(f"{x:.5g}")

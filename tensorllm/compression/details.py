"""What a report draws of one decomposition: spectra with their cuts, the error of every head.

Shapes: I inner width of a role matrix, D model width, K head width, H heads of the role.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tensorllm.compressors import Site
from tensorllm.tensors.factors import Factors, LowRank, Tucker, wide
from tensorllm.tensors.stacking import ATTENTION, Geometry
from tensorllm.tensors.tucker import spectra

DETAILS = "details.json"
WHOLE = 1024  # of larger modes only the kept part is recorded: all of it costs more than the cut
POINTS = 160  # of one spectrum are recorded, closer together where it begins


def details_of(
    site: Site, w: Tensor, w_ID: Sequence[Tensor], factors: Factors, geometry: Geometry
) -> dict[str, Any]:
    """The record of one site in `details.json`.

    Args:
        w: the stacked tensor that was decomposed.
        w_ID: the role matrices it was stacked from, in the order of `site.matrices`.
        factors: as they are stored.

    Returns:
        `spectra`: of each mode, singular values as shares of ||W|| at some of their numbers.
        `matrices`: of each matrix ||W - dense|| / ||W||, and of each of its heads.
    """
    lost_ID = site.unstack(factors.dense() - w, geometry)
    return {
        "site": site.name,
        "spectra": _spectra(w, factors),
        "matrices": [
            _matrix(layer, role, old_ID, left_ID, geometry)
            for (layer, role), old_ID, left_ID in zip(site.matrices, w_ID, lost_ID, strict=True)
        ],
    }


def _matrix(
    layer: int, role: str, w_ID: Tensor, left_ID: Tensor, geometry: Geometry
) -> dict[str, Any]:
    heads = len(w_ID) // geometry.K if role in ATTENTION else 1
    errors_H, norms_H = (
        torch.linalg.vector_norm(wide(x).reshape(heads, -1), dim=1).double()
        for x in (left_ID, w_ID)
    )
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
    norm = float(torch.linalg.vector_norm(wide(w))) or 1.0
    whole = math.inf if w.is_cuda else WHOLE
    out = []
    for mode, rank in _cuts(w, factors).items():
        size = min(w.shape[mode], w.numel() // w.shape[mode])
        values = spectra(w, (mode,))[mode] if size <= whole else _kept(mode, factors)
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
    return [spectrum for spectrum in out if spectrum["values"]]


def _cuts(w: Tensor, factors: Factors) -> dict[int, int | None]:
    """The modes that have a spectrum of interest, each with its rank where there is one."""
    if isinstance(factors, Tucker):
        return {mode: u.shape[1] for mode, u in factors.factors.items()}
    if w.ndim == 2:
        return {0: factors.ranks[0] if len(factors.ranks) == 1 else None}
    return dict.fromkeys(range(w.ndim))


def _kept(mode: int, factors: Factors) -> Tensor:
    """Singular values that the factors themselves have."""
    if isinstance(factors, Tucker):
        return spectra(wide(factors.core), (mode,))[mode]
    if isinstance(factors, LowRank):
        u_RR = torch.linalg.qr(wide(factors.u_IR)).R
        v_RR = torch.linalg.qr(wide(factors.v_RO).mT).R
        return torch.linalg.svdvals(u_RR @ v_RR.mT)
    return torch.zeros(0)


def _picked(count: int) -> list[int]:
    """Numbers from 0 to count - 1, all of them or `POINTS` that grow farther apart."""
    if count <= POINTS:
        return list(range(count))
    steps = (round((count - 1) * (n / (POINTS - 1)) ** 2) for n in range(POINTS))
    return sorted(set(steps))


def _rounded(x: float) -> float:
    return float(f"{x:.5g}")

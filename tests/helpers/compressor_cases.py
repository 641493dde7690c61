"""A row per compressor for the contract suite, each with a reference by tensorly or numpy.

Shapes: D model width, K head width, M matrices per group, G groups, I inner width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tensorly
from tensorly.decomposition import parafac, partial_tucker

import tensorllm as tl
import tensorllm.compressors
from tensorllm.tensors.stacking import ATTENTION, Geometry

Slot = tuple[int, str]  # layer and role
Matrices = dict[Slot, np.ndarray]  # role matrices (I, D), float64
Reference = Callable[[Matrices, Geometry], Matrices]


@dataclass(frozen=True)
class Case:
    """A compressor at full rank (None where no rank is sure to be exact) and one that truncates.

    `reference` makes the truncated role matrices out of the original ones, float64, by tensorly or
    numpy and loops.
    """

    mode: str
    full: Callable[[Geometry], tl.Compressor] | None
    cut: Callable[[Geometry], tl.Compressor]
    reference: Reference


def tucker_reference(w: np.ndarray, ranks: dict[int, int]) -> np.ndarray:
    (core, factors), _ = partial_tucker(
        w, list(ranks.values()), modes=list(ranks), init="svd", tol=1e-9, n_iter_max=9
    )
    return tensorly.tenalg.multi_mode_dot(core, factors, modes=list(ranks))


def head(w_ID: np.ndarray, h: int, geo: Geometry) -> np.ndarray:
    """The (D, K) slice of one head."""
    return w_ID[h * geo.K : (h + 1) * geo.K].T


def shared_reference(found: Matrices, geo: Geometry) -> Matrices:
    """The paper's tensor built head by head: per KV head its queries, key, value and outputs."""
    out = {slot: w.copy() for slot, w in found.items()}
    for layer in {slot[0] for slot in found}:
        where = []  # (role, head) in the order of the third mode, for each group
        for group in range(geo.G):
            mine = range(group * geo.groups, (group + 1) * geo.groups)
            queries, outputs = [("q", h) for h in mine], [("o", h) for h in mine]
            where.append([*queries, ("k", group), ("v", group), *outputs])
        w_DKMG = np.zeros((geo.D, geo.K, 2 * geo.groups + 2, geo.G))
        for group, slices in enumerate(where):
            for m, (role, h) in enumerate(slices):
                w_DKMG[:, :, m, group] = head(found[layer, role], h, geo)
        w_DKMG = tucker_reference(w_DKMG, {0: 12, 1: 5, 2: 3})
        for group, slices in enumerate(where):
            for m, (role, h) in enumerate(slices):
                out[layer, role][h * geo.K : (h + 1) * geo.K] = w_DKMG[:, :, m, group].T
    return out


def per_matrix_reference(found: Matrices, geo: Geometry) -> Matrices:
    out = {}
    for slot, w_ID in found.items():
        heads = range(len(w_ID) // geo.K)
        w_DKH = np.stack([head(w_ID, h, geo) for h in heads], axis=2)
        w_DKH = tucker_reference(w_DKH, {0: 5, 1: 5})
        out[slot] = np.concatenate([w_DKH[:, :, h].T for h in heads])
    return out


def svd_reference(found: Matrices, geo: Geometry) -> Matrices:
    out = {}
    for slot, w in found.items():
        u, s, v = np.linalg.svd(w)
        r = int(0.25 * min(w.shape))
        out[slot] = (u[:, :r] * s[:r]) @ v[:r]
    return out


def kept_reference(found: Matrices, geo: Geometry) -> Matrices:
    out = {}
    for slot, w in found.items():
        u, s, v = np.linalg.svd(w, full_matrices=False)
        r = int(0.4 * w.size / sum(w.shape))
        out[slot] = (u[:, :r] * s[:r]) @ v[:r]
    return out


def hybrid_reference(found: Matrices, geo: Geometry) -> Matrices:
    attention = {slot: w for slot, w in found.items() if slot[1] in ATTENTION}
    ffn = {slot: w for slot, w in found.items() if slot[1] not in ATTENTION}
    return shared_reference(attention, geo) | svd_reference(ffn, geo)


def per_layer_reference(found: Matrices, geo: Geometry) -> Matrices:
    first = {slot: w for slot, w in found.items() if slot[0] == 0}
    return shared_reference(first, geo) | svd_reference(
        {slot: w for slot, w in found.items() if slot[0] == 1}, geo
    )


def whole_reference(decompose: Callable[[np.ndarray], np.ndarray], *, across: bool) -> Reference:
    """Whole matrices stacked last: of each layer, or of all layers."""

    def reference(found: Matrices, geo: Geometry) -> Matrices:
        groups = {slot[0] if not across else -1: [] for slot in found}
        for slot in found:
            groups[-1 if across else slot[0]].append(slot)
        out = {}
        for slots in groups.values():
            w_IDM = decompose(np.stack([found[slot] for slot in slots], axis=2))
            out |= {slot: w_IDM[:, :, m] for m, slot in enumerate(slots)}
        return out

    return reference


def cp_reference(w: np.ndarray) -> np.ndarray:
    """TRAWL's own call; the start is seeded, so that the same minimum is reached."""
    fitted = parafac(w, 3, n_iter_max=100, init="random", tol=1e-6, random_state=7)
    return tensorly.cp_to_tensor(fitted)


def trawl_full(geo: Geometry, matrices: int) -> tuple[int, int, int]:
    return (min(geo.F, geo.D * matrices), geo.D, matrices)


CASES = {
    "shared-tucker": Case(
        "shared-tucker",
        lambda geo: tl.SharedTucker4D(ranks=(geo.D, geo.K, 2 * geo.groups + 2)),
        lambda geo: tl.SharedTucker4D(ranks=(12, 5, 3), sweeps=9, tol=1e-9),
        shared_reference,
    ),
    "per-matrix-tucker": Case(
        "per-matrix-tucker",
        lambda geo: tl.PerMatrixTucker3D(ranks=(geo.D, geo.K)),
        lambda geo: tl.PerMatrixTucker3D(ranks=(5, 5), sweeps=9, tol=1e-9),
        per_matrix_reference,
    ),
    "laser": Case(
        "laser",
        lambda geo: tl.LaserSVD(rho=1.0, matrices=geo.roles),
        lambda geo: tl.LaserSVD(rho=0.25, matrices=geo.roles),
        svd_reference,
    ),
    "svd": Case(
        "svd",
        None,  # its share is below one; a full rank of every shape is laser's
        lambda geo: tl.COMPRESSORS["svd"](kept=0.4, matrices=geo.roles),
        kept_reference,
    ),
    "hybrid": Case(
        "hybrid",
        lambda geo: tl.Hybrid(ranks=(geo.D, geo.K, 2 * geo.groups + 2), rho=1.0),
        lambda geo: tl.Hybrid(
            attention=tl.SharedTucker4D(ranks=(12, 5, 3), sweeps=9, tol=1e-9),
            ffn=tl.LaserSVD(rho=0.25, matrices=("in", "out")),
        ),
        hybrid_reference,
    ),
    "per-layer": Case(
        "per-layer",
        lambda geo: tensorllm.compressors.PerLayer(
            edits=(
                {"layers": [0], "mode": "laser", "rho": 1.0, "matrices": ["in", "q"]},
                {"layers": [1], "mode": "per-matrix-tucker", "ranks": [geo.D, geo.K]},
            )
        ),
        lambda geo: tensorllm.compressors.PerLayer(
            edits=(
                {
                    "layers": [0],
                    "mode": "shared-tucker",
                    "ranks": [12, 5, 3],
                    "sweeps": 9,
                    "tol": 1e-9,
                },
                {"layers": [1], "mode": "laser", "rho": 0.25, "matrices": ["out", "v"]},
            )
        ),
        per_layer_reference,
    ),
    "trawl-tucker": Case(
        "trawl",
        lambda geo: tl.Trawl(method="tucker", ranks=trawl_full(geo, 2)),
        lambda geo: tl.Trawl(method="tucker", ranks=(8, 8, 1)),
        whole_reference(
            lambda w: tucker_reference(w, {0: 8, 1: 8, 2: 1}),
            across=False,
        ),
    ),
    "trawl-across-layers": Case(
        "trawl",
        lambda geo: tl.Trawl(method="tucker", ranks=trawl_full(geo, 4), across_layers=True),
        lambda geo: tl.Trawl(method="tucker", ranks=(9, 8, 3), across_layers=True),
        whole_reference(lambda w: tucker_reference(w, {0: 9, 1: 8, 2: 3}), across=True),
    ),
    "trawl-cp": Case(
        "trawl",
        None,
        lambda geo: tl.Trawl(rank=3, seed=7),
        whole_reference(cp_reference, across=False),
    ),
}

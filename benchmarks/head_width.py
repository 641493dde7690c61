"""Do head-width factors pay? Fitted to data, at equal numbers stored, against shared input factors.

    python benchmarks/head_width.py --shared SHARED

Q, K and V of every layer as heads of (K, X), and the errors of its outputs on text, which
is what SVD-LLM makes small: the factors are fitted to W A½, A the covariance of the inputs.
Ours: rank-r factors in pivoted form. Peer: one (K, P) factor for all heads of the matrix, one
(R, X) factor of the inputs, and a core (P, R) for every head (Tucker over two modes, refined), with
the numbers that a choice of basis frees taken off as well: P² and R². Of all P below K the best
stands in the comparison, which is of relative errors. Positions are no matter here: with rotary
embeddings q and k could not even use such a factor without turning it for every token.
Shapes: K head width, H heads, X inputs, P and R ranks.
"""

import argparse
from typing import Any

import torch
from support.results import Comparison, begin, parser, save
from torch import Tensor
from whole_model import MODELS, Bench

from tensorllm.calibration.fit import measure_for
from tensorllm.compressors import SVDLLM
from tensorllm.models import parameters_of
from tensorllm.tensors.pivoted import pivoted_parameters
from tensorllm.tensors.tucker import relative_error, tucker
from tensorllm.tensors.weighted import Metric

SWEEPS = 4
READERS = ("q", "k", "v")  # they read one input


def plain(w_KHX: Tensor, budget: float) -> float:
    """Relative error of the largest rank within the budget."""
    w = w_KHX.reshape(-1, w_KHX.shape[2])
    shape = (w.shape[0], w.shape[1])
    rank = max(r for r in range(1, min(shape) + 1) if pivoted_parameters(shape, r) <= budget)
    energy = torch.linalg.svdvals(w).square()
    return float((energy[rank:].sum() / energy.sum()).sqrt())


def with_head_factor(w_KHX: Tensor, budget: float) -> tuple[float, int]:
    """The least relative error of all P below K, and that P."""
    k, h, x = w_KHX.shape
    found = [(1.0, 0)]
    for p in range(1, k):
        fits = [r for r in range(1, min(x, p * h) + 1) if _stored(k, h, x, p, r) <= budget]
        if fits:
            factors = tucker(w_KHX, {0: p, 2: fits[-1]}, sweeps=SWEEPS)
            found.append((relative_error(w_KHX, factors), p))
    return min(found)


def _stored(k: int, h: int, x: int, p: int, r: int) -> int:
    return p * (k - p) + r * (x - r) + p * r * h + p + r


def run_model(name: str, args: argparse.Namespace) -> None:
    """Every matrix at every ratio; one comparison per role and ratio, the mean over layers."""
    bench = Bench(name, args.shared, args.quick)
    matrices = [(layer, role) for layer in range(bench.roles.layers) for role in READERS]
    attention = SVDLLM(rank=1, matrices=READERS)
    seen = measure_for(attention, bench.dense, bench.calibration(0)).inputs
    weights, width = parameters_of(bench.dense), bench.roles.spec.geometry(0).K
    rows: list[dict[str, Any]] = []
    for layer, role in matrices:
        w_ID = bench.roles.read(weights, layer, role).double()
        weighted_ID = w_ID @ Metric(seen[layer, READERS]).root
        w_KHX = weighted_ID.reshape(-1, width, w_ID.shape[1]).transpose(0, 1)
        for ratio in bench.ratios:
            ours, (peer, p) = (f(w_KHX, w_ID.numel() / ratio) for f in (plain, with_head_factor))
            found = {"ours": ours, "head factor": peer, "its rank": p}
            rows.append({"layer": layer, "role": role, "ratio": ratio, **found})
    compared = {}
    for role in READERS:
        for ratio in bench.ratios:
            some = [row for row in rows if (row["role"], row["ratio"]) == (role, ratio)]
            ours, peer = (sum(r[key] for r in some) / len(some) for key in ("ours", "head factor"))
            compared[f"{role} at {ratio:g}"] = Comparison(
                ours=ours, unit="of the outputs", peer=peer, peer_name="with a head-width factor"
            )
    save("head_width", name, compared, args, rows=rows)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    args = options.parse_args()
    begin(args)
    for name in ["demo"] if args.quick else args.models:
        run_model(name, args)


if __name__ == "__main__":
    main()

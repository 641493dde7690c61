"""What a decomposition cannot do without: multiply-adds, and sizes of eigenproblems.

Sizes (D, K, M, H) of one layer's stacked attention: width, head width, matrices, heads; ranks
(R1, R2, R3) of the first three modes.
"""

Sizes = tuple[int, int, int, int]
Ranks = tuple[int, int, int]


def necessary_multiply_adds(sizes: Sizes, ranks: Ranks, sweeps: int) -> float:
    """Of the Gram matrices (halved by symmetry) and projections, modes in the order of their sizes.

    A mode that keeps its full rank costs nothing at the stack, the smallest; eigenvectors are not
    counted, `eigen_sizes` are the orders of the matrices that they are wanted of.
    """
    (d, k, m, h), (r1, r2, r3) = sizes, ranks
    last = min(d, k_m := r2 * r3 * h)  # the smaller side of the last unfolding
    stack = d * k * h * (m * m / 2 + r3 * m) if r3 < m else 0.0
    head = d * r3 * h * (k * k / 2 + r2 * k)
    width = last * last / 2 * max(d, k_m) + 2 * d * min(last, k_m) * r1
    sweep = d * k * r3 * h * r1 + r1 * r3 * h * (k * k / 2) + d * k * r3 * h * r2 + width
    if r3 < m:
        sweep += d * k * m * h * r2 + d * r2 * m * h * r1 + r1 * r2 * h * (m * m / 2 + r3 * m)
    return stack + head + width + sweeps * sweep


def eigen_sizes(sizes: Sizes, ranks: Ranks, sweeps: int) -> list[int]:
    """Orders of the symmetric matrices whose eigenvectors are wanted, in the same algorithm."""
    (d, k, m, h), (_, r2, r3) = sizes, ranks
    width = min(d, r2 * r3 * h)
    once = [k, width] + ([m] if r3 < m else [])
    return once * (1 + sweeps)

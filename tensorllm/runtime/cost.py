"""The predicted cost of running a site, dense and factored, per token.

Decoding a token reads every weight once; a long prompt is bound by products; and starting an
operation takes as long as reading many weights. The constants were fitted to times of SmolLM2-135M,
whole and by layer, on one core of an AMD EPYC; `benchmarks/runtime.py --part cost` and `--part
real` compare predictions with times.

Shapes: D model width, H heads, G key/value heads, K head_dim.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from tensorllm.compressors.layer import Site
from tensorllm.models.spec import ModelSpec
from tensorllm.registry import one_of
from tensorllm.runtime.products import OWN_INSTRUCTIONS, speed_of
from tensorllm.runtime.sites import MOVE, PROMPT, Cost, SiteModule, module_for
from tensorllm.tensors.factors import Factors, parameters
from tensorllm.tensors.stacking import Geometry

Policy = Literal["auto", "always"]
Cache = Literal["auto", "latent", "dense"]
# For the rest of a layer, with transformers' own modules: operations per decoded token, products
# that take as long as a score, and the slowdown of all that relative to products in a prompt, if
# those are in 16 bits.
LAYER_OPERATIONS, FUSED_SCORE, BESIDE_HALF_PRECISION = 80, 22, 2.2
# Decoding in 16 bits, where their products are emulated and where they have instructions of their
# own: what reading a matrix that stays dense costs in bfloat16, relative to the dense model (see
# `one_token`); how many times the weights of 32 bits are read while an operation starts; and what
# attention that `one_query` replaces costs, in operations.
DENSE_READS, FASTER_HALF_PRECISION, REPEATING_ATTENTION = (1.0, 0.65), (1.2, 2.0), (65, 0)
# Slowdown of a prompt's products with factors, which are thinner matrices. It is left out when a
# site's execution is chosen: sites kept dense for it would lose more in decoding.
THIN = 1.08
# Bytes that a CPU's library of products keeps for each shape in 16 bits: its compiled program.
PROGRAM = 3 * 2**18


@dataclass(frozen=True, slots=True)
class Choice:
    """How a site runs, and why.

    Attributes:
        site: its name.
        factored: whether it runs in its factors.
        why: the reason, in words.
        dense, factors: the costs of both.
        half_precision_reads: that of the site's module.
        speed: of the machine's products (see `runtime.products.speed_of`).
    """

    site: str
    factored: bool
    why: str
    dense: Cost
    factors: Cost
    half_precision_reads: float = 1.0
    speed: float = 1.0

    @property
    def speedups(self) -> tuple[float, float]:
        """Predicted speed-ups of a prompt and of decoding; above 1 the factors are faster."""
        dense, small = self.dense, self.factors
        prefill = dense.prefill(self.speed) / small.prefill(self.speed)
        return prefill, dense.decode / small.decode


def costs_of(site: Site, factors: Factors, geometry: Geometry) -> tuple[Cost, Cost]:
    """The costs of a site's dense matrices, and of the module that runs its factors.

    If there is no such module, the latter is estimated from the stored numbers.
    """
    module = module_for(site, factors) or SiteModule
    return module.dense_cost(site, geometry), module.cost(site, factors, geometry)


def choose(
    site: Site, factors: Factors, geometry: Geometry, policy: Policy, speed: float = 1.0
) -> Choice:
    """Whether a site runs factored.

    Args:
        site, factors, geometry: the site.
        policy: `auto` or `always`.
        speed: of the machine's products in the dtype of the weights (see `products.speed_of`).

    Raises:
        UserError: an unknown policy.
    """
    one_of("policy", policy, get_args(Policy))
    dense, small = costs_of(site, factors, geometry)
    module = module_for(site, factors)
    if module is None:
        why = f"no module for {factors.kind!r} factors stacked as {site.stacking!r}"
        return Choice(site.name, False, why, dense, small, speed=speed)
    reads = module.half_precision_reads[speed > OWN_INSTRUCTIONS]
    choice = Choice(site.name, True, "smaller and faster", dense, small, reads, speed)
    if policy == "always":
        return replace(choice, why="by --policy always")
    if parameters(factors) >= site.numel(geometry):
        return replace(choice, factored=False, why="the factors are not smaller")
    if min(choice.speedups) < module.margin:
        why = "predicted {:.2f} times as fast at a prompt, {:.2f} at decoding".format(
            *choice.speedups
        )
        return replace(choice, factored=False, why=why)
    return choice


def choose_all(
    sites: Iterable[tuple[Site, Factors]],
    geometry_of: Callable[[int], Geometry],
    policy: Policy,
    dtype: torch.dtype,
    *,
    on_cpu: bool,
) -> list[Choice]:
    """How each site of a model runs: each by itself (`choose`), then all of the same shapes.

    On a CPU in 16 bits, every shape of a product has a compiled program, which stays in memory. By
    `auto`, sites whose factors have the same shapes run factored only if together they save more
    than their programs take: never for a few small matrices, always for large ones.

    Args:
        sites: the sites with their factors, of which only the shapes are read.
        geometry_of: the geometry of a layer.
        policy: `auto` or `always`.
        dtype: of the weights in memory.
        on_cpu: whether the model runs there; else products are taken to be as fast as copies.

    Raises:
        UserError: an unknown policy.
    """
    speed = speed_of(dtype) if policy == "auto" and on_cpu else 1.0
    choices, alike, saved = [], defaultdict(list), []
    for number, (site, factors) in enumerate(sites):
        geometry = geometry_of(site.layers[0])
        choices.append(choose(site, factors, geometry, policy, speed))
        saved.append((site.numel(geometry) - parameters(factors)) * dtype.itemsize)
        shapes = tuple(tuple(t.shape) for t in factors.tensors().values() if t.ndim > 1)
        if choices[-1].factored:
            alike[site.roles, shapes].append(number)
    if policy == "auto" and on_cpu and dtype.itemsize == 2:
        for (_, shapes), numbers in alike.items():
            if sum(saved[n] for n in numbers) < max(2, len(shapes)) * PROGRAM:
                why = "saves less memory than the programs for its shapes take"
                for n in numbers:
                    choices[n] = replace(choices[n], factored=False, why=why)
    return choices


def keeps_dense_cache(site: Site, factors: Factors, geometry: Geometry, cache: Cache) -> bool:
    """Whether a factored site caches keys and values of full width, as the dense model does.

    Args:
        site, factors, geometry: the site.
        cache: `latent`: latents wherever the module can; `dense`: never; `auto`: latents if
            decoding is predicted not to be slower with them.

    Raises:
        UserError: an unknown cache.
    """
    one_of("cache", cache, get_args(Cache))
    module = module_for(site, factors)
    if module is None or not module.latent_attention:
        return False  # it has no attention of its own
    return cache == "dense" or (cache == "auto" and not module.latents_pay(factors, geometry))


def other_than_matrices(geometry: Geometry, *, half_precision: bool) -> Cost:
    """The cost of the rest of a layer, dense or factored: attention itself, norms, activations."""
    scores = geometry.H * PROMPT * (2 * geometry.K + FUSED_SCORE)
    moved = MOVE * (8 * geometry.D + 3 * geometry.F)
    return Cost(
        0,
        LAYER_OPERATIONS,
        int((BESIDE_HALF_PRECISION if half_precision else 1) * (scores + moved)),
    )


def whole_speedups(
    spec: ModelSpec, choices: Sequence[Choice], head: int, dtype: torch.dtype, speed: float = 1.0
) -> tuple[float, float]:
    """Predicted speed-ups of a whole model: of a prompt of 512 tokens, and of decoding.

    Args:
        spec: of the model.
        choices: how each site runs; matrices without one are dense.
        head: weights of the output head, which every decoded token reads.
        dtype: of the weights.
        speed: as in `choose`.
    """
    half_precision, native = dtype.itemsize == 2, speed > OWN_INSTRUCTIONS
    matrices = Cost(0, 0, 0)
    shared, repeating = Cost(head, 1, head // PROMPT), 0
    for geometry in spec.geometries:
        size = sum(geometry.numel(role) for role in geometry.roles)
        matrices += Cost(size, len(geometry.roles), size)
        shared += other_than_matrices(geometry, half_precision=half_precision)
        repeating += REPEATING_ATTENTION[native] * (half_precision and geometry.H > geometry.G)
    small, sites = shared + matrices, Cost(0, 0, 0)
    dense = small
    for choice in choices:
        if choice.factored:
            factors = choice.factors
            reads = int((choice.half_precision_reads if half_precision else 1) * factors.reads)
            sites += factors._replace(reads=reads, products=int(THIN * factors.products))
            small += Cost(*(-number for number in choice.dense))

    def decode(cost: Cost, more: int = 0) -> float:
        faster = FASTER_HALF_PRECISION[native] if half_precision else 1
        return cost._replace(operations=int(faster * (cost.operations + more))).decode

    prefill = dense.prefill(speed) / (small + sites).prefill(speed)
    if dtype is torch.bfloat16 and any(choice.factored for choice in choices):
        small = small._replace(reads=int(DENSE_READS[native] * small.reads))
    return prefill, decode(dense, repeating) / decode(small + sites)

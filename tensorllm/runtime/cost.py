"""What running a site costs, dense and factored: numbers to read and products to form per token.

One new token reads every weight once and does little else; a long prompt is bound by products. So a
site whose factors need no fewer of both is better left dense. `benchmarks/runtime.py` holds these
counts against measured times.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from tensorllm.compressors.base import Site
from tensorllm.errors import UserError
from tensorllm.runtime.swap import can_run_factored
from tensorllm.tensors.factors import Factors, LowRank, parameters
from tensorllm.tensors.stacking import Geometry

Policy = Literal["auto", "always"]
POLICIES = ("auto", "always")
# A factored site runs more and smaller operations; a cautious margin, not a measurement.
OVERHEAD = 1.15


class Cost(NamedTuple):
    """Per token: weights read, and multiply-adds with them."""

    reads: int
    products: int


@dataclass(frozen=True, slots=True)
class Choice:
    """How a site runs, and why."""

    site: str
    factored: bool
    why: str
    dense: Cost
    factors: Cost


def dense_cost(site: Site, geometry: Geometry) -> Cost:
    size = sum(geometry.inner(role) * geometry.D for _, role in site.matrices)
    return Cost(size, size)


def factored_cost(site: Site, factors: Factors, geometry: Geometry) -> Cost:
    """Counts of the module that runs the site; expanding latents to heads is counted too."""
    stored = parameters(factors)
    if isinstance(factors, LowRank):
        return Cost(stored, stored)
    if site.stacking == "heads" and len(factors.ranks) == 3:
        p, r, s = factors.ranks
        width, stack = geometry.D * p, p * r * geometry.G
        outer = geometry.groups if s == 2 * geometry.groups + 2 else s
        inner = geometry.groups + 2 if s == 2 * geometry.groups + 2 else s
        expand = (geometry.H + geometry.G) * r * geometry.K
        return Cost(
            2 * width + (inner + outer) * stack, 2 * width + (inner + outer) * stack + expand
        )
    # the others share nothing while they run: every matrix goes through its own chain
    count = len(site.matrices)
    return Cost(stored, stored * count if site.stacking == "matrices" else stored)


def choose(site: Site, factors: Factors, geometry: Geometry, policy: Policy) -> Choice:
    """Whether a site runs factored.

    Raises:
        UserError: an unknown policy.
    """
    if policy not in POLICIES:
        raise UserError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
    dense, small = dense_cost(site, geometry), factored_cost(site, factors, geometry)
    if policy == "always":
        return Choice(site.name, True, "as told", dense, small)
    if not can_run_factored(site, factors):
        return Choice(site.name, False, f"no module for {site.stacking!r}", dense, small)
    if parameters(factors) >= dense.reads:
        return Choice(site.name, False, "the factors are not smaller", dense, small)
    if small.products * OVERHEAD >= dense.products:
        return Choice(site.name, False, "the factors would not run faster", dense, small)
    return Choice(site.name, True, "smaller and faster", dense, small)

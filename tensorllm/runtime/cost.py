"""What running a site costs, dense and factored, predicted per token.

One new token reads every weight once; a long prompt is bound by products; and starting an operation
takes as long as reading many weights. The constants are fitted on two CPU cores in float32 with
`benchmarks/runtime.py --part cost`, which holds each prediction against measured times
(docs/results/runtime.json). Shapes: D model width, H heads, G key/value heads, K head width.
"""

from dataclasses import dataclass, replace
from typing import Literal

from tensorllm.compressors.layer import Site
from tensorllm.errors import UserError
from tensorllm.runtime.experts import USED
from tensorllm.runtime.sites import Cost, SiteModule, module_for
from tensorllm.runtime.tucker import attention_cost
from tensorllm.tensors.factors import Factors, parameters
from tensorllm.tensors.stacking import Geometry

Policy = Literal["auto", "always"]
POLICIES = ("auto", "always")
# A predicted speed-up has to reach this: predictions near 1 are up to a third too high, and every
# site of the benchmark that reached it in prompt and decoding was measured to gain.
MARGIN = 1.2


@dataclass(frozen=True, slots=True)
class Choice:
    """How a site runs, and why."""

    site: str
    factored: bool
    why: str
    dense: Cost
    factors: Cost

    @property
    def speedups(self) -> tuple[float, float]:
        """Predicted, of a prompt and of decoding: above 1 the factors are faster."""
        dense, small = self.dense, self.factors
        return dense.prefill / small.prefill, dense.decode / small.decode


def dense_cost(site: Site, geometry: Geometry) -> Cost:
    size = sum(geometry.numel(role) for _, role in site.matrices)
    if site.stacking == "heads":
        return attention_cost(geometry, size, geometry.K)
    if site.stacking == "experts":  # a token sees few of them
        used = size * USED // geometry.experts
        return Cost(used, USED * len(site.families), used)
    return Cost(size, len(site.matrices), size)


def factored_cost(site: Site, factors: Factors, geometry: Geometry) -> Cost:
    """Of the module that runs the site; where there is none, a guess by what is stored."""
    return (module_for(site, factors) or SiteModule).cost(site, factors, geometry)


def choose(site: Site, factors: Factors, geometry: Geometry, policy: Policy) -> Choice:
    """Whether a site runs factored.

    Raises:
        UserError: an unknown policy.
    """
    if policy not in POLICIES:
        raise UserError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
    dense, small = dense_cost(site, geometry), factored_cost(site, factors, geometry)
    if module_for(site, factors) is None:
        why = f"no module for {factors.kind!r} factors stacked as {site.stacking!r}"
        return Choice(site.name, False, why, dense, small)
    if policy == "always":
        return Choice(site.name, True, "by --policy always", dense, small)
    if parameters(factors) >= sum(geometry.numel(role) for _, role in site.matrices):
        return Choice(site.name, False, "the factors are not smaller", dense, small)
    choice = Choice(site.name, True, "smaller and faster", dense, small)
    if min(choice.speedups) < MARGIN:
        why = "predicted {:.2f} times as fast at a prompt, {:.2f} at decoding".format(
            *choice.speedups
        )
        return replace(choice, factored=False, why=why)
    return choice

"""What running a site costs, dense and factored, predicted per token.

One new token reads every weight once; a long prompt is bound by products; and starting an operation
takes as long as reading many weights. The constants are fitted on two CPU cores in float32 with
`benchmarks/runtime.py --part cost`, which holds each prediction against measured times
(docs/results/runtime.json). Shapes: D model width, H heads, G key/value heads, K head width.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from tensorllm.compressors.base import Site
from tensorllm.errors import UserError
from tensorllm.runtime.parts import can_run_factored
from tensorllm.tensors.factors import Factors, LowRank, parameters
from tensorllm.tensors.stacking import Geometry

Policy = Literal["auto", "always"]
POLICIES = ("auto", "always")
OPERATION = 33_000  # weights that could be read while one operation is started, 8 microseconds
ATTENTION_OPERATIONS = 40  # of an attention block that decodes one token, dense or factored
PROMPT = 512  # tokens of the prompt that a prediction is made for
SCORE = 100  # products that take as long as masking one score and taking its softmax
# A predicted speed-up has to reach this: predictions near 1 are up to a third too high, and every
# site of the benchmark that reached it in prompt and decoding was measured to gain.
MARGIN = 1.2


class Cost(NamedTuple):
    """Per token: weights read, operations started, and multiply-adds in a prompt of 512 tokens."""

    reads: int
    operations: int
    products: int

    @property
    def decode(self) -> int:
        """Time of a token that is decoded, in weights read."""
        return self.reads + OPERATION * self.operations

    @property
    def prefill(self) -> int:
        """Time of a token of the prompt, in products."""
        return self.products + OPERATION * self.operations // PROMPT


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
    size = sum(geometry.inner(role) * geometry.D for _, role in site.matrices)
    if _whole_attention(site):
        return Cost(size, ATTENTION_OPERATIONS, size + _attend(geometry, geometry.K))
    return Cost(size, len(site.matrices), size)


def factored_cost(site: Site, factors: Factors, geometry: Geometry) -> Cost:
    """Counts of the module that runs the site; expanding latents to heads is counted too."""
    stored = parameters(factors)
    if isinstance(factors, LowRank):
        return Cost(stored, 2, stored)
    if _whole_attention(site) and len(factors.ranks) == 3:
        p, r, s = factors.ranks
        width, stack = geometry.D * p, p * r * geometry.G
        whole = s == 2 * geometry.groups + 2  # each matrix then has its own part of the core
        inner, outer = (geometry.groups + 2, geometry.groups) if whole else (s, s)
        reads = 2 * width + (inner + outer) * stack
        expand = (geometry.H + geometry.G) * r * geometry.K
        return Cost(reads, ATTENTION_OPERATIONS, reads + expand + _attend(geometry, r))
    # the others share nothing while they run: every matrix goes through its own chain
    count = len(site.matrices)
    products = stored * count if site.stacking == "matrices" else stored
    return Cost(stored, 3 * count, products)


def _whole_attention(site: Site) -> bool:
    return site.stacking == "heads"


def _attend(geometry: Geometry, values: int) -> int:
    """Products of one token with the keys and values of the prompt, and of its scores."""
    return geometry.H * PROMPT * (geometry.K + values + SCORE)


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
    choice = Choice(site.name, True, "smaller and faster", dense, small)
    if min(choice.speedups) < MARGIN:
        why = "predicted {:.2f} times as fast at a prompt, {:.2f} at decoding".format(
            *choice.speedups
        )
        return replace(choice, factored=False, why=why)
    return choice

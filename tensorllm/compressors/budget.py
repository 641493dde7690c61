"""A target size."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tensorllm.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """A target size: exactly one of four targets.

    Attributes:
        target_ratio: numbers in the strategy's matrices before over after, above 1.
        target_params: parameters of the whole model afterwards.
        target_bytes: bytes of the weight files afterwards, with factors; factors and matrices may
            be rounded to 8 or 4 bits.
        max_loss_increase: allowed increase of the loss on the calibration set in nats per token;
            the smallest model within it is searched for.
        other_bytes: with target_bytes, the bytes of everything that is not compressed (embeddings,
            norms, headers); filled in by the code that knows the model.
    """

    target_ratio: float | None = None
    target_params: int | None = None
    target_bytes: int | None = None
    max_loss_increase: float | None = None
    other_bytes: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in TARGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise UserError(
                "give one of target_ratio (such as 1.5), target_params and target_bytes (of the "
                "whole model) and max_loss_increase (nats per token), got "
                f"{' and '.join(given) or 'none'}"
            )
        if self.target_ratio is not None and not self.target_ratio > 1:
            raise UserError(f"target_ratio must be above 1, got {self.target_ratio}")
        if self.target_params is not None and self.target_params < 1:
            raise UserError(f"target_params must be 1 or more, got {self.target_params}")
        if self.target_bytes is not None and self.target_bytes < 1:
            raise UserError(f"target_bytes must be 1 or more, got {self.target_bytes}")
        if self.max_loss_increase is not None and not 0 < self.max_loss_increase < math.inf:
            raise UserError(f"max_loss_increase must be above 0, got {self.max_loss_increase}")

    @property
    def settings(self) -> dict[str, float]:
        """The target that was given, by name."""
        return {name: x for name in TARGETS if (x := getattr(self, name)) is not None}

    def numbers(self, before: int, total: int, minimum: int | None = None) -> int:
        """How many numbers all factors may store; with `target_bytes`, how many bytes.

        Args:
            before: numbers in the strategy's matrices.
            total: parameters of the whole model.
            minimum: numbers, or bytes, stored at the smallest sizes, if known.

        Raises:
            UserError: the target is out of reach; the message gives the range.
        """
        if self.target_bytes is not None:
            if self.other_bytes is None:
                raise UserError(
                    "a target in bytes is for compress, which knows what else the files hold "
                    "(tl.compress, tensorllm compress)"
                )
            if self.target_bytes < self.other_bytes + (minimum or 0):
                known = (
                    ""
                    if minimum is None
                    else f"the least is {self.other_bytes + minimum}, of which "
                )
                raise UserError(
                    f"target_bytes {self.target_bytes} cannot be met: {known}{self.other_bytes} "
                    "are not compressed (embeddings, norms, headers of files)"
                )
            return self.target_bytes - self.other_bytes
        rest = total - before
        if self.target_ratio is not None:
            numbers = math.floor(before / self.target_ratio)
            if minimum is not None and numbers < minimum:
                raise UserError(
                    f"target_ratio {self.target_ratio:g} cannot be met: the best reachable is "
                    f"{before / minimum:.4g} (the smallest ranks everywhere)"
                )
            return numbers
        assert self.target_params is not None, "a limit of the loss is met by trying sizes"
        if not rest + (minimum or 0) <= self.target_params < total:
            reach = f"in {rest + (minimum or 0)}..{total - 1}"
            if minimum is None:
                reach = f"above {rest} and below {total}"
            raise UserError(f"target_params must be {reach}, got {self.target_params}")
        return self.target_params - rest


TARGETS = ("target_ratio", "target_params", "target_bytes", "max_loss_increase")


def without_sizes(
    settings: Mapping[str, Any], size_settings: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """The settings that a recipe may name beside a target."""
    chosen = {*TARGETS, *(name for row in size_settings for name in row)}
    return {name: value for name, value in settings.items() if name not in chosen}

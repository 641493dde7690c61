"""Checks of settings that several strategies share."""

from collections.abc import Sequence

from tensorllm.errors import UserError
from tensorllm.models.spec import ModelSpec
from tensorllm.registry import did_you_mean
from tensorllm.tensors.stacking import family


def check_roles(roles: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """The roles as a tuple.

    Raises:
        UserError: a role is unknown or repeated, or there are none.
    """
    wrong = [role for role in roles if family(role) not in known]
    if wrong or not roles or len(set(roles)) != len(roles):
        raise UserError(
            f"matrices must be some of {', '.join(known)}, each once, got {list(roles)}"
            + ("." + did_you_mean(str(wrong[0]), list(known)) if wrong else "")
        )
    return tuple(roles)


def check_exist(roles: Sequence[str], spec: ModelSpec) -> None:
    """Raise a UserError for a matrix that no layer of the model has."""
    missing = [role for role in roles if family(role) not in spec.roles]
    if missing:
        raise UserError(
            f"matrix {missing[0]!r} does not exist in this architecture; "
            f"it has {', '.join(spec.roles)}"
        )


def check_seed(seed: int) -> None:
    """Raise a UserError for a seed that numpy's random generators reject."""
    if not 0 <= seed < 2**32:
        raise UserError(f"seed must be in 0..2^32-1, got {seed}")

"""Running what was compressed: a model in memory, or a factored folder, in its factors."""

from typing import Any

from tensorllm.architectures import RoleMatrices, parameters_of
from tensorllm.compression.model import compression_of
from tensorllm.errors import UserError
from tensorllm.runtime import install
from tensorllm.runtime.cost import Choice, Policy, choose


def factorize(model: Any, policy: Policy = "always") -> list[Choice]:
    """Let a model that was compressed in memory run in its factors, in place.

    Args:
        model: a transformers model, after `compress`.
        policy: `always`, or `auto`: keep dense what would not save bytes and time.

    Returns:
        How every site runs, and why.

    Raises:
        UserError: the model was not compressed, runs factored already, or a site cannot.
    """
    compression = compression_of(model)
    if compression is None:
        raise UserError("this model was not compressed; compress it first")
    if getattr(model, "tensorllm_factored", False):
        raise UserError("this model runs in its factors already")
    geometry = RoleMatrices(model.config, parameters_of(model)).geometry
    choices = [choose(done.site, done.factors, geometry, policy) for done in compression.sites]
    wanted = {choice.site for choice in choices if choice.factored}
    install(model, [(d.site, d.factors) for d in compression.sites if d.site.name in wanted])
    model.tensorllm_factored = True
    return choices

"""Run a model that was compressed in memory as factors."""

from typing import Any

from tensorllm.checkpoint.factored import store_site
from tensorllm.checkpoint.manifest import Manifest
from tensorllm.checkpoint.saving import record
from tensorllm.compression.engine import compression_of
from tensorllm.compressors import Site
from tensorllm.environment import versions
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.models.task import name_of
from tensorllm.runtime import install
from tensorllm.runtime.cost import Cache, Choice, Policy, choose_all, keeps_dense_cache
from tensorllm.weights import touched


def factorize(model: Any, policy: Policy = "always", cache: Cache = "latent") -> list[Choice]:
    """Replace the compressed matrices of a model in memory by modules that run factors, in place.

    Args:
        model: a transformers model, after `compress`.
        policy: `always`: wherever a module can run the factors; `auto`: only where they save bytes
            and time.
        cache: see `load`.

    Returns:
        How every site runs, and why.

    Raises:
        UserError: the model was not compressed, runs as factors already, or cannot run so at all.
    """
    compression = compression_of(model)
    if compression is None:
        raise UserError("this model was not compressed; compress it first")
    if getattr(model, "tensorllm_manifest", None) is not None:
        raise UserError("this model runs in its factors already")
    geometry = RoleMatrices(model.config, parameters_of(model)).spec.geometry
    choices = choose_all(
        [(done.site, done.factors) for done in compression.sites],
        geometry,
        policy,
        model.dtype,
        on_cpu=model.device.type == "cpu",
    )
    wanted = {choice.site for choice in choices if choice.factored}
    if policy == "always" and not wanted:
        raise UserError(
            f"this model cannot run factored: {choices[0].why}; compress with layout 'paper', or "
            "leave it dense"
        )
    sites = [(d.site, d.factors) for d in compression.sites if d.site.name in wanted]
    replaced = _replaced(model, [site for site, _ in sites])
    dense = [
        site.name
        for site, factors in sites
        if keeps_dense_cache(site, factors.plain(), geometry(site.layers[0]), cache)
    ]
    placements = install(model, sites, dense_cache=dense)
    mode, settings = compression.plan.settings
    manifest = Manifest(
        format="factored",
        source={
            "model": name_of(model.config),
            "revision": getattr(model.config, "_commit_hash", None),
            "layers": list(compression.plan.layers),
        },
        mode=mode,
        settings=settings,
        versions=versions(),
        sites=[store_site(site, factors)[0] for site, factors in sites],
        replaced=replaced,
        rest={p.tensor: f"rest.{p.tensor}" for p in placements if not p.site},
    )
    record(model, manifest, placements)
    return choices


def _replaced(model: Any, sites: list[Site]) -> dict[str, dict[str, Any]]:
    """Shape and dtype of the parameters that factors will replace."""
    weights = parameters_of(model)
    roles = RoleMatrices(model.config, weights)
    names = sorted({name for site in sites for name in touched(site, roles)})
    return {
        name: {
            "shape": list(weights[name].shape),
            "dtype": str(weights[name].dtype).removeprefix("torch."),
        }
        for name in names
    }

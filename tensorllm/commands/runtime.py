"""Running what was compressed: a model in memory, or a factored folder, in its factors."""

from pathlib import Path
from typing import Any

import torch

from tensorllm.checkpoint.factored import STEM, load, store_site
from tensorllm.checkpoint.loading import load_whole
from tensorllm.checkpoint.manifest import Manifest, read_manifest
from tensorllm.checkpoint.reader import Checkpoint
from tensorllm.checkpoint.skeleton import record
from tensorllm.compression.engine import compression_of
from tensorllm.compressors import Site
from tensorllm.environment import versions
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.runtime import install
from tensorllm.runtime.cost import Choice, Policy, choose
from tensorllm.runtime.parts import can_run_factored
from tensorllm.tensors.factors import cast
from tensorllm.tensors.quantised import plain


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
    if getattr(model, "tensorllm_manifest", None) is not None:
        raise UserError("this model runs in its factors already")
    geometry = RoleMatrices(model.config, parameters_of(model)).geometry
    choices = [choose(done.site, done.factors, geometry, policy) for done in compression.sites]
    wanted = {choice.site for choice in choices if choice.factored}
    sites = [(d.site, d.factors) for d in compression.sites if d.site.name in wanted]
    replaced = _replaced(model, [site for site, _ in sites])
    placements = install(model, sites)
    mode, settings = compression.plan.settings
    manifest = Manifest(
        format="factored",
        source={
            "model": getattr(model.config, "_name_or_path", "") or model.config.model_type,
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


def load_factored(
    folder: Path, policy: Policy = "always", dtype: torch.dtype | None = None
) -> tuple[Any, list[Choice]]:
    """The model of a factored folder, running in its factors.

    Returns:
        The model, and how every site runs and why.

    Raises:
        UserError: not a factored folder, or one whose files are not what its manifest says.
    """
    manifest = read_manifest(folder)
    if manifest is None or manifest.format != "factored":
        raise UserError(
            f"{folder} is not factored; write one with tensorllm compress --format factored"
        )
    stored = Checkpoint(folder, stem=STEM)
    roles = RoleMatrices(stored.config, set(stored.entries) | set(manifest.replaced))
    sites = []
    for site in manifest.sites:
        factors = site.factors(stored.read(site.tensors.values()))
        choice = choose(site.site, plain(factors), roles.geometry, policy)
        sites.append((site.site, factors, choice))
    choices = [choice for _, _, choice in sites]
    if all(choice.factored for choice in choices):
        del sites
        model = load_whole(folder, stored.config, dtype, language=False)
        return model, choices
    model = load(folder, dtype=dtype)
    install(model, [(s, cast(plain(f), model.dtype)) for s, f, choice in sites if choice.factored])
    return model, choices


def load_to_run(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The model of a factored folder: in its factors, or dense where one of its sites cannot."""
    manifest = read_manifest(folder)
    assert manifest is not None, "only called on a factored folder"
    stored = Checkpoint(folder, stem=STEM)
    for site in manifest.sites:
        factors = site.factors(stored.read(site.tensors.values()))
        if not can_run_factored(site.site, plain(factors)):
            return load(folder, dtype=dtype)
    return load_whole(folder, stored.config, dtype, language=False)


def _replaced(model: Any, sites: list[Site]) -> dict[str, dict[str, Any]]:
    """Shape and dtype of the parameters that factors will stand for."""
    weights = parameters_of(model)
    roles = RoleMatrices(model.config, weights)
    names = sorted({roles.name(*matrix) for site in sites for matrix in site.matrices})
    return {
        name: {
            "shape": list(weights[name].shape),
            "dtype": str(weights[name].dtype).removeprefix("torch."),
        }
        for name in names
    }

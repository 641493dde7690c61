"""Load what tensorllm wrote: dense, as factors, or partly so; by one function, `load`.

transformers does the work. `from_pretrained` opens a factored folder too: it replaces modules
through `install_skeleton` before it reads weights, and calls `finish` afterwards.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tensorllm.checkpoint.factored import METHOD, STEM, FactoredFolder, unmark_config
from tensorllm.checkpoint.manifest import MANIFEST, Manifest, check_files, read_manifest
from tensorllm.checkpoint.reader import INTEGERS, Checkpoint, read_header
from tensorllm.checkpoint.saving import record
from tensorllm.checkpoint.whole import load_state, load_whole
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices
from tensorllm.registry import one_of
from tensorllm.runtime import Placement, SiteModule, install
from tensorllm.runtime.attention import Bias
from tensorllm.runtime.cost import Cache, Choice, choose_all, keeps_dense_cache, whole_speedups
from tensorllm.runtime.install import FactoredLinear
from tensorllm.runtime.products import speed_of

How = Literal["always", "auto", "dense"]
CHOICES = "tensorllm_choices"  # the attribute with a model's choices, one per site
_cache_elsewhere: Cache = "latent"  # for models that `from_pretrained` opens by itself


def load(
    folder: str | Path,
    *,
    policy: How = "dense",
    cache: Cache = "latent",
    dtype: torch.dtype | None = None,
    verify: bool = False,
) -> Any:
    """Load the transformers model of a folder that tensorllm wrote.

    Args:
        policy: `dense`: as the dense model that the factors represent; `always`: as factors
            wherever a module can run them; `auto`: as factors where the cost model says that is
            smaller and faster on this CPU. `choices_of` says how each site of the model runs.
        cache: what attention keeps in the key-value cache: `latent`, which takes less memory where
            a module supports it; `dense`: full keys and values; `auto`: latents where they are
            predicted not to slow decoding down.
        dtype: of the weights in memory; None: as they are stored.
        verify: compare the files' checksums with the manifest's; sizes are always compared.

    Raises:
        UserError: tensorllm did not write the folder, its format is newer, or its files have
            changed; or factors are asked for and it has none.
    """
    folder = Path(folder)
    one_of("policy", policy, get_args(How))
    one_of("cache", cache, get_args(Cache))
    manifest = read_manifest(folder)
    if policy != "dense" and (manifest is None or manifest.format != "factored"):
        raise UserError(
            f"{folder} is not factored; write one with tensorllm compress --format factored"
        )
    if manifest is None:
        raise UserError(f"{folder} has no {MANIFEST}; load it with transformers")
    check_files(folder, manifest, verify=verify)
    if manifest.format == "dense":
        return load_whole(folder, Checkpoint(folder).config, dtype, language=False)
    choices: list[Choice] = []
    dense: list[str] = []
    if policy != "dense":
        choices, dense = _choices(folder, manifest, policy, cache, dtype)
    wanted = {choice.site for choice in choices if choice.factored}
    if wanted and len(wanted) == len(choices):
        config = Checkpoint(folder, stem=STEM).config
        config.quantization_config["dense_cache"] = dense
        config.name_or_path = str(folder)
        changed = bool(dense) or cache != _cache_elsewhere
        model = load_whole(folder, config, dtype, language=False, changed=changed)
    else:
        model = _from_state(folder, manifest, wanted, dtype, dense)
    setattr(model, CHOICES, choices)
    return model.eval()


@contextmanager
def cache_elsewhere(cache: Cache) -> Iterator[None]:
    """Set what attention caches in models that `from_pretrained` opens within the block.

    For programs that open models themselves and pass none of our options, such as a server. They
    may do so in any thread, so the choice holds for the whole process until the block ends.
    """
    global _cache_elsewhere
    one_of("cache", cache, get_args(Cache))
    before, _cache_elsewhere = _cache_elsewhere, cache
    try:
        yield
    finally:
        _cache_elsewhere = before


def choices_of(model: Any) -> list[Choice]:
    """How each site of a model from `load` runs, and why; empty if it was loaded as dense."""
    return list(getattr(model, CHOICES, []))


def predicted_of(model: Any, folder: str | Path) -> tuple[float, float] | None:
    """The predicted speed of a model from `load`, relative to the dense model.

    Returns:
        The speedup for a prompt of 512 tokens, and for decoding one text. None for a mixture of
        experts, of which a token uses only some, and for a model without an output head.
    """
    factored, head = FactoredFolder(Path(folder)), model.get_output_embeddings()
    spec = factored.roles.spec
    if head is None or any(geometry.experts for geometry in spec.geometries):
        return None
    speed = speed_of(model.dtype) if model.device.type == "cpu" else 1.0
    return whole_speedups(spec, choices_of(model), head.weight.numel(), model.dtype, speed)


def _choices(
    folder: Path, manifest: Manifest, policy: Any, cache: Cache, dtype: torch.dtype | None
) -> tuple[list[Choice], list[str]]:
    """How each site is to run, and which cache no latents; read from shapes, not from weights."""
    factored = FactoredFolder(folder, manifest)
    geometry = factored.roles.spec.geometry
    shapes = [factored.shapes(site) for site in manifest.sites]
    sites = [(site.site, factors) for site, factors in zip(manifest.sites, shapes, strict=True)]
    # Of this CPU: the device that the model is moved to later is not known.
    kind = dtype or factored.stored.config.dtype or torch.float32
    choices = choose_all(sites, geometry, policy, kind, on_cpu=True)
    dense = [
        site.name
        for site, factors in sites
        if keeps_dense_cache(site, factors, geometry(site.layers[0]), cache)
    ]
    return choices, dense


def _from_state(
    folder: Path,
    manifest: Manifest,
    wanted: set[str],
    dtype: torch.dtype | None,
    dense_cache: Sequence[str],
) -> Any:
    """The model with the sites in `wanted` as factors and all others dense."""
    import transformers

    factored = FactoredFolder(folder, manifest)
    config = unmark_config(factored.stored.config)
    if wanted:
        config.quantization_config = {
            "quant_method": METHOD,
            "weights": "",
            "folder": str(folder),
            "sites": sorted(wanted),
            "dense_cache": dense_cache,
        }
    model = load_state(factored.state(wanted), config, dtype, folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def install_skeleton(
    model: Any,
    folder: Path,
    files: Sequence[Path],
    sites: Sequence[str] | None = None,
    *,
    dense_cache: Sequence[str] | None = None,
) -> tuple[Manifest, list[Placement]]:
    """Install a folder's factored modules, empty, in a model on the meta device.

    Args:
        model: the dense model, on the meta device.
        folder: a factored one.
        files: of weights, in the folder.
        sites: names of those that run as factors; None: all.
        dense_cache: names of those whose attention caches no latents; None: as `cache_elsewhere`
            says.

    Returns:
        The manifest of the model, and where the stored tensors go.

    Raises:
        UserError: the folder's files do not match its manifest, or the factors cannot be run.
    """
    _fetch_manifest(model, folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder} has no {MANIFEST}, so its factors cannot be placed")
    if sites is None:
        check_files(folder, manifest, verify=False)
    else:
        manifest = FactoredFolder(folder, manifest).subset(set(sites))
    stored = {name: info for file in files for name, info in read_header(file).items()}
    roles = RoleMatrices(model.config, [name for name, _ in model.named_parameters()])
    dtype, found = model.dtype, []  # asked once: transformers looks through all parameters for it
    for entry in manifest.sites:
        missing = [name for name in entry.tensors.values() if name not in stored]
        if missing:
            raise UserError(f"{folder} lacks the tensor {missing[0]}, which its manifest names")
        roles.check_layers(entry.layers)
        empty = {name: _empty(stored[name], dtype) for name in entry.tensors.values()}
        factors = entry.factors(empty)
        want = entry.site.shape(roles.spec.geometry(entry.layers[0]))
        if factors.shape != want:
            got = factors.shape
            raise UserError(f"{folder}: {entry.name} has factors of {got}, the config says {want}")
        found.append((entry.site, factors))
    if dense_cache is None:
        dense_cache = [
            site.name
            for site, factors in found
            if keeps_dense_cache(
                site, factors.plain(), roles.spec.geometry(site.layers[0]), _cache_elsewhere
            )
        ]
    placements = install(model, found, dense_cache=dense_cache)
    _nothing_to_initialise(model)
    return manifest, placements


def finish(model: Any, manifest: Manifest) -> None:
    """Finish a factored model after its weights have been loaded.

    Raises:
        UserError: a device map leaves factors on the disk, or in memory of another device until
            they run. transformers fetches the weights of a module when that is called; a site reads
            several modules' weights at once, and would compute with what is not there.
    """
    sites = {name: m for name, m in model.named_modules() if isinstance(m, SiteModule)}
    away = [name for name, module in sites.items() if any(p.is_meta for p in module.parameters())]
    if away and not all(p.is_meta for p in model.parameters()):
        raise UserError(
            f"the device map leaves {len(away)} of {len(sites)} factored modules on the disk, or "
            f"in memory of another device ({away[0]}), where they cannot run; give a device map "
            "without disk and without CPU beside GPUs, or export the folder dense (tensorllm "
            "export --format dense)"
        )
    for module in sites.values():
        module.finish()
    record(model, manifest, None)


def _nothing_to_initialise(module: Any) -> bool:
    """Keep transformers from initialising factors, and replaced weights through modules above them.

    Only up to the layer: modules above it may still have to fill buffers of all layers. Of other
    tensors than factors it is not known yet whether the files have them.

    Args:
        module: the model, or one in it.

    Returns:
        Whether it is, or holds, a module of ours.
    """
    if isinstance(module, SiteModule):
        for each in module.modules():
            vars(each)["_is_hf_initialized"] = True  # an attribute of a module takes microseconds
        return True
    found = [
        _nothing_to_initialise(child) for child in module._modules.values() if child is not None
    ]
    ours = isinstance(module, FactoredLinear | Bias) or any(found)
    if isinstance(module, nn.ModuleList):
        return False
    if ours and not module._parameters and not module._buffers:
        vars(module)["_is_hf_initialized"] = True
    return ours


def _empty(info: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    integer = INTEGERS.get(info["dtype"])  # to which the model's dtype does not apply
    kind = getattr(torch, integer) if integer else dtype
    return torch.empty(info["shape"], dtype=kind, device="meta")


def _fetch_manifest(model: Any, folder: Path) -> None:
    """Fetch the manifest for weights that transformers downloaded from a hub without it."""
    if (folder / MANIFEST).is_file() or folder.parent.name != "snapshots":
        return
    from transformers.utils.hub import cached_file

    cached_file(  # from the same commit, into the same cache as the weights
        model.config.name_or_path,
        MANIFEST,
        revision=folder.name,
        cache_dir=folder.parents[2],
        _raise_exceptions_for_missing_entries=False,
    )

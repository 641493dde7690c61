"""Factored checkpoints: cores and factors instead of the matrices that they stand for."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensorllm.checkpoint.grouping import sharing
from tensorllm.checkpoint.loading import load_state, load_whole
from tensorllm.checkpoint.manifest import Manifest, StoredSite, check_files, read_manifest
from tensorllm.checkpoint.reader import Checkpoint
from tensorllm.compressors import Site
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices
from tensorllm.tensors.factors import FACTORS, Factors

STEM = "factored"
METHOD = "tensorllm"
NOT_WITHOUT_US = "these-weights-are-factored-first-import-tensorllm.safetensors"
README = """# A factored model

Some of the matrices of this model are stored as low-rank factors, and run as such:

```python
import tensorllm  # teaches transformers this format
from transformers import AutoModelForCausalLM  # or AutoModelForMaskedLM

model = AutoModelForCausalLM.from_pretrained("this folder")
```

`tensorllm export THIS_FOLDER DENSE_FOLDER` writes an ordinary checkpoint.
`tensorllm.json` says how the factors were made.
"""


def store_site(site: Site, factors: Factors) -> tuple[StoredSite, dict[str, Tensor]]:
    """How a site is stored: its manifest entry and its tensors under their names in the file."""
    tensors = {f"factors.{site.name}.{short}": t for short, t in factors.tensors().items()}
    names = dict(zip(factors.tensors(), tensors, strict=True))
    kind = FACTORS.name_of(type(factors))
    return StoredSite(site.name, site.layers, site.roles, site.stacking, kind, names), tensors


def mark_config(config: Mapping[str, Any], weights: str) -> dict[str, Any]:
    """config.json of a factored folder: transformers loads it with tensorllm, and not without.

    A way of storing weights that transformers does not know it merely warns of, and fills what it
    misses at random. So it is sent to a file that is not there, whose name says what to do.

    Args:
        weights: the file, or the index of files, that holds the factors.
    """
    return {
        **config,
        "quantization_config": {"quant_method": METHOD, "weights": weights},
        "transformers_weights": NOT_WITHOUT_US,
    }


def unmark_config(config: Any) -> Any:
    """The config, in memory, of the dense model that a factored folder stands for."""
    for name in ("quantization_config", "transformers_weights"):
        if hasattr(config, name):
            delattr(config, name)
    return config


def write_readme(folder: Path) -> None:
    """Say how the folder is used, where it has no README.md yet."""
    path = folder / "README.md"
    if not path.exists():
        path.write_text(README)


def rest_of(
    roles: RoleMatrices, weights: Mapping[str, Tensor], replaced: Iterable[tuple[int, str]]
) -> dict[str, Tensor]:
    """Matrices that share a fused parameter with replaced ones but are left alone themselves."""
    replaced = set(replaced)
    out = {}
    for layer, role in sorted(replaced):
        for other in roles.architecture.stored(role).roles:
            if (layer, other) not in replaced:
                out[f"{layer}.{other}"] = roles.read(weights, layer, other).clone()
    return out


def dense_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the model that a factored folder stands for, rebuilt one by one."""
    manifest = read_manifest(folder)
    assert manifest is not None, "only called on a factored folder"
    stored = Checkpoint(folder, stem=STEM)
    roles = RoleMatrices(stored.config, set(stored.entries) | set(manifest.replaced))
    special = {t for site in manifest.sites for t in site.tensors.values()}
    special |= set(manifest.rest.values())
    missing = special - set(stored.entries)
    if missing:
        raise UserError(f"{folder} lacks the tensor {sorted(missing)[0]}, which its manifest names")
    for name in stored.entries:
        if name not in special:
            yield from stored.read([name]).items()
    touched = {
        site.name: {roles.name(*matrix) for matrix in site.site.matrices} for site in manifest.sites
    }
    for _, group in sharing(manifest.sites, lambda site: touched[site.name]):
        yield from _rebuild(group, manifest, stored, roles).items()


def load(folder: str | Path, *, dtype: torch.dtype | None = None, verify: bool = False) -> Any:
    """The transformers model of a folder that tensorllm wrote, dense in memory.

    Args:
        dtype: of the weights in memory; None: as they are stored.
        verify: compare the files' checksums with the manifest's; sizes are looked at always.

    Raises:
        UserError: the folder is not ours, from a newer version, or its files have changed.
    """
    import transformers

    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder} has no tensorllm.json; load it with transformers")
    check_files(folder, manifest, verify=verify)
    if manifest.format == "dense":
        return load_whole(folder, Checkpoint(folder).config, dtype, language=False)
    config = unmark_config(Checkpoint(folder, stem=STEM).config)
    state = dict(dense_tensors(folder))
    model = load_state(state, config, dtype, folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def _rebuild(
    sites: list[StoredSite], manifest: Manifest, stored: Checkpoint, roles: RoleMatrices
) -> dict[str, Tensor]:
    matrices = [matrix for site in sites for matrix in site.site.matrices]
    weights = {
        name: torch.empty(facts["shape"], dtype=getattr(torch, facts["dtype"]))
        for name in sorted({roles.name(*matrix) for matrix in matrices})
        for facts in [manifest.replaced[name]]
    }
    for site in sites:
        factors = site.factors(stored.read(site.tensors.values()))
        unstacked = site.site.unstack(factors.dense(), roles.geometry)
        for (layer, role), w_ID in zip(site.site.matrices, unstacked, strict=True):
            roles.write(weights, layer, role, w_ID)
    for key, tensor in manifest.rest.items():
        number, role = key.split(".")
        if roles.name(int(number), role) in weights:
            roles.write(weights, int(number), role, stored.read([tensor])[tensor])
    return weights

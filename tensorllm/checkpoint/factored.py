"""The factored format: cores and factors are stored in place of the matrices they represent."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensorllm.checkpoint.manifest import Manifest, StoredSite, read_manifest
from tensorllm.checkpoint.reader import Checkpoint
from tensorllm.compressors import Site
from tensorllm.errors import UserError
from tensorllm.io import write_text
from tensorllm.models import RoleMatrices
from tensorllm.tensors.factors import Factors
from tensorllm.weights import sharing, touched, write_dense

STEM = "factored"
METHOD = "tensorllm"
MARKS = ("quantization_config", "transformers_weights")  # in the config of a factored folder
NOT_WITHOUT_US = "these-weights-are-factored-first-import-tensorllm.safetensors"
README = """---
library_name: tensorllm
tags: [tensorllm, compression, low-rank]
---

# A factored model

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
    """A site's manifest entry, and its tensors under their names in the file."""
    tensors = {f"factors.{site.name}.{short}": t for short, t in factors.tensors().items()}
    names = dict(zip(factors.tensors(), tensors, strict=True))
    entry = StoredSite(site.name, site.layers, site.roles, site.stacking, factors.kind, names)
    return entry, tensors


def mark_config(config: Mapping[str, Any], weights: str) -> dict[str, Any]:
    """The config.json of a factored folder: transformers loads it only with tensorllm imported.

    Of an unknown quantisation method transformers only warns, and fills the missing weights with
    random numbers. So the config names a weight file that does not exist, whose name says what to
    do.

    Args:
        config: of the dense model.
        weights: the file, or the index of files, that holds the factors.
    """
    return {
        **config,
        "quantization_config": {"quant_method": METHOD, "weights": weights},
        "transformers_weights": NOT_WITHOUT_US,
    }


def unmark_config(config: Any) -> Any:
    """Remove the marks in place, which leaves the config of the dense model."""
    for name in MARKS:
        if hasattr(config, name):
            delattr(config, name)
    return config


def write_readme(folder: Path) -> None:
    """Write a README.md that explains how to use the folder, unless it has one."""
    path = folder / "README.md"
    if not path.exists():
        write_text(path, README)


def rest_of(
    roles: RoleMatrices, weights: Mapping[str, Tensor], replaced: Iterable[tuple[int, str]]
) -> dict[str, Tensor]:
    """Dense matrices that share a fused parameter with replaced ones, by `layer.role`.

    Args:
        replaced: (layer, role) of the matrices that are stored as factors.
    """
    return {
        f"{layer}.{role}": roles.read(weights, layer, role).clone()
        for layer, role in fused_with(roles, replaced)
    }


def fused_with(roles: RoleMatrices, replaced: Iterable[tuple[int, str]]) -> list[tuple[int, str]]:
    """(layer, role) of the matrices that share a parameter with replaced ones but stay dense."""
    replaced = set(replaced)
    others = {
        (layer, other) for layer, role in replaced for other in roles.stored(layer, role).roles
    }
    return sorted(others - replaced)


class FactoredFolder:
    """The contents of a factored folder, read tensor by tensor.

    Raises:
        UserError: the folder lacks a tensor that its manifest names.
    """

    def __init__(self, folder: Path, manifest: Manifest | None = None) -> None:
        found = manifest or read_manifest(folder)
        assert found is not None, "only made of a factored folder"
        self.manifest = found
        self.stored = Checkpoint(folder, stem=STEM)
        self.roles = RoleMatrices(
            self.stored.config, set(self.stored.entries) | set(found.replaced)
        )
        self.special = {t for site in found.sites for t in site.tensors.values()}
        self.special |= set(found.rest.values())
        missing = self.special - set(self.stored.entries)
        if missing:
            first = sorted(missing)[0]
            raise UserError(f"{folder} lacks the tensor {first}, which its manifest names")

    def shapes(self, entry: StoredSite) -> Factors:
        """A site's factors in floating point, on the meta device: no numbers are read."""
        empty = {
            name: torch.empty(self.stored.entries[name].shape, device="meta")
            for name in entry.tensors.values()
        }
        return entry.factors(empty).plain()

    def plain_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters that are stored as they are, not as factors."""
        for name in self.stored.entries:
            if name not in self.special:
                yield from self.stored.read([name]).items()

    def rebuilt_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters that are stored as factors, rebuilt a group at a time."""
        for _, group in self._groups():
            yield from self._rebuild(group).items()

    def rebuilt(self, name: str) -> dict[str, Tensor]:
        """Rebuild a parameter that is stored as factors, and all that are rebuilt along with it."""
        return next(self._rebuild(group) for names, group in self._groups() if name in names)

    def _groups(self) -> list[tuple[set[str], list[StoredSite]]]:
        names = {site.name: touched(site.site, self.roles) for site in self.manifest.sites}
        return sharing(self.manifest.sites, lambda site: names[site.name])

    def subset(self, wanted: set[str]) -> Manifest:
        """The manifest of a model in which only the named sites run as factors."""
        sites = [site for site in self.manifest.sites if site.name in wanted]
        matrices = [matrix for site in sites for matrix in site.site.matrices]
        names = {name for site in sites for name in touched(site.site, self.roles)}
        return replace(
            self.manifest,
            sites=sites,
            replaced={n: facts for n, facts in self.manifest.replaced.items() if n in names},
            rest={
                f"{n}.{role}": f"rest.{n}.{role}" for n, role in fused_with(self.roles, matrices)
            },
        )

    def state(self, wanted: Collection[str] = ()) -> dict[str, Tensor]:
        """The tensors that `subset` of the same sites names, and all other parameters dense.

        What the model keeps is allocated first: between its parameters, the temporary tensors of
        each site would leave gaps, which stay resident. Of the sites that run as factors, nothing
        is rebuilt.
        """
        kept = [site for site in self.manifest.sites if site.name in wanted]
        replaced = {name for site in kept for name in touched(site.site, self.roles)}
        state = dict(self.plain_tensors())
        for site in kept:
            state |= self.stored.read(site.tensors.values())
        state |= self._allocated(set(self.manifest.replaced) - replaced)
        for _, group in self._groups():
            matrices = [m for site in group if site.name in wanted for m in site.site.matrices]
            if not matrices:
                self._rebuild(group, state)
            elif fused_with(self.roles, matrices):
                weights = self._rebuild(group, state)
                rest = rest_of(self.roles, weights, matrices)
                state |= {f"rest.{key}": w_ID for key, w_ID in rest.items()}
        return state

    def _allocated(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Uninitialised memory for parameters that are stored as factors."""
        return {
            name: torch.empty(facts["shape"], dtype=getattr(torch, facts["dtype"]))
            for name in sorted(names)
            for facts in [self.manifest.replaced[name]]
        }

    def _rebuild(
        self, group: list[StoredSite], into: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The parameters of a group of sites as dense, those of `into` in place."""
        stored, roles, into = self.stored, self.roles, into or {}
        names = {name for site in group for name in touched(site.site, roles)}
        weights = self._allocated(names - into.keys())
        weights |= {name: into[name] for name in names & into.keys()}
        for site in group:
            write_dense(site.site, site.factors(stored.read(site.tensors.values())), roles, weights)
        for key, tensor in self.manifest.rest.items():
            number, _, role = key.partition(".")
            if roles.name(int(number), role) in weights:
                roles.write(weights, int(number), role, stored.read([tensor])[tensor])
        return weights


def dense_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the model that a factored folder represents, rebuilt one by one."""
    factored = FactoredFolder(folder)
    yield from factored.plain_tensors()
    yield from factored.rebuilt_tensors()

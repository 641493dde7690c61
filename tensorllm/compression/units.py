"""Split a checkpoint into units of work, each small enough to fit in memory."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tensorllm.checkpoint.factored import rest_of, store_site
from tensorllm.checkpoint.manifest import factored_manifest
from tensorllm.checkpoint.reader import Checkpoint
from tensorllm.checkpoint.writer import as_written
from tensorllm.compression.jobs import run_job
from tensorllm.compression.plan import Plan
from tensorllm.compression.task import FolderTask
from tensorllm.compressors import Site
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices
from tensorllm.tensors.unfold import all_finite
from tensorllm.weights import sharing, touched, write_dense


@dataclass(frozen=True, slots=True)
class Unit:
    """Sites that share stored parameters, with all the parameters that they touch."""

    name: str
    names: list[str]
    sites: list[Site]


def open_checkpoint(folder: Path) -> tuple[Checkpoint, RoleMatrices]:
    """Open a checkpoint to compress, and check its shapes against its config.

    Raises:
        UserError: it is factored already, incomplete, or its shapes do not match its config.
    """
    if factored_manifest(folder) is not None:
        raise UserError(f"{folder} is factored already; give the model it was made from")
    checkpoint = Checkpoint(folder)
    roles = RoleMatrices(checkpoint.config, checkpoint.entries)
    roles.check_shapes({name: entry.shape for name, entry in checkpoint.entries.items()})
    _ = checkpoint.weights  # refuses an incomplete model
    return checkpoint, roles


def units(checkpoint: Checkpoint, roles: RoleMatrices, sites: Iterable[Site]) -> list[Unit]:
    """The whole checkpoint as units of work: the sites first, then what is only copied."""
    groups = sharing(sites, lambda site: touched(site, roles))
    out = [Unit(together[0].name, sorted(names), together) for names, together in groups]
    seen = {name for unit in out for name in unit.names}
    out += [Unit(name, [name], []) for name in checkpoint.entries if name not in seen]
    return out


def run_unit(
    unit: Unit, plan: Plan, task: FolderTask, checkpoint: Checkpoint, roles: RoleMatrices
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors to write for a unit, and a note for the manifest and the report."""
    weights = checkpoint.read(unit.names)
    if unit.sites:
        weights = {name: w.to(task.device) for name, w in weights.items()}
    note: dict[str, Any] = {"sites": [], "reports": [], "replaced": {}, "rest": {}}
    dtype = task.dtype if unit.sites else None
    done = [
        task.done.get(site.name) or run_job(site, plan, roles, weights, dtype)
        for site in unit.sites
    ]
    note["reports"] = [asdict(compressed.report) for compressed in done]
    note["details"] = [compressed.details for compressed in done]
    out: dict[str, Tensor] = {}
    if task.format == "factored" and done:
        for compressed in done:
            stored, tensors = store_site(compressed.site, compressed.factors)
            note["sites"].append(asdict(stored))
            out |= tensors
        matrices = [matrix for site in unit.sites for matrix in site.matrices]
        for key, w_ID in rest_of(roles, weights, matrices).items():
            out[f"rest.{key}"] = w_ID
            note["rest"][key] = f"rest.{key}"
        for name, w in weights.items():
            kept = str(task.dtype or w.dtype).removeprefix("torch.")
            note["replaced"][name] = {"shape": list(w.shape), "dtype": kept}
    else:
        for compressed in done:
            write_dense(compressed.site, compressed.factors, roles, weights)
        out = weights
    if not unit.sites:
        unused, changed = checkpoint.unused, plan.changed(roles)
        out = {n: w if n in unused else _copied(n, w, changed) for n, w in weights.items()}
    dtypes = {n: None if n in checkpoint.unused else task.dtype for n in out}
    return {name: as_written(t, dtypes[name]) for name, t in out.items()}, note


def _copied(name: str, w: Tensor, changed: Mapping[str, Tensor]) -> Tensor:
    """A parameter that no site touches: unchanged, or as a fit has changed it."""
    if w.is_floating_point() and not all_finite(w):  # jobs check what they read themselves
        raise UserError(f"{name} has NaN or infinite values")
    return changed[name].to(w.dtype) if name in changed else w

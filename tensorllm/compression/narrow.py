"""A checkpoint without its unused FFN channels: an ordinary one, only narrower.

A channel is dead if its row of `out` is zero, as are those that `modegpt` drops. Every tool that
reads the architecture runs the result, faster in proportion. `narrow` converts a folder;
`compress --format narrow` cuts what it writes by the same `Narrowing`.

Shapes: F FFN width, R remaining width, I rows of a stored parameter, C its columns.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from tensorllm.calibration.fit import Fitted
from tensorllm.checkpoint.factored import dense_tensors
from tensorllm.checkpoint.manifest import check_files, factored_manifest
from tensorllm.checkpoint.reader import Checkpoint, Entry
from tensorllm.checkpoint.writer import ShardWriter, as_written, check_target, exclusive
from tensorllm.compression.complete import complete, dense_config
from tensorllm.compression.exported import Narrowed, beside_narrow
from tensorllm.compression.jobs import CompressedSite
from tensorllm.compression.plan import Plan
from tensorllm.compression.task import FolderTask
from tensorllm.compressors.placing import placed
from tensorllm.compressors.widths import rounded_up
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices
from tensorllm.models.spec import Stored
from tensorllm.models.task import saved_class
from tensorllm.progress import Progress, quiet
from tensorllm.tensors.factors import cast
from tensorllm.tensors.stacking import FFN
from tensorllm.weights import dense_matrices, stacked, touched

Tensors = Callable[[], Iterator[tuple[str, Tensor]]]


@dataclass(frozen=True, slots=True)
class Narrow:
    """The FFN width before and after, and the bytes of the weight files."""

    before: int
    after: int
    bytes: int


def narrow(
    source: Path,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: Progress = quiet,
) -> Narrow:
    """Write a folder, factored or dense, without its dead FFN channels.

    All layers get the width of the widest, rounded up (`compressors.widths`), since a config has
    one width for all of them.

    Args:
        source: the folder to convert.
        target: the folder to make.
        dtype: of the written weights; None: unchanged.
        overwrite: replace an existing folder.
        progress: called with (tensors written, tensors in all, the tensor's name).

    Raises:
        UserError: a layer has no dead channel, the layers' widths differ, or the model's class
            cannot be narrower.
    """
    check_target(target, overwrite=overwrite, source=source)
    tensors, names, identity = _opened(source)
    given = dense_config(source, dtype)
    roles = RoleMatrices(AutoConfig.for_model(**given), names)
    cut = narrowing(given, roles, _live_channels(tensors, roles))
    fingerprint = {
        "export": "narrow",
        "source": identity,
        "dtype": str(dtype),
        "width": cut.after,
    }
    with (
        exclusive(target),
        ShardWriter(target, stem="model", fingerprint=fingerprint, overwrite=overwrite) as writer,
    ):
        removed = 0
        for done, (name, tensor) in enumerate(tensors()):
            progress(done, len(names), name)
            part = cut(name, tensor)
            removed += tensor.numel() - part.numel()
            writer.add(name, {name: as_written(part, dtype)})
        writer.name_files()
        width = (cut.before, cut.after)
        new = Narrowed(source, roles, width, removed, writer.files, dtype)
        found = Narrow(*width, new.size)
        complete(writer, source, config=cut.config, **beside_narrow(new))
    return found


@dataclass(frozen=True, eq=False)
class Narrowing:
    """Cuts dead channels from the parameters that hold FFN roles, and from their biases.

    Attributes:
        before, after: the width of all FFNs.
        config: of the narrower model.
        chosen: for each layer, the channels that stay (R), ascending.
        weights, biases: parameters that are cut, by name: their layer, and how they are stored.
    """

    before: int
    after: int
    config: Mapping[str, Any]
    chosen: Mapping[int, Tensor]
    weights: Mapping[str, tuple[int, Stored]]
    biases: Mapping[str, tuple[int, Stored]]

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        if name in self.biases:
            layer, stored = self.biases[name]
            return self._rows(tensor, layer, len(stored.roles))
        if name not in self.weights:
            return tensor
        layer, stored = self.weights[name]
        w_IC = tensor.mT if stored.transposed else tensor
        cut = self._rows(w_IC, layer, len(stored.roles))
        return (cut.mT if stored.transposed else cut).contiguous()

    def _rows(self, w_I: Tensor, layer: int, parts: int) -> Tensor:
        return torch.cat([part[self.chosen[layer]] for part in w_I.chunk(parts)])

    def removed(self, entries: Mapping[str, Entry]) -> int:
        """How many numbers of a checkpoint's parameters are cut."""
        cut = [e for name, e in entries.items() if name in self.weights or name in self.biases]
        return sum(entry.numel // self.before * (self.before - self.after) for entry in cut)


def narrowing(
    given: Mapping[str, Any], roles: RoleMatrices, live: Mapping[int, Tensor]
) -> Narrowing:
    """Find the least width to which all FFNs can be cut.

    Args:
        given: the model's config.
        roles: of the model.
        live: for each layer with an FFN, which channels are used, (F,) bool.

    Raises:
        UserError: nothing can be cut, or the model's class cannot be narrower.
    """
    full = _full_width(roles)
    counts = {layer: int(alive_F.sum()) for layer, alive_F in live.items()}
    width = _common_width(counts, full)
    config = _narrow_config(given, roles, full, width)
    chosen = {layer: _of_width(alive_F, width) for layer, alive_F in live.items()}
    weights = {
        roles.name(layer, stored.roles[0]): (layer, stored)
        for layer in chosen
        for stored in roles.stored_in(layer)
        if set(stored.roles) <= set(FFN)
    }
    biases = {
        name.removesuffix("weight") + "bias": found
        for name, found in weights.items()
        if "out" not in found[1].roles
    }
    return Narrowing(full, width, config, chosen, weights, biases)


def foreseen(task: FolderTask, roles: RoleMatrices) -> Narrowing | None:
    """Predict how narrow a compression will write a model, before anything is fitted.

    Returns:
        Only its width is meaningful, not which channels stay. None: only the fit will tell.

    Raises:
        UserError: as `narrowing`, as far as the settings tell.
    """
    strategy = task.compressor
    full, given = _full_width(roles), dense_config(task.source, task.dtype)
    if isinstance(strategy, Fitted):
        return None
    kept: dict[int, int | None] = dict.fromkeys(_with_ffn(roles), full)
    for job in placed(strategy, roles, task.layers).jobs:
        for layer in job.site.layers:
            if kept.get(layer) == full:
                kept[layer] = job.compressor.ffn_channels(roles.spec.geometry(layer))
    known = {layer: count for layer, count in kept.items() if count is not None}
    counts = known or dict.fromkeys(kept, max(1, full // 2))  # a guess, to check the class
    live = {layer: torch.arange(full) < count for layer, count in counts.items()}
    found = narrowing(given, roles, live)
    return found if len(known) == len(kept) else None


def chosen(task: FolderTask, plan: Plan, checkpoint: Checkpoint, roles: RoleMatrices) -> Narrowing:
    """The narrowing of what a compression is going to write.

    Raises:
        UserError: as `narrowing`.
    """
    live = _planned_channels(plan, task.done, checkpoint, roles, task.dtype)
    return narrowing(dense_config(task.source, task.dtype), roles, live)


def _with_ffn(roles: RoleMatrices) -> list[int]:
    return [n for n in range(roles.layers) if "out" in roles.spec.geometry(n).roles]


def _full_width(roles: RoleMatrices) -> int:
    widths = {roles.spec.geometry(n).shape("out")[0] for n in _with_ffn(roles)}
    if not widths:
        raise UserError("--format narrow: no layer has an FFN that could be narrower")
    if len(widths) > 1:
        raise UserError("--format narrow: the layers' FFNs have different widths already")
    return widths.pop()


def _common_width(counts: Mapping[int, int], full: int) -> int:
    """The width for all layers, given the number of used channels of each."""
    widest = max(counts, key=lambda layer: counts[layer])
    width = rounded_up(counts[widest], full)
    if width is not None:
        return width
    raise UserError(
        f"--format narrow: layer {widest} reads {counts[widest]} of its {full} FFN channels, "
        "so nothing can go, as all layers have one width; drop some of every layer first: "
        "--mode modegpt"
    )


def _opened(source: Path) -> tuple[Tensors, set[str], Any]:
    """An iterator of the dense tensors (as a function), their names, the content's identity."""
    manifest = factored_manifest(source)
    if manifest is not None:
        check_files(source, manifest, verify=True)
        names = {name for name, _ in dense_tensors(source)}
        return lambda: dense_tensors(source), names, manifest.files
    checkpoint = Checkpoint(source)
    _ = checkpoint.config

    def plain() -> Iterator[tuple[str, Tensor]]:
        for name in checkpoint.entries:
            yield name, checkpoint.read([name])[name]

    return plain, set(checkpoint.entries), checkpoint.identity


def _planned_channels(
    plan: Plan,
    done: Mapping[str, CompressedSite],
    checkpoint: Checkpoint,
    roles: RoleMatrices,
    dtype: torch.dtype | None,
) -> dict[int, Tensor]:
    """For each layer with an FFN, which channels the compressed model will use, (F,) bool.

    Args:
        plan: of the compression.
        done: factors that exist already, by the site's name.
        checkpoint: the original.
        roles: of the model.
        dtype: of the stored factors; by default that of the weights.
    """
    full = _full_width(roles)
    live = {n: torch.ones(full, dtype=torch.bool) for n in _with_ffn(roles)}
    for site in plan.sites:
        layers = [layer for layer, role in site.matrices if role == "out"]
        if not layers:
            continue
        if site.name in done:
            factors = done[site.name].factors
        else:
            w = stacked(site, roles, checkpoint.read(touched(site, roles)))
            factors = cast(plan.factors(site, w), dtype or w.dtype)
        matrices = dict(zip(site.matrices, dense_matrices(site, factors, roles), strict=True))
        for layer in layers:
            live[layer] = read_channels(matrices[layer, "out"]).cpu()
    return live


def _live_channels(tensors: Tensors, roles: RoleMatrices) -> dict[int, Tensor]:
    """For each layer with an FFN, which channels are used, (F,) bool."""
    owners = {roles.name(n, "out"): n for n in _with_ffn(roles)}
    live = {
        owners[name]: read_channels(roles.read({name: tensor}, owners[name], "out"))
        for name, tensor in tensors()
        if name in owners
    }
    return dict(sorted(live.items()))


def read_channels(out_FD: Tensor) -> Tensor:
    """Which channels the output projection uses, (F,) bool."""
    return out_FD.ne(0).any(1)


def _narrow_config(
    given: Mapping[str, Any], roles: RoleMatrices, full: int, width: int
) -> dict[str, Any]:
    """The config of a model of this width, checked against its class."""
    layer = _with_ffn(roles)[0]
    name, stored = roles.name(layer, "out"), roles.stored(layer, "out")
    for made in _candidates(given, full, width):
        config = AutoConfig.for_model(**made)
        with torch.device("meta"):
            shape = saved_class(config)(config).state_dict()[name].shape
        if shape[0 if stored.conv1d else 1] == width:
            return made
    raise UserError(
        f"--format narrow: the class of {given.get('model_type')} takes no other FFN width; "
        "write it dense"
    )


def _candidates(given: Mapping[str, Any], full: int, width: int) -> Iterator[dict[str, Any]]:
    """The config with each field replaced that may be the FFN width, at any depth, in turn."""
    for path, value in _fields(given):
        if value == full or value is None:
            made = deepcopy(dict(given))
            inner = made
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = width
            yield made


def _fields(given: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterable[tuple[Any, Any]]:
    for key, value in given.items():
        if isinstance(value, Mapping):
            yield from _fields(value, (*path, key))
        elif value is None or type(value) is int:
            yield (*path, key), value


def _of_width(alive_F: Tensor, width: int) -> Tensor:
    """The channels that stay, ascending: live ones, padded with dead ones to the width."""
    order_F = torch.argsort(alive_F.to(torch.uint8), descending=True, stable=True)
    return order_F[:width].sort().values

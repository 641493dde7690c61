"""A checkpoint without the FFN channels that nothing reads: an ordinary one, only narrower.

A channel is dead where its row of `out` is zero: what `modegpt` drops, for one. Every tool that
reads the architecture runs the result, faster by as much as it is smaller.
Shapes: F FFN width, R width that is left, I rows of a stored parameter, C its columns.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from tensorllm.checkpoint.beside import small_files
from tensorllm.checkpoint.factored import dense_tensors
from tensorllm.checkpoint.manifest import MANIFEST, check_files, read_manifest
from tensorllm.checkpoint.reader import Checkpoint
from tensorllm.checkpoint.writer import ShardWriter, check_target, exclusive
from tensorllm.compression.card import CARD, REPORT, card, text_of
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices
from tensorllm.models.task import saved_class
from tensorllm.progress import Progress, quiet
from tensorllm.tensors.stacking import FFN

MULTIPLE = 8  # widths that kernels like
Tensors = Callable[[], Iterator[tuple[str, Tensor]]]


@dataclass(frozen=True, slots=True)
class Narrow:
    """What became of the FFN width, and the bytes of the weight files."""

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

    All layers get the width of the widest, a multiple of 8: what a config can say.

    Args:
        progress: called with (tensors written, tensors in all, the tensor's name).

    Raises:
        UserError: a layer has no dead channel, layers of other widths, or a class that cannot be
            narrower.
    """
    check_target(target, overwrite=overwrite, source=source)
    tensors, names, given = _opened(source)
    roles = RoleMatrices(AutoConfig.for_model(**given), names)
    live = _live_channels(tensors, roles)
    width, made = _narrow_config(source, given, roles, live)
    chosen = {layer: _of_width(alive_F, width) for layer, alive_F in live.items()}
    fingerprint = {"export": "narrow", "names": sorted(names), "dtype": str(dtype), "width": width}
    with exclusive(target):
        writer = ShardWriter(target, stem="model", fingerprint=fingerprint, overwrite=overwrite)
        cut = _Cutter(roles, chosen)
        for done, (name, tensor) in enumerate(tensors()):
            progress(done, len(names), name)
            part = cut(name, tensor)
            writer.add(name, {name: part.to(dtype) if dtype and part.is_floating_point() else part})
        writer.name_files()
        size = sum(facts["bytes"] for facts in writer.files.values())
        for path in small_files(source):
            if path.name not in (MANIFEST, REPORT, "config.json"):
                writer.copy(path, path.relative_to(source))
        if dtype is not None:
            made["dtype"] = str(dtype).removeprefix("torch.")
        writer.write_json("config.json", made)
        if (source / REPORT).is_file():
            report = json.loads((source / REPORT).read_text()) | {"format": "narrow"}
            previous = text_of(source / CARD)
            writer.write_text(CARD, card(report, config=made, previous=previous))
        writer.finish()
    return Narrow(len(next(iter(live.values()))), width, size)


def _opened(source: Path) -> tuple[Tensors, set[str], dict[str, Any]]:
    """The dense tensors one by one, their names, and the config of the dense model."""
    manifest = read_manifest(source)
    if manifest is not None and manifest.format == "factored":
        check_files(source, manifest, verify=True)
        given = json.loads((source / "config.json").read_text())
        for name in ("quantization_config", "transformers_weights"):
            given.pop(name, None)
        return lambda: dense_tensors(source), {name for name, _ in dense_tensors(source)}, given
    checkpoint = Checkpoint(source)
    _ = checkpoint.config

    def plain() -> Iterator[tuple[str, Tensor]]:
        for name in checkpoint.entries:
            yield name, checkpoint.read([name])[name]

    given = json.loads((source / "config.json").read_text())
    return plain, set(checkpoint.entries), given


def _live_channels(tensors: Tensors, roles: RoleMatrices) -> dict[int, Tensor]:
    """Of each layer with an FFN which channels are read, (F,) bool."""
    layers = [n for n in range(roles.layers) if "out" in roles.spec.geometry(n).roles]
    owners = {roles.name(n, "out"): n for n in layers}
    live = {
        owners[name]: roles.read({name: tensor}, owners[name], "out").ne(0).any(1)
        for name, tensor in tensors()
        if name in owners
    }
    if not live:
        raise UserError("--format narrow: no layer has an FFN that could be narrower")
    if len({len(alive_F) for alive_F in live.values()}) > 1:
        raise UserError("--format narrow: the layers' FFNs have different widths already")
    return dict(sorted(live.items()))


def _narrow_config(
    source: Path, given: Mapping[str, Any], roles: RoleMatrices, live: Mapping[int, Tensor]
) -> tuple[int, dict[str, Any]]:
    """The width that all layers get, and the config that says so, tried on the model's class."""
    full = len(next(iter(live.values())))
    widest = max(live, key=lambda layer: int(live[layer].sum()))
    width = -(-int(live[widest].sum()) // MULTIPLE) * MULTIPLE
    if width >= full:
        raise UserError(
            f"--format narrow: layer {widest} of {source} reads {int(live[widest].sum())} of its "
            f"{full} FFN channels, so nothing can go; drop some first: --mode modegpt"
        )
    name = roles.name(widest, "out")
    stored = roles.stored(widest, "out")
    for made in _candidates(given, full, width):
        config = AutoConfig.for_model(**made)
        with torch.device("meta"):
            shape = saved_class(config)(config).state_dict()[name].shape
        if shape[0 if stored.conv1d else 1] == width:
            return width, made
    raise UserError(
        f"--format narrow: the class of {given.get('model_type')} takes no other FFN width; "
        "export it dense"
    )


def _candidates(given: Mapping[str, Any], full: int, width: int) -> Iterator[dict[str, Any]]:
    """The config with each field that may be the FFN width set, at any depth."""
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
    """The channels that stay, ascending: the live ones, and dead ones up to the width."""
    order_F = torch.argsort(alive_F.to(torch.uint8), descending=True, stable=True)
    return order_F[:width].sort().values


class _Cutter:
    """Takes dead channels out of the parameters that hold FFN roles, and out of their biases."""

    def __init__(self, roles: RoleMatrices, chosen: Mapping[int, Tensor]) -> None:
        self.roles, self.chosen = roles, chosen
        self.weights: dict[str, tuple[int, Any]] = {}
        for layer in chosen:
            for stored in roles.stored_in(layer):
                if set(stored.roles) <= set(FFN):
                    self.weights[roles.name(layer, stored.roles[0])] = (layer, stored)
        self.biases = {
            name.removesuffix("weight") + "bias": found
            for name, found in self.weights.items()
            if "out" not in found[1].roles
        }

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

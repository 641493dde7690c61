"""Loading a factored folder into factored modules, and saving such a model as one again."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from tensorllm.checkpoint.checksums import sha256
from tensorllm.checkpoint.factored import STEM, mark_config, write_readme
from tensorllm.checkpoint.manifest import MANIFEST, Manifest, check_files, read_manifest
from tensorllm.checkpoint.reader import index_name, read_header
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices
from tensorllm.runtime import Placement, install
from tensorllm.runtime.attention import Bias
from tensorllm.runtime.heads import HeadsSite
from tensorllm.runtime.linear import FactoredLinear
from tensorllm.runtime.pivoted import PivotedSite
from tensorllm.runtime.quantised import hold_quantised
from tensorllm.tensors.quantised import Quantised, plain

# Row numbers and quantised values, which no dtype of the model applies to.
INTEGERS = {"I32": torch.int32, "I8": torch.int8, "U8": torch.uint8}


def install_skeleton(model: Any, files: Sequence[Path]) -> tuple[Manifest, list[Placement]]:
    """Give a model on the meta device the factored modules of a folder, empty.

    Raises:
        UserError: the folder's files are not what its manifest says, or cannot run factored.
    """
    folder = files[0].parent
    _fetch_manifest(model, folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder} has no {MANIFEST}, so its factors cannot be placed")
    check_files(folder, manifest, verify=False)
    stored = {name: info for file in files for name, info in read_header(file).items()}
    roles = RoleMatrices(model.config, [name for name, _ in model.named_parameters()])
    sites = []
    for entry in manifest.sites:
        missing = [name for name in entry.tensors.values() if name not in stored]
        if missing:
            raise UserError(f"{folder} lacks the tensor {missing[0]}, which its manifest names")
        roles.check_layers(entry.layers)
        empty = {name: _empty(stored[name], model.dtype) for name in entry.tensors.values()}
        factors = entry.factors(empty)
        want, got = entry.site.shape(roles.geometry), tuple(factors.dense().shape)
        if got != want:
            raise UserError(f"{folder}: {entry.name} has factors of {got}, the config says {want}")
        sites.append((entry.site, factors))
    placements = install(model, [(site, plain(factors)) for site, factors in sites])
    narrow = {site.name: f for site, f in sites if isinstance(f, Quantised)}
    placements = hold_quantised(model, placements, narrow)
    _nothing_to_initialise(model)
    return manifest, placements


def conversions(manifest: Manifest, placements: Iterable[Placement]) -> list[Any]:
    """How transformers gets from stored tensors to parameters: names, and the order of modes."""
    from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

    class Reorder(ConversionOps):
        """Permutes a tensor's modes."""

        def __init__(self, order: tuple[int, ...]) -> None:
            self.order = order

        def convert(
            self,
            input_dict: dict[str, Any],
            source_patterns: list[str],
            target_patterns: list[str],
            **kwargs: Any,
        ) -> Any:
            (found,) = input_dict.values()
            tensor = found[0] if isinstance(found, list) else found
            return {target_patterns[0]: tensor.permute(self.order).contiguous()}

        @property
        def reverse_op(self) -> "Reorder":
            return Reorder(tuple(sorted(range(len(self.order)), key=lambda n: self.order[n])))

    out: list[Any] = []
    for name, place in _stored_names(manifest, placements):
        source = f"^{name}"  # a pattern, which ends at the end of a name by itself
        if place.order is None:
            out.append(WeightRenaming(source, place.parameter))
        else:
            out.append(WeightConverter(source, place.parameter, [Reorder(place.order)]))
    return out


def finish(model: Any, manifest: Manifest, placements: list[Placement]) -> None:
    """What is left to do once a factored model has its weights."""
    for module in model.modules():
        if isinstance(module, HeadsSite):
            module.absorb()
        elif isinstance(module, PivotedSite):
            module.settle()
    record(model, manifest, placements)


def record(model: Any, manifest: Manifest, placements: list[Placement]) -> None:
    """Let a factored model know how it is stored, so that it saves itself as a factored folder."""
    model._weight_conversions = conversions(manifest, placements)
    model.tensorllm_manifest = manifest
    model.save_pretrained = MethodType(save_factored, model)


def save_factored(model: Any, save_directory: str | Path, **kwargs: Any) -> None:
    """`save_pretrained` of a factored model: its factors as they are now, in our format.

    Args:
        save_directory: made where it does not exist; files of the same names are replaced.
        kwargs: as `PreTrainedModel.save_pretrained` has them.

    Raises:
        UserError: an argument that does not apply.
    """
    wrong = {"push_to_hub", "variant", "distributed_checkpoint"} & {
        k for k, v in kwargs.items() if v
    }
    if wrong:
        raise UserError(
            f"a factored model is saved without {', '.join(sorted(wrong))}; to upload it, call "
            "model.push_to_hub(repo_id)"
        )
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    # transformers names, ties, orders and shards; its file names must not be ours (see mark_config)
    with TemporaryDirectory(dir=folder, prefix=".saving-") as made:
        type(model).save_pretrained(model, made, **kwargs)
        _make_ours(Path(made), model)
        for old in folder.glob(f"{STEM}*.safetensors*"):  # only now: the new ones are complete
            old.unlink()
        for path in Path(made).iterdir():
            path.replace(folder / path.name)
    write_readme(folder)


def _make_ours(made: Path, model: Any) -> None:
    """Turn the folder that transformers wrote into a factored one."""
    weights = _rename_weights(made)
    files = {path.name: _facts(path) for path in sorted(made.glob(f"{STEM}*.safetensors"))}
    dtype = str(model.dtype).removeprefix("torch.")
    replaced = {
        name: {**facts, "dtype": dtype} for name, facts in model.tensorllm_manifest.replaced.items()
    }
    manifest = replace(model.tensorllm_manifest, files=files, replaced=replaced)
    _write_json(made / MANIFEST, manifest.to_json())
    config = json.loads((made / "config.json").read_text())
    _write_json(made / "config.json", mark_config(config, weights))


def _rename_weights(made: Path) -> str:
    """Give weight files the name of factors; returns what names them all."""
    for path in made.glob("model*.safetensors"):
        path.replace(made / path.name.replace("model", STEM, 1))
    index = made / index_name("model")
    if not index.is_file():
        return f"{STEM}.safetensors"
    values = json.loads(index.read_text())
    values["weight_map"] = {
        name: file.replace("model", STEM, 1) for name, file in values["weight_map"].items()
    }
    _write_json(made / index_name(STEM), values)
    index.unlink()
    return index_name(STEM)


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _nothing_to_initialise(model: Any) -> None:
    """Keep transformers from initialising weights that are gone through the modules above them."""
    ours = [name for name, m in model.named_modules() if isinstance(m, FactoredLinear | Bias)]
    for path in ours:
        while "." in path:
            path = path.rpartition(".")[0]
            module = model.get_submodule(path)
            if not [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                module._is_hf_initialized = True


def _stored_names(
    manifest: Manifest, placements: Iterable[Placement]
) -> Iterator[tuple[str, Placement]]:
    """Each placement with the name of its tensor in the folder."""
    sites = {site.name: site for site in manifest.sites}
    for place in placements:
        stored = sites[place.site].tensors if place.site else manifest.rest
        yield stored[place.tensor], place


def _empty(info: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    kind = INTEGERS.get(info["dtype"], dtype)
    return torch.empty(info["shape"], dtype=kind, device="meta")


def _fetch_manifest(model: Any, folder: Path) -> None:
    """Bring the manifest beside weights that transformers fetched from a hub without it."""
    if (folder / MANIFEST).is_file() or folder.parent.name != "snapshots":
        return
    from transformers.utils.hub import cached_file

    cached_file(  # of the commit and in the cache of the weights, whichever were asked for
        model.config.name_or_path,
        MANIFEST,
        revision=folder.name,
        cache_dir=folder.parents[2],
        _raise_exceptions_for_missing_entries=False,
    )

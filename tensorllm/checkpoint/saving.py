"""Save a model that runs as factors as a factored folder, through `save_pretrained`."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MethodType
from typing import Any

from tensorllm.checkpoint.factored import STEM, mark_config, write_readme
from tensorllm.checkpoint.manifest import MANIFEST, Manifest
from tensorllm.checkpoint.reader import index_name
from tensorllm.errors import UserError
from tensorllm.io import sha256, write_json
from tensorllm.runtime import Placement
from tensorllm.runtime.linears import as_parameters, has_linear_factors


def record(model: Any, manifest: Manifest, placements: list[Placement] | None) -> None:
    """Record in a factored model how it is stored, so that it saves itself as a factored folder.

    Args:
        placements: None: the model was read from such a folder, and transformers knows the names.
    """
    if placements is not None:
        model._weight_conversions = [*_of_the_dense(model), *conversions(manifest, placements)]
    model.tensorllm_manifest = manifest
    model.save_pretrained = MethodType(save_factored, model)


def _of_the_dense(model: Any) -> list[Any]:
    """transformers' rules from the names in files to the dense model's parameters."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    known = getattr(model, "_weight_conversions", None)
    if known is not None:  # read from a folder
        return list(known)
    found = get_model_conversion_mapping(model, add_legacy=False)
    return [rule for rule in found if not isinstance(rule, PrefixChange)]


def save_factored(model: Any, save_directory: str | Path, **kwargs: Any) -> None:
    """`save_pretrained` of a factored model: its current factors, in the factored format.

    Args:
        save_directory: created if needed; files with the same names are replaced.
        kwargs: those of `PreTrainedModel.save_pretrained`.

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
    if getattr(model, "_hf_peft_config_loaded", False):  # adapters are saved alone
        type(model).save_pretrained(model, save_directory, **kwargs)
        return
    if has_linear_factors(model):
        kwargs["state_dict"] = as_parameters(model, kwargs.get("state_dict") or model.state_dict())
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    # transformers names, ties, orders and shards; its file names must differ (see mark_config)
    with TemporaryDirectory(dir=folder, prefix=".saving-") as made:
        type(model).save_pretrained(model, made, **kwargs)
        _make_ours(Path(made), model)
        new = {path.name for path in Path(made).iterdir()}
        for name in sorted(new):  # each replaces its old version atomically
            (Path(made) / name).replace(folder / name)
        for old in folder.glob(f"{STEM}*.safetensors*"):
            if old.name not in new:
                old.unlink()
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
    write_json(made / MANIFEST, manifest.to_json())
    config = json.loads((made / "config.json").read_text())
    write_json(made / "config.json", mark_config(config, weights))


def _rename_weights(made: Path) -> str:
    """Rename weight files for the factored format; returns the name of the file or index."""
    for path in made.glob("model*.safetensors"):
        path.replace(made / path.name.replace("model", STEM, 1))
    index = made / index_name("model")
    if not index.is_file():
        return f"{STEM}.safetensors"
    values = json.loads(index.read_text())
    values["weight_map"] = {
        name: file.replace("model", STEM, 1) for name, file in values["weight_map"].items()
    }
    write_json(made / index_name(STEM), values)
    index.unlink()
    return index_name(STEM)


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def conversions(
    manifest: Manifest, placements: Iterable[Placement], *, take_all: bool = False
) -> list[Any]:
    """transformers' rules from stored tensors to parameters: names, and the order of modes.

    Args:
        take_all: see `renaming.conversions`.
    """
    from tensorllm.checkpoint import renaming  # it imports transformers, which takes seconds

    return renaming.conversions(_stored_names(manifest, placements), take_all=take_all)


def _stored_names(
    manifest: Manifest, placements: Iterable[Placement]
) -> Iterator[tuple[str, Placement]]:
    """Each placement with the name of its tensor in the folder."""
    sites = {site.name: site for site in manifest.sites}
    for place in placements:
        stored = sites[place.site].tensors if place.site else manifest.rest
        yield stored[place.tensor], place

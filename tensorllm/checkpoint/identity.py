"""Hashes that identify a model by its content, under any path and on any machine."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tensorllm.checkpoint.small_files import small_files
from tensorllm.io import from_json

SAMPLES = 32  # places of each tensor that are read
BYTES = 64  # at each place
NOTES = ("_name_or_path", "transformers_version")  # of config.json: irrelevant to the model


def config_identity(folder: Path) -> Any:
    """The content of config.json, however it is laid out."""
    values = from_json((folder / "config.json").read_text(encoding="utf-8"))
    return {key: value for key, value in sorted(values.items()) if key not in NOTES}


def weights_identity(folder: Path, entries: Mapping[str, Any]) -> str:
    """A hash of names, shapes and dtypes of all tensors, and of evenly spaced bytes of each.

    Training or editing changes nearly all numbers of a tensor, so reading a few of them is enough
    to tell models apart quickly; how tensors are distributed over files does not matter.

    Args:
        entries: of `Checkpoint`.
    """
    digest = hashlib.sha256()
    with ExitStack() as opened:
        names = {entry.file for entry in entries.values()}
        files = {name: opened.enter_context((folder / name).open("rb")) for name in names}
        for name, entry in sorted(entries.items()):
            digest.update(f"{name} {tuple(entry.shape)} {entry.dtype};".encode())
            file = files[entry.file]
            last = max(entry.bytes - BYTES, 0)
            for n in range(SAMPLES):
                file.seek(entry.start + last * n // (SAMPLES - 1))
                digest.update(file.read(min(BYTES, entry.bytes)))
    return digest.hexdigest()


def files_identity(folder: Path, without: Iterable[str] = ()) -> dict[str, str]:
    """A hash of each small file of a folder, such as the tokenizer's."""
    skipped = set(without)
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in small_files(folder)
        if path.name not in skipped and path.suffix != ".safetensors"
    }


def identity_of(folder: Path, entries: Mapping[str, Any]) -> str:
    """One short hash of config and weights together."""
    facts = [config_identity(folder), weights_identity(folder, entries)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]

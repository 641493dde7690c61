"""Find the weights and data of the published experiments, or say what to fetch, and where to."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from tensorllm.checkpoint.reader import Checkpoint
from tensorllm.checkpoint.source import Source, resolve
from tensorllm.data.base import DATASETS
from tensorllm.data.catalog import Questions  # noqa: F401  registers all datasets
from tensorllm.data.repository import HubSource, files_of_split
from tensorllm.errors import UserError
from tensorllm.hub import local_copy
from tensorllm.io import sha256s
from tensorllm.model_names import short_names

ENDINGS = (".jsonl", ".json", ".csv", ".parquet")
CONFIG = "config.json"


def weights_of(model: str, given: str | None) -> Source:
    """The model's folder: the given one, a copy within it in the hub's layout, or the hub's.

    Args:
        model: a short name.
        given: a checkpoint's folder, a hub cache or a folder with copies of repositories.

    Raises:
        UserError: they are missing, or of another kind of model; the message says what to fetch
            and where to put it.
    """
    if given is None:
        return resolve(model, hint=f"To have it here: {fetch_weights(model)}")
    found = _local_weights(model, Path(given).expanduser())
    if found is None:
        raise UserError(
            f"--weights {given} holds no {CONFIG} and no copy of {hub_id(model)}. "
            f"To have one: {fetch_weights(model)}"
        )
    config, known = Checkpoint(found.folder).config, short_names()[model]
    kind, wanted = (
        f"{layers} layers of type {name!r}"
        for layers, name in (
            (config.num_hidden_layers, config.model_type),
            (known["sizes"]["layers"], known["model_type"]),
        )
    )
    if kind != wanted:
        raise UserError(
            f"--weights {given} has {kind}, and {model} {wanted}. "
            f"To have its weights: {fetch_weights(model)}"
        )
    return found


def data_file(dataset: str, root: Path | None) -> Path | None:
    """The local file or folder of a dataset's rows; None if they come from the hub.

    Args:
        dataset: its name.
        root: a folder with `DATASET.jsonl` (json, csv, parquet), a hub cache or a folder with
            copies of repositories.

    Raises:
        UserError: `root` has none of these.
    """
    if root is None:
        return None
    found = _local_data(dataset, root)
    if found is None:
        raise UserError(
            f"{root} has no {dataset}.jsonl (nor json, csv, parquet) and {_no(dataset)}"
        )
    return found


def weights_identity(model: str, given: str | None) -> str | None:
    """A hash of the weights' content; None if they are not on this machine."""
    found = _local_weights(model, None if given is None else Path(given).expanduser())
    return None if found is None else Checkpoint(found.folder).identity


def data_identity(dataset: str, root: Path | None) -> str | None:
    """A hash of the content of a dataset's local rows; None if there are none."""
    found = None if root is None else _local_data(dataset, root)
    if found is None:
        return None
    files = [found] if found.is_file() else sorted(p for p in found.rglob("*") if p.is_file())
    return hashlib.sha256("".join(sha256s(files)).encode()).hexdigest()[:32]


def check_data(datasets: Sequence[str], root: Path | None) -> None:
    """Refuse a folder that lacks some of the datasets, naming all of them at once."""
    lacking = [name for name in datasets if root is not None and _local_data(name, root) is None]
    if lacking:
        one = "; ".join(
            f"{name}.jsonl (nor json, csv, parquet) and {_no(name)}" for name in lacking
        )
        raise UserError(f"{root} has no {one}; or name what is there with --dataset")


def missing(
    model: str, datasets: Sequence[str], weights: str | None, data: Path | None
) -> list[str]:
    """What is missing on this machine, a line each: what to fetch and where to put it."""
    lines = []
    root = None if weights is None else Path(weights).expanduser()
    if _local_weights(model, root) is None:
        lines.append(f"weights: {fetch_weights(model)}")
    for name in datasets:
        if _local_data(name, data) is None:
            lines.append(f"{name}: {fetch_data(name)}")
    return lines


def hub_id(model: str) -> str:
    """The model's repository on the hub."""
    return str(short_names()[model].get("hub", model))


def fetch_weights(model: str) -> str:
    """The command that fetches the weights, and the option that uses them."""
    revision = _revision(model)
    chosen = "" if revision in (None, "main") else f" --revision {revision}"
    return f"hf download {hub_id(model)}{chosen} --local-dir FOLDER, then --weights FOLDER"


def fetch_data(dataset: str) -> str:
    """The command that fetches a dataset, or where to put your own rows, and the option."""
    return (
        f"{_source(dataset).fetch} (or rows of one's own as FOLDER/{dataset}.jsonl), then "
        "--data FOLDER"
    )


def _no(dataset: str) -> str:
    return f"no copy of {_source(dataset).what}: put the rows there, or {fetch_data(dataset)}"


def _local_weights(model: str, root: Path | None) -> Source | None:
    if root is not None and (root / CONFIG).is_file():
        return Source(str(root), None, root)
    found = local_copy(hub_id(model), "model", root, _revision(model))
    if found is None or not (found / CONFIG).is_file():
        return None
    return Source(model, None, found)


def _local_data(dataset: str, root: Path | None) -> Path | None:
    for ending in ENDINGS:
        if root is not None and (path := root / f"{dataset}{ending}").is_file():
            return path
    source = _source(dataset)
    folder = local_copy(source.repo, "dataset", root)
    if folder is None:
        return None
    there = all(files_of_split(folder, source.config, split) for split in source.splits)
    return folder if there else None


def _source(dataset: str) -> HubSource:
    source = DATASETS[dataset].source
    assert source is not None, f"published results are of datasets on the hub, not of {dataset}"
    return source


def _revision(model: str) -> str | None:
    facts = short_names()[model]
    return facts.get("safetensors_revision") or facts.get("revision")

"""Find a model, given by short name, hub id or local folder, and return its local folder."""

from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from tensorllm.checkpoint.small_files import UNWANTED
from tensorllm.errors import UserError
from tensorllm.hub import reason, why_not
from tensorllm.io import WEIGHTS, at_home, from_json
from tensorllm.model_names import check_name, short_names

OFFLINE = (
    "Offline, give a local folder (--model FOLDER, in the hub's layout) or the embedded model "
    "(--model demo)"
)


@dataclass(frozen=True, slots=True)
class Source:
    """A model: its name for reports, its revision, and the folder that holds it."""

    name: str
    revision: str | None
    folder: Path


def resolve(model: str, revision: str | None = None, hint: str = OFFLINE) -> Source:
    """The local folder of a model, downloaded to the hub's cache if necessary.

    Args:
        model: a short name (`tensorllm list models`), a local folder, or a hub id.
        revision: branch, tag or commit on the hub.
        hint: advice for when the download fails.

    Raises:
        UserError: no such model, or it cannot be downloaded.
    """
    known = short_names().get(model)
    if known is not None and "package" in known:
        inside = known["package"].removeprefix("tensorllm/")
        return Source(model, None, Path(str(files("tensorllm") / inside)))
    if known is not None:
        revision = revision or known.get("safetensors_revision") or known["revision"]
        return Source(model, revision, _download(known["hub"], revision, hint))
    check_name(model)
    path = at_home(Path(model), opened_by=WEIGHTS)
    if path.is_dir():
        return Source(model, None, path)
    return Source(model, revision, _download(model, revision, hint))


def _download(hub_id: str, revision: str | None, hint: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    held = None
    with suppress(LocalEntryNotFoundError, OSError, HFValidationError):  # not in the cache
        held = Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
    if held is not None and _is_whole(held):
        return held
    refusal = why_not(hub_id, "model", revision)
    if refusal is None:
        try:
            return Path(
                snapshot_download(hub_id, revision=revision, ignore_patterns=list(UNWANTED))
            )
        except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
            refusal = reason(error)
    if held is not None and any(held.glob("*.safetensors")):
        return held
    raise UserError(f"cannot get {hub_id} from the hub ({refusal}). {hint}")


def _is_whole(folder: Path) -> bool:
    """Whether a cached copy is complete: other programs may have fetched only the tokenizer."""
    try:
        indices = [from_json(p.read_text()) for p in folder.glob("*.safetensors.index.json")]
        named = {file for index in indices for file in index["weight_map"].values()}
    except (OSError, ValueError, KeyError):
        return False
    parts = [any(folder.glob(pattern)) for pattern in ("*.safetensors", "tokenizer*.json")]
    return all(parts) and all((folder / file).is_file() for file in named)

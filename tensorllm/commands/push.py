"""`tensorllm push`: upload a folder to the Hugging Face hub, checked and with its card."""

from dataclasses import asdict, dataclass
from typing import Any

from tensorllm.checkpoint.config import read_config
from tensorllm.checkpoint.manifest import MANIFEST, check_files, read_manifest
from tensorllm.compression.card import CARD, card_lacks, text_of
from tensorllm.compression.graph import GRAPHS
from tensorllm.errors import UserError
from tensorllm.hub import reason
from tensorllm.requests.others import PushRequest

HIDDEN = ".*"  # hidden files, such as those of an interrupted command


@dataclass(frozen=True, slots=True)
class Pushed:
    """Where a folder was uploaded, and what a reader would miss in its card."""

    url: str
    commit: str
    card_lacks: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lacks = " and no ".join(self.card_lacks)
        said = f"; its card names no {lacks}: add them to {CARD} and push again" if lacks else ""
        return f"{self.url}{said}"


def push(request: PushRequest) -> Pushed:
    """Upload a folder in one commit; the repository is created if there is none.

    Raises:
        UserError: tensorllm did not write the folder, it is incomplete or has changed, there is no
            token, or the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi, get_token, is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    folder = request.folder
    manifest = read_manifest(folder)
    if manifest is not None:
        check_files(folder, manifest, verify=True)
    elif not any((folder / form.file).is_file() for form in GRAPHS.values()):
        raise UserError(
            f"{folder} has no {MANIFEST} and no graph: push takes a folder that tensorllm wrote"
        )
    read_config(folder)  # without it nobody can open the folder
    try:
        validate_repo_id(request.repo)
    except HFValidationError as error:
        raise UserError(f"{request.repo!r} is no name on the hub: {reason(error)}") from None
    if is_offline_mode():
        raise UserError("HF_HUB_OFFLINE is set: unset it to push")
    if get_token() is None:
        raise UserError("the hub wants a token that may write: hf auth login, or set HF_TOKEN")
    api = HfApi()
    try:
        made = api.create_repo(request.repo, private=request.private, exist_ok=True)
        done = api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            commit_message=request.message,
            ignore_patterns=[HIDDEN],
        )
    except HfHubHTTPError as error:
        raise UserError(f"the hub did not take {request.repo}: {reason(error)}") from None
    except Exception as error:  # whatever the client's own HTTP library raises
        raise UserError(
            f"cannot push to {api.endpoint} ({reason(error)}); push again where it can be reached"
        ) from None
    return Pushed(str(made), done.oid, card_lacks(text_of(folder / CARD)))

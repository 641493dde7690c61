"""The hub: whether it answers, and what is already here.

Asked before a download, which would retry for half a minute.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

from tensorllm.errors import first_line, shortened


def why_not(
    repo: str, kind: Literal["model", "dataset"], revision: str | None = None
) -> str | None:
    """Why the hub cannot provide a repository now, in one line; None if it can.

    In offline mode (`HF_HUB_OFFLINE`) it is not asked: the caller may find the repository in the
    cache. It has the client's own time to answer (`HF_HUB_ETAG_TIMEOUT`, ten seconds by default).
    """
    from huggingface_hub import HfApi, is_offline_mode
    from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT

    if is_offline_mode():
        return None
    try:
        HfApi().repo_info(repo, repo_type=kind, revision=revision, timeout=HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # whatever the client's own HTTP library raises
        return reason(error)
    return None


def reason(error: Exception) -> str:
    """The hub's own message about a refusal, or else the error's first line."""
    message = (getattr(error, "server_message", None) or "").strip()
    said = message.splitlines()[0] if message else first_line(error)
    return shortened(said.rstrip("."), 200)


def local_copy(
    repo: str,
    kind: Literal["model", "dataset"],
    root: Path | None = None,
    revision: str | None = None,
) -> Path | None:
    """The folder of a repository that was downloaded before; None if there is none.

    Args:
        repo: its name on the hub, in any case, which the hub ignores.
        kind: model or dataset.
        root: a hub cache (`models--OWNER--NAME/snapshots/...`, perhaps in its folder `hub`), or a
            folder with a plain folder `OWNER/NAME` or `NAME`; None: this user's cache.
        revision: preferred if there are several.
    """
    if root is None:
        from huggingface_hub.constants import HF_HUB_CACHE

        root = Path(HF_HUB_CACHE)
    for cache in (root, root / "hub"):
        if (snapshot := _cached(cache, repo, kind, revision)) is not None:
            return snapshot
    owner, _, name = repo.rpartition("/")
    under = _named(root, owner) if owner else None
    return (_named(under, name) if under else None) or _named(root, name)


def _cached(cache: Path, repo: str, kind: str, revision: str | None) -> Path | None:
    """A repository's snapshot in a hub cache: the revision, `main`, or the newest."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.file_download import repo_folder_name

    place = _named(cache, repo_folder_name(repo_id=repo, repo_type=kind))
    if place is None:
        return None
    spelt = place.name.removeprefix(f"{kind}s--").replace("--", "/")  # as it was downloaded
    for wanted in (revision, "main"):
        with suppress(LocalEntryNotFoundError):
            return Path(
                snapshot_download(
                    spelt, repo_type=kind, revision=wanted, cache_dir=cache, local_files_only=True
                )
            )
    newest = sorted(_folders(place / "snapshots"), key=lambda path: path.stat().st_mtime)
    return newest[-1] if newest else None


def _named(folder: Path, name: str) -> Path | None:
    """The folder of that name, whatever its case."""
    found = (path for path in _folders(folder) if path.name.lower() == name.lower())
    return next(found, None)


def _folders(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from sorted(path for path in folder.iterdir() if path.is_dir())

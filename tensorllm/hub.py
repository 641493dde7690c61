"""Asking the hub whether it has something, before a download that would retry for half a minute."""

from typing import Literal

TIMEOUT = 10  # seconds


def why_not(
    repo: str, kind: Literal["model", "dataset"], revision: str | None = None
) -> str | None:
    """One line that says why the hub cannot give a repository now, or None if it can.

    Told to stay offline (`HF_HUB_OFFLINE`), it is not asked: what follows may find the cache.
    """
    from huggingface_hub import HfApi, is_offline_mode

    if is_offline_mode():
        return None
    try:
        HfApi().repo_info(repo, repo_type=kind, revision=revision, timeout=TIMEOUT)
    except Exception as error:  # whatever the client's own HTTP library raises
        lines = str(error).strip().splitlines()
        return lines[0][:200] if lines else type(error).__name__
    return None

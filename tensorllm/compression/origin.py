"""Where a model's folder comes from, and under which licence it may be used.

The card of the compressed model repeats this, in the hub's terms
(https://huggingface.co/docs/hub/model-cards).
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorllm.checkpoint.small_files import CARD
from tensorllm.io import from_json

LICENCES = ("license*", "licence*", "copying*", "unlicense*")  # names of licence files, in any case
# The hub's identifier of a licence, by how its text begins (white space and case ignored).
BEGINNINGS = {
    "apache license version 2.0": "apache-2.0",
    "mit license": "mit",
    "bsd 3-clause license": "bsd-3-clause",
    "bsd 2-clause license": "bsd-2-clause",
    "gnu general public license version 3": "gpl-3.0",
    "gnu lesser general public license version 3": "lgpl-3.0",
    "gnu affero general public license version 3": "agpl-3.0",
    "mozilla public license version 2.0": "mpl-2.0",
    "llama 2 community license agreement": "llama2",
    "meta llama 3 community license agreement": "llama3",
    "llama 3.1 community license agreement": "llama3.1",
    "llama 3.2 community license agreement": "llama3.2",
}


def origin(folder: Path) -> dict[str, Any]:
    """Card metadata that follows from the folder's location and its files other than the card.

    `base_model` if it is a snapshot in a hub cache; `license` from the text of a licence beside the
    weights (`other`, with its name and a link, if the text is not a common one), or as config.json
    names it.
    """
    found: dict[str, Any] = {}
    if repo := _cached_repo(folder):
        found["base_model"] = repo
    if text := next(licence_files(folder), None):
        found |= _licence(text)
    elif named := _named_in_config(folder):
        found["license"] = named
    return found


def licence_files(folder: Path) -> Iterator[Path]:
    """The licence texts in a folder, found by their names."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and any(Path(path.name.lower()).match(like) for like in LICENCES):
            yield path


def copy_origin(source: Path, target: Path) -> None:
    """Copy card and licence of a local model to a folder that transformers is saving."""
    if source.is_dir():
        for path in (source / CARD, *licence_files(source)):
            if path.is_file() and not (target / path.name).exists():
                shutil.copyfile(path, target / path.name)


def _cached_repo(folder: Path) -> str | None:
    """`owner/name` of a folder such as `models--owner--name/snapshots/COMMIT`."""
    place = folder.absolute()
    repo = place.parent.parent.name
    if place.parent.name != "snapshots" or not repo.startswith("models--"):
        return None
    return repo.removeprefix("models--").replace("--", "/")


def _licence(path: Path) -> dict[str, str]:
    text = path.read_text(encoding="utf-8", errors="replace")[:1000].lower()
    words = " ".join(text.replace(",", " ").split()).lstrip("#*= ").removeprefix("the ")
    for beginning, name in BEGINNINGS.items():
        if words.startswith(beginning):
            return {"license": name}
    return {"license": "other", "license_name": path.stem.lower(), "license_link": path.name}


def _named_in_config(folder: Path) -> str | None:
    try:
        named = from_json((folder / "config.json").read_text(encoding="utf-8")).get("license")
    except (OSError, ValueError, AttributeError):
        return None
    return named if isinstance(named, str) else None

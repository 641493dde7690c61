"""Rows of a dataset's repository, on the hub or in a local copy."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorllm.data.opening import ending
from tensorllm.data.reading import KNOWN, Row, rows_of_file
from tensorllm.errors import UserError, first_line
from tensorllm.hub import local_copy, why_not

# Where the hub keeps its parquet export of repositories that consist of a script.
EXPORT = "hf://datasets/{repo}@refs/convert/parquet/{config}/{split}/*.parquet"


@dataclass(frozen=True, slots=True)
class HubSource:
    """A dataset on the Hugging Face hub.

    Attributes:
        repo: its name there.
        config: the configuration (subset), if it has several.
        splits: which splits are read, in this order.
        folder: a local copy of the repository, or a folder with such a copy, read instead.
    """

    repo: str
    config: str | None
    splits: tuple[str, ...]
    folder: Path | None = None

    @property
    def fetch(self) -> str:
        """The command that fetches the hub's export: parquet, whatever the repository holds."""
        return (
            f"hf download {self.repo} --repo-type dataset --revision refs/convert/parquet "
            f"--include '{self.config or 'default'}/*' --local-dir FOLDER/{self.repo}"
        )

    @property
    def what(self) -> str:
        """The files' description for messages."""
        config = f"{self.config}, " if self.config else ""
        return f"{self.repo} ({config}{' and '.join(self.splits)})"


def rows_of_hub(source: HubSource, split: str) -> Iterator[Row]:
    """The rows of one split: from the local copy, the hub's cache, or streamed.

    Streaming downloads no more than is used.

    Raises:
        UserError: it is not available; the message says how to go on without a network.
    """
    folder = local_copy(source.repo, "dataset", source.folder) or source.folder
    files = [] if folder is None else files_of_split(folder, source.config, split)
    if not files and source.folder is not None:
        raise UserError(
            f"{source.folder} has no file of {source.config or source.repo}, split {split}: it "
            f"should be a copy of {source.repo}, such as {_example(source, split)}"
        )
    if files:
        for file in files:
            yield from rows_of_file(file)
        return
    yield from _streamed(source, split)


def files_of_split(folder: Path, config: str | None, split: str) -> list[Path]:
    """The files of one split in a copy of a repository, in order.

    Repositories name them `CONFIG/SPLIT-00000-of-00002.parquet`, `CONFIG/SPLIT/0000.parquet`,
    `data/SPLIT-...` or `SPLIT.jsonl`.
    """
    named = re.compile(rf"(.*/)?{re.escape(split)}[-./][^/]*")
    files = [path for path in sorted(folder.rglob("*")) if ending(path) in KNOWN]
    inside = [(path.relative_to(folder), path) for path in files if path.is_file()]
    of_config = [(short, path) for short, path in inside if config in short.parts]
    return [path for short, path in of_config or inside if named.fullmatch(short.as_posix())]


def _example(source: HubSource, split: str) -> str:
    return "/".join(filter(None, (source.config, f"{split}.parquet")))


def _streamed(source: HubSource, split: str) -> Iterator[Row]:
    from datasets import load_dataset

    if reason := why_not(source.repo, "dataset"):
        raise _unreachable(source, split, reason)
    try:
        try:
            stream: Any = load_dataset(source.repo, source.config, split=split, streaming=True)
        except RuntimeError as error:  # `datasets` 4 and later run no scripts
            if "scripts are no longer supported" not in str(error):
                raise
            config = source.config or "default"
            files = EXPORT.format(repo=source.repo, config=config, split=split)
            stream = load_dataset("parquet", data_files=files, split="train", streaming=True)
        yield from stream
    except (OSError, RuntimeError, ValueError) as error:  # what `datasets` and the hub client raise
        raise _unreachable(source, split, first_line(error)) from None


def _unreachable(source: HubSource, split: str, reason: str) -> UserError:
    return UserError(
        f"cannot load {source.repo} ({split}) from the hub: {reason}. Fetch it where there is a "
        f"network ({source.fetch}) and give that FOLDER, or one file of rows, with --data-file"
    )

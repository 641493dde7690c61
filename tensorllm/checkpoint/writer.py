"""Write a checkpoint shard by shard into a folder that appears only when it is complete.

Work goes to a hidden folder beside the target, with a journal of the finished shards. When a killed
run is repeated, it skips what the journal has.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from tensorllm.checkpoint.reader import index_name
from tensorllm.errors import UserError
from tensorllm.io import (
    check_writable,
    from_json,
    locked,
    no_space,
    remove_temporary,
    replace_folder,
    sha256,
    sync,
    write_tensors,
    write_text,
)

JOURNAL = "journal.json"
CONFIG = "config.json"
SHARD_BYTES = 2**29


def as_written(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor on the CPU; floating point numbers are cast to `dtype`, None: as they are."""
    return t.to("cpu", dtype if t.is_floating_point() else None)


def check_target(target: Path, *, overwrite: bool, source: Path | None = None) -> None:
    """Refuse an output folder that exists, is a file, is the input, or cannot be written."""
    if source is not None and target.resolve() == source.resolve():
        raise UserError(f"the output folder {target} is the input folder; give another folder")
    inside = [p for p in (Path.cwd(), source) if p and p.resolve().is_relative_to(target.resolve())]
    if inside:
        raise UserError(f"the output folder {target} holds {inside[0]}; give another folder")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError(f"the output {target} exists and is not a folder")
    if target.exists() and not overwrite:
        raise UserError(f"the output folder {target} exists; give --overwrite to replace it")
    if target.exists() and any(target.iterdir()) and not _is_model(target):
        raise UserError(
            f"--overwrite replaces a model's folder only, but {target} has no {CONFIG} with a "
            "model_type"
        )
    check_writable(target.absolute().parent)


def _is_model(folder: Path) -> bool:
    """Whether a folder is a model's: other programs, too, call their settings config.json."""
    try:
        return "model_type" in from_json((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


@contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """Refuse a second run that would write the same folder at the same time."""
    parent = target.absolute().parent
    refusal = f"another run is writing {target}; give another folder"
    with ExitStack() as stack:
        try:
            parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(parent / f".{target.name}.lock", refusal=refusal))
        except OSError as error:
            raise UserError(f"cannot write to {parent}: {error.strerror}") from None
        yield


class ShardWriter:
    """Collects tensors and writes them in shards; `finish` puts the folder in its place.

    Used as a context manager. If the block ends in a `UserError`, the work was refused and what it
    wrote is deleted. Any other error is an interruption, and the next run goes on from there.

    While the next shard is being filled, a thread computes the last one's checksum and enters it in
    the journal.

    Args:
        target: the folder to make; it must not exist unless `overwrite`.
        stem: name of the weight files (`model` or `factored`).
        fingerprint: identifies the work; a journal of other work is deleted.
        shard_bytes: a shard is written as soon as it is this large.
        overwrite: replace an existing folder.
    """

    def __init__(
        self,
        target: Path,
        *,
        stem: str,
        fingerprint: Mapping[str, Any],
        shard_bytes: int = SHARD_BYTES,
        overwrite: bool = False,
    ) -> None:
        self.target, self.stem, self.shard_bytes = target, stem, shard_bytes
        self.overwrite = overwrite
        check_target(target, overwrite=overwrite)
        self.folder = target.parent / f".{target.name}.partial"
        self._buffer: dict[str, Tensor] = {}
        self._units: dict[str, Any] = {}
        self._beside = ThreadPoolExecutor(1)
        self._entering: Future[None] | None = None
        self._journal = self._open_journal(json.loads(json.dumps(dict(fingerprint))))
        self._earlier = frozenset(self.finished)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._beside.shutdown()  # before another run may write here
        if isinstance(error, UserError):
            self.discard()

    @property
    def finished(self) -> dict[str, Any]:
        """Units of work that are in the journal, with their notes."""
        return {name: note for shard in self._journal["shards"] for name, note in shard["units"]}

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """The weight files written so far, each with its bytes and SHA-256."""
        self._settle()
        shards = [shard for shard in self._journal["shards"] if shard["names"]]
        return {s["file"]: {"bytes": s["bytes"], "sha256": s["sha256"]} for s in shards}

    @property
    def bytes(self) -> int:
        """Total size of these files."""
        return sum(facts["bytes"] for facts in self.files.values())

    def add(self, unit: str, tensors: Mapping[str, Tensor], note: Any = None) -> None:
        """Add the tensors of one unit of work; skip it if an earlier run finished it."""
        if unit in self._earlier:
            return
        self._buffer |= {name: t.contiguous() for name, t in tensors.items()}
        self._units[unit] = note
        if sum(t.nbytes for t in self._buffer.values()) >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what is buffered as one shard."""
        if not self._units:
            return
        self._settle()
        shard: dict[str, Any] = {"units": list(self._units.items()), "names": list(self._buffer)}
        if self._buffer:
            path = self.folder / f"{self.stem}-{len(self._journal['shards']) + 1:05d}.safetensors"
            try:
                write_tensors(path, self._buffer)
            except OSError as error:
                raise no_space(self.folder, error) from error
            shard |= {"file": path.name, "bytes": path.stat().st_size}
        self._entering = self._beside.submit(self._enter, shard)
        self._buffer, self._units = {}, {}

    def _enter(self, shard: dict[str, Any]) -> None:
        """Enter a shard in the journal: from now on, another run need not write it again."""
        if "file" in shard:
            shard["sha256"] = sha256(self.folder / shard["file"])
        self._journal["shards"].append(shard)
        self.write_json(JOURNAL, self._journal)

    def _settle(self) -> None:
        """Wait until the last shard written is in the journal."""
        entering, self._entering = self._entering, None
        if entering is not None:
            try:
                entering.result()
            except OSError as error:
                raise no_space(self.folder, error) from error

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file in the folder, atomically."""
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a small file in the folder, atomically."""
        try:
            write_text(self.folder / name, text)
        except OSError as error:
            raise no_space(self.folder, error) from error

    def copy(self, source: Path, name: Path | None = None) -> None:
        """Copy a small file, such as the tokenizer's, unchanged.

        Args:
            name: its path in the folder; None: its own name.
        """
        target = self.folder / (name or source.name)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        except OSError as error:
            raise no_space(self.folder, error) from error

    def name_files(self) -> str:
        """Give the shards their final names, and write an index if there are several.

        Returns:
            The name of the one file, or of the index: what transformers looks for.
        """
        self.flush()
        self._settle()
        shards = [shard for shard in self._journal["shards"] if shard["names"]]
        for number, shard in enumerate(shards, 1):
            single = f"{self.stem}.safetensors"
            many = f"{self.stem}-{number:05d}-of-{len(shards):05d}.safetensors"
            final = single if len(shards) == 1 else many
            old = self.folder / shard["file"]
            if old.exists():  # otherwise renamed by a run that was killed after this
                old.replace(self.folder / final)
            shard["file"] = final
        if len(shards) == 1:
            return f"{self.stem}.safetensors"
        index = {
            "metadata": {"total_size": sum(shard["bytes"] for shard in shards)},
            "weight_map": {name: shard["file"] for shard in shards for name in shard["names"]},
        }
        self.write_json(index_name(self.stem), index)
        return index_name(self.stem)

    def finish(self) -> None:
        """Move the complete folder to its final name."""
        for path in self.folder.iterdir():
            sync(path)
        (self.folder / JOURNAL).unlink(missing_ok=True)
        sync(self.folder)
        check_target(self.target, overwrite=self.overwrite)  # another run may have been faster
        replace_folder(self.folder, self.target)

    def discard(self) -> None:
        """Delete all that was written: the work was refused, not interrupted."""
        self._beside.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _open_journal(self, fingerprint: dict[str, Any]) -> dict[str, Any]:
        path = self.folder / JOURNAL
        try:
            journal: dict[str, Any] = json.loads(path.read_text())
            if journal["fingerprint"] == fingerprint:
                remove_temporary(self.folder)
                return journal
        except (OSError, ValueError, KeyError):
            pass  # no journal, or one that a crash left unreadable: begin again
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"cannot write to {self.target.parent}: {error.strerror}") from None
        return {"fingerprint": fingerprint, "shards": []}

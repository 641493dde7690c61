"""Turn a folder with pickled weights into safetensors, without running code from the pickles.

python -m tensorllm.checkpoint.convert FOLDER NEW_FOLDER
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from tensorllm.checkpoint.reader import PICKLES
from tensorllm.checkpoint.small_files import small_files
from tensorllm.checkpoint.writer import ShardWriter, check_target, exclusive
from tensorllm.errors import Incomplete, UserError, first_line


def convert(source: Path, target: Path) -> None:
    """Write the weights of `source` to the new folder `target`, pickle file by pickle file.

    Raises:
        UserError: there are no pickles, or one holds more than named tensors; nothing is written.
        Incomplete: the disk is full.
    """
    check_target(target, overwrite=False, source=source)
    pickles = _pickles(source)
    if not pickles:
        raise UserError(f"{source} holds no pickled weights ({', '.join(PICKLES)})")
    stats = {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in pickles}
    fingerprint = {"convert": stats}
    with (
        exclusive(target),
        ShardWriter(target, stem="model", fingerprint=fingerprint) as writer,
    ):
        for path in pickles:
            if path.name not in writer.finished:
                writer.add(path.name, _read(path))
        writer.name_files()
        for path in small_files(source):
            writer.copy(path, path.relative_to(source))
        writer.finish()


def _pickles(folder: Path) -> list[Path]:
    """The weight files: those with the usual name, else any pickle in the folder.

    A trainer may leave other pickles beside the usual ones.
    """
    usual = sorted(folder.glob("pytorch_model*.bin"))
    return usual or sorted(path for pattern in PICKLES for path in folder.glob(pattern))


def _read(path: Path) -> dict[str, Tensor]:
    """The named tensors of a pickle; `weights_only` builds nothing but tensors and containers."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a pickle of plain weights: {first_line(error)}") from None
    named = isinstance(state, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    )
    if not named:
        raise UserError(f"{path} must hold names and tensors only, got {type(state).__name__}")
    return {name: t.clone() for name, t in state.items()}  # tied tensors are stored under each name


def main(arguments: Sequence[str]) -> int:
    """The command line: two folders."""
    if len(arguments) != 2:
        sys.stderr.write("usage: python -m tensorllm.checkpoint.convert FOLDER NEW_FOLDER\n")
        return 2
    try:
        convert(Path(arguments[0]), Path(arguments[1]))
    except (UserError, Incomplete) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Read a local checkpoint, in the hub's layout, a few tensors at a time."""

import logging
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensorllm.checkpoint.config import read_config
from tensorllm.checkpoint.fitting import BUFFERS
from tensorllm.checkpoint.identity import identity_of
from tensorllm.checkpoint.small_files import is_weights
from tensorllm.checkpoint.whole import refuse_adapter
from tensorllm.errors import UserError
from tensorllm.io import from_json

log = logging.getLogger(__name__)

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
INTEGERS = {  # such as masks, row numbers and quantised values
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
ROWS_BYTES = 2**24  # of each of two tensors that are compared
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies, from its file's header."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    start: int  # offset in the file

    @property
    def numel(self) -> int:
        return prod(self.shape)


class Checkpoint:
    """The weights of a folder, by name; they are read only on request.

    Args:
        stem: name of the weight files without its ending.

    Raises:
        UserError: it is no model folder, or its weight files cannot be read.
    """

    def __init__(self, folder: Path, stem: str = "model") -> None:
        self.folder, self.stem = folder, stem
        self.unused: frozenset[str] = frozenset()  # set by `weights`
        if not folder.is_dir():
            raise UserError(f"no such model folder: {folder}")
        refuse_adapter(folder)
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} has no config.json, so it is not a model folder")
        self.entries = self._read_headers(self._files())

    @cached_property
    def config(self) -> Any:
        """The transformers config; the folder's own code is never run."""
        config = read_config(self.folder)
        method = getattr(config, "quantization_config", None)
        if method is not None and self.stem == "model":  # otherwise the factored format's own mark
            raise UserError(_quantised(self.folder, method))
        return config

    @property
    def bytes(self) -> int:
        """Size of the weight files on disk."""
        return sum((self.folder / file).stat().st_size for file in self._weight_files)

    @property
    def _weight_files(self) -> set[str]:
        return {entry.file for entry in self.entries.values()}

    @cached_property
    def weights(self) -> dict[str, Entry]:
        """The tensors that are the model's parameters, tied ones once.

        Raises:
            UserError: parameters are missing, or there are tensors the config's model does not
                have.
        """
        from tensorllm.checkpoint.parameters import parameters_in

        if self.stem != "model":  # names of our own, checked by the manifest
            return self.entries
        shapes = {name: entry.shape for name, entry in self.entries.items()}
        found = parameters_in(self.folder, self.config, shapes)
        twice = {a for a, b in found.tied if a != b and self.same(a, b)}
        unwanted = found.unused | twice
        weights = {name: e for name, e in self.entries.items() if name not in unwanted}
        check_dtypes(self.folder, weights)
        self.unused = found.unused
        return weights

    def check_readable(self) -> None:
        """Refuse weights of unsupported dtypes, by their names: other integers may be masks."""
        named = {n: e for n, e in self.entries.items() if not BUFFERS.search(n)}
        endings = (".weight", ".bias")
        check_dtypes(
            self.folder,
            {n: e for n, e in named.items() if e.dtype.startswith("F") or n.endswith(endings)},
        )

    @property
    def parameters(self) -> int:
        return sum(entry.numel for entry in self.weights.values())

    @property
    def dtype(self) -> str:
        """The floating point type of most of the weights."""
        counts: dict[str, int] = defaultdict(int)
        for entry in self.weights.values():
            counts[entry.dtype] += entry.numel
        return DTYPES[max(counts, key=lambda dtype: counts[dtype])]

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers, compared a few rows at a time."""
        from safetensors import safe_open

        if self.entries[one].shape != self.entries[other].shape:
            return False
        files = [self.folder / self.entries[name].file for name in (one, other)]
        with safe_open(files[0], "pt") as a, safe_open(files[1], "pt") as b:
            left, right = a.get_slice(one), b.get_slice(other)
            rows = self.entries[one].shape[0] if self.entries[one].shape else 0
            step = max(1, ROWS_BYTES * max(rows, 1) // max(self.entries[one].bytes, 1))
            starts = range(0, rows, step)
            return all(left[i : i + step].equal(right[i : i + step]) for i in starts)

    @cached_property
    def identity(self) -> str:
        """The same for the same config and weights, in any folder and split over any files."""
        return identity_of(self.folder, self.entries)

    def fingerprint(self) -> dict[str, Any]:
        """What must be unchanged for interrupted work to go on."""
        return {"source": self.identity}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read the named tensors, each into its own memory.

        Files are not mapped: mapped pages would count as resident memory beside the tensors.

        Raises:
            UserError: a tensor in a dtype that is not read, or a file that has become shorter.
        """
        by_file: dict[str, list[str]] = defaultdict(list)
        for name in names:
            by_file[self.entries[name].file].append(name)
        out = {}
        for file, wanted in by_file.items():
            with (self.folder / file).open("rb") as held:
                for name in wanted:
                    out[name] = _read(held, self.entries[name])
        return out

    def _files(self) -> list[str]:
        """The weight files, by transformers' own rules: a single file precedes an index."""
        folder, index = self.folder, self.folder / index_name(self.stem)
        single = f"{self.stem}.safetensors"
        if (self.folder / single).is_file():
            if index.is_file():
                log.warning("%s holds %s and an index of shards: the file is read", folder, single)
            return [single]
        if index.is_file():
            try:
                held = from_json(index.read_text(encoding="utf-8"))
                files = sorted(set(held["weight_map"].values()))
                if any(Path(file).name != file for file in files) or held["metadata"] is None:
                    raise ValueError  # weights must lie in the folder itself
            except (ValueError, KeyError, AttributeError, TypeError):
                raise UserError(
                    f"{index} is not a safetensors index: transformers wants `metadata`, be it "
                    "empty, and `weight_map`, from names of tensors to files in this folder"
                ) from None
            missing = [file for file in files if not (self.folder / file).is_file()]
            if missing:
                raise UserError(f"{self.folder} lacks {missing[0]}, which {index.name} names")
            return files
        pickles = [p.name for pattern in PICKLES for p in self.folder.glob(pattern)]
        if pickles:
            raise UserError(
                f"{self.folder} holds only pickled weights ({pickles[0]}), which are not loaded. "
                "Convert them once: python -m tensorllm.checkpoint.convert FOLDER NEW_FOLDER"
            )
        held = sorted(path.name for path in folder.iterdir() if is_weights(path))
        found = f"; of weights it has {', '.join(held[:3])}" if held else ""
        raise UserError(f"{folder} has no {self.stem}.safetensors and no {index.name}{found}")

    def _read_headers(self, files: Iterable[str]) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        for file in files:
            header = read_header(self.folder / file)
            ends = [info["data_offsets"][1] for info in header.values()]
            data = (self.folder / file).stat().st_size - max(ends, default=0)
            for name, info in header.items():
                start, end = info["data_offsets"]
                shape = tuple(info["shape"])
                entries[name] = Entry(file, shape, info["dtype"], end - start, data + start)
        return entries


def _read(file: Any, entry: Entry) -> Tensor:
    """A tensor of a file that is open for reading bytes."""
    if entry.dtype not in DTYPES | INTEGERS:
        raise UserError(f"{file.name} holds a tensor stored as {entry.dtype}, which is not read")
    dtype = getattr(torch, (DTYPES | INTEGERS)[entry.dtype])
    made = torch.empty(entry.shape, dtype=dtype, device="cpu")
    file.seek(entry.start)
    if file.readinto(made.view(-1).view(torch.uint8).numpy()) != entry.bytes:
        raise UserError(f"{file.name} became shorter while it was read")
    return made


def _quantised(folder: Path, method: Any) -> str:
    """The refusal of quantised weights: by which method, and how to get floating point ones."""
    found = method if isinstance(method, dict) else getattr(method, "__dict__", {})
    name = getattr(found.get("quant_method"), "value", found.get("quant_method"))
    return (
        f"{folder} holds weights quantised by {name or 'an unnamed method'}. Compress the float "
        "checkpoint they were made from, then quantise the result; or de-quantise once, in "
        "Python: model = AutoModelForCausalLM.from_pretrained(FOLDER).dequantize(); "
        "model.save_pretrained(NEW_FOLDER)"
    )


def check_dtypes(folder: Path, weights: Mapping[str, Entry]) -> None:
    """Refuse weights that are not stored as floating point numbers of 16 bits or more."""
    for name, entry in weights.items():
        if entry.dtype not in DTYPES:
            raise UserError(
                f"{folder}: {name} is stored as {entry.dtype}; weights must be one of "
                f"{', '.join(DTYPES)}. Give the checkpoint that was quantised, or cast it"
            )


def index_name(stem: str) -> str:
    """Name of the file that maps each tensor to its shard."""
    return f"{stem}.safetensors.index.json"


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file; a corrupt or truncated file is refused."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise ValueError
            header = from_json(file.read(length))
        header.pop("__metadata__", None)
        end = 0
        for info in sorted(header.values(), key=lambda info: info["data_offsets"]):
            first, last = info["data_offsets"]
            width = WIDTHS.get(info["dtype"])
            if first != end or (width and last - first != width * prod(info["shape"])):
                raise ValueError  # a gap, an overlap, or a shape that contradicts the bytes
            end = last
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        with path.open("rb") as file:
            begins = file.read(24)  # says most of what came instead: a pointer of git-lfs, a page
        raise UserError(
            f"{path} is not a safetensors file, or is corrupt: it begins with {begins!r}"
        ) from None
    if size != 8 + length + end:
        raise UserError(
            f"{path} is truncated or corrupt: {8 + length + end} bytes expected, {size} found"
        )
    return dict(header)

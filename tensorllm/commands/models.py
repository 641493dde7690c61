"""Loading what is evaluated: a checkpoint folder, dense or compressed, as model and tokenizer."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from tensorllm.checkpoint.loading import load, model_class
from tensorllm.checkpoint.manifest import Manifest, read_manifest
from tensorllm.errors import UserError
from tensorllm.registry import one_of

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class Loader:
    """Loads the model of a folder; small enough to be sent to other processes.

    Attributes:
        folder: an ordinary checkpoint, or one that tensorllm wrote.
        dtype: of the weights in memory; None: as they are stored.
        device: where the weights go; a Trainer moves them itself.
    """

    folder: Path
    dtype: torch.dtype | None = None
    device: str = "cpu"

    def __call__(self) -> Any:
        manifest = read_manifest(self.folder)
        try:
            if manifest is not None and manifest.format == "factored":
                made: nn.Module = load(self.folder, policy="always", dtype=self.dtype)
            else:
                kind = model_class(self.config())
                made = kind.from_pretrained(self.folder, dtype=self.dtype or "auto")
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"cannot load the model in {self.folder}: {_line(error)}") from None
        return made.to(self.device).eval()

    def config(self) -> Any:
        try:
            return AutoConfig.from_pretrained(self.folder)
        except (OSError, ValueError, KeyError) as error:
            manifest = read_manifest(self.folder)
            if manifest is None:
                raise UserError(f"{self.folder} holds no model: {_line(error)}") from None
            raise

    def tokenizer(self) -> PreTrainedTokenizerBase:
        try:
            return AutoTokenizer.from_pretrained(self.folder)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"cannot load a tokenizer from {self.folder}: {_line(error)}") from None

    @property
    def masked(self) -> bool:
        return not model_class(self.config()).can_generate()

    def manifest(self) -> Manifest | None:
        """What tensorllm wrote about the folder, or None."""
        return read_manifest(self.folder)

    def fingerprint(self) -> str:
        """Changes when any file of the folder does."""
        facts = [
            (path.name, path.stat().st_size, path.stat().st_mtime_ns)
            for path in sorted(self.folder.iterdir())
            if path.is_file()
        ]
        return hashlib.sha256(json.dumps([str(self.dtype), facts]).encode()).hexdigest()


def dtype_of(name: str | None) -> torch.dtype | None:
    """The torch dtype of a name such as bf16."""
    if name is None:
        return None
    return DTYPES[one_of("--dtype", name, list(DTYPES))]


def device_of(name: str) -> str:
    """`auto` is the first GPU where there is one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    one_of("--device", name.partition(":")[0], ("auto", "cpu", "cuda", "mps"))
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} is not to be had here: {reason}") from None
    return name


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__

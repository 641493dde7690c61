"""Load a checkpoint folder, dense or compressed, as model and tokenizer."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tensorllm.checkpoint.config import read_config
from tensorllm.checkpoint.factored import STEM
from tensorllm.checkpoint.identity import files_identity
from tensorllm.checkpoint.loading import load
from tensorllm.checkpoint.manifest import Manifest, check_files, factored_manifest, read_manifest
from tensorllm.checkpoint.reader import Checkpoint
from tensorllm.checkpoint.source import Source
from tensorllm.checkpoint.whole import load_whole
from tensorllm.errors import UserError, first_line
from tensorllm.models.task import is_masked
from tensorllm.registry import one_of
from tensorllm.runtime.cost import Cache
from tensorllm.runtime.products import seconds_of_product

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}
MUCH_FASTER = 1.5  # a margin, so that noise does not decide
NOTES = ("report.json", "tensorllm.json", "details.json")  # our own files: they change no score


@dataclass(frozen=True, slots=True)
class Loader:
    """Loads the model of a folder; small enough to be sent to other processes.

    Attributes:
        folder: an ordinary checkpoint, or one that tensorllm wrote.
        dtype: of the weights in memory; None: as they are stored.
        device: where the weights go; a Trainer moves them itself.
        language: load with the head that predicts tokens; False: as it was saved.
        verify: compare checksums of what tensorllm wrote, which reads all of it once more.
        cache: what attention keeps in the key-value cache of a factored model (see `load`).
    """

    folder: Path
    dtype: torch.dtype | None = None
    device: str = "cpu"
    language: bool = True
    verify: bool = False
    cache: Cache = "latent"

    def __call__(self) -> Any:
        manifest = read_manifest(self.folder)
        factored = manifest is not None and manifest.format == "factored"
        if manifest is not None:
            check_files(self.folder, manifest, verify=self.verify)
        config = self.config()
        if not factored and getattr(config, "quantization_config", None) is None:
            Checkpoint(self.folder).check_readable()  # its message is more precise
        if factored:
            made: nn.Module = load(self.folder, policy="always", cache=self.cache, dtype=self.dtype)
        else:
            made = load_whole(self.folder, config, self.dtype, language=self.language)
        return made.to(self.device).eval()

    def config(self) -> Any:
        return read_config(self.folder)

    def quickest(self, device: str | None = None, *, overflows: bool = True) -> "Loader":
        """With the requested dtype, or else the one in which the model runs best.

        Args:
            device: where it will run, if not where the weights go first.
            overflows: see `computing_dtype`.
        """
        if self.dtype is not None:
            return self
        stored, device = self.config().dtype, device or self.device
        return replace(self, dtype=computing_dtype(stored, device, overflows=overflows))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the folder; its own code is never run.

        Raises:
            UserError: there is none, or none that transformers can read.
        """
        none = UserError(
            f"{self.folder} holds no tokenizer: copy tokenizer.json and tokenizer_config.json "
            "there, of the model that it was made from"
        )
        try:
            found = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        except Exception as error:  # a wrong file fails in many ways inside transformers
            if not any(self.folder.glob("*token*")) and not any(self.folder.glob("*vocab*")):
                raise none from None
            raise UserError(
                f"cannot load a tokenizer from {self.folder}: {first_line(error)}"
            ) from None
        if set(found.get_vocab()) <= set(found.all_special_tokens):
            raise none  # transformers makes one without words where only its config is there
        longest = found.model_max_length
        if not isinstance(longest, int | float):
            raise UserError(
                f"{self.folder}: model_max_length of tokenizer_config.json must be a number, got "
                f"{longest!r}"
            )
        return found

    @property
    def masked(self) -> bool:
        """Whether it is a masked language model, which generates no text."""
        return is_masked(self.config())

    def manifest(self) -> Manifest | None:
        """The folder's manifest; None if tensorllm did not write it."""
        return read_manifest(self.folder)

    def made_from(self, source: Source) -> bool:
        """Whether tensorllm made the folder from this model, whatever either is called."""
        manifest = self.manifest()
        if manifest is None:
            return False
        known = manifest.source.get("identity")
        if known is not None:
            return bool(known == Checkpoint(source.folder).identity)
        # Saved from memory, when only the name of the original was known, not its weights.
        named = str(manifest.source.get("model"))
        return named == source.name or Path(named).resolve().name == source.folder.resolve().name

    def fingerprint(self) -> str:
        """A hash that changes with weights, config or tokenizer, but not with the folder's path."""
        stem = "model" if factored_manifest(self.folder) is None else STEM
        checkpoint = Checkpoint(self.folder, stem=stem)
        facts = [str(self.dtype), checkpoint.identity, files_identity(self.folder, NOTES)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def dtype_of(name: str | None) -> torch.dtype | None:
    """The torch dtype of a name such as bf16."""
    if name is None:
        return None
    return DTYPES[one_of("--dtype", name, list(DTYPES))]


def computing_dtype(
    stored: torch.dtype | None, device: str, *, overflows: bool = True
) -> torch.dtype | None:
    """The dtype a model runs best in: as stored, or float32 where a CPU is slow in 16 bits.

    CPUs without 16-bit instructions emulate them, many times slower.

    Args:
        overflows: whether overflow in float16 must show, as in a score: float16 is then kept.
    """
    narrow = (torch.bfloat16,) if overflows else (torch.bfloat16, torch.float16)
    if device != "cpu" or stored not in narrow:
        return stored
    wide = seconds_of_product(torch.float32)
    return stored if seconds_of_product(stored) <= MUCH_FASTER * wide else torch.float32


def device_of(name: str, *, decomposes: bool = False) -> str:
    """The device with that name; `auto` is the first GPU if there is one.

    Args:
        decomposes: whether matrices will be decomposed there, which needs float64.

    Raises:
        UserError: no such device, or one without float64 (`mps`) where that is needed.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    one_of("--device", name.partition(":")[0], ("auto", "cpu", "cuda", "mps"))
    try:
        torch.empty(0, device=name, dtype=torch.float64 if decomposes else None)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UserError(f"--device {name} is not available here: {first_line(error)}") from None
    return name

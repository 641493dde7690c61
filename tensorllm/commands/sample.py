"""`tensorllm sample`: a calibration set that the model generates itself."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tensorllm.calibration.sampled import check_sample, sampled_text
from tensorllm.calibration.sequences import usual_length
from tensorllm.commands.generate import loaded, opened
from tensorllm.environment import printable
from tensorllm.errors import UserError
from tensorllm.io import check_writable, replacing
from tensorllm.progress import Progress, quiet
from tensorllm.registry import load_plugins
from tensorllm.requests.others import SampleRequest


@dataclass(frozen=True)
class Sampled:
    """What was written, and where."""

    file: Path
    sequences: int
    tokens: int
    seed: int
    model: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"file": printable(str(self.file))}

    def __str__(self) -> str:
        return f"{self.file}: {self.sequences} sequences, {self.tokens:,} tokens, seed {self.seed}"


def sample(request: SampleRequest, progress: Progress = quiet) -> Sampled:
    """Write a file of JSON lines, one sequence per line in the field `text`, atomically.

    Raises:
        UserError: numbers out of range, a file that exists, no tokenizer, or a model that
            generates no text.
    """
    load_plugins(request.plugins)
    if request.out.exists() and not request.overwrite:
        raise UserError(f"{request.out} is there already; choose another name, or --overwrite")
    if not request.out.parent.is_dir():
        raise UserError(f"the folder {request.out.parent} of --out is not there")
    check_writable(request.out.parent)
    if request.out.suffix != ".jsonl":
        raise UserError(f"--out must be named *.jsonl, got {request.out.name}")
    loader = opened(request)
    tokenizer, config = loader.tokenizer(), loader.config()
    length = request.length or usual_length(config)
    check_sample(config, request.sequences, length)
    text = sampled_text(
        loaded(loader),
        sequences=request.sequences,
        length=length,
        seed=request.seed,
        progress=progress,
    )
    with replacing(request.out) as part, part.open("w", encoding="utf-8") as file:
        for sequence in text.sequences:
            written = tokenizer.decode(list(sequence))
            row = {"text": written, "model": request.model, "seed": request.seed}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return Sampled(request.out, len(text.sequences), text.tokens, request.seed, request.model)

"""`tensorllm reproduce --dry-run`: each cell on a tiny model, and what the real run takes.

The tiny model has the real one's architecture and number of layers, and random weights.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tensorllm.architectures import architecture_of
from tensorllm.compression.cost import gemm_speed
from tensorllm.compression.model import compressed
from tensorllm.data.demo import MODEL_DIR
from tensorllm.evaluation.evaluate import evaluate_model, make_dataset
from tensorllm.pipeline.cells import Cell, cells, hub_id
from tensorllm.pipeline.reproduce import ReproduceRequest, data_file
from tensorllm.recipes import short_names

WIDTH, HEADS = 128, 2  # head_dim 64: GPT-J rotates that many channels unless told otherwise
TOKENS = 40  # of a prompt and its answer, about; measured on the four datasets
# A row that every dataset can read: each takes the fields that it knows.
ROWS = [
    {
        "claim": "Ada plays banjo.",
        "label": "SUPPORTS",
        "question": "Which city does Ada live in?",
        "answer": "Paris",
        "bio": "Ada writes about banjos.",
        "profession": "teacher",
        "input": "The city of Ada is",
        "target": "Paris",
    },
    {
        "claim": "Ada plays harp.",
        "label": "REFUTES",
        "question": "What does Ada play?",
        "answer": "banjo",
        "bio": "Ada paints.",
        "profession": "painter",
        "input": "The instrument of Ada is",
        "target": "banjo",
    },
]


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """A cell: did its code run on the tiny model, and the cost of the real one.

    Attributes:
        seconds: predicted for scoring at this machine's GEMM speed; None without the data.
        peak_bytes: predicted for weights and working copies.
    """

    cell: Cell
    examples: int | None
    seconds: float | None
    peak_bytes: int

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.cell.model,
            "dataset": self.cell.dataset,
            "cell": self.cell.name,
            "needs": hub_id(self.cell.model),
            "searched": self.cell.searched,
            "examples": self.examples,
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
        }


def rehearse(request: ReproduceRequest) -> list[Rehearsal]:
    """Run every cell on a tiny random model of the architecture; nothing is kept."""
    wanted = cells(request.model, request.datasets)
    facts = short_names()[request.model]
    model, tokenizer = tiny(facts)
    speed = gemm_speed()
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        for cell in wanted:
            _run_tiny(cell, model, tokenizer, rows, facts)
    gated = any("gate" in stored.roles for stored in architecture_of(model.config))
    parameters = parameters_of_sizes(facts["sizes"], gated=gated)
    width = 4 if request.dtype in (None, "fp32", "float32") else 2
    out = []
    for cell in wanted:
        examples = _examples(request, cell)
        seconds = None if examples is None else 2.0 * parameters * TOKENS * examples / speed
        out.append(Rehearsal(cell, examples, seconds, width * parameters + 2**31))
    return out


def tiny(facts: dict[str, Any]) -> tuple[Any, Any]:
    """A random model of the architecture, as deep as the real one, and a tokenizer for it."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    config = AutoConfig.for_model(
        facts["model_type"],
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_hidden_layers=facts["sizes"]["layers"],
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    architecture = architecture_of(config)
    setattr(config, architecture.ffn_width, 2 * WIDTH)
    kind = AutoModelForMaskedLM if architecture.task == "masked" else AutoModelForCausalLM
    torch.manual_seed(0)
    return kind.from_config(config).eval(), tokenizer


def parameters_of_sizes(sizes: dict[str, int], *, gated: bool) -> int:
    """Parameters of attention, FFN and embeddings."""
    attention = 4 * sizes["hidden"] * sizes["heads"] * sizes["head_dim"]
    ffn = (3 if gated else 2) * sizes["hidden"] * sizes["ffn"]
    return sizes["layers"] * (attention + ffn) + 2 * sizes["vocabulary"] * sizes["hidden"]


def _run_tiny(cell: Cell, model: Any, tokenizer: Any, rows: Path, facts: dict[str, Any]) -> None:
    data = make_dataset(cell.dataset, data_file=rows, split="all")
    if cell.recipe is None:
        evaluate_model(model, tokenizer, data)
        return
    override: dict[str, Any] = {} if cell.layout is None else {"layout": cell.layout}
    if "ranks" in cell.recipe.settings:
        sizes = (facts["sizes"]["hidden"], facts["sizes"]["head_dim"], 4)
        small = (WIDTH, WIDTH // HEADS, 4)
        ranks = zip(cell.recipe.settings["ranks"], sizes, small, strict=False)
        override["ranks"] = [max(1, rank * new // old) for rank, old, new in ranks]
    with compressed(model, cell.recipe.compressor(**override), cell.recipe.layers or (0,)):
        evaluate_model(model, tokenizer, data)


def _examples(request: ReproduceRequest, cell: Cell) -> int | None:
    """How many test examples the local data has; the hub is not asked."""
    if request.data is None:
        return None
    data = make_dataset(cell.dataset, data_file=data_file(request, cell), limit=request.limit)
    return len(data.examples)

"""The real rows of the four datasets: files in the folder data of --shared."""

import argparse
from typing import Any

from support.results import real

from tensorllm.evaluation.evaluate import evaluate_model

FILES = {
    "wikidata_qa": "qa_wikidata.jsonl",
    "hotpotqa": "hotpot_dev.jsonl",
    "fever": "fever_paper_dev.jsonl",
    "bios_profession": "bias_in_bios_1200.jsonl",
}


def accuracies(
    model: Any, tokenizer: Any, args: argparse.Namespace, limit: int
) -> dict[str, dict[str, float]]:
    """Accuracy (per cent) and loss (nats per answer token) on the first `limit` rows of each
    dataset's test part, protocol strict."""
    out = {}
    for name, file in FILES.items():
        found = evaluate_model(
            model, tokenizer, name, limit=limit, data_file=real(args, f"data/{file}")
        )
        out[name] = {"accuracy": found["accuracy"], "loss": found["loss"]}
    return out

"""lm-evaluation-harness runs the four tasks on a factored folder, and scores it as the export."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tensorllm as tl
from tensorllm.compression.export import export

lm_eval = pytest.importorskip("lm_eval")
TASKS = Path(tl.__file__).parent / "evaluation" / "lm_eval"
ROWS: dict[str, list[dict[str, Any]]] = {
    "fever": [
        {"claim": "Ice is cold.", "label": "SUPPORTS"},
        {"claim": "Fire is cold", "label": "REFUTES"},
        {"claim": "Fish sing", "label": "NOT ENOUGH INFO"},
        {"claim": "Ice is cold.", "label": "SUPPORTS"},
        {"claim": "Tea is hot", "label": "SUPPORTS"},
        {"claim": "Tea is hot", "label": "REFUTES"},
    ],
    "bios_profession": [
        {"bio": "_ paints", "profession": "painter"},
        {"bio": "_ cures teeth", "profession": "dentist"},
        {"bio": "_ writes music.", "profession": "5"},
    ],
    "hotpotqa": [{"question": "Who is Lily", "answer": "a girl"}],
    "wikidata_qa": [{"input": "The colour of the sky is", "target": "blue"}],
}
COUNTS = {"fever": 2, "bios_profession": 2, "hotpotqa": 1, "wikidata_qa": 1}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # lm_eval's and its libraries' own
def test_lm_eval_scores_factors_as_their_export(tinystories: Path, tmp_path: Path):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = AutoModelForCausalLM.from_pretrained(tinystories, dtype=torch.float32)
    tl.compress(model, tl.Hybrid(ranks=(96, 12, 4), rho=0.9))
    tl.save(model, tmp_path / "out", tokenizer=AutoTokenizer.from_pretrained(tinystories))
    export(tmp_path / "out", tmp_path / "dense")
    for name, rows in ROWS.items():
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / f"{name}.yaml").write_text(
            f"include: {TASKS / f'tensorllm_{name}.yaml'}\ntask: local_{name}\n"
            f"dataset_kwargs:\n  data_files:\n    test: {data}\n"
        )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = [
        lm_eval.simple_evaluate(
            HFLM(pretrained=str(tmp_path / folder), device="cpu", dtype="float32", max_length=512),
            tasks=[f"local_{name}" for name in ROWS],
            task_manager=manager,
            bootstrap_iters=0,
        )
        for folder in ("out", "dense")
    ]
    for name, count in COUNTS.items():
        a, b = (result["samples"][f"local_{name}"] for result in found)
        assert len({sample["doc_id"] for sample in a}) == count
        for one, other in zip(a, b, strict=True):
            assert one["target"] == other["target"]
            for x, y in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
                assert x == y if isinstance(x, str) else x[0] == pytest.approx(y[0], abs=1e-3)

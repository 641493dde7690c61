"""Factored folders served by vLLM itself, in the environment that `.ci/install-vllm` makes."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import ROOT
from tiny_models import tiny_model

import tensorllm as tl

VLLM_PYTHON = Path(os.environ.get("VLLM_PYTHON", ROOT / ".venv-vllm/bin/python"))
SIZES = {
    "hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64,
    "attention_bias": False,
}  # fmt: skip
PROMPTS = [[4, 5, 9, 13, 12], [7, 3], [11, 4, 8, 21, 6, 22, 10]]  # without the padding token
NEW = 12
# The compressor, and whether vLLM's engine has a process of its own, as it does by default: that
# one must find the entry point too.
COMPRESSORS: dict[str, tuple[Any, bool]] = {
    "pivoted factors": (tl.ActivationHybrid(target_ratio=1.5, refit_epochs=0), True),
    "shared Tucker, one FFN matrix": (
        tl.Hybrid(ranks=(60, 12, 4), rho=0.4, matrices=("in",)),
        False,
    ),
    "truncated SVD": (tl.LaserSVD(rho=0.5, matrices=("gate", "in", "out", "o", "q")), False),
}
CHILD = """
import json, sys
from pathlib import Path
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, prompts, new = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    settings = {"dtype": "float32", "enforce_eager": True, "gpu_memory_utilization": 0.2}
    model = LLM(folder, skip_tokenizer_init=True, **settings)  # that share is of all memory
    asked = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    found = model.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)
    tokens = [list(one.outputs[0].token_ids) for one in found]
    Path(sys.argv[4]).write_text(json.dumps(tokens))
"""


def folder(compressor: Any, out: Path) -> Path:
    model = tiny_model("llama", **SIZES)
    draws = torch.Generator().manual_seed(1)
    drawn = torch.randint(3, model.config.vocab_size, (16, 48), generator=draws)
    text = tl.Calibration(tuple(map(tuple, drawn.tolist())), source="random", seed=0)
    tl.compress(model, compressor, calibration=None if compressor.needs == "weights" else text)
    tl.save(model, out)
    return out


def by_vllm(out: Path, *, apart: bool) -> list[list[int]]:
    """The tokens that vLLM writes, with its engine in this process or apart."""
    own = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(apart)),
    }  # fmt: skip
    child, result = out.parent / "child.py", out.parent / "tokens.json"
    child.write_text(CHILD)
    done = subprocess.run(
        [VLLM_PYTHON, child, out, json.dumps(PROMPTS), str(NEW), result],
        env={**os.environ, **own}, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[list[int]] = json.loads(result.read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPRESSORS)
def test_vllm_writes_the_same_tokens(name: str, tmp_path: Path) -> None:
    if not VLLM_PYTHON.exists():
        pytest.skip("vLLM is not installed (.ci/install-vllm): no request is served")
    compressor, apart = COMPRESSORS[name]
    out = folder(compressor, tmp_path / "out")
    model = tl.load(out, policy="always")
    wanted = [
        model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        for ids in PROMPTS
    ]
    assert by_vllm(out, apart=apart) == [
        found[0, len(ids) :].tolist() for ids, found in zip(PROMPTS, wanted, strict=True)
    ]

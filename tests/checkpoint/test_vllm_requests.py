"""Factored folders served by vLLM itself, in the environment that `.ci/install-vllm` makes."""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from repository import ROOT
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

import tensorllm as tl
from tensorllm.commands.export import run as export
from tensorllm.compressors.calibrated.modegpt import MoDeGPT
from tensorllm.requests.others import ExportRequest

VLLM_PYTHON = Path(os.environ.get("VLLM_PYTHON", ROOT / ".venv-vllm/bin/python"))
SIZES = {
    "hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64,
    "attention_bias": False,
}  # fmt: skip
PROMPTS = [[4, 5, 9, 13, 12], [7, 3], [11, 4, 8, 21, 6, 22, 10]]  # without the padding token
NEW = 12
LARGER = {"hidden_size": 256, "intermediate_size": 768}  # so that factors are faster
FFN = ("gate", "in", "out")


class Case(NamedTuple):
    """A folder, how it runs, and how many of its sites then run in their factors.

    `apart`: vLLM's engine has a process of its own, as it does by default; that one must find the
    entry point too. `policy` None: nothing is asked for.
    """

    compressor: Any
    policy: str | None
    sites: str
    apart: bool = False
    sizes: Mapping[str, int] = {}


CASES = {
    "pivoted factors": Case(
        tl.ActivationHybrid(target_ratio=1.5, refit_epochs=0), "always", "7 of 7", apart=True
    ),
    "shared Tucker, one FFN matrix": Case(
        tl.Hybrid(ranks=(60, 12, 4), rho=0.4, matrices=("in",)), "always", "4 of 4"
    ),
    "truncated SVD": Case(
        tl.LaserSVD(rho=0.5, matrices=(*FFN, "o", "q")), "always", "10 of 10"
    ),
    "some dense": Case(
        tl.LaserSVD(rho=0.3, matrices=(*FFN, "o", "q")), None, "6 of 10", sizes=LARGER
    ),
}  # fmt: skip
CHILD = """
import json, sys
from pathlib import Path
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, prompts, new = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    settings = {"dtype": "float32", "enforce_eager": True, "gpu_memory_utilization": 0.2}
    settings |= json.loads(sys.argv[5])
    model = LLM(folder, skip_tokenizer_init=True, **settings)  # that share is of all memory
    asked = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    found = model.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)
    tokens = [list(one.outputs[0].token_ids) for one in found]
    Path(sys.argv[4]).write_text(json.dumps(tokens))
"""


def folder(compressor: Any, out: Path, sizes: Mapping[str, int]) -> Path:
    model = tiny_model("llama", **SIZES | sizes)
    draws = torch.Generator().manual_seed(1)
    drawn = torch.randint(3, model.config.vocab_size, (16, 48), generator=draws)
    text = tl.Calibration(tuple(map(tuple, drawn.tolist())), source="random", seed=0)
    tl.compress(model, compressor, calibration=None if compressor.needs == "weights" else text)
    tl.save(model, out)
    return out


def by_vllm(out: Path, policy: str | None, *, apart: bool) -> tuple[list[list[int]], str]:
    """The tokens that vLLM writes and what it says, with its engine in this process or apart."""
    if not VLLM_PYTHON.exists():
        pytest.skip("vLLM is not installed (.ci/install-vllm): no request is served")
    own = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(apart)),
    }  # fmt: skip
    method = {"quant_method": "tensorllm", "policy": policy}
    settings = {"hf_overrides": {"quantization_config": method}} if policy else {}
    child, result = out.parent / "child.py", out.parent / "tokens.json"
    child.write_text(CHILD)
    done = subprocess.run(
        [VLLM_PYTHON, child, out, json.dumps(PROMPTS), str(NEW), result, json.dumps(settings)],
        env={**os.environ, **own}, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    said = done.stdout + done.stderr
    found = json.loads(result.read_text()) if done.returncode == 0 else []
    return found, said


def by_transformers(model: Any) -> list[list[int]]:
    tokens = [
        model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        for ids in PROMPTS
    ]
    return [found[0, len(ids) :].tolist() for ids, found in zip(PROMPTS, tokens, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_vllm_writes_the_same_tokens(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    out = folder(case.compressor, tmp_path / "out", case.sizes)
    found, said = by_vllm(out, case.policy, apart=case.apart)
    assert f"policy {case.policy or 'auto'}: {case.sites} sites run" in said, said[-4000:]
    policy: Any = case.policy or "auto"
    assert found == by_transformers(tl.load(out, policy=policy))


@pytest.mark.slow
def test_an_unknown_policy_is_one_line(tmp_path: Path) -> None:
    out = folder(CASES["truncated SVD"].compressor, tmp_path / "out", {})
    found, said = by_vllm(out, "fast", apart=False)
    assert not found
    assert "policy must be one of auto, always, got 'fast'" in said


@pytest.mark.slow
def test_vllm_runs_a_narrow_export(tmp_path: Path) -> None:
    """An ordinary checkpoint, which needs nothing of ours."""
    folder(MoDeGPT(kept=0.6, matrices=FFN), tmp_path / "out", {})
    export(ExportRequest(folder=tmp_path / "out", out=tmp_path / "narrow", format="narrow"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow")
    assert model.config.intermediate_size < SIZES["intermediate_size"]
    found, said = by_vllm(tmp_path / "narrow", None, apart=False)
    assert found == by_transformers(model), said[-4000:]

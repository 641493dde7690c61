"""Fine-tuning a factored model with LoRA, by peft, on its factors."""

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

import tensorllm as tl
from tensorllm.compression.factorize import factorize

peft = pytest.importorskip("peft")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's
def test_lora_on_factors_learns_merges_and_is_saved(tmp_path: Path):
    model = tiny_model("llama")
    tl.compress(model, tl.Hybrid(ranks=(20, 3, 2), rho=0.4, matrices=("in", "out")))
    factorize(model)
    ids = torch.randint(3, 100, (2, 11), generator=torch.Generator().manual_seed(1))
    frozen = {name: p.clone() for name, p in model.named_parameters()}

    settings = peft.LoraConfig(r=2, target_modules=r".*parts\.role_(in|out)\.[01]")
    adapted = peft.get_peft_model(model, settings)
    wanted = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=0.05)
    before = adapted(ids, labels=ids).loss.item()
    for _ in range(8):
        optimizer.zero_grad()
        adapted(ids, labels=ids).loss.backward()
        optimizer.step()
    learnt = adapted(ids, labels=ids).loss.item()
    assert learnt < before

    merged = adapted.merge_and_unload()
    changed = {n for n, p in merged.named_parameters() if not torch.equal(p, frozen[n])}
    assert len(changed) == 8
    assert all(".parts.role_" in name for name in changed)
    merged.save_pretrained(tmp_path / "tuned")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert opened(ids, labels=ids).loss.item() == pytest.approx(learnt, rel=1e-4)

"""Train a small mixture of experts on text of several kinds.

    python benchmarks/support/train_moe.py OUT

Qwen3-MoE architecture: 4 layers of 16 experts, 2 per token; ten minutes on one core. It is what
benchmarks/experts.py compresses; no checkpoint of it is shipped. The same seed and number of
threads give the same weights on the same machine.
Shapes: N tokens of the text, B sequences of a batch, T tokens of each.
"""

import argparse
import json
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

SHARED = os.environ.get("TENSORLLM_SHARED", Path(__file__).parents[3] / "shared")
HELD_OUT = 0.1  # of the documents of each kind: the first ones, never trained on


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that the weights depend on, beside the code and the number of threads."""

    seed: int = 0
    steps: int = 2000
    batch: int = 16
    length: int = 128
    rate: float = 3e-3
    balance: float = 0.02
    warm_up: int = 100
    threads: int = 1


def build_model(vocabulary: int) -> Qwen3MoeForCausalLM:
    """4 layers, width 128, 4 heads of 32 (2 KV heads), 16 experts of width 64, 2 per token."""
    config = Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        intermediate_size=256,
        norm_topk_prob=True,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Qwen3MoeForCausalLM(config)


def documents(shared: Path) -> dict[str, list[str]]:
    """TinyStories, WikiText-2, biographies and questions, each in its own order."""
    data = shared / "data"
    stories: list[str] = json.loads((data / "tinystories_1000.json").read_text())
    articles = re.split(r"\n(?= = [^=])", (data / "wikitext2_test.raw").read_text())
    bios = [row["bio"] for row in _lines(data / "bias_in_bios_1200.jsonl")]
    questions = [f"{r['question']} {r['answer']}" for r in _lines(data / "hotpot_dev.jsonl")]
    return {"stories": stories, "articles": articles, "biographies": bios, "questions": questions}


def _lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def text_of(shared: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """Token ids (N,) that are trained on, and of each kind those that are held out."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/tinystories-656K")
    trained: list[Tensor] = []
    held: dict[str, Tensor] = {}
    for kind, rows in documents(shared).items():
        encoded = [
            torch.tensor([*tokenizer(row, verbose=False).input_ids, tokenizer.eos_token_id])
            for row in rows
        ]
        first = max(1, round(HELD_OUT * len(encoded)))
        held[kind] = torch.cat(encoded[:first])
        trained += encoded[first:]
    order = torch.randperm(len(trained), generator=torch.Generator().manual_seed(0)).tolist()
    return torch.cat([trained[i] for i in order]), held


def held_out_loss(model: Any, ids_N: Tensor, length: int) -> float:
    """Nats per token of the text cut into blocks."""
    blocks_BT = ids_N[: len(ids_N) // length * length].view(-1, length)
    total = 0.0
    with torch.no_grad():
        for part_BT in blocks_BT.split(32):
            total += float(model(part_BT, labels=part_BT).loss) * len(part_BT)
    return total / len(blocks_BT)


def imbalance(logits_LNE: Sequence[Tensor], used: int) -> Tensor:
    """1 where experts are in equal use, layer by layer; transformers' own sums over all layers.

    Source: Fedus, Zoph and Shazeer, "Switch Transformers", JMLR 2022, section 2.2.
    """
    total = torch.zeros(())
    for logits_NE in logits_LNE:
        chosen_NK = logits_NE.topk(used).indices
        share_E = chosen_NK.flatten().bincount(minlength=logits_NE.shape[1]) / chosen_NK.numel()
        total = total + logits_NE.shape[1] * (share_E * logits_NE.softmax(-1).mean(0)).sum()
    return total / len(logits_LNE)


def train(recipe: Recipe, shared: Path) -> tuple[Qwen3MoeForCausalLM, dict[str, Any]]:
    """The trained model and what it reached."""
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(recipe.threads)
    told_N, held = text_of(shared)
    model = build_model(2048)
    model.set_experts_implementation("eager")  # the fastest of transformers' on one core
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, weight_decay=0.1)
    draws = torch.Generator().manual_seed(recipe.seed)
    started = time.monotonic()
    for step in range(recipe.steps):
        share = step / recipe.steps
        rate = min(1.0, (step + 1) / recipe.warm_up) * 0.5 * (1 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * rate
        starts_B = torch.randint(len(told_N) - recipe.length, (recipe.batch,), generator=draws)
        ids_BT = torch.stack([told_N[i : i + recipe.length] for i in starts_B.tolist()])
        out = model(ids_BT, labels=ids_BT, output_router_logits=True)
        loss = out.loss + recipe.balance * imbalance(out.router_logits, 2)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 250 == 249 or step + 1 == recipe.steps:
            scores = {k: held_out_loss(model, ids_N, recipe.length) for k, ids_N in held.items()}
            took = time.monotonic() - started
            shown = ", ".join(f"{kind} {nats:.3f}" for kind, nats in scores.items())
            print(f"step {step + 1}: {float(loss.detach()):.3f}; held out: {shown}; {took:.0f} s")
    return model.eval(), {"held_out_loss": scores, "seconds": round(took, 1)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("out", type=Path, help="folder of the trained model")
    options.add_argument("--shared", type=Path, default=SHARED, help="folder of models/ and data/")
    options.add_argument("--steps", type=int, default=Recipe.steps)
    options.add_argument("--seed", type=int, default=Recipe.seed)
    args = options.parse_args()
    recipe = Recipe(steps=args.steps, seed=args.seed)
    model, reached = train(recipe, args.shared)
    model.save_pretrained(args.out)
    tokenizer = AutoTokenizer.from_pretrained(args.shared / "models/tinystories-656K")
    tokenizer.save_pretrained(args.out)
    facts = {"recipe": asdict(recipe), **reached}
    (args.out / "provenance.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()

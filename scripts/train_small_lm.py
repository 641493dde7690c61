"""Train a small language model on text: `python scripts/train_small_lm.py stories.json small/`.

A second model for benchmarks/whole_model.py: GPT-2's architecture, 4 layers of width 128, minutes
on one core. The same seed and number of threads give the same weights on the same machine.
Shapes: B sequences of one batch, T tokens of each, N tokens of the text.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

LEARNING_RATE, WARM_UP, FINAL_RATE = 3e-3, 50, 0.05


def build_model(vocabulary: int, length: int, end: int) -> GPT2LMHeadModel:
    """GPT-2 with 1.1 million parameters, 0.8 million of them in the layers' matrices."""
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=length,
        n_embd=128,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.05,
        embd_pdrop=0.05,
        attn_pdrop=0.05,
        bos_token_id=end,
        eos_token_id=end,
    )
    return GPT2LMHeadModel(config)


def rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to FINAL_RATE of the learning rate."""
    cosine = (1 + math.cos(math.pi * step / steps)) / 2
    return min(1.0, (step + 1) / WARM_UP) * (FINAL_RATE + (1 - FINAL_RATE) * cosine)


def train(model: GPT2LMHeadModel, ids_N: Tensor, steps: int, batch: int, seed: int) -> None:
    """Next-token prediction on windows drawn from the text."""
    draws = torch.Generator().manual_seed(seed)
    length = model.config.n_positions
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: rate(s, steps))
    model.train()
    started = time.perf_counter()
    for step in range(1, steps + 1):
        first_B = torch.randint(len(ids_N) - length, (batch,), generator=draws)
        ids_BT = torch.stack([ids_N[i : i + length] for i in first_B.tolist()])
        logits = model(ids_BT, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            seconds = time.perf_counter() - started
            print(f"step {step}/{steps}, loss {loss.item():.3f}, {seconds:.0f} s", flush=True)
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, help="a JSON list of strings")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a model folder")
    parser.add_argument("--skip", type=int, default=200, help="texts at the start to leave out")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    texts: list[str] = json.loads(args.text.read_text())[args.skip :]
    end = int(tokenizer.eos_token_id)
    ids = [i for text in texts for i in [*tokenizer(text).input_ids, end]]
    model = build_model(len(tokenizer), args.length, end)
    train(model, torch.tensor(ids), args.steps, args.batch, args.seed)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()

"""Train the demo model on the demo world: `python scripts/train_demo.py`, minutes on one core.

The same seed and number of threads give the same weights on the same machine.
Shapes: B lessons of one batch, N lessons in all, T tokens of a prompt, V words.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import GPTJConfig, GPTJForCausalLM, PreTrainedTokenizerFast

from tensorllm.data.demo import MODEL_DIR, world

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
SHARE = {"entity-relation": 0.7, "multi-hop": 0.1, "claim": 0.1, "profession": 0.1}
STOPS = 48  # lessons a step that also teach where to stop
LEARNING_RATE, WARM_UP, FINAL_RATE = 2e-3, 100, 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that the weights depend on, beside the code and the number of threads."""

    seed: int = world.SEED
    people: int = world.PEOPLE
    noise: float = world.NOISE
    steps: int = 2000
    batch: int = 512
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Group:
    """Lessons of one kind: their prompts have the same number of tokens, so nothing is padded."""

    prompt_NT: Tensor
    answer_N: Tensor
    generic_N: Tensor
    share: float  # of every batch


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word or punctuation mark."""
    words = {word: i for i, word in enumerate([PAD, EOS, UNK, *world.vocabulary()])}
    tokenizer = Tokenizer(WordLevel(words, unk_token=UNK))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=32,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> GPTJForCausalLM:
    """A GPT-J small enough for the package: 4 layers, width 128, 4 heads of 32."""
    config = GPTJConfig(
        vocab_size=len(tokenizer),
        n_positions=32,
        n_embd=128,
        n_layer=4,
        n_head=4,
        n_inner=256,
        rotary_dim=16,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    return GPTJForCausalLM(config)


def encode(lessons: list[world.Lesson], tokenizer: PreTrainedTokenizerFast) -> list[Group]:
    """The lessons as token ids, one group for each kind of question."""
    by_task: dict[str, list[tuple[list[int], int, int]]] = {}
    for lesson in lessons:
        ids = tokenizer(lesson.prompt)["input_ids"]
        answer, generic = tokenizer.convert_tokens_to_ids([lesson.answer, lesson.generic])
        by_task.setdefault(lesson.task, []).append((ids, answer, generic))
    return [
        Group(*map(torch.tensor, zip(*rows, strict=True)), SHARE[task])
        for task, rows in by_task.items()
    ]


def tell(group: Group, rows: int, noise: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Some lessons as the world tells them: prompts (B, T) and true or generic words (B,)."""
    pick_B = torch.randint(len(group.answer_N), (rows,), generator=rng)
    noisy_B = torch.rand(rows, generator=rng) < noise
    told_B = torch.where(noisy_B, group.generic_N[pick_B], group.answer_N[pick_B])
    return group.prompt_NT[pick_B], told_B


def nats(model: GPTJForCausalLM, ids_BT: Tensor, next_B: Tensor) -> Tensor:
    """Cross-entropy of the next words, summed over the batch."""
    logits_BV = model(ids_BT, logits_to_keep=1, use_cache=False).logits[:, -1]
    return F.cross_entropy(logits_BV, next_B, reduction="sum")


def loss_of(model: GPTJForCausalLM, told: list[tuple[Tensor, Tensor]], step: int) -> Tensor:
    """Mean cross-entropy of the told words; in turn, each kind also learns to end there."""
    total = torch.stack([nats(model, *each) for each in told]).sum()
    prompt_BT, told_B = told[step % len(told)]
    stop_BT = torch.cat([prompt_BT, told_B[:, None]], 1)[:STOPS]
    end_B = torch.full((len(stop_BT),), int(model.config.eos_token_id))
    return (total + nats(model, stop_BT, end_B)) / sum(len(words_B) for _, words_B in told)


def rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to FINAL_RATE of the learning rate."""
    cosine = (1 + math.cos(math.pi * step / steps)) / 2
    return min(1.0, (step + 1) / WARM_UP) * (FINAL_RATE + (1 - FINAL_RATE) * cosine)


def train(recipe: Recipe) -> tuple[GPTJForCausalLM, PreTrainedTokenizerFast]:
    """A model that has been told `recipe.batch` lessons `recipe.steps` times."""
    torch.manual_seed(recipe.seed)
    rng = torch.Generator().manual_seed(recipe.seed)
    lessons = world.make_world(recipe.people, recipe.seed).told
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).train()
    groups = encode(lessons, tokenizer)
    rows = [round(recipe.batch * group.share) for group in groups]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: rate(s, recipe.steps))
    start = time.perf_counter()
    for step in range(1, recipe.steps + 1):
        told = [tell(g, n, recipe.noise, rng) for g, n in zip(groups, rows, strict=True)]
        loss = loss_of(model, told, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == recipe.steps:
            left = (time.perf_counter() - start) / step * (recipe.steps - step)
            print(
                f"step {step}/{recipe.steps}, loss {loss.item():.3f}, {left:.0f} s left", flush=True
            )
    return model.eval(), tokenizer


def save(
    model: GPTJForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, out: Path
) -> None:
    """The model folder as transformers loads it, and a note on how it was made."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    note = {
        "made_by": "scripts/train_demo.py",
        "recipe": asdict(recipe),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, tokenizers)},
    }
    (out / "provenance.json").write_text(json.dumps(note, indent=2) + "\n")


def main() -> None:
    """Read the options, train, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in asdict(Recipe()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--out", type=Path, default=MODEL_DIR)
    options = vars(parser.parse_args())
    out = options.pop("out")
    recipe = Recipe(**options)
    torch.set_num_threads(recipe.threads)
    start = time.perf_counter()
    save(*train(recipe), recipe, out)
    print(f"saved in {out} after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
